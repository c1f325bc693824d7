# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the tests in the guest: the module, file systems, a kernel log that stays silent."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.guest.console import find_problems
from benchmarks.guest.devices import ScaledDevice, open_device
from pagecache_bpf.kernel import kmod
from pagecache_bpf.kernel.control_device import Device
from pagecache_bpf.policy import loader
from pagecache_bpf.policy.observing import VARIABLE

#: Where a test takes long in an emulated guest: 50 rounds each, and many starts of the command.
SLOW = ("test_kmod_stress.py", "test_cli.py", "test_controller.py")
LOADED = Path("/sys/module/pagecache_bpf")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: guests that share the files then end together."""
    items.sort(key=lambda item: item.path.name not in SLOW)


class Module:
    """The kernel module of this checkout."""

    def load(self) -> None:
        """Load it if it is not."""
        if not LOADED.exists():
            kmod.load()

    def unload(self) -> None:
        """Detach everything and unload it; links are let go of by the kernel a moment later."""
        for name in loader.pinned():
            loader.detach(name)
        deadline = time.monotonic() + 20
        while True:
            done = subprocess.run(["rmmod", "pagecache_bpf"], capture_output=True, text=True)
            if done.returncode == 0:
                return
            assert time.monotonic() < deadline, done.stderr
            time.sleep(0.05)


#: Loading the observer takes an emulated CPU ten seconds; these tests are about it.
OBSERVED = ("test_observer", "test_views", "test_controller", "test_api", "test_agent_filesystems")


@pytest.fixture(autouse=True)
def _observe_where_it_matters(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not request.module.__name__.rpartition(".")[2].startswith(OBSERVED):
        monkeypatch.setenv(VARIABLE, "off")


@pytest.fixture(scope="session")
def module() -> Iterator[Module]:
    """The module, loaded for the whole session and unloaded at its end."""
    it = Module()
    it.load()
    yield it
    it.unload()


@pytest.fixture(autouse=True)
def _clean(module: Module) -> Iterator[None]:
    """Each test starts with the module and without policies, and leaves a silent kernel."""
    module.load()
    log = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
    os.lseek(log, 0, os.SEEK_END)
    yield
    if LOADED.exists():
        for name in loader.pinned():
            loader.detach(name)
        with Device() as device:
            for tag in list(device.tags()):
                device.untag(tag.dev_major, tag.dev_minor, tag.ino, tag.generation)
    lines = []
    while True:
        try:
            lines.append(os.read(log, 8192).decode(errors="replace").partition(";")[2])
        except BlockingIOError:
            break
        except BrokenPipeError:
            continue  # the oldest lines were overwritten while we read
    os.close(log)
    problems = find_problems(lines)
    assert not problems, "\n".join(problems)


_devices: dict[tuple[int, str, int], ScaledDevice] = {}
_delays: dict[tuple[int, str, int], float] = {}


def device(disk: int, fs: str, part: int = 0, delay_ms: float = 0) -> ScaledDevice:
    """A file system made once a session, emptied for each test."""
    key = (disk, fs, part)
    if key not in _devices:
        _devices[key] = open_device(disk, fs, part=(part, 2))
    found = _devices[key]
    if delay_ms != _delays.get(key, 0):
        found.set_delay(delay_ms)
        _delays[key] = delay_ms
    for entry in found.mount.iterdir():
        if entry.name == "lost+found":
            continue
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    return found


@pytest.fixture
def mount() -> Path:
    """An empty ext4 without a delay; read_ahead_kb is 128."""
    return device(0, "ext4").mount


@pytest.fixture
def slow_mount() -> Path:
    """The same with 20 ms a read."""
    return device(0, "ext4", part=1, delay_ms=20).mount


@pytest.fixture
def paced_mount() -> Path:
    """The same with 1 ms a read: a device to wait for."""
    return device(0, "ext4", part=1, delay_ms=1).mount


@pytest.fixture
def xfs_mount() -> Path:
    """An empty xfs, which has large folios."""
    return device(1, "xfs").mount


@pytest.fixture
def scratch_fs() -> Path:
    """A file system that a test may unmount, with `remount`."""
    return device(1, "ext4", part=1).mount


@pytest.fixture
def remount() -> Callable[[], None]:
    """Unmount and mount `scratch_fs`; fails if it is busy."""
    return device_of_scratch().remount


def device_of_scratch() -> ScaledDevice:
    """The device of `scratch_fs`, not emptied."""
    return _devices[(1, "ext4", 1)]
