# SPDX-License-Identifier: Apache-2.0
"""The control device, against a module that is only simulated (tests/vm has the real one)."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pagecache_bpf.errors import PagecacheError, PrivilegeError, UnsupportedError, UsageError
from pagecache_bpf.kernel import abi, lending
from pagecache_bpf.kernel.control_device import Device


class Module:
    """Answers ioctls as kmod/control.c does."""

    def __init__(self) -> None:
        self.version = abi.ABI_VERSION
        self.lists: dict[int, list[ctypes.Structure]] = {}
        self.tag_error = 0
        self.requests: list[Any] = []

    def ioctl(self, _fd: int, request: int, argument: Any) -> int:
        if request == abi.IOC_INFO:
            argument.abi_version = self.version
            argument.hooks = 1 << abi.Hook.READAHEAD | 1 << abi.Hook.ADDED
            argument.max_answer_pages = 1 << 40
            return 0
        if request in (abi.IOC_TAG, abi.IOC_UNTAG, abi.IOC_LEND, abi.IOC_TAKE_BACK):
            self.requests.append(argument)
            if self.tag_error:
                raise OSError(self.tag_error, os.strerror(self.tag_error))
            return 0
        for record in self.lists.get(request, []):
            if record.seq > argument.seq:
                ctypes.memmove(ctypes.byref(argument), ctypes.byref(record), ctypes.sizeof(record))
                return 0
        raise OSError(errno.ENOENT, "end of the list")


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Module:
    module = Module()
    monkeypatch.setattr(fcntl, "ioctl", module.ioctl)
    return module


@pytest.fixture
def opened(module: Module) -> Device:
    return Device(Path("/dev/null"))


def test_info_is_decoded(opened: Device) -> None:
    info = opened.info()
    assert info.hooks == ("readahead", "added")
    assert info.max_answer_pages == 1 << 40


def test_lists_are_read_to_their_end(opened: Device, module: Module) -> None:
    counters = (ctypes.c_uint64 * len(abi.COUNTERS))(*range(len(abi.COUNTERS)))
    module.lists[abi.IOC_POLICIES] = [
        abi.pagecache_policy_record(
            seq=3, name=b"one", hooks=4, tags=2, governed_pages=7, counters=counters
        ),
        abi.pagecache_policy_record(seq=9, name=b"two"),
    ]
    one, two = opened.policies()
    assert (one.name, one.hooks, one.tags, one.governed_pages) == ("one", ("readahead",), 2, 7)
    assert list(one.counters) == [counter.name for counter in abi.COUNTERS]
    assert list(one.counters.values()) == list(range(len(abi.COUNTERS)))
    assert two.name == "two"


def test_tags_keep_any_file_name(opened: Device, module: Module) -> None:
    path = b"/models/\xff\xfe na\xc3\xafve"
    module.lists[abi.IOC_TAGS] = [
        abi.pagecache_tag_record(seq=1, ino=5, dev_major=8, active=1, model=b"m", path=path)
    ]
    (tag,) = opened.tags()
    assert os.fsencode(tag.path) == path
    assert (tag.ino, tag.dev_major, tag.active, tag.model) == (5, 8, True, "m")


def test_exit_records_are_named(opened: Device, module: Module) -> None:
    def record(seq: int, **more: Any) -> abi.pagecache_exit_record:
        return abi.pagecache_exit_record(seq=seq, policy=b"p", reason=b"why", **more)

    module.lists[abi.IOC_EXITS] = [
        record(1, kind=abi.ExitKind.INVALID, hook=abi.Hook.READAHEAD, code=-22, message=b"so"),
        record(2, kind=77, hook=abi.Hook.INIT),
    ]
    first, second = opened.exits()
    assert (first.kind, first.hook, first.code) == ("invalid", "readahead", -22)
    assert str(first) == "why: so (code -22)"
    assert (second.kind, second.hook, str(second)) == ("77", "init", "why")
    assert [record.seq for record in opened.exits(since=1)] == [2]


def test_a_list_that_goes_backwards_does_not_hang(
    opened: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def same_again(_fd: int, _request: int, argument: Any) -> int:
        argument.seq = 1
        return 0

    monkeypatch.setattr(fcntl, "ioctl", same_again)
    with pytest.raises(PagecacheError, match="backwards"):
        list(opened.exits())


def test_tagging_sends_what_it_is_given(opened: Device, module: Module) -> None:
    long = "/models/" + "d/" * 1000 + "weights.safetensors"
    opened.tag(7, policy="sequential", model="llama", path=long, replace=True)
    (request,) = module.requests
    assert (request.fd, request.flags) == (7, abi.TAG_REPLACE)
    assert (request.policy, request.model) == (b"sequential", b"llama")
    assert len(request.path) == abi.PATH_LEN - 1
    assert request.path.endswith(b"/weights.safetensors")


@pytest.mark.parametrize(
    ("number", "kind", "message"),
    [
        (errno.ESRCH, UsageError, "policy sequential is not attached"),
        (errno.EEXIST, UsageError, "tagged already"),
        (errno.EINVAL, UsageError, "not a regular file"),
        (errno.EBADF, UsageError, "not open for reading"),
        (errno.ENOMEM, PagecacheError, "Cannot allocate memory"),
    ],
)
def test_refused_tags_say_why(
    opened: Device, module: Module, number: int, kind: type[PagecacheError], message: str
) -> None:
    module.tag_error = number
    with pytest.raises(kind, match=message) as caught:
        opened.tag(7, policy="sequential", model="m", path="/a")
    assert str(caught.value).startswith("/a was not tagged")


@pytest.mark.parametrize(
    ("number", "kind", "message"),
    [
        (errno.ENOENT, UsageError, "it is not tagged"),
        (errno.EEXIST, UsageError, "lent from here already"),
        (errno.EINVAL, UsageError, "not a regular file"),
        (errno.EBADF, UsageError, "not open for reading"),
        (errno.EOPNOTSUPP, UsageError, "overlayfs"),
        (errno.ENOSPC, PagecacheError, "as many files are lent as the module allows"),
        (errno.ENFILE, PagecacheError, "Too many open files in system"),
    ],
)
def test_refused_loans_say_why(
    opened: Device, module: Module, number: int, kind: type[PagecacheError], message: str
) -> None:
    module.tag_error = number
    with pytest.raises(kind, match=message) as caught:
        opened.lend(7)
    assert str(caught.value).startswith("file descriptor 7 was not lent")


def test_loans_are_taken_back(opened: Device, module: Module) -> None:
    opened.lend(7)
    opened.take_back(8)
    assert [request.fd for request in module.requests] == [7, 8]
    module.tag_error = errno.ENOENT
    with pytest.raises(UsageError, match="descriptor 7 was not taken back: it was not lent"):
        opened.take_back(7)
    module.tag_error = errno.EBADF
    with pytest.raises(PagecacheError, match="was not taken back"):
        opened.take_back(7)


@pytest.mark.parametrize(
    ("number", "asked"), [(errno.EOPNOTSUPP, [7, 8, 9]), (errno.ENOSPC, [7, 8])]
)
def test_a_session_does_without_what_cannot_be_lent(
    opened: Device,
    module: Module,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    asked: list[int],
) -> None:
    """One file that cannot be lent is left out; when no more can be, no more is tried."""
    monkeypatch.setattr(lending, "Device", lambda: opened)
    with lending.Session() as session:
        session.lend(7)
        module.tag_error = number
        session.lend(8)
        module.tag_error = 0
        session.lend(9)
        assert [request.fd for request in module.requests] == asked
        assert session.files == len(asked) - 1
    assert session.files == 0


def test_a_session_without_a_module_lends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Device:
        raise UnsupportedError("the kernel module is not loaded", "", "")

    monkeypatch.setattr(lending, "Device", missing)
    with lending.Session() as session:
        session.lend(7)
        assert session.files == 0


@pytest.mark.parametrize("name", ["", "x" * 32, "nul\0"])
def test_names_that_do_not_fit_are_refused(opened: Device, module: Module, name: str) -> None:
    with pytest.raises(UsageError, match="1 to 31 bytes"):
        opened.tag(7, policy=name, model="m", path="/a")
    assert module.requests == []


def test_untagging_by_either_name(opened: Device, module: Module) -> None:
    opened.untag_fd(7)
    opened.untag(8, 1, 4711, 3)
    by_fd, by_name = module.requests
    assert by_fd.fd == 7
    assert (by_name.fd, by_name.dev_major, by_name.dev_minor) == (-1, 8, 1)
    assert (by_name.ino, by_name.generation) == (4711, 3)
    module.tag_error = errno.ENOENT
    with pytest.raises(UsageError, match="inode 4711 of device 8:1 is not tagged"):
        opened.untag(8, 1, 4711, 3)


def test_another_abi_is_refused(module: Module) -> None:
    module.version = 99
    with pytest.raises(UnsupportedError, match=f"version 99, the package {abi.ABI_VERSION}"):
        Device(Path("/dev/null"))


def test_a_device_that_is_no_device_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="does not answer"):
        Device(Path("/dev/null"))


def test_no_module_points_at_doctor(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"not loaded.*pagecache-bpf doctor") as caught:
        Device(tmp_path / "absent")
    assert caught.value.exit_code == 3


def raising(number: int) -> Callable[..., int]:
    def opener(path: Any, *_: Any) -> int:
        raise OSError(number, os.strerror(number), str(path))

    return opener


@pytest.mark.parametrize("number", [errno.EPERM, errno.EACCES])
def test_without_the_right_it_says_sudo(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(os, "open", raising(number))
    with pytest.raises(PrivilegeError, match="sudo") as caught:
        Device()
    assert caught.value.exit_code == 4


def test_the_descriptor_is_closed_even_after_an_error(module: Module) -> None:
    before = len(os.listdir("/proc/self/fd"))
    module.version = 99
    for _ in range(20):
        with pytest.raises(UnsupportedError):
            Device(Path("/dev/null"))
    module.version = abi.ABI_VERSION
    with Device(Path("/dev/null")) as opened:
        opened.info()
    assert len(os.listdir("/proc/self/fd")) == before
