# SPDX-License-Identifier: Apache-2.0
"""How far the readers of files have come, as an unprivileged process can see it.

What can be seen is the position of each descriptor (/proc/PID/fdinfo), and which pages of a mapping
the process has touched (/proc/PID/pagemap, which hides page frame numbers from those without
privilege but not whether a page is present).  Where a reader only uses pread(2), which moves no
position, the bytes that it has read in all (/proc/PID/io) stand in for one. This process and its
descendants are looked at, among which a server's workers are.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from pagecache_bpf.kernel.file_pages import PAGE_SIZE
from pagecache_bpf.kernel.kernelfs import LIVE, KernelFS
from pagecache_bpf.kernel.process_tree import descendants

_ENTRY = 8  # bytes of /proc/PID/pagemap a page
_FAMILY_SECONDS = 0.1
_PRESENT = 0x80


@dataclass(frozen=True)
class Mapping:
    """A part of a file that a process has mapped.

    Attributes:
        pid: the process.
        address: where the mapping begins in its memory.
        offset: the first byte of the file that is mapped.
        length: bytes.
    """

    pid: int
    address: int
    offset: int
    length: int


@dataclass
class FileProgress:
    """What is known of one file's readers at one moment.

    Attributes:
        opened: whether anybody has it open or mapped.
        position: the offset in bytes of the descriptor that is furthest in the file.
        direct: whether somebody has it open for direct I/O, which goes past the page cache.
        mappings: where it is mapped.
    """

    opened: bool = False
    position: int = 0
    direct: bool = False
    mappings: list[Mapping] = field(default_factory=list)


class ReaderProgress:
    """Watches the readers of a set of files.

    Args:
        files: device and inode number of each; answers name the files by their index in it.
        kernel: where procfs is read.
    """

    def __init__(self, files: Sequence[tuple[int, int]], kernel: KernelFS = LIVE) -> None:
        self._kernel = kernel
        self._number = {identity: number for number, identity in enumerate(files)}
        inodes = "|".join(str(ino) for _, ino in files)
        # start-end permissions offset major:minor inode path; the device is that of the path
        # only on file systems with one device, so the inode has to do.
        self._line = re.compile(rf"(?m)^(\w+)-(\w+) \S+ (\w+) \S+ ({inodes}) ")
        self._by_inode = {ino: number for number, (_, ino) in enumerate(files)}
        self._pagemaps: dict[int, int] = {}
        self._read_before: dict[int, int] = {}
        self._pids: list[int] = []
        self._look_again = 0.0

    def close(self) -> None:
        """Close what was opened of the processes that were watched."""
        for fd in self._pagemaps.values():
            os.close(fd)
        self._pagemaps.clear()

    def look(
        self,
        our_descriptors: frozenset[int] = frozenset(),
        our_parts: frozenset[tuple[int, int, int]] = frozenset(),
    ) -> dict[int, FileProgress]:
        """Look at the descriptors and mappings of all watched processes.

        Descriptors and mappings by which this process reads ahead are no readers and passed over.

        Args:
            our_descriptors: descriptors of this process that are used to read ahead.
            our_parts: index of the file, offset and length in bytes of each range that is being
                read ahead; a mapping of this process that covers just one of them is passed over.

        Returns:
            What is seen, by the index of the file; files that nobody has open or mapped are left
            out.
        """
        found: dict[int, FileProgress] = {}
        for pid in self._processes():
            here = pid == os.getpid()
            self._look_at_maps(pid, found, our_parts if here else frozenset())
            self._look_at_descriptors(pid, found, our_descriptors if here else frozenset())
        return found

    def _processes(self) -> list[int]:
        """Return this process and its descendants; procfs is asked for them only now and then."""
        started = time.monotonic()
        if started >= self._look_again:
            self._pids = descendants(os.getpid(), self._kernel)
            now = time.monotonic()
            self._look_again = now + max(_FAMILY_SECONDS, 50 * (now - started))
        return self._pids

    def _look_at_maps(
        self, pid: int, found: dict[int, FileProgress], ours: frozenset[tuple[int, int, int]]
    ) -> None:
        """Add the mappings of a process to what is found, except for `ours`."""
        text = self._kernel.read(f"/proc/{pid}/maps") or ""  # it ended, or is not ours to look into
        for start, end, offset, ino in self._line.findall(text):
            address, number = int(start, 16), self._by_inode[int(ino)]
            mapping = Mapping(pid, address, int(offset, 16), int(end, 16) - address)
            if (number, mapping.offset, mapping.length) in ours:
                continue
            seen = found.setdefault(number, FileProgress())
            seen.opened = True
            seen.mappings.append(mapping)

    def _look_at_descriptors(
        self, pid: int, found: dict[int, FileProgress], ours: frozenset[int]
    ) -> None:
        """Add the descriptors of a process to what is found, except for `ours`."""
        for name in self._kernel.entries(f"/proc/{pid}/fd"):
            if int(name) in ours:
                continue
            try:
                status = self._kernel.stat(f"/proc/{pid}/fd/{name}")
            except OSError:
                continue  # it was closed
            number = self._number.get((status.st_dev, status.st_ino))
            text = self._kernel.read(f"/proc/{pid}/fdinfo/{name}") if number is not None else None
            if number is None or text is None:
                continue
            fields = dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)
            seen = found.setdefault(number, FileProgress())
            seen.opened = True
            seen.position = max(seen.position, int(fields.get("pos", 0)))
            seen.direct |= bool(int(fields.get("flags", "0"), 8) & os.O_DIRECT)

    def touched(self, mapping: Mapping, offset: int) -> bool | None:
        """Tell whether a process has touched a page of a file through a mapping.

        A fault also maps the pages around it that are in the page cache (fault-around, 64 KiB by
        default), so a page may count as touched a little before the process comes to it.

        Args:
            mapping: a part of a file that look() has found mapped.
            offset: the page's offset in the file, in bytes.

        Returns:
            None if the mapping does not reach there, or the process may not be looked into.

        Source: Documentation/admin-guide/mm/pagemap.rst (bit 63 of an entry: the page is present).
        """
        if not mapping.offset <= offset < mapping.offset + mapping.length:
            return None
        fd = self._pagemap(mapping.pid)
        if fd < 0:
            return None
        page = (mapping.address + offset - mapping.offset) // PAGE_SIZE
        try:
            data = os.pread(fd, _ENTRY, page * _ENTRY)
        except OSError:
            return None
        # Documentation/admin-guide/mm/pagemap.rst: bit 63, so the last byte on what we run on.
        return bool(data and data[-1] & _PRESENT)

    def _pagemap(self, pid: int) -> int:
        """Return a descriptor of a process's pagemap, opened once; -1 if that is not allowed."""
        if pid not in self._pagemaps:
            try:
                path = self._kernel.path(f"/proc/{pid}/pagemap")
                self._pagemaps[pid] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                return -1
        return self._pagemaps[pid]

    def read_bytes(self, our_threads: frozenset[int] = frozenset()) -> int:
        """Count what the watched processes have read by system calls, of whatever file.

        Args:
            our_threads: threads of this process, whose reading is left out.

        Returns:
            Bytes since the first call.

        Source: /proc/PID/io, field rchar (Documentation/filesystems/proc.rst).
        """
        total = 0
        for pid in self._processes():
            total += self._since(pid, f"/proc/{pid}/io")
        for tid in our_threads:
            total -= self._since(-tid, f"/proc/self/task/{tid}/io")
        return max(0, total)

    def _since(self, key: int, name: str) -> int:
        """Return by how much `rchar` of a file of procfs has grown since it was first read."""
        text = self._kernel.read(name)
        if text is None:
            return 0
        count = re.search(r"(?m)^rchar: (\d+)", text)
        value = int(count[1]) if count else 0
        return value - self._read_before.setdefault(key, value)


def blocked_seconds(skip: frozenset[int] = frozenset()) -> float | None:
    """Add up the time that the threads of this process have waited for disks.

    Args:
        skip: threads that are left out.

    Returns:
        Seconds, since each thread began; None unless the kernel accounts for it (sysctl
        kernel.task_delayacct).

    Source: proc(5), field 42 of /proc/PID/task/TID/stat, in clock ticks.
    """
    try:
        if LIVE.read("/proc/sys/kernel/task_delayacct") != "1":
            return None
        ticks = 0
        for tid in LIVE.entries("/proc/self/task"):
            if int(tid) not in skip:
                text = LIVE.read(f"/proc/self/task/{tid}/stat") or ""
                ticks += int(text.rpartition(")")[2].split()[39])
    except (OSError, ValueError, IndexError):
        return None
    return ticks / os.sysconf("SC_CLK_TCK")
