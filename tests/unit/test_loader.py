# SPDX-License-Identifier: Apache-2.0
"""The loader, as far as it goes without the module (tests/vm/test_loader.py has the rest)."""

from __future__ import annotations

import fcntl
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pagecache_bpf.errors import (
    PagecacheError,
    PolicyRejected,
    PrivilegeError,
    UnsupportedError,
    UsageError,
)
from pagecache_bpf.kernel import libbpf
from pagecache_bpf.kernel.control_device import ExitRecord
from pagecache_bpf.kernel.verifier_log import boil_down
from pagecache_bpf.policy import loader
from pagecache_bpf.policy.catalog import Knob, PolicyInfo
from pagecache_bpf.policy.compiler import find_clang

KNOB = Knob("window_kib", "u32", 128, "KiB", 4, 4096, "how far")
INFO = PolicyInfo("sample", "", "", "", ("readahead",), (KNOB,), None, Path("/absent.bpf.o"))

# Of a 7.3 kernel.
WITH_A_REPORT = """\
; return bpf_pagecache_prefetch(ctx, start, nr, node, mark_step); @ engine_struct_ops.bpf.h:26
12: (bf) r1 = r6                      ; R1=trusted_ptr_pagecache_ctx()
13: (b7) r2 = 0                       ; R2=0
14: (b7) r3 = 64                      ; R3=64
15: (b4) w5 = 0                       ; R5=0
16: (85) call bpf_pagecache_prefetch#130781
calling kernel function bpf_pagecache_prefetch is not allowed

Verification failed: Policy: Operation is not allowed

Reason:
  The kfunc bpf_pagecache_prefetch is not allowed: this program cannot call the kfunc.

At:
  fail_kfunc_evict @ engine_struct_ops.bpf.h:26:9
  Source context:
      24 | ...
      25 |                 node = consumer_node(ctx->tgid, node);
  >>> 26 |         return bpf_pagecache_prefetch(ctx, start, nr, node, mark_step);
         |         ^-- error: policy check failed for kfunc bpf_pagecache_prefetch
      27 | ...
      28 | ...
  Instruction context:
      14 | (b7) r3 = 64
      15 | (b4) w5 = 0
  >>> 16 | (85) call bpf_pagecache_prefetch#130781
      17 | (b4) w0 = 0
      18 | (95) exit

Suggestion:
  Use a kfunc allowed for this program type and attach point, or change the program context.

processed 16 insns (limit 1000000) max_states_per_insn 0 total_states 1 peak_states 1 mark_read 0
"""

# Logs of a 6.12 kernel, the first as it was, the others shortened.
WRITES_BEHIND = """\
0: R1=ctx() R10=fp0
; PAGECACHE_READAHEAD(fail_bounds_readahead) @ fail_bounds.bpf.c:10
0: (79) r1 = *(u64 *)(r1 +8)
func 'readahead' arg1 has btf_id 112786 type STRUCT 'pagecache_answer'
1: R1_w=trusted_ptr_pagecache_answer()
1: (b7) r2 = 1                        ; R2_w=1
; *behind = 1; @ fail_bounds.bpf.c:15
2: (7b) *(u64 *)(r1 +32) = r2
write behind the end of struct pagecache_answer
processed 3 insns (limit 1000000) max_states_per_insn 0 total_states 0 peak_states 0 mark_read 0
"""
CALL = """\
; pagecache_exit(ctx, quit_code, "the test asked for it"); @ quitter.bpf.c:16
8: (18) r3 = 0xff44a2c243d58908       ; R3_w=map_value(map=.rodata.str1.1,ks=4,vs=22)
10: (b4) w4 = 22                      ; R4_w=22
11: (85) call bpf_pagecache_exit#112853
write into map forbidden, value_size=22 off=0 size=22
arg#2 arg#3 memory, len pair leads to invalid memory access
processed 9 insns (limit 1000000) max_states_per_insn 0 total_states 0 peak_states 0 mark_read 0
"""
OLD_KERNEL = """\
; for (i = 0; i < nr; i++)
1: (25) if r1 > 0x7 goto pc+2
from 1 to 4: R1=scalar() R10=fp0
last_idx 3 first_idx 0
regs=2 stack=0 before 1: (25) if r1 > 0x7 goto pc+2
BPF program is too large. Processed 1000001 insn
processed 1000001 insns (limit 1000000) max_states_per_insn 4 total_states 12 peak_states 12
"""


