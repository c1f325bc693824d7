# SPDX-License-Identifier: Apache-2.0
"""Attach, detach, load and unload under readers.  The console must stay silent (conftest.py)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks.cachestat import drop
from pagecache_bpf.kernel.control_device import Device
from pagecache_bpf.policy import loader
from pagecache_bpf.policy.catalog import find
from tests.vm.kernel import ROOT, attached, make_file, test_policy, wait_for

pytestmark = pytest.mark.vm

PAGES = 2053
ROUNDS = os.environ.get("PAGECACHE_BPF_ROUNDS")
#: Moments at which an attach is killed; each takes an emulated guest 15 seconds.
KILLED = int(ROUNDS or 5)
#: Attached and detached under readers; each takes an emulated guest 9 seconds.
TURNS = int(ROUNDS or 6)
#: The module unloaded and loaded, too; 10 seconds each.
LOADED = int(ROUNDS or 7)

READER = """
import sys
from pathlib import Path
from benchmarks.cachestat import drop
from tests.vm.kernel import map_all, read_all
path = Path(sys.argv[1])
rounds = 0
print("go", flush=True)
while True:
    drop([path])
    read_all(path, 65536)
    drop([path])
    map_all(path)
    rounds += 1
    print(rounds, flush=True)
"""


@contextmanager
def readers(*files: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that read and map a file each, over and over, checking every byte."""
    running = [
        subprocess.Popen(
            [sys.executable, "-c", READER, str(path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for path in files
    ]
    try:
        for process in running:
            assert process.stdout and process.stdout.readline() == "go\n"
        yield running
        for process in running:
            # At least one round is whole, with all its bytes checked.
            assert process.stdout and process.stdout.readline(), process.communicate()[1]
            assert process.poll() is None, process.communicate()[1]
    finally:
        for process in running:
            process.kill()
            process.communicate()


@pytest.fixture
def files(mount: Path) -> list[Path]:
    return [make_file(mount / f"weights-{i}", PAGES) for i in range(2)]


def attach_and_detach(files: list[Path], turn: int) -> None:
    with attached(("sequential", test_policy("maximal"))[turn % 2], *files) as policy:
        wait_for(lambda: policy.count("readahead_calls") > 5, "readers to be governed")


def test_attach_and_detach_under_readers(files: list[Path]) -> None:
    """In one module; below, it is a module loaded anew each time."""
    with readers(*files):
        for turn in range(TURNS):
            attach_and_detach(files, turn)


def test_load_and_unload_under_readers(files: list[Path], module: object) -> None:
    """The module's text is left only when nobody is in it."""
    assert hasattr(module, "load") and hasattr(module, "unload")
    with readers(*files):
        for turn in range(LOADED):
            attach_and_detach(files, turn)
            module.unload()
            module.load()


def test_module_in_use_cannot_be_unloaded(files: list[Path]) -> None:
    with attached("sequential", files[0]):
        result = subprocess.run(["rmmod", "pagecache_bpf"], capture_output=True, check=False)
        assert result.returncode != 0
        with Device() as device:
            assert device.info().policies == 1


def test_killed_loader_leaves_nothing_half(files: list[Path]) -> None:
    """kill -9 at any point of an attach: either it is attached, or nothing is."""
    command = [sys.executable, "-m", "pagecache_bpf", "attach", "sequential", str(files[0])]
    began = time.monotonic()
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    whole = time.monotonic() - began
    detach = [sys.executable, "-m", "pagecache_bpf", "detach", "sequential"]
    subprocess.run(detach, check=True, cwd=ROOT, capture_output=True)
    for part in range(KILLED):
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        # The point of the test: a moment that nobody chose.
        time.sleep(whole * (part + 1) / (KILLED + 1))
        process.send_signal(signal.SIGKILL)
        process.wait()

        def consistent() -> bool:
            with Device() as device:
                names = [policy.name for policy in device.policies()]
            return names == loader.pinned()

        wait_for(consistent, "links that nobody pinned to go")
        if "sequential" in loader.pinned():
            subprocess.run(detach, check=True, cwd=ROOT, capture_output=True)
        else:
            with Device() as device:
                for tag in list(device.tags()):
                    device.untag(tag.dev_major, tag.dev_minor, tag.ino, tag.generation)
        loader.attach(find("sequential"))
        loader.detach("sequential")


def test_many_policies_at_once(files: list[Path]) -> None:
    with (
        attached("sequential", files[0]) as first,
        attached(test_policy("maximal"), files[1]) as second,
        attached("noop"),
        readers(*files),
    ):
        wait_for(lambda: first.count("readahead_calls") > 50, "the first to be asked")
        wait_for(lambda: second.count("readahead_calls") > 50, "the second to be asked")


def test_reader_killed_in_the_middle(files: list[Path]) -> None:
    with attached(test_policy("window"), *files, window_pages=4, prefetch_pages=2048) as policy:
        for _ in range(17):
            drop(files)
            process = subprocess.Popen(["cat", *map(str, files)], stdout=subprocess.PIPE)
            assert process.stdout
            os.read(process.stdout.fileno(), 65536)
            process.kill()
            process.communicate()
        policy.idle()
