# SPDX-License-Identifier: Apache-2.0
"""Whom the agent reads for: the memory cgroup and node of each, and the room that is left there."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pagecache_bpf.agent.workers import WorkerPlace
from pagecache_bpf.errors import UsageError
from pagecache_bpf.kernel import cgroups
from pagecache_bpf.kernel.numa import nodes

#: Of the host's memory this much stays free of prefetch: a share of it, and at least so much.
HOST_FLOOR_SHARE = 0.05
HOST_FLOOR_BYTES = 256 << 20
#: A window may take this share of the room: what has been read stays until it is reclaimed.
WINDOW_SHARE = 0.25
#: Room is looked up again after so long.
STALE_SECONDS = 0.25
#: A reader that has asked for nothing for so long is forgotten.
FORGET_SECONDS = 60.0

# /proc/self/ns/pid of the first PID namespace (PROC_PID_INIT_INO, include/linux/proc_ns.h).
_INIT_PID_NS = 0xEFFFFFFC


@dataclass
class Reader:
    """A process that reads tagged files; window: bytes, None: unbounded."""

    cgroup: Path | None
    window: int | None
    seen: float


def host_window(memory: dict[str, int]) -> int:
    """Bytes that a window may take of the host's memory, by /proc/meminfo."""
    floor = max(HOST_FLOOR_BYTES, int(memory.get("MemTotal", 0) * HOST_FLOOR_SHARE))
    return int(max(0, memory.get("MemAvailable", 0) - floor) * WINDOW_SHARE)


def sees_readers() -> bool:
    """Whether the kernel's process numbers are those of this process's /proc."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino == _INIT_PID_NS
    except OSError:
        return False


class Readers:
    """What is known of the readers, by process number.

    changed: told a reader and the pages that its window may have (None: it is gone).
    """

    def __init__(self, page_size: int, changed: Callable[[int, int | None], None]) -> None:
        self._page_size = page_size
        self._changed = changed
        self._known: dict[int, Reader] = {}
        self._asked: dict[int, float] = {}
        self.blind = not sees_readers()
        self._several_nodes = len(nodes()) > 1
        self._home: Path | None = None
        with suppress(UsageError):
            self._home = cgroups.directory_of(os.getpid())

    def place(self, tgid: int, node: int, device: str) -> WorkerPlace:
        """Where pages of a device belong that are read for a reader."""
        cgroup = self.get(tgid).cgroup
        if cgroup == self._home:
            cgroup = None
        return WorkerPlace(device, cgroup, node if self._several_nodes else -1)

    def get(self, tgid: int) -> Reader:
        """What is known of a reader that asks, not older than STALE_SECONDS."""
        now = self._asked[tgid] = time.monotonic()
        return self._get(tgid, now)

    def _get(self, tgid: int, now: float) -> Reader:
        reader = self._known.get(tgid)
        if reader is None or now > reader.seen + STALE_SECONDS:
            reader = self._known[tgid] = self._look(tgid, now)
            if reader.window is not None:
                self._changed(tgid, reader.window // self._page_size)
        return reader

    def refresh(self) -> None:
        """Look at all of them again: room may have come, and they may have gone."""
        now = time.monotonic()
        for tgid in list(self._known):
            gone = not self.blind and not os.path.exists(f"/proc/{tgid}")
            if gone or now > self._asked[tgid] + FORGET_SECONDS:
                del self._known[tgid], self._asked[tgid]
                self._changed(tgid, None)
            else:
                self._get(tgid, now)

    def _look(self, tgid: int, now: float) -> Reader:
        window = host_window(cgroups.host_memory())
        if self.blind:
            return Reader(None, window, now)
        try:
            memory = cgroups.of_process(tgid)
            directory = cgroups.directory_of(tgid)
        except UsageError:  # it has ended
            return Reader(None, window, now)
        if memory.headroom is not None:
            window = min(window, int(memory.headroom * WINDOW_SHARE))
        return Reader(directory, window, now)
