# SPDX-License-Identifier: Apache-2.0
"""The observer without a kernel: its maps are as compiled, bits are laid out right, errors."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import pytest

from pagecache_bpf.errors import PrivilegeError, UnsupportedError
from pagecache_bpf.kernel import abi, libbpf
from pagecache_bpf.kernel.file_pages import PAGE_SIZE
from pagecache_bpf.observer import Observer, bcc, programs, residency_blocks
from pagecache_bpf.observer.count_maps import BITS_PAGES, MAPS, RING

ROOT = Path(__file__).resolve().parents[2]
OBJECT = ROOT / "build" / "bpf" / "observer" / "observer.bpf.o"


def test_maps_are_as_compiled() -> None:
    """BCC's maps are made from MAPS, libbpf's from the object."""
    if not OBJECT.exists():
        pytest.skip("the observer is not built: run `make build`")
    library = libbpf.library()
    with libbpf.Object(OBJECT, "observer") as opened:
        found = {
            bpf_map.name: (
                bpf_map.type,
                *(
                    int(getattr(library, f"bpf_map__{what}")(bpf_map._pointer))
                    for what in ("key_size", "value_size", "max_entries", "map_flags")
                ),
            )
            for bpf_map in _with_arguments(library, opened)
            # BCC's programs look for no areas of memory, and write their loops out.
            if not bpf_map.name.endswith((".rodata", ".bss", RING))
            and bpf_map.name not in {"areas", "last_memory", "loop_numbers"}
        }
    assert found == MAPS


def _with_arguments(library: object, opened: libbpf.Object) -> list[libbpf.ObjectMap]:
    for what in ("key_size", "value_size", "max_entries", "map_flags"):
        getattr(library, f"bpf_map__{what}").argtypes = (ctypes.c_void_p,)
    return list(opened.maps())


def test_what_is_resident_is_told_page_by_page(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes((2 * BITS_PAGES + 7) * PAGE_SIZE))
    fd = os.open(path, os.O_RDONLY)
    blocks = dict(residency_blocks.resident_blocks(fd))
    os.close(fd)
    assert sorted(blocks) == [0, 1, 2]
    for block, value in blocks.items():
        assert len(value) == MAPS["page_bits"][2]
        bits = int.from_bytes(value[: BITS_PAGES // 8], "little")
        assert bits == (1 << (7 if block == 2 else BITS_PAGES)) - 1
        assert value[: BITS_PAGES // 8] == value[BITS_PAGES // 8 : BITS_PAGES // 4]
        assert not any(value[BITS_PAGES // 4 :])


def test_every_counter_has_a_text() -> None:
    names = [counter.name for counter in abi.OBSERVED]
    assert len(set(names)) == len(names)
    guide = (ROOT / "docs" / "observing.md").read_text()
    for counter in abi.OBSERVED:
        assert counter.unit in ("bytes", "ns") and counter.name.endswith(f"_{counter.unit}")
        assert f"`{counter.name}`" in guide and counter.help


def test_only_root_observes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(PrivilegeError, match="only root can observe"):
        Observer()


def test_a_kernel_without_tracepoints_is_refused() -> None:
    programs.check_tracepoints(sorted(programs.ACCESSES))
    with pytest.raises(UnsupportedError, match="mm_filemap_add_to_page_cache"):
        programs.check_tracepoints(["mm_filemap_add_to_page_cache"])


def test_bcc_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "bcc", raising=False)
    monkeypatch.setattr(bcc, "PLACES", ("/nonexistent",))
    with pytest.raises(UnsupportedError, match="python3-bpfcc"):
        bcc.import_bcc()


def test_bcc_gets_every_program() -> None:
    """The same source, with a plain function for each program that it can have."""
    text = bcc._source()
    assert "int observe_get_pages(u64 *args)" in text
    assert "int observe_removed(u64 *args)" in text
    assert "OBSERVE(" not in text
