# SPDX-License-Identifier: Apache-2.0
"""The kernel's readahead window of the device below a file, as most machines have it.

The window is the device's and not a test's: several processes may want it so at the same time, and
the one that ends first must leave it to the others.  So it is with the device's speed, which engine
agent compares readers with: where it is known, the machine's load decides who is helped.
"""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from benchmarks.disks import queue_of
from pagecache_bpf._run_dir import RUN_DIR
from pagecache_bpf.agent.queue_depth import DEFAULT_DEPTH
from pagecache_bpf.errors import PagecacheError
from pagecache_bpf.kernel.process_tree import is_alive

USUAL = "128"


def window_of(path: Path) -> Path | None:
    """The file with the readahead window, in KiB, of the device below a file, if it has one."""
    try:
        return queue_of(path) / "read_ahead_kb"
    except PagecacheError:
        return None


@contextmanager
def usual_readahead(path: Path) -> Iterator[None]:
    """Set read_ahead_kb to 128 for the block, where there is such a device, of unknown speed."""
    window = window_of(path)
    with shared_setting(window, USUAL) if window else nullcontext(), device_speed(path, 0):
        yield


@contextmanager
def device_speed(path: Path, bytes_per_second: int) -> Iterator[None]:
    """Have agents that are started in the block take this for what a device can do.

    Args:
        path: a file or a directory on it.
        bytes_per_second: how fast it is; 0: nobody knows, so that each reader is helped at once.
    """
    if os.geteuid() != 0:
        yield
        return
    RUN_DIR.mkdir(mode=0o700, parents=True, exist_ok=True)
    depths = RUN_DIR / "depths.json"
    depths.touch()
    number = path.stat().st_dev
    device = f"{os.major(number)}:{os.minor(number)}"
    try:
        known = json.loads(depths.read_text() or "{}")
    except ValueError:
        known = {}
    depth = known.get(device, {}).get("depth", DEFAULT_DEPTH)
    known[device] = {"depth": depth, "bytes_per_second": bytes_per_second}
    with shared_setting(depths, json.dumps(known)):
        yield


@contextmanager
def shared_setting(setting: Path, value: str) -> Iterator[None]:
    """Have a setting of the kernel for the block; the last process that wants it puts it back.

    Args:
        setting: the file; all that share it want the same value.
        value: what is written to it.
    """
    with _users(setting) as users:
        if not users["pids"] and users["before"] is None:
            users["before"] = setting.read_text()
        users["pids"].append(os.getpid())
        setting.write_text(value)
    try:
        yield
    finally:
        with _users(setting) as users:
            users["pids"].remove(os.getpid())
            if not users["pids"]:
                setting.write_text(users["before"])
                users["before"] = None


@contextmanager
def _users(setting: Path) -> Iterator[dict[str, Any]]:
    """Who has changed a setting, and what it was before; one process at a time.

    Of processes that were killed only what was there before them is left.
    """
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    name = str(setting.resolve()).strip("/").replace("/", "-")
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(Path(tempfile.gettempdir(), f"pagecache-bpf-{boot}-{name}"), flags, 0o600)
    with os.fdopen(fd, "r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        users = json.loads(file.read() or '{"before": null, "pids": []}')
        users["pids"] = [pid for pid in users["pids"] if is_alive(pid)]
        yield users
        file.seek(0)
        file.truncate()
        json.dump(users, file)
