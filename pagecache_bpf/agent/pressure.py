# SPDX-License-Identifier: Apache-2.0
"""How engine agent learns that memory is short, and asks the policy what to drop first.

The kernel tells by triggers on pressure stall information (Documentation/accounting/psi.rst, Linux
5.2 and newer): /proc/pressure/memory for the machine, memory.pressure for a memory cgroup, and by
changes of a cgroup's memory.events (version 2).  Version 1 has neither; there the machine's trigger
stands for all, and how full a cgroup is says whose it was.  Nothing here waits: whoever runs the
agent's loop looks at it between two requests.
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pagecache_bpf.errors import UsageError
from pagecache_bpf.kernel import cgroups as memory_cgroups
from pagecache_bpf.kernel.cgroups import unified_mount
from pagecache_bpf.kernel.kernelfs import LIVE

MACHINE = Path("/proc/pressure/memory")
#: Tasks have stalled on memory for 100 ms of 2 s (in microseconds).  Other windows than multiples
#: of 2 s are for CAP_SYS_RESOURCE in the first user namespace only: d82caa273565 ("sched/psi: Allow
#: unprivileged polling of N*2s period", 6.5).
TRIGGER = b"some 100000 2000000\0"
#: Asked for at a time: what the kernel would reclaim meanwhile is not much more.
WANT_BYTES = 16 << 20
#: A cgroup is to be this much below its limit.
SLACK = 0.03
#: The machine is short when not more than this part of its memory is available: tasks that stall in
#: a small cgroup of their own raise its pressure, too.
HOST_SLACK = 0.1
MAX_CGROUPS = 256
#: A process is looked at again after that: its number may be another's, in another cgroup.
AGAIN_SECONDS = 10.0


@dataclass(frozen=True)
class Short:
    """Memory is short: in one cgroup or on the whole machine.

    Attributes:
        cgroup_id: the inode number of the cgroup's directory; 0 stands for the machine.
        wanted_bytes: bytes that should be given up.
    """

    cgroup_id: int
    wanted_bytes: int


@dataclass
class _Source:
    """A descriptor that becomes ready when a cgroup, or (group None) the machine, lacks memory."""

    fd: int
    group: Path | None
    limited: int = 0  # how often it has met its limit: `max` and `high` of memory.events


class PressureWatch:
    """Watches the memory pressure of the machine and of the readers' memory cgroups.

    Attributes:
        missing: what the kernel does not let it watch, in sentences for people.

    Source: Documentation/accounting/psi.rst (triggers, Linux 5.2).
    """

    def __init__(self, machine: Path = MACHINE, cgroups: Path | None = None) -> None:
        """Set the triggers.

        Args:
            machine: the machine's pressure.
            cgroups: the root of the cgroups; None: where they are mounted.
        """
        cgroups = cgroups or unified_mount()
        self.missing: list[str] = []
        self._poll = select.poll()
        self._sources: dict[int, _Source] = {}
        self._groups: set[Path] = set()
        self._seen: dict[int, float] = {}  # processes, and when to look at them again
        self._cgroups = cgroups
        try:
            self._add(_trigger(machine), None)
        except OSError as error:
            self.missing.append(f"no trigger on {machine} ({error.strerror})")
        if not (cgroups / "cgroup.controllers").exists():
            self.missing.append("no pressure of memory cgroups (cgroup version 1)")

    def watch_process(self, pid: int) -> None:
        """Watch the memory cgroup of a process and those above it.

        A process that was looked at within the last AGAIN_SECONDS, or one too many (MAX_CGROUPS),
        is passed over, and so is one that has ended.

        Args:
            pid: the process.
        """
        now = time.monotonic()
        if now < self._seen.get(pid, 0.0) or len(self._groups) >= MAX_CGROUPS:
            return
        if len(self._seen) >= MAX_CGROUPS:
            self._seen.clear()
        self._seen[pid] = now + AGAIN_SECONDS
        lines = (LIVE.read(f"/proc/{pid}/cgroup") or "").splitlines()
        if lines:
            name = next((line[3:] for line in lines if line.startswith("0::")), "/")
            self.watch(self._cgroups / name.lstrip("/"))

    def watch(self, group: Path) -> None:
        """Watch a memory cgroup and those above it.

        What a cgroup lacks (memory.events, memory.pressure) or root may not open is left out.

        Args:
            group: its directory, below the root of the cgroups.
        """
        while group != self._cgroups and group not in self._groups:
            self._groups.add(group)
            with suppress(OSError):
                self._add(os.open(group / "memory.events", os.O_RDONLY | os.O_CLOEXEC), group)
            with suppress(OSError):
                self._add(_trigger(group / "memory.pressure"), group)
            group = group.parent

    def check(self) -> list[Short]:
        """Ask, without waiting, which cgroups have become short of memory since the last call.

        Cgroups that have been removed are no longer watched.

        Returns:
            One entry a cgroup, and one for the machine; empty most of the time.
        """
        found: dict[int, Short] = {}
        for fd, events in self._poll.poll(0):
            source = self._sources[fd]
            if events & (select.POLLHUP | select.POLLNVAL) or not self._still(source):
                self._remove(fd)
                continue
            short = self._judge(source)
            if short is not None:
                found.setdefault(short.cgroup_id, short)
        return list(found.values())

    def close(self) -> None:
        """Close the descriptors of all triggers, which ends them."""
        for fd in list(self._sources):
            self._remove(fd)

    def _add(self, fd: int, group: Path | None) -> None:
        """Poll a descriptor from now on; events of the past are read off first and do not count."""
        source = _Source(fd, group)
        if group is not None:
            source.limited = _limited(group)
            with suppress(OSError):
                os.pread(fd, 4096, 0)  # what has happened is no news
        self._sources[fd] = source
        self._poll.register(fd, select.POLLPRI | select.POLLERR)

    def _remove(self, fd: int) -> None:
        """Close a descriptor and forget its cgroup, so that watch() may add the cgroup again."""
        source = self._sources.pop(fd)
        self._poll.unregister(fd)
        os.close(fd)
        if source.group is not None:
            self._groups.discard(source.group)

    @staticmethod
    def _still(source: _Source) -> bool:
        """Tell whether the cgroup of a descriptor still exists; the machine always does."""
        return source.group is None or source.group.is_dir()

    def _machine_is_short(self) -> bool:
        """Decide whether a stall of some task means that what is tagged should give pages up.

        Under version 1 a reader's cgroup that is full counts as well.
        """
        host = memory_cgroups.host_memory()
        if host.get("MemAvailable", 0) <= HOST_SLACK * host.get("MemTotal", 0):
            return True
        if (self._cgroups / "cgroup.controllers").exists():
            return False  # each cgroup has a trigger of its own
        for pid in list(self._seen):
            with suppress(UsageError):  # it has ended
                for level in memory_cgroups.of_process(pid).levels:
                    if level.bound is not None and (level.free or 0) <= SLACK * level.bound:
                        return True
        return False

    def _judge(self, source: _Source) -> Short | None:
        """Decide whether a cgroup whose descriptor became ready is short of memory.

        It is when it has met a limit since the last event, or is within SLACK of one: tasks stall
        for other reasons, too, and then dropping pages would not help.
        """
        if source.group is None:
            return Short(0, WANT_BYTES) if self._machine_is_short() else None
        with suppress(OSError):
            os.pread(source.fd, 4096, 0)  # ready again for the next event
        try:
            identity = source.group.stat().st_ino
            used = int((source.group / "memory.current").read_text())
        except (OSError, ValueError):
            return None
        limited, before = _limited(source.group), source.limited
        source.limited = limited
        limits = [_number(source.group / name) for name in ("memory.high", "memory.max")]
        limit = min((bound for bound in limits if bound is not None), default=None)
        if limit is None or (limited == before and used < limit * (1 - SLACK)):
            return None
        return Short(identity, max(int(used - limit * (1 - SLACK)), WANT_BYTES // 8))


def _trigger(path: Path) -> int:
    """Open a file of pressure stall information and set TRIGGER on it.  Raises OSError."""
    fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        os.write(fd, TRIGGER)
    except OSError:
        os.close(fd)
        raise
    return fd


def _limited(group: Path) -> int:
    """Count how often a cgroup has met memory.max or memory.high; 0 if it cannot be read."""
    try:
        lines = (group / "memory.events").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.split()[0] in ("max", "high"))
    except (OSError, ValueError, IndexError):
        return 0


def _number(path: Path) -> int | None:
    """Read a limit; None for "max", which is no limit, and for one that cannot be read."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


#: Asks the policy about one file: pages wanted, cgroup, round; returns pages that it gave up.
Ask = Callable[[int, int, int], int]


def ask_all(short: Short, page_size: int, files: list[Ask]) -> int:
    """Ask the policy about one file after another, until enough pages are given up.

    If the first round was not enough there is a second one, in which a policy may give up more.

    Args:
        short: who is short of memory, and by how much.
        page_size: bytes of a page.
        files: asks about one file each, in the order in which they are asked.

    Returns:
        Pages that were given up, which may be more than were wanted.
    """
    wanted = -(-short.wanted_bytes // page_size)
    given = 0
    for turn in (0, 1):
        for ask in files:
            if given >= wanted:
                return given
            given += ask(wanted - given, short.cgroup_id, turn)
    return given
