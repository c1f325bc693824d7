# SPDX-License-Identifier: Apache-2.0
"""Tries the module on an emulated arm64 machine, as the only program there (tools/vm_arm64.sh).

Loads it, attaches policies, reads cold files, detaches and unloads; cachestat(2) counts the pages
in the cache.  The first thing that is not as it has to be ends it with a traceback.

    try_module.py MODULE DIRECTORY SHA256      DIRECTORY has weights.bin and stream.bin on a disk
"""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from pagecache_bpf.kernel import kmod
from pagecache_bpf.kernel.cachestat import cachestat
from pagecache_bpf.kernel.control_device import Device, PolicyStatus
from pagecache_bpf.kernel.file_pages import PAGE_SIZE
from pagecache_bpf.policy import loader
from pagecache_bpf.policy.catalog import find

MIB = 1 << 20
PIECE = 128 << 10
TEST_POLICIES = Path(__file__).resolve().parents[2] / "build" / "bpf" / "test"
GROUP = Path("/sys/fs/cgroup/try")


def cached_bytes(path: Path) -> int:
    """Bytes of a file in the page cache."""
    with path.open("rb") as file:
        return cachestat(file.fileno(), 0, 0).cached * PAGE_SIZE


def drop(path: Path) -> None:
    """Take a file out of the page cache."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    assert cached_bytes(path) == 0, path


def read(path: Path, size: int) -> str:
    """Read the first bytes of a file in pieces of 128 KiB; their SHA-256."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while size > 0 and (data := file.read(min(PIECE, size))):
            digest.update(data)
            size -= len(data)
    return digest.hexdigest()


def status_of(device: Device, name: str) -> PolicyStatus:
    """An attached policy as the module has it."""
    return next(policy for policy in device.policies() if policy.name == name)


def wait_for(condition: Callable[[], bool], what: str) -> None:
    """Wait until something is so, for a minute at most."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


class Attached:
    """A policy that governs a file for the block."""

    def __init__(self, device: Device, name: str, path: Path) -> None:
        self.device, self.path = device, path
        info = find(name)
        self.name = info.name
        self.link = loader.attach(info, pin=False)

    def __enter__(self) -> Attached:
        with self.path.open("rb") as file:
            self.device.tag(file.fileno(), policy=self.name, model="m", path=str(self.path))
        return self

    def __exit__(self, *_: object) -> None:
        with self.path.open("rb") as file:
            self.device.untag_fd(file.fileno())
        self.link.close()
        wait_for(lambda: self.name not in {p.name for p in self.device.policies()}, "it is gone")

    def count(self, counter: str) -> int:
        """One of its counters."""
        return status_of(self.device, self.name).counters[counter]

    def idle(self) -> None:
        """Wait until nothing is queued for it."""
        wait_for(lambda: not status_of(self.device, self.name).inflight_pages, "the queue is empty")


def try_load(device: Device, weights: Path, sha256: str) -> None:
    """A cold load is read ahead of, and every byte is right."""
    drop(weights)
    read(weights, MIB)
    alone = cached_bytes(weights)
    drop(weights)
    with Attached(device, "sequential", weights) as policy:
        read(weights, MIB)
        policy.idle()
        ahead = cached_bytes(weights)
        print(f"after 1 MiB: {alone} bytes in the cache by default, {ahead} with the policy")
        assert alone < 2 * MIB and ahead >= 4 * MIB
        assert read(weights, weights.stat().st_size) == sha256
        policy.idle()
        assert cached_bytes(weights) == -(-weights.stat().st_size // PAGE_SIZE) * PAGE_SIZE
        prefetched = policy.count("prefetch_bytes")
        print(f"{prefetched} of {weights.stat().st_size} bytes were prefetched")
        assert prefetched > weights.stat().st_size // 2
        assert status_of(device, "sequential").hooks == ("readahead", "evict")
    drop(weights)
    read(weights, MIB)
    assert cached_bytes(weights) == alone, "detached, and still read ahead"


def try_keeping(device: Device, weights: Path, stream: Path) -> None:
    """What a policy keeps outlives a stream in a small cgroup; folio_referenced() is redirected."""
    GROUP.mkdir()
    (GROUP / "memory.max").write_text(str(weights.stat().st_size + 8 * MIB))
    enter = f"echo $$ >{GROUP}/cgroup.procs && cat {weights} {stream} {stream} >/dev/null"
    kept = []
    for name in (None, "keep_all"):
        drop(weights)
        drop(stream)
        if name is None:
            subprocess.run(["/bin/busybox", "sh", "-c", enter], check=True)
            kept.append(cached_bytes(weights))
            continue
        with Attached(device, str(TEST_POLICIES / f"{name}.bpf.o"), weights) as policy:
            subprocess.run(["/bin/busybox", "sh", "-c", enter], check=True)
            kept.append(cached_bytes(weights))
            print(f"{policy.count('evict_calls')} folios were asked about")
    print(f"{kept[0]} bytes outlive the stream by default, {kept[1]} with the policy")
    assert kept[0] < weights.stat().st_size // 10
    assert kept[1] > weights.stat().st_size * 9 // 10


def main() -> int:
    """Run all of it; the exit status."""
    module, directory, sha256 = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    print(f"{platform.machine()}, {platform.release()}, pages of {PAGE_SIZE} bytes")
    kmod.load(module)
    with Device() as device:
        weights, stream = directory / "weights.bin", directory / "stream.bin"
        # Whenever a policy is attached, the module sees each of its hooks run on a file of its own.
        with Attached(device, str(TEST_POLICIES / "maximal.bpf.o"), weights) as maximal:
            print("hooks that run:", *status_of(device, maximal.name).hooks)
        with Attached(device, str(TEST_POLICIES / "pressure_drop.bpf.o"), weights) as pressure:
            print("hooks that run:", *status_of(device, pressure.name).hooks)
        try_load(device, weights, sha256)
        try_keeping(device, weights, stream)
    # The kernel lets go of a link a moment after it was closed.
    rmmod = ["/bin/busybox", "rmmod", "pagecache_bpf"]
    wait_for(lambda: subprocess.run(rmmod).returncode == 0, "the module is unloaded")
    return 0


if __name__ == "__main__":
    sys.exit(main())
