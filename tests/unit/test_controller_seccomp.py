# SPDX-License-Identifier: Apache-2.0
"""System calls that an inspector gives up: what it needs still works, what is left out does not."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from pagecache_bpf.controller import seccomp
from pagecache_bpf.controller.inspectors import Inspectors
from pagecache_bpf.kernel.classic_bpf import EQUAL, LOAD, RETURN, FilterProgram
from pagecache_bpf.kernel.kernelfs import KernelFS

pytestmark = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "aarch64"), reason="no filter for this machine"
)


def told_by_a_child(action: Callable[[], object]) -> object:
    """Do something behind the filter; what comes of it, or the name of its error."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        found: object = "no filter"
        try:
            ctypes.CDLL(None).prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
            if seccomp.deny():
                found = action()
        except BaseException as error:
            found = type(error).__name__
        os.write(writer, json.dumps(found).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as back:
        answer = json.loads(back.read())
    os.waitpid(child, 0)
    if answer == "no filter":
        pytest.skip("this kernel has no filters of system calls")
    return answer


@pytest.mark.parametrize(
    "denied",
    [
        lambda path: os.fork(),
        lambda path: os.execv("/bin/true", ["true"]),
        lambda path: socket.socket(socket.AF_UNIX),
        lambda path: os.kill(os.getppid(), 0),
        lambda path: path.write_text("mine"),
        lambda path: path.open("r+b"),
        lambda path: path.with_name("new").touch(),
        lambda path: path.unlink(),
        lambda path: path.chmod(0o777),
        lambda path: path.rename(path.with_name("other")),
        lambda path: path.with_name("directory").mkdir(),
        lambda path: path.with_name("link").symlink_to(path),
        lambda path: os.truncate(path, 0),
    ],
)
def test_what_nobody_needs_who_reads_is_refused(
    tmp_path: Path, denied: Callable[[Path], object]
) -> None:
    path = tmp_path / "file"
    path.write_text("theirs")
    assert told_by_a_child(lambda: denied(path)) == "PermissionError"
    assert path.read_text() == "theirs" and len(list(tmp_path.iterdir())) == 1


def test_reading_and_a_memory_file_work(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("theirs")

    def read() -> str:
        fd = os.memfd_create("copy", os.MFD_CLOEXEC)
        os.write(fd, path.read_bytes())
        return Path(f"/proc/self/fd/{fd}").read_text()

    assert told_by_a_child(read) == "theirs"


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_every_jump_stays_inside(machine: str) -> None:
    """The kernel takes the filter of this machine; that of the other one is of the same kind."""
    code = seccomp.instructions(machine)
    assert FilterProgram.of(code).length == len(code) < 256
    for at, (kind, true, false, _) in enumerate(code):
        if kind not in (LOAD, RETURN):
            assert at + 1 + max(true, false) < len(code)
    refuse = next(at for at, instruction in enumerate(code) if instruction[3] == seccomp._REFUSE)
    denied = [
        at for at, instruction in enumerate(code) if instruction[0] == EQUAL and instruction[1] > 1
    ]
    assert len(denied) >= 50 and all(at + 1 + code[at][1] == refuse for at in denied)


@pytest.mark.parametrize("machine", ["x86_64", "aarch64", "s390x"])
def test_where_there_is_no_filter_it_is_told(machine: str, tmp_path: Path) -> None:
    """An inspector works without; that it does is in the log, in `clients list` and in metrics."""
    kernel = KernelFS(tmp_path)
    assert not seccomp.available(machine, kernel)
    actions = kernel.path("/proc/sys/kernel/seccomp/actions_avail")
    actions.parent.mkdir(parents=True)
    actions.write_text("kill_process allow\n")
    assert seccomp.available(machine, kernel) == (machine != "s390x")


def test_that_there_is_no_filter_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(seccomp, "available", lambda: False)
    found = Inspectors()
    assert not found.filtered and "no filter of system calls" in caplog.text
    found.close()
