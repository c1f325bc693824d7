# SPDX-License-Identifier: Apache-2.0
"""What of a load's files was in the page cache when it began, so that its end can leave just that.

It also lets loads of other processes see that these files are being loaded.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from pagecache_bpf.kernel.residency import CHUNK, CachedChunks, ChunkLook, resident_bytes

__all__ = ["CHUNK", "Snapshot", "opened", "resident_bytes", "resident_of"]


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """Open a file for reading for as long as the with block runs.

    Args:
        path: the file.

    Yields:
        Its descriptor, which does not block and is closed on exec.

    Raises:
        OSError: it cannot be opened.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        yield fd
    finally:
        os.close(fd)


def resident_of(paths: Sequence[Path]) -> int | None:
    """Count the bytes of several files in the page cache.

    Args:
        paths: the files; one that is gone counts as 0.

    Returns:
        Bytes; None if this user may not know it of one of them.
    """
    total = 0
    for path in paths:
        try:
            with opened(path) as fd:
                found = resident_bytes(fd)
        except OSError:
            continue  # gone: nothing of it is reachable by that name
        if found is None:
            return None
        total += found
    return total


class Snapshot:
    """What of the files of a load was cached, and a claim that the load is under way.

    Attributes:
        known: whether this user may know what is in the page cache.
        resident: bytes of all the files that were there.
        taken: set once every file has been looked at.
    """

    def __init__(self, paths: Sequence[Path], *, look: bool = True) -> None:
        """Claim the files, and look at them.

        Args:
            paths: the files of the load.
            look: look at once; otherwise begin() and take() do.
        """
        self._paths = tuple(paths)
        self.known = True
        self.resident = 0
        self.taken = threading.Event()
        # A shared lock on the first file tells the loads of other processes (the ranks of one
        # model) that this one is under way; nobody needs to be asked, and it ends with us.
        self._claim = -1
        with suppress(OSError, IndexError):
            self._claim = os.open(paths[0], os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            fcntl.flock(self._claim, fcntl.LOCK_SH | fcntl.LOCK_NB)
        self._cached: dict[Path, CachedChunks] = {}
        self._under_way: ChunkLook | None = None  # at the first file that is not in _cached
        if look:
            self.take()

    def begin(self, seconds: float) -> None:
        """Look at as much as the time allows, from the front of the first file on.

        Of files that are not cached that is all of them.

        Args:
            seconds: when to stop; take() goes on from there.
        """
        self._look(time.monotonic() + seconds)

    def take(self, earlier: Snapshot | None = None) -> None:
        """Look at every file that has not been looked at.

        Args:
            earlier: the snapshot of a load of the same files that is just ending: what it has
                brought into the cache and not dropped yet is not taken for what was there before.
        """
        if earlier is not None:
            for path in self._paths:
                cached = earlier._cached.get(path)
                if cached is not None:
                    self._add(path, cached)
        self._look(None)

    def _look(self, until: float | None) -> None:
        """Look at one file after the other until then; None: to the end."""
        for path in self._paths:
            if path in self._cached:
                continue
            try:
                with opened(path) as fd:
                    look = self._under_way or ChunkLook(fd)
                    self._under_way = None if look.go_on(fd, until) else look
                    if self._under_way is not None:
                        return
                    cached = look.result()
            except OSError:
                self._under_way, cached = None, CachedChunks(0, None)
            self._add(path, cached)
        self.taken.set()

    def _add(self, path: Path, cached: CachedChunks) -> None:
        """Note what of a file was cached."""
        self.known &= cached.known
        self.resident += cached.resident
        self._cached[path] = cached

    def was_there(self, file: int, offset: int) -> bool:
        """Tell whether at least half of a chunk was in the page cache when the load began.

        Args:
            file: the index of the file.
            offset: any byte of the chunk, from the start of the file.

        Returns:
            True also where it is not known, so that nothing is dropped that may have been there.
        """
        cached = self._cached.get(self._paths[file])
        return cached is None or cached.has(offset)

    def others(self) -> bool:
        """Tell whether another process, or another load in this one, is loading these files.

        Returns:
            False also where the first file could not be opened or locked.

        Source: flock(2).
        """
        if self._claim < 0:
            return False
        try:
            fcntl.flock(self._claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
        return False

    def close(self) -> None:
        """Take back the claim that the load is under way."""
        if self._claim >= 0:
            os.close(self._claim)
            self._claim = -1

    def drop_rest(self) -> int | None:
        """Drop what was not in the page cache when the load began, as far as nobody maps it.

        Nothing is dropped while another process loads the same files: the last one drops.

        Returns:
            Bytes that went; None if it is not known what was there.
        """
        if not self.known:
            return None
        if self.others():
            return 0
        dropped = 0
        for path, cached in list(self._cached.items()):
            with suppress(OSError), opened(path) as fd:
                dropped += cached.drop_others(fd)
        return dropped
