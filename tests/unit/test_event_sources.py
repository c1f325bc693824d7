# SPDX-License-Identifier: Apache-2.0
"""Which of a kernel's tracepoints and functions tell programs of an event."""

from __future__ import annotations

from pathlib import Path

import pytest

from pagecache_bpf.agent.unsupported import check_heard, check_kernel
from pagecache_bpf.errors import UnsupportedError, UsageError
from pagecache_bpf.kernel import bpf_object, event_sources, libbpf
from pagecache_bpf.kernel.event_sources import ACCESSES, EVENTS, FUNCTION, MOVES, TRACEPOINT
from pagecache_bpf.kernel.kernelfs import LIVE
from pagecache_bpf.policy import catalog

MOVED = [event.name for event in MOVES]
BOTH = (TRACEPOINT, FUNCTION)


def types(*names: str) -> bytes:
    """Type information that has these names, and those of the pages that come and go."""
    known = [*names, *(f"btf_trace_{name}" for name in MOVED)]
    return b"\0" + b"".join(name.encode() + b"\0" for name in known)


OLD = types("filemap_get_pages", "filemap_map_pages", "filemap_fault", "vm_fault")
NEW = OLD + types(*(f"btf_trace_{event.name}" for event in ACCESSES))


def sections(data: bytes, allowed: tuple[str, ...] = BOTH) -> dict[str, str]:
    return {
        name: source.section
        for name, source in event_sources.sources_here(allowed, data).items()
        if name not in MOVED
    }


def test_tracepoints_come_first_then_functions() -> None:
    assert sections(NEW) == {event.name: f"raw_tp/{event.name}" for event in ACCESSES}
    assert sections(OLD) == {
        "mm_filemap_get_pages": "fexit/filemap_get_pages",
        "mm_filemap_map_pages": "fexit/filemap_map_pages",
        "mm_filemap_fault": "fentry/filemap_fault",
    }
    assert sections(NEW, (FUNCTION,)) == sections(OLD)
    assert sections(OLD, (TRACEPOINT,)) == {}


def test_each_event_is_looked_for_by_itself() -> None:
    """A function may be inlined; one whose name another contains is not it."""
    found = sections(types("btf_trace_mm_filemap_fault", "filemap_map_pages", "xfilemap_get_pages"))
    assert found == {
        "mm_filemap_map_pages": "fexit/filemap_map_pages",
        "mm_filemap_fault": "raw_tp/mm_filemap_fault",
    }
    assert set(event_sources.sources_here(BOTH, types())) == set(MOVED)


def test_what_every_program_needs_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that lacks it is refused by name; this one does not."""
    assert event_sources.lacking() == []
    assert event_sources.lacking(types(*event_sources.NEEDED)) == []
    check_kernel("noop")
    monkeypatch.setattr(event_sources, "_type_names", lambda: types("BPF_FUNC_task_pt_regs"))
    with pytest.raises(UnsupportedError, match=r"cannot run.*here") as caught:
        check_kernel("noop")
    assert caught.value.why == (
        "this kernel lacks bpf_for_each_map_elem() (5.13, bpf: Add bpf_for_each_map_elem() helper)"
    )
    assert "5.15" in caught.value.fix


def test_the_variable_names_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(event_sources.VARIABLE, "function")
    assert event_sources.sources_here(types=NEW).keys() == {event.name for event in EVENTS}
    assert {
        source.kind
        for name, source in event_sources.sources_here(types=NEW).items()
        if name not in MOVED
    } == {FUNCTION}
    monkeypatch.setenv(event_sources.VARIABLE, "function,magic")
    with pytest.raises(UsageError, match="magic is no kind of source"):
        event_sources.sources_here(types=NEW)


@pytest.mark.parametrize("data", [NEW, OLD, types()], ids=["new", "old", "neither"])
@pytest.mark.parametrize("which", ["policy", "observer", "tried"])
def test_one_program_of_an_object_is_loaded_for_each_event(data: bytes, which: str) -> None:
    """Of objects as they are compiled: what the table names is there."""
    path = {
        "policy": lambda: catalog.agent_object(catalog.find("sequential")),
        "observer": lambda: bpf_object.compiled("observer/observer.bpf.o", ""),
        "tried": lambda: bpf_object.compiled("files/events.bpf.o", ""),
    }[which]()
    with libbpf.Object(Path(path), "test") as opened:
        listed = {program.section for program in opened.programs()}
        assert {source.section for event in ACCESSES for source in event.sources} <= listed
        # Left out until it is known what the kernel has: one that is refused takes all along.
        before = {program.section for program in opened.programs() if program.autoload}
        assert not before & {source.section for event in ACCESSES for source in event.sources}
        event_sources.choose(opened, event_sources.sources_here(BOTH, data))
        loaded = [program.section for program in opened.programs() if program.autoload]
    accesses = [section for section in loaded if section not in before]
    assert sorted(accesses) == sorted(sections(data).values())


def test_what_else_could_have_told_is_said() -> None:
    with pytest.raises(UnsupportedError) as caught:
        check_heard("sequential", ("readahead",), MOVED)
    assert "filemap_get_pages, filemap_map_pages, filemap_fault" in caught.value.why
    with pytest.raises(UnsupportedError, match="nothing else tells of that"):
        check_heard("fifo", ("added",), [])


def test_the_names_of_this_kernel_are_read_whole() -> None:
    whole = LIVE.read_bytes("/sys/kernel/btf/vmlinux")
    names = event_sources._type_names()
    if whole is None:
        assert names is None
        return
    assert names is not None and names in whole and names.startswith(b"\0")
    for event in EVENTS:
        for source in event.sources:
            name = f"\0{source.type_name}\0".encode()
            assert (name in names) is (name in whole)


@pytest.mark.parametrize(("has", "tags", "loops"), [(False, 32768, 65536), (True, 131072, 1)])
def test_maps_are_as_the_kernel_takes_them(
    monkeypatch: pytest.MonkeyPatch, has: bool, tags: int, loops: int
) -> None:
    """Before 6.1 all of a map is allocated; before 5.17 loops go through the elements of one."""
    names = types("bpf_mem_alloc", "BPF_FUNC_loop") if has else types()
    monkeypatch.setattr(event_sources, "_type_names", lambda: names)
    with libbpf.Object(catalog.agent_object(catalog.find("sequential")), "sequential") as opened:
        event_sources.choose(opened, {})
        found = {loaded.name: loaded for loaded in opened.maps()}
        assert (found["tags"].max_entries, found["loop_numbers"].max_entries) == (tags, loops)
        allocated = libbpf.library().bpf_map__map_flags(found["tags"].pointer) & 1 == 0
        assert allocated is not has
