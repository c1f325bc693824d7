# SPDX-License-Identifier: Apache-2.0
"""What a process without privilege does for its load: a readahead window in front of its reader.

Threads read ahead, chunk by chunk in the order that is expected, and never more than the window
ahead of where the reader is, which is looked up in procfs (reader_progress).  The window moves on
as the reader passes chunks; a chunk that the reader jumps to becomes its new start. When nothing of
a reader can be seen, the window is filled once and stays as it is: the rest of the load goes at the
kernel's own speed.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pagecache_bpf.agent import read_threads, worker
from pagecache_bpf.errors import PagecacheError
from pagecache_bpf.kernel import cgroups
from pagecache_bpf.kernel.file_pages import PAGE_SIZE
from pagecache_bpf.loads.reader_progress import FileProgress, ReaderProgress
from pagecache_bpf.loads.residency_snapshot import CHUNK, Snapshot, opened, resident_bytes

#: The window unless a budget asks for less; also bounded by a part of the memory that is free.
WINDOW_BYTES = 1 << 30
_FREE_PART = 4
_LOOK_SECONDS = 0.02  # at most a twentieth of the time is spent looking
_MEMORY_SECONDS = 0.25
_AHEAD = 64  # chunks beyond the window in which a reader that overtakes it is looked for
_SLACK = 32  # chunks that readers may go back, as loaders do that sort tensors by name

_IDLE, _READING, _READY, _GONE = range(4)


@dataclass
class _File:
    """A file of the load: how to open it, and what is known of its readers."""

    path: Path
    identity: tuple[int, int]
    size: int
    source: read_threads.Source
    fd: int = -1  # held while chunks of it are being read
    reading: int = 0
    opened: bool = False  # by a reader, when we last looked
    used: bool = False  # something of it was consumed


@dataclass
class _Chunk:
    """A chunk of a file, given by its index, that is read, passed and dropped as a whole."""

    file: int
    offset: int
    length: int
    state: int = _IDLE
    before: bool = False  # was in the cache when the load began


class ReadaheadWindow:
    """A window over the files of one load; it runs until stop().

    Args:
        files: real paths of the files.
        snapshot: what of them was in the page cache before, which is never dropped.
        order: index of the file, offset and length in bytes in the order in which they will be
            read; None: the files one after the other.
        budget: bytes that may be in the page cache at a time; None: no bound.
        cpus: CPUs that the threads run on, from whose NUMA node the pages come; empty: any.

    Attributes:
        notes: what went wrong, in sentences for people.

    Raises:
        OSError: a file is gone.
    """

    def __init__(
        self,
        files: Sequence[Path],
        snapshot: Snapshot,
        *,
        order: Iterable[tuple[int, int, int]] | None = None,
        budget: int | None = None,
        cpus: Sequence[int] = (),
    ) -> None:
        self.notes: list[str] = []
        self._snapshot = snapshot
        self._files = [_file(path) for path in files]
        self._chunks = _cut(
            order if order is not None else ((n, 0, f.size) for n, f in enumerate(self._files)),
            [file.size for file in self._files],
        )
        for chunk in self._chunks:
            chunk.before = snapshot.was_there(chunk.file, chunk.offset)
        self._budget = budget
        self._cpus = frozenset(cpus)
        self._bound = threading.local()
        self._threads: set[int] = set()
        self._lock = threading.Lock()
        self._number = {id(file.source): n for n, file in enumerate(self._files)}
        self._next = 0  # the first chunk that may have to be asked for
        self._cursor = 0  # chunks before it are behind the readers
        self._reading: dict[tuple[int, int], int] = {}  # chunks by file and offset
        self._ready: set[int] = set()
        self._consumed: deque[int] = deque()
        self._outstanding = 0  # bytes being read or ready, not consumed
        self._held = 0  # bytes brought in and not dropped
        self._room, self._room_until = 0, 0.0
        self._bypassed = False
        self._stop = threading.Event()
        self._progress = ReaderProgress([file.identity for file in self._files])
        self._executor = read_threads.Executor(self._settled, read=self._read)
        self._watcher = threading.Thread(target=self._watch, name="window", daemon=True)
        self._watcher.start()

    # --- what is asked from outside ---

    @property
    def prefetched_bytes(self) -> int:
        """Bytes read ahead."""
        return self._executor.totals.read_bytes

    @property
    def outstanding_bytes(self) -> int:
        """Bytes ahead of the reader: read or being read, and not passed by it yet."""
        return self._outstanding

    @property
    def thread_ids(self) -> frozenset[int]:
        """Threads of this process that belong to the window."""
        return frozenset(self._threads)

    @property
    def dropped_bytes(self) -> int:
        """Bytes dropped behind the reader so far, for the sake of the budget."""
        return self._executor.totals.dropped_bytes

    def stop(self) -> None:
        """End the window; what is being read is finished."""
        self._stop.set()
        self._watcher.join()
        self._executor.cancel(None)
        self._executor.stop()
        self._progress.close()
        for file in self._files:
            self._let_go(file)
        if self._executor.totals.by_errno:
            names = (
                f"{count} x {os.strerror(code)}"
                for code, count in self._executor.totals.by_errno.items()
            )
            self.notes.append(f"reads that failed: {', '.join(names)}")

    # --- the watcher ---

    def _watch(self) -> None:
        """Look where the readers are and ask for more, again and again, until stop()."""
        self._threads.add(threading.get_native_id())
        try:
            self._pass_over_what_is_there()
            while not self._stop.is_set():
                started = time.monotonic()
                self._look()
                self._ask()
                took = time.monotonic() - started
                self._stop.wait(max(_LOOK_SECONDS, 19 * took))
        except Exception as error:  # a server must not notice
            self.notes.append(f"the window ended: {type(error).__name__}: {error}")

    def _pass_over_what_is_there(self) -> None:
        """Mark chunks that are wholly in the page cache, which need not be read."""
        for number, file in enumerate(self._files):
            mine = [chunk for chunk in self._chunks if chunk.file == number and chunk.before]
            if not mine or not self._snapshot.known:
                continue
            with suppress(OSError), opened(file.path) as fd:
                for chunk in mine:
                    if (resident_bytes(fd, chunk.offset, chunk.length) or 0) >= chunk.length:
                        chunk.state = _GONE

    def _look(self) -> None:
        """Find out where the readers are, and which files they have closed again."""
        with self._lock:
            parts = frozenset(
                (file, offset, _pages(self._chunks[at].length))
                for (file, offset), at in self._reading.items()
            )
            ours = frozenset(file.fd for file in self._files if file.fd >= 0)
        seen = self._progress.look(ours, parts)
        if any(progress.direct for progress in seen.values()) and not self._bypassed:
            self._bypassed = True
            self.notes.append("the reader bypasses the page cache (O_DIRECT): nothing more is read")
        with self._lock:
            self._follow(seen)
            for number, file in enumerate(self._files):
                now = number in seen
                if file.opened and not now and file.used:
                    # Closed again: whatever was wanted of it has been read.
                    self._consume(at for at in self._ready if self._chunks[at].file == number)
                file.opened = now

    def _follow(self, seen: dict[int, FileProgress]) -> None:
        """Note the chunks that readers have consumed, and move the cursor."""
        end = min(max(self._next, self._cursor) + _AHEAD, len(self._chunks))
        found = [
            at
            for at in range(self._cursor, end)
            if self._chunks[at].state != _READING
            and (there := seen.get(self._chunks[at].file))
            and self._is_touched(there, self._chunks[at], self._chunks[end - 1])
        ]
        if (
            not found
            and seen
            and not any(progress.mappings or progress.position for progress in seen.values())
        ):
            found = self._by_bytes_read()
        if not found:
            return
        for at in found:
            self._files[self._chunks[at].file].used = True
            if self._chunks[at].state == _IDLE:
                self._chunks[at].state = _GONE  # the reader was faster
        self._cursor = max(self._cursor, found[-1] + 1 - _SLACK)
        self._next = max(self._next, self._cursor)
        self._consume([at for at in found if at in self._ready])
        self._consume([at for at in self._ready if at < self._cursor])

    def _is_touched(self, seen: FileProgress, chunk: _Chunk, last: _Chunk) -> bool:
        """Tell whether a reader has passed a chunk: by its position, or by a page in its middle."""
        if seen.position >= chunk.offset + chunk.length and (
            # Further on than anybody reads between two looks: it looks for an archive's index.
            last.file != chunk.file or seen.position <= last.offset + last.length
        ):
            return True
        middle = (chunk.offset + chunk.length // 2) // PAGE_SIZE * PAGE_SIZE
        return any(self._progress.touched(mapping, middle) for mapping in seen.mappings)

    def _by_bytes_read(self) -> list[int]:
        """Estimate which chunks a reader with pread(2) has passed, by the bytes it has read."""
        credit = self._progress.read_bytes(self.thread_ids)
        passed = []
        for at, chunk in enumerate(self._chunks[: self._next]):
            credit -= chunk.length
            if credit < 0:
                break
            if at in self._ready:
                passed.append(at)
        return passed

    def _consume(self, chunks: Iterable[int]) -> None:
        """Mark chunks as passed by the reader: they leave the window, and may be dropped."""
        for at in list(chunks):
            self._chunks[at].state = _GONE
            self._ready.discard(at)
            self._outstanding -= self._chunks[at].length
            self._consumed.append(at)

    def _ask(self) -> None:
        """Ask for chunks while the window has room; a budget may make passed ones go first."""
        window = self._window()
        asked = []
        with self._lock:
            while not self._bypassed and (at := self._first_idle()) is not None:
                chunk = self._chunks[at]
                if self._outstanding + chunk.length > window and self._outstanding:
                    break
                if self._budget is not None and self._held + chunk.length > self._budget:
                    if not self._drop_one():
                        break
                    continue
                chunk.state = _READING
                self._reading[chunk.file, chunk.offset] = at
                self._outstanding += chunk.length
                self._held += chunk.length
                self._next = at + 1
                asked.append(chunk)
                file = self._files[chunk.file]
                file.reading += 1
                if file.fd < 0:
                    with suppress(OSError):
                        file.fd = file.source.acquire()
        for chunk in asked:
            source = self._files[chunk.file].source
            self._executor.submit(read_threads.Extent(source, chunk.offset, chunk.length, 0))

    def _first_idle(self) -> int | None:
        """Return the index of the next chunk to ask for; None: all have been asked for."""
        for at in range(self._next, len(self._chunks)):
            if self._chunks[at].state == _IDLE:
                return at
        self._next = len(self._chunks)
        return None

    def _drop_one(self) -> bool:
        """Drop the chunk that the reader passed first, unless it was cached before the load.

        False: there is none left.
        """
        while self._consumed:
            chunk = self._chunks[self._consumed.popleft()]
            self._held -= chunk.length
            if not chunk.before:
                file = self._files[chunk.file].source
                self._executor.submit(
                    read_threads.Extent(file, chunk.offset, chunk.length, 0, drop=True)
                )
            return True
        return False

    def _window(self) -> int:
        """Return how many bytes may be ahead of the reader, at most a part of the free memory."""
        now = time.monotonic()
        if now >= self._room_until:
            self._room_until = now + _MEMORY_SECONDS
            self._room = free_memory() // _FREE_PART
        wanted = WINDOW_BYTES if self._budget is None else min(self._budget, WINDOW_BYTES)
        # What is outstanding is no longer free.
        return min(wanted, self._room + self._outstanding)

    # --- the workers ---

    def _read(self, fd: int, start: int, length: int) -> None:
        """Read a chunk in a thread of the executor, which binds itself to its CPUs first."""
        if not hasattr(self._bound, "done"):
            self._bound.done = True
            self._threads.add(threading.get_native_id())
            self._bind()
        try:
            worker.by_populate(fd, start, length)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            worker.by_readahead(fd, start, length)  # before Linux 5.14

    def _bind(self) -> None:
        """Run this thread on the wanted CPUs: pages come from the node of who reads them."""
        allowed = os.sched_getaffinity(0) & self._cpus
        if allowed:
            os.sched_setaffinity(0, allowed)
        elif self._cpus and not any("node" in note for note in self.notes):
            self.notes.append("this process may not run on the node next to the device")

    def _settled(self, extent: read_threads.Extent, start: int, length: int) -> None:
        """Note that a chunk is in the page cache, or that reading it has failed."""
        if extent.drop:
            return
        with self._lock:
            number = self._number[id(extent.file)]
            at = self._reading.pop((number, start), None)
            if at is None:
                return
            self._chunks[at].state = _READY
            self._ready.add(at)
            file = self._files[number]
            file.reading -= 1
            if not file.reading:
                self._let_go(file)

    def _let_go(self, file: _File) -> None:
        """Close a file of which no chunk is being read."""
        if file.fd >= 0:
            file.fd = -1
            file.source.release()


def free_memory() -> int:
    """Ask how much memory can be filled before anything of value has to be reclaimed.

    Returns:
        MemAvailable of the host in bytes, or the headroom of this process's memory cgroup if that
        is less.
    """
    free = cgroups.host_memory().get("MemAvailable", 0)
    with suppress(PagecacheError):
        headroom = cgroups.of_process().headroom
        if headroom is not None:
            free = min(free, headroom)
    return free


def _file(path: Path) -> _File:
    """Describe a file, which is later opened only if its path still leads to the same inode."""
    status = os.stat(path)
    identity = (status.st_dev, status.st_ino)

    def opener() -> int:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        found = os.fstat(fd)
        if (found.st_dev, found.st_ino) != identity:
            os.close(fd)
            raise FileNotFoundError(errno.ENOENT, "another file has its name now", str(path))
        return fd

    return _File(path, identity, status.st_size, read_threads.Source(opener))


def _cut(extents: Iterable[tuple[int, int, int]], sizes: Sequence[int]) -> list[_Chunk]:
    """Cut extents into chunks that end at multiples of CHUNK, none of them twice."""
    chunks = []
    taken: set[tuple[int, int]] = set()
    for file, offset, length in extents:
        at = offset // CHUNK * CHUNK
        end = min(offset + length, sizes[file])
        while at < end:
            # Neighbors in a chunk come with it: reading it in two parts takes longer.
            if (file, at) not in taken:
                taken.add((file, at))
                chunks.append(_Chunk(file, at, min(CHUNK, sizes[file] - at)))
            at += CHUNK
    return chunks


def _pages(length: int) -> int:
    return (length + PAGE_SIZE - 1) // PAGE_SIZE * PAGE_SIZE
