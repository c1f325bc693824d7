# SPDX-License-Identifier: Apache-2.0
"""Which processes the agent reads for: the memory cgroup and NUMA node of each, and its headroom.

A window bounds how many bytes may be read ahead of a reader, so that prefetching never makes its
cgroup or the host reclaim what others need.  It knows processes, but no policy and no file.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pagecache_bpf.agent.worker_process import WorkerPlace
from pagecache_bpf.errors import UsageError
from pagecache_bpf.kernel import cgroups, pid_namespace
from pagecache_bpf.kernel.numa import nodes
from pagecache_bpf.kernel.process_tree import is_alive

#: Of the host's memory this much stays free of prefetch: a share of it, and at least so much.
HOST_FLOOR_SHARE = 0.05
HOST_FLOOR_BYTES = 256 << 20
#: A window may take this share of the room: what has been read stays until it is reclaimed.
WINDOW_SHARE = 0.25
#: Room is looked up again after so long.
STALE_SECONDS = 0.25
#: A reader that has asked for nothing for so long is forgotten.
FORGET_SECONDS = 60.0


@dataclass
class Reader:
    """A process that reads tagged files.

    Attributes:
        cgroup: the directory of its memory cgroup; None: not known, or memory is not accounted.
        window: bytes that may be read ahead of it; None: no bound.
        seen: when this was looked up, in seconds of the monotonic clock.
    """

    cgroup: Path | None
    window: int | None
    seen: float


def host_window(memory: dict[str, int]) -> int:
    """Compute how many bytes a window may take of the host's memory.

    Args:
        memory: bytes by the names of /proc/meminfo, as cgroups.host_memory() returns them.

    Returns:
        WINDOW_SHARE of the bytes that are available above the floor that stays free.
    """
    floor = max(HOST_FLOOR_BYTES, int(memory.get("MemTotal", 0) * HOST_FLOOR_SHARE))
    return int(max(0, memory.get("MemAvailable", 0) - floor) * WINDOW_SHARE)


class Readers:
    """The readers, by process number, with what was last found out about each.

    Args:
        page_size: bytes of a page.
        changed: called with a reader and the pages that its window may have; None: it is gone.

    Attributes:
        blind: whether this process cannot look readers up, being in a PID namespace of its own.
    """

    def __init__(self, page_size: int, changed: Callable[[int, int | None], None]) -> None:
        self._page_size = page_size
        self._changed = changed
        self._known: dict[int, Reader] = {}
        self._asked: dict[int, float] = {}
        self.blind = not pid_namespace.is_first()
        self._several_nodes = len(nodes()) > 1
        self._home: Path | None = None
        with suppress(UsageError):
            self._home = cgroups.directory_of(os.getpid())

    def place(self, tgid: int, node: int, device: str) -> WorkerPlace:
        """Tell which worker should read from a device for a reader.

        Args:
            tgid: the reader's process number.
            node: the NUMA node that the policy asks for; -1: any.
            device: MAJOR:MINOR of the file system's device.

        Returns:
            The place; without a cgroup where the reader's is the agent's own, and without a node
            where the machine has only one.
        """
        cgroup = self.get(tgid).cgroup
        if cgroup == self._home:
            cgroup = None
        return WorkerPlace(device, cgroup, node if self._several_nodes else -1)

    def get(self, tgid: int) -> Reader:
        """Look up a reader that has just asked for something.

        Args:
            tgid: its process number.

        Returns:
            What is known of it, not older than STALE_SECONDS.
        """
        now = self._asked[tgid] = time.monotonic()
        return self._get(tgid, now)

    def _get(self, tgid: int, now: float) -> Reader:
        """Look a reader up as get() does, without taking note that it has asked for something."""
        reader = self._known.get(tgid)
        if reader is None or now > reader.seen + STALE_SECONDS:
            reader = self._known[tgid] = self._look(tgid, now)
            if reader.window is not None:
                self._changed(tgid, reader.window // self._page_size)
        return reader

    def refresh(self) -> None:
        """Look all readers up again: they may have got headroom, or have ended.

        Readers that have ended or asked for nothing for FORGET_SECONDS are forgotten.
        """
        now = time.monotonic()
        for tgid in list(self._known):
            gone = not self.blind and not is_alive(tgid)
            if gone or now > self._asked[tgid] + FORGET_SECONDS:
                del self._known[tgid], self._asked[tgid]
                self._changed(tgid, None)
            else:
                self._get(tgid, now)

    def _look(self, tgid: int, now: float) -> Reader:
        """Ask procfs and cgroupfs about a process; of one that is gone only the host counts."""
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
