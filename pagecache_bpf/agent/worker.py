# SPDX-License-Identifier: Apache-2.0
"""A process that reads pages for the agent, from several threads.

Page cache is charged to the memory cgroup of the process that brings it in (of its mm's owner:
moving single threads changes nothing) and comes from the node that its task prefers, so the agent
has one such process for each cgroup and node of its readers and moves it there.  It holds a file
for as long as it reads it, and ends with the agent, however that ends.

Run by its path, with the number of a SOCK_SEQPACKET socket; it imports the standard library
only, so that it starts quickly and stays small.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import resource
import select
import signal
import socket
import struct
import sys
import threading
from collections import deque
from contextlib import suppress
from functools import cache

#: Of the agent's environment, what the interpreter may need to be started.
ENVIRONMENT = {name: text for name, text in os.environ.items() if name == "LD_LIBRARY_PATH"}
#: Bytes read by one system call, and the alignment of chunks.
CHUNK_BYTES = 2 << 20
MAX_DEPTH = 32
#: One chunk in so many is read in small folios.  A huge one is mapped by one fault that no
#: tracepoint tells of, so a reader that meets nothing else cannot be followed.
SEEN_CHUNKS = 16
#: The agent ends a lent worker that was idle for a second; one of a stopped agent leaves by itself.
LENT_SECONDS = 4.0
#: So much is told at once of a long extent: each message costs the agent a wakeup.
TOLD_BYTES = 8 << 20
#: Of one readahead(2), which the kernel cuts to what the device takes at once.
_PIECE_BYTES = 512 << 10
_BLOCK_BYTES = 512  # of getrusage(2)

#: To the worker: operation, number, start, length.  READ carries a descriptor, BIND a list of CPUs.
ORDER = struct.Struct("=BxxxiQQQ")
#: LENT: it is in the cgroup of a reader, which cannot be removed with it.
READ, CANCEL, BIND, DEPTH, LENT = range(5)
#: From the worker: errno, number, length, end of a settled chunk; ECANCELED: nobody took it.
#: Number READY, which is no extent's, comes first: it is there.
READY = 0
DONE = struct.Struct("=i4xQQQ")

_MADV_POPULATE_READ = 22  # include/uapi/asm-generic/mman-common.h, since 5.14
_PROT_READ, _MAP_SHARED = 1, 1
_BTF, _HUGE_PAGES = "/sys/kernel/btf/vmlinux", "/sys/kernel/mm/transparent_hugepage"
_looking = threading.Lock()
_PR_SET_NAME, _PR_SET_NO_NEW_PRIVS = 15, 38
_CAPABILITY_VERSION = 0x20080522  # 3, in include/uapi/linux/capability.h
_MPOL_DEFAULT, _MPOL_PREFERRED = 0, 1
_SET_MEMPOLICY = {"x86_64": 238, "aarch64": 237}.get(os.uname().machine)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int),
    *(ctypes.c_int, ctypes.c_int, ctypes.c_int64),
)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.readahead.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_size_t)


def by_readahead(fd: int, start: int, length: int) -> None:
    """Start reading a range of a file into the page cache, by readahead(2).

    The call returns before the pages are there, unless the device's queue is full.

    Args:
        fd: the file, open for reading.
        start: the first byte.
        length: bytes; the kernel cuts them at what the device takes at once.

    Raises:
        OSError: the kernel refuses.
    """
    if _libc.readahead(fd, start, length):
        raise _error()


def reads_huge_pages() -> bool:
    """Tell whether the kernel reads all of a huge page when one page of it is touched.

    Where it does not, it reads the one page of a mapping for random access, so that a chunk is 512
    requests of the device.

    Returns:
        Whether it has transparent huge pages and readahead of large folios; False also where the
        names of its functions cannot be read.

    Source: do_sync_mmap_readahead(), Linux 5.18 (commit 4687fdbb805a), which came with
    page_cache_ra_order() (commit 793917d997df).
    """
    with _looking:  # one of the threads looks, which takes some milliseconds
        return _has_huge_reads()


@cache
def _has_huge_reads() -> bool:
    """Look for what reads_huge_pages() tells of."""
    try:
        with open(_BTF, "rb") as file:
            return b"\0page_cache_ra_order\0" in file.read() and os.path.isdir(_HUGE_PAGES)
    except OSError:
        return False


def by_populate(fd: int, start: int, length: int, huge: bool = True) -> None:
    """Read a range of a file into the page cache and wait for it, by MADV_POPULATE_READ.

    A whole, aligned chunk is read in huge pages where the file system has them and the kernel
    reads them whole.  A huge page is always filled whole, so of a part of a chunk just its pages
    are read, in small folios; to map each of these takes half as long again as to read them, so
    that is done only where readahead(2) has not asked the device for all of them.

    Args:
        fd: the file, open for reading.
        start: the first byte, at a page boundary.
        length: bytes.
        huge: False: read whole chunks in small folios, too.

    Raises:
        OSError: the file cannot be mapped, or its pages cannot be read.

    Source: madvise(2), MADV_POPULATE_READ (Linux 5.14).
    """
    huge = huge and start % CHUNK_BYTES == 0 and length == CHUNK_BYTES and reads_huge_pages()
    if not huge and _by_pieces(fd, start, length):
        return
    address = _libc.mmap(None, length, _PROT_READ, _MAP_SHARED, fd, start)
    if address == ctypes.c_void_p(-1).value:
        raise _error()
    try:
        if huge:
            _libc.madvise(address, length, mmap.MADV_HUGEPAGE)
            _libc.madvise(address, length, mmap.MADV_RANDOM)
        if _libc.madvise(address, length, _MADV_POPULATE_READ):
            raise _error()
    finally:
        _libc.munmap(address, length)


def _by_pieces(fd: int, start: int, length: int) -> bool:
    """Read a range by readahead(2), and wait for the last page of each piece.

    The kernel cuts what is asked for at the larger of the device's request and its readahead, and
    does not say so; how much it has asked the device for is counted with the thread.

    Returns:
        Whether that was all of it; False also where some of it was cached, or nothing is counted.

    Raises:
        OSError: the kernel refuses, or the device fails.

    Source: force_page_cache_ra() in mm/readahead.c; getrusage(2), ru_inblock.
    """
    end = start + length
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_inblock
    for at in range(start, end, _PIECE_BYTES):
        by_readahead(fd, at, min(_PIECE_BYTES, end - at))
    asked = resource.getrusage(resource.RUSAGE_THREAD).ru_inblock - before
    if asked * _BLOCK_BYTES < length:
        return False
    for at in range(start, end, _PIECE_BYTES):
        os.pread(fd, 1, min(at + _PIECE_BYTES, end) - 1)
    return True


def call_reader() -> None:
    """Give this thread the name by which programs know that it reads ahead for others.

    What it reads is then no access of a reader's, whoever's process it belongs to.

    Source: prctl(2), PR_SET_NAME; bpf/include/reading_thread.bpf.h.
    """
    _libc.prctl(_PR_SET_NAME, b"pagecache-read", 0, 0, 0)


def _error() -> OSError:
    """Make an OSError of the errno that the last call of the C library has left."""
    code = ctypes.get_errno()
    return OSError(code, os.strerror(code))


def prefer_node(node: int) -> None:
    """Let this thread's allocations come from a NUMA node as long as that has memory.

    Where the machine's number of set_mempolicy(2) is not known, nothing changes.

    Args:
        node: the node's number, below 64; -1: the kernel's default.
    """
    if _SET_MEMPOLICY is None:
        return
    mask = ctypes.c_ulong(1 << node) if 0 <= node < 64 else None
    mode = _MPOL_DEFAULT if mask is None else _MPOL_PREFERRED
    _libc.syscall(
        *(ctypes.c_long(_SET_MEMPOLICY), ctypes.c_int(mode)),
        *(ctypes.byref(mask) if mask else None, ctypes.c_ulong(64 if mask else 0)),
    )


class _Job:
    """An extent that is being read.

    Everything before `at` has been taken by a thread, `reading` threads are at work on it, and
    `untold` bytes of it have been read and not yet been reported to the agent.  No dataclass: to
    import that module is a third of what it takes to start this process.
    """

    __slots__ = ("at", "end", "fd", "number", "reading", "untold")

    def __init__(self, number: int, fd: int, at: int, end: int) -> None:
        self.number, self.fd, self.at, self.end = number, fd, at, end
        self.reading = self.untold = 0


class Worker:
    """The worker process: its main thread takes the agent's orders, the others read.

    Args:
        connection: a SOCK_SEQPACKET socket to the agent, for ORDER and DONE messages.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._jobs: deque[_Job] = deque()
        self._wake = threading.Condition()
        self._depth = 1
        self._busy = 0
        self._binding: tuple[int, int, frozenset[int]] = (0, -1, frozenset())

    def run(self) -> None:
        """Take orders until the agent closes the socket, by ending or otherwise.

        A lent worker returns, too, when there was nothing to do for LENT_SECONDS.

        Raises:
            OSError: the socket fails.
        """
        # While a load keeps the CPUs busy, starting a thread takes a millisecond.
        for _ in range(MAX_DEPTH):
            threading.Thread(target=self._work, daemon=True).start()
        self._tell(0, READY, 0, 0)
        heard = select.poll()
        heard.register(self._connection, select.POLLIN)
        lent = False
        while True:
            if not heard.poll(LENT_SECONDS * 1000 if lent else None):
                with self._wake:
                    if self._jobs or self._busy:
                        continue
                return
            data, fds, _, _ = socket.recv_fds(self._connection, 4096, 1)
            if not data:
                return
            operation, argument, number, start, length = ORDER.unpack_from(data)
            if operation == READ:
                self._read(_Job(number, fds[0], start, start + length))
            elif operation == CANCEL:
                self._cancel(number)
            elif operation == BIND:
                cpus = frozenset(map(int, data[ORDER.size :].split()))
                self._binding = (self._binding[0] + 1, argument, cpus)
            elif operation == LENT:
                lent = True
            elif operation == DEPTH:
                with self._wake:
                    self._depth = max(1, min(argument, MAX_DEPTH))
                    self._wake.notify_all()

    def _read(self, job: _Job) -> None:
        """Queue an extent, and wake as many threads as it has chunks and as may read now."""
        with self._wake:
            self._jobs.append(job)
            chunks = -(-job.end // CHUNK_BYTES) - job.at // CHUNK_BYTES
            self._wake.notify(max(0, min(chunks, self._depth - self._busy)))

    def _cancel(self, number: int) -> None:
        """Take the rest of an extent out of the queue and report what was read and what was not."""
        with self._wake:
            job = next((queued for queued in self._jobs if queued.number == number), None)
            if job is None:
                return
            self._jobs.remove(job)
            left, job.at = job.end - job.at, job.end
            told, job.untold = job.untold, 0
            if not job.reading:
                os.close(job.fd)
        if told:
            self._tell(0, number, told, job.end - left)
        self._tell(errno.ECANCELED, number, left, job.end)

    def _take(self) -> tuple[_Job, int, int]:
        """Wait for a chunk that may be read now; return its extent, and where it starts and ends.

        Chunks end at multiples of CHUNK_BYTES, since a huge page cannot begin elsewhere.
        """
        with self._wake:
            while not self._jobs or self._busy >= self._depth:
                self._wake.wait()
            job, start = self._jobs[0], self._jobs[0].at
            job.at = min(job.end, (start // CHUNK_BYTES + 1) * CHUNK_BYTES)
            if job.at >= job.end:
                self._jobs.popleft()
            job.reading += 1
            self._busy += 1
            return job, start, job.at

    def _work(self) -> None:
        """Read one chunk after another for ever; a new binding takes effect before the next one."""
        bound = 0
        while True:
            job, start, end = self._take()
            if bound != self._binding[0]:
                bound, node, cpus = self._binding
                # The cgroup of the reader may allow none of these CPUs (a cpuset): then this thread
                # runs where it may, and the memory still comes from that node.
                with suppress(OSError):
                    os.sched_setaffinity(0, cpus)
                prefer_node(node)
            code = 0
            try:
                huge = start // CHUNK_BYTES % SEEN_CHUNKS != 0
                by_populate(job.fd, start, end - start, huge)
            except OSError as error:
                code = error.errno or errno.EIO
            with self._wake:
                self._busy -= 1
                job.reading -= 1
                ended = job.at >= job.end and not job.reading
                if ended:
                    os.close(job.fd)
                told = 0
                if not code:
                    job.untold += end - start
                if job.untold and (ended or job.untold >= TOLD_BYTES):
                    told, job.untold = job.untold, 0
                if self._jobs and (code or told):
                    # Another thread takes the next chunk while this one tells.  One with nothing to
                    # tell takes it itself: to wake one each time takes as long as to read a chunk.
                    self._wake.notify()
            if code:
                self._tell(code, job.number, end - start, end)
            if told:
                self._tell(0, job.number, told, end)

    def _tell(self, code: int, number: int, length: int, end: int) -> None:
        """Send a DONE message; end the process when there is no agent any more to take it."""
        try:
            self._connection.send(DONE.pack(code, number, length, end))
        except OSError:
            os._exit(0)  # the agent is gone


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


def give_up_rights() -> None:
    """Drop every capability of this process for good: reading files that are open takes none.

    Call it before threads start, which inherit what the first one has.

    Raises:
        OSError: the kernel refuses.

    Source: capset(2) and prctl(2), PR_SET_NO_NEW_PRIVS.
    """
    _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    # Two sets of three words, all empty: struct __user_cap_data_struct.
    if _libc.capset(ctypes.byref(_Header(_CAPABILITY_VERSION, 0)), (ctypes.c_uint32 * 6)()):
        raise _error()


def main() -> None:
    """Serve the socket whose descriptor is the only argument; the process ends in here."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    reads_huge_pages()  # now, and not when something is to be read
    call_reader()
    give_up_rights()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        Worker(socket.socket(fileno=int(sys.argv[1]))).run()
    finally:
        os._exit(0)  # without waiting for what is being read


if __name__ == "__main__":
    main()