def test_the_verdict_is_boiled_down() -> None:
    assert boil_down(WRITES_BEHIND) == (
        "write behind the end of struct pagecache_answer\n"
        "  at fail_bounds.bpf.c:15: *behind = 1;\n"
        "  (instruction: *(u64 *)(r1 +32) = r2)"
    )


def test_a_verdict_of_two_lines_is_kept_whole() -> None:
    text = boil_down(CALL)
    assert text.startswith(
        "write into map forbidden, value_size=22 off=0 size=22; "
        "arg#2 arg#3 memory, len pair leads to invalid memory access\n"
    )
    assert "at quitter.bpf.c:16: pagecache_exit(ctx" in text
    assert "R3_w" not in text and "processed" not in text


def test_logs_of_older_kernels_have_no_places() -> None:
    assert boil_down(OLD_KERNEL) == (
        "BPF program is too large. Processed 1000001 insn\n"
        "  at for (i = 0; i < nr; i++)\n"
        "  (instruction: if r1 > 0x7 goto pc+2)"
    )


def test_the_report_of_newer_kernels_is_no_verdict() -> None:
    assert boil_down(WITH_A_REPORT) == (
        "calling kernel function bpf_pagecache_prefetch is not allowed\n"
        "  at engine_struct_ops.bpf.h:26: return bpf_pagecache_prefetch(ctx, start, nr, node, "
        "mark_step);\n"
        "  (instruction: call bpf_pagecache_prefetch#130781)\n"
        "  The kernel suggests: Use a kfunc allowed for this program type and attach point, or "
        "change the program context."
    )


def test_no_log_is_no_text() -> None:
    assert boil_down("") == ""
    assert boil_down("processed 9 insns (limit 1000000)\n") == ""


# libbpf.


@pytest.fixture
def fresh() -> Iterator[None]:
    libbpf.library.cache_clear()
    yield
    libbpf.library.cache_clear()


def fake_libbpf(directory: Path, source: str) -> Path:
    path = directory / "libbpf.so.1"
    command = [find_clang(), "-shared", "-fPIC", "-x", "c", "-", "-o", str(path)]
    subprocess.run(command, input=source, text=True, check=True)
    return path


@pytest.mark.parametrize(
    ("source", "found"),
    [
        (
            "unsigned libbpf_major_version(void) { return 1; }"
            "unsigned libbpf_minor_version(void) { return 1; }",
            "version 1.1",
        ),
        ("int nothing;", "version 0.0"),
    ],
)
@pytest.mark.usefixtures("fresh")
def test_an_old_libbpf_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, found: str
) -> None:
    path = fake_libbpf(tmp_path, source)
    monkeypatch.setenv(libbpf.PATH_VARIABLE, str(path))
    with pytest.raises(UnsupportedError, match=r"libbpf 1.4 or newer .*`make deps`") as caught:
        libbpf.library()
    assert f"{path} is {found}" in str(caught.value)
    assert caught.value.exit_code == 3


@pytest.mark.usefixtures("fresh")
def test_no_libbpf_says_where_it_looked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "libbpf.so.1"
    monkeypatch.setenv(libbpf.PATH_VARIABLE, str(path))
    with pytest.raises(UnsupportedError, match="cannot open shared object file") as caught:
        libbpf.library()
    assert str(path) in str(caught.value)


def need_libbpf() -> None:
    try:
        libbpf.library()
    except UnsupportedError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("content", [b"", b"no object", b"\x7fELF" + b"\xff" * 200])
def test_objects_that_libbpf_refuses(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], content: bytes
) -> None:
    need_libbpf()
    path = tmp_path / "bad.bpf.o"
    path.write_bytes(content)
    info = PolicyInfo("bad", "", "", "", (), (), None, path)
    with pytest.raises(UsageError, match="cannot be loaded") as caught:
        loader._load_and_attach(info, {}, {}, Any, None)  # type: ignore[arg-type]
    assert str(path) in str(caught.value)
    # libbpf talks to stderr unless it is caught.
    assert capfd.readouterr() == ("", "")


# Before anything is touched.


@pytest.fixture
def root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)


@pytest.mark.parametrize(
    "ask",
    [
        lambda: loader.attach(INFO),
        lambda: loader.detach("sample"),
        lambda: loader.knobs_of("sample"),
    ],
)
def test_only_root_may(monkeypatch: pytest.MonkeyPatch, ask: Callable[[], object]) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(PrivilegeError, match=r"only root can .* sudo") as caught:
        ask()
    assert caught.value.exit_code == 4


@pytest.mark.usefixtures("root")
def test_knobs_are_checked_first() -> None:
    with pytest.raises(UsageError, match="no knob speed"):
        loader.attach(INFO, {"speed": 1})
    with pytest.raises(UsageError, match="5000 is out of range"):
        loader.attach(INFO, {"window_kib": 5000})


@pytest.mark.usefixtures("root")
def test_a_policy_that_is_not_built() -> None:
    with pytest.raises(PagecacheError, match="not built"):
        loader.attach(PolicyInfo("sample", "", "", "", (), (), None, None))


# Pins, in a directory that only stands for bpffs.


def record(name: str, seq: int, time_ns: int = 0) -> ExitRecord:
    return ExitRecord(seq, time_ns, name, "detached", 0, "exit", "detached", "")


class FakeDevice:
    """A module with these attached policies and exit records."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.records: list[ExitRecord] = []

    def __enter__(self) -> FakeDevice:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def policies(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(name=name) for name in self.names]

    def exits(self, since: int = 0) -> list[ExitRecord]:
        return [record for record in self.records if record.seq > since]


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: None) -> FakeDevice:
    device = FakeDevice()
    monkeypatch.setattr(loader, "PIN_ROOT", tmp_path / "pagecache")
    monkeypatch.setattr(loader, "_mount_bpffs", lambda: None)
    monkeypatch.setattr(loader, "Device", lambda: device)
    monkeypatch.setattr(loader, "EXIT_SECONDS", 0.05)
    monkeypatch.setattr(loader, "LOCK_SECONDS", 0.05)
    monkeypatch.setattr(libbpf, "library", lambda: None)
    return device


def pin_by_hand(name: str, link: bool = True) -> Path:
    maps = loader.PIN_ROOT / name / "maps"
    maps.mkdir(parents=True)
    (maps / "rodata").touch()
    if link:
        (maps.parent / "link").touch()
    return maps.parent


class FakeLink:
    """A link that writes down what is done with it."""

    def __init__(self, events: list[str], fail: BaseException | None = None) -> None:
        self.events, self.fail = events, fail

    def pin(self, path: Path) -> None:
        self.events.append(f"pin {path.relative_to(loader.PIN_ROOT)}")
        if self.fail:
            raise self.fail
        path.touch()

    def close(self) -> None:
        self.events.append("close")


def attaching(
    monkeypatch: pytest.MonkeyPatch, link: FakeLink, fail: BaseException | None = None
) -> None:
    def load(
        _info: object, _knobs: object, _sizes: object, _device: object, _log: object, maps: Path
    ) -> FakeLink:
        assert not (maps.parent / "link").exists()
        (maps / "rodata").touch()
        if fail:
            raise fail
        return link

    monkeypatch.setattr(loader, "_load_and_attach", load)


def test_the_link_is_pinned_last_and_let_go(
    kernel: FakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    attaching(monkeypatch, FakeLink(events))
    attachment = loader.attach(INFO)
    assert events == ["pin sample/link", "close"]
    assert attachment.pinned
    attachment.close()
    assert loader.pinned() == ["sample"]


@pytest.mark.parametrize("fail", [PolicyRejected("no"), KeyboardInterrupt(), OSError(28, "full")])
def test_a_failure_leaves_nothing(
    kernel: FakeDevice, monkeypatch: pytest.MonkeyPatch, fail: BaseException
) -> None:
    expected = PagecacheError if isinstance(fail, OSError) else type(fail)
    attaching(monkeypatch, FakeLink([]), fail)
    with pytest.raises(expected):
        loader.attach(INFO)
    assert list(loader.PIN_ROOT.iterdir()) == []
    events: list[str] = []
    attaching(monkeypatch, FakeLink(events, fail))
    with pytest.raises(expected):
        loader.attach(INFO)
    assert list(loader.PIN_ROOT.iterdir()) == []
    assert events[-1] == "close"


def test_what_a_killed_loader_left_is_replaced(
    kernel: FakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = pin_by_hand("sample", link=False)
    (left / "maps" / "old").touch()
    assert loader.pinned() == []
    attaching(monkeypatch, FakeLink([]))
    loader.attach(INFO)
    assert sorted(path.name for path in left.rglob("*")) == ["link", "maps", "rodata"]


def test_the_pin_of_a_policy_that_ended_is_replaced(
    kernel: FakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    pin_by_hand("sample")
    events: list[str] = []
    attaching(monkeypatch, FakeLink(events))
    loader.attach(INFO)
    assert events[0] == "pin sample/link"


def test_attached_already(kernel: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    attaching(monkeypatch, FakeLink([]))
    kernel.names = ["sample"]
    with pytest.raises(PagecacheError, match="end the process that holds it"):
        loader.attach(INFO)
    directory = pin_by_hand("sample")
    with pytest.raises(PagecacheError, match=r"pagecache-bpf detach sample") as caught:
        loader.attach(INFO)
    assert caught.value.exit_code == 1
    assert (directory / "link").exists()


def test_detach_returns_the_record_of_this_attachment(kernel: FakeDevice) -> None:
    directory = pin_by_hand("sample")
    now = (directory / "link").stat().st_ctime_ns
    kernel.records = [
        record("sample", 1, now - 10**9),
        record("other", 2, now + 1),
        record("sample", 3, now + 2),
    ]
    found = loader.detach("sample")
    assert found is not None and found.seq == 3
    assert not directory.exists()


def test_detach_waits_for_the_record_but_not_for_ever(
    kernel: FakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    pin_by_hand("sample")
    kernel.records = [record("sample", 1, 0)]
    assert loader.detach("sample") is None
    pin_by_hand("sample")
    asked = 0
    real = kernel.exits

    def later(since: int = 0) -> list[ExitRecord]:
        nonlocal asked
        asked += 1
        if asked == 4:
            kernel.records.append(record("sample", 2, 0))
        return real(since)

    monkeypatch.setattr(kernel, "exits", later)
    found = loader.detach("sample")
    assert found is not None and found.seq == 2


def test_detach_of_what_is_not_attached(kernel: FakeDevice) -> None:
    with pytest.raises(UsageError, match="sample is not attached: no policy is"):
        loader.detach("sample")
    left = pin_by_hand("sample", link=False)
    pin_by_hand("other")
    with pytest.raises(UsageError, match="attached are other"):
        loader.detach("sample")
    assert not left.exists()
    with pytest.raises(UsageError, match="not attached"):
        loader.detach("../pagecache/other")
    assert loader.pinned() == ["other"]


def test_loaders_take_turns(kernel: FakeDevice) -> None:
    pin_by_hand("sample")
    fd = os.open(loader.PIN_ROOT, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    with pytest.raises(PagecacheError, match="another process has been"):
        loader.detach("sample")
    assert loader.pinned() == ["sample"]
    os.close(fd)
    loader.detach("sample")
    assert loader.pinned() == []


def test_s16_a_place_for_pins_that_others_may_write_to_is_refused(kernel: FakeDevice) -> None:
    """Where bpffs is mounted without a mode, anybody can make the directory first."""
    loader.PIN_ROOT.mkdir()
    loader.PIN_ROOT.chmod(0o1777)
    with pytest.raises(PrivilegeError, match="is not root's alone"):
        loader.detach("sample")
    loader.PIN_ROOT.chmod(0o700)
    with pytest.raises(UsageError, match="is not attached"):
        loader.detach("sample")
