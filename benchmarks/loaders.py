# SPDX-License-Identifier: Apache-2.0
"""Loaders under test, each run cold in a process of its own and checked byte for byte.

A round forks a warmed-up parent: nothing is imported and nothing of the files is open or
mapped before the clock starts, and everything the loader held is gone when it ends. The
bytes it got are compared with the reference after the clock has stopped.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  # gives numpy the type bfloat16, which safe_open asks for by name
import numpy as np
from safetensors import safe_open

from benchmarks import memory
from benchmarks.checkpoints import data_offsets, generate
from benchmarks.directio import Plan, read_into, read_whole
from benchmarks.disks import device_bytes_read, difference, settled_bytes_read
from pagecache_bpf.errors import PagecacheError

# Bytes of one read().  The size matters: for a read() larger than read_ahead_kb the kernel
# widens its window to the size of the read (up to the device's largest request).  128 KiB is
# what cat and cp use, and about what buffered readers in libraries use.
_PIECE = 128 << 10
_LARGE_PIECE = 1 << 20
_BLOCK = 8 << 20
_MAP_POPULATE = getattr(mmap, "MAP_POPULATE", 0x8000)

# What a loader returns: per file, (offset in the file, the bytes it got from there), lazily:
# the work to find the offsets is not part of loading.
Loaded = Callable[[], "list[list[tuple[int, Any]]]"]


@dataclass(frozen=True)
class Outcome:
    """One round: the loader's seconds, the bytes it delivered, whether they were right.

    begun_s and ended_s are on CLOCK_MONOTONIC, to line up with residency samples.  device_bytes:
    read meanwhile, where the process itself has counted them.  cpu_s: CPU seconds of the loader
    alone, where they were measured.
    """

    seconds: float
    loaded_bytes: int
    correct: bool
    begun_s: float
    ended_s: float
    device_bytes: int | None = None
    cpu_s: float | None = None


class Reference:
    """The true contents of files, read past the page cache into memory."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = list(files)
        self.contents = [read_whole(path) for path in files]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(len(content) for content in self.contents)

    def matches(self, loaded: list[list[tuple[int, Any]]]) -> bool:
        """Tell whether every delivered piece equals the file's bytes at its offset."""
        for content, pieces in zip(self.contents, loaded, strict=True):
            true = np.frombuffer(content, np.uint8)
            for offset, piece in pieces:
                got = np.frombuffer(piece, np.uint8)
                if offset + got.size > true.size:
                    return False
                # In blocks: the answer for each byte takes as much memory as the bytes.
                for at in range(0, got.size, _BLOCK):
                    part = got[at : at + _BLOCK]
                    if not np.array_equal(true[offset + at : offset + at + part.size], part):
                        return False
        return True


def _load_safe_open(files: Sequence[Path], sizes: Sequence[int]) -> Callable[[], Loaded]:
    memory.reserve(sum(sizes))

    def load() -> Loaded:
        tensors: list[dict[str, Any]] = []
        for path in files:
            with safe_open(str(path), framework="numpy") as file:
                # For numpy safe_open copies each tensor out of its mapping: all bytes are read.
                tensors.append({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118

        def loaded() -> list[list[tuple[int, Any]]]:
            return [
                [
                    (
                        offset,
                        np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8),
                    )
                    for name, (offset, size) in data_offsets(path).items()
                    if size
                ]
                for path, arrays in zip(files, tensors, strict=True)
            ]

        return loaded

    return load


def _load_read(
    files: Sequence[Path], sizes: Sequence[int], piece: int = _PIECE
) -> Callable[[], Loaded]:
    # As above, the destination is faulted in before the clock starts.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_POPULATE
    buffers = [mmap.mmap(-1, max(size, 1), flags=flags) for size in sizes]

    def load() -> Loaded:
        for path, buffer, size in zip(files, buffers, sizes, strict=True):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            view = memoryview(buffer)
            done = 0
            while done < size:
                got = os.readv(fd, [view[done : min(done + piece, size)]])
                if got == 0:
                    raise PagecacheError(f"{path} ended early", f"{done} of {size} bytes")
                done += got
            os.close(fd)
        return lambda: [[(0, memoryview(b)[:size])] for b, size in zip(buffers, sizes, strict=True)]

    return load


def _load_pread(
    files: Sequence[Path],
    sizes: Sequence[int],
    piece: int = _LARGE_PIECE,
    thread_count: int = 8,
) -> Callable[[], Loaded]:
    """Threads that take pieces in the order of the files, as several streamers do."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_POPULATE
    buffers = [mmap.mmap(-1, max(size, 1), flags=flags) for size in sizes]

    def load() -> Loaded:
        fds = [os.open(path, os.O_RDONLY | os.O_CLOEXEC) for path in files]
        work = iter([(n, at) for n, size in enumerate(sizes) for at in range(0, size, piece)])
        lock = threading.Lock()
        short: list[Path] = []

        def read() -> None:
            while True:
                with lock:
                    number, at = next(work, (-1, 0))
                if number < 0:
                    return
                end = min(at + piece, sizes[number])
                while at < end:
                    got = os.preadv(fds[number], [memoryview(buffers[number])[at:end]], at)
                    if got == 0:
                        short.append(files[number])
                        return
                    at += got

        threads = [threading.Thread(target=read) for _ in range(thread_count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for fd in fds:
            os.close(fd)
        if short:
            raise PagecacheError(f"{short[0]} ended early")
        return lambda: [[(0, memoryview(b)[:size])] for b, size in zip(buffers, sizes, strict=True)]

    return load


def _load_mmap(files: Sequence[Path], sizes: Sequence[int]) -> Callable[[], Loaded]:
    def load() -> Loaded:
        maps = []
        for path in files:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            mapped = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
            os.close(fd)
            # One byte a page: every page is faulted in, nothing is copied.
            int(np.frombuffer(mapped, np.uint8)[:: mmap.PAGESIZE].sum())
            maps.append(mapped)
        return lambda: [[(0, mapped)] for mapped in maps]

    return load


LOADERS: dict[str, Callable[[Sequence[Path], Sequence[int]], Callable[[], Loaded]]] = {
    "safe_open": _load_safe_open,
    "read": _load_read,
    "read_1m": partial(_load_read, piece=_LARGE_PIECE),
    "read_16m": partial(_load_read, piece=16 * _LARGE_PIECE),
    "pread_8": _load_pread,
    "mmap": _load_mmap,
}


def in_child(work: Callable[[], Outcome], what: str) -> Outcome:
    """Run `work` in a fork and hand its outcome back; raises PagecacheError when it fails."""
    out_r, out_w = os.pipe()
    pid = os.fork()
    if pid == 0:
        answer: dict[str, Any]
        try:
            answer = asdict(work())
        except BaseException as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        try:
            data = json.dumps(answer).encode()
            os.write(out_w, struct.pack("<I", len(data)) + data)
        finally:
            os._exit(0)
    os.close(out_w)
    try:
        with os.fdopen(out_r, "rb") as pipe:
            data = pipe.read()
    finally:
        _, status = os.waitpid(pid, 0)
    if status != 0 or len(data) < 4:
        raise PagecacheError(f"{what} failed", f"its process died, wait status {status}")
    answer = json.loads(data[4:])
    if "error" in answer:
        raise PagecacheError(f"{what} failed", str(answer["error"]))
    return Outcome(**answer)


def measure(
    start: Callable[[], Loaded],
    reference: Reference,
    whole: bool,
    enter: Callable[[], None] | None = None,
    settle: bool = False,
) -> Outcome:
    """Time a load in this process and compare what it got.

    Args:
        start: loads.
        reference: what the bytes have to be.
        whole: every byte of the files has to be delivered.
        enter: called when all memory is there and before the clock starts (it moves this process
            into the memory cgroup whose page cache the load is to use).
        settle: count the device's bytes here, before the comparison, which may read from the
            files again; and until nothing is read any more.

    Returns:
        The load.
    """
    memory.touch()
    if enter:
        enter()
    before = device_bytes_read(reference.files[0]) if settle else None
    cpu = time.process_time()
    begun = time.monotonic()
    loaded = start()
    ended = time.monotonic()
    cpu = time.process_time() - cpu
    after = settled_bytes_read(reference.files[0]) if settle else None
    pieces = loaded()
    got = sum(memoryview(piece).nbytes for file in pieces for _, piece in file)
    right = reference.matches(pieces) and (not whole or got == reference.size)
    read = difference(before, after)
    return Outcome(ended - begun, got, right, begun, ended, read, cpu)


def warm_up() -> None:
    """Run every loader once on a tiny file in memory, so that forks find all code loaded."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        checkpoint = generate(Path(directory) / "tiny", 1 << 20, shards=1)
        sizes = [path.stat().st_size for path in checkpoint.files]
        for make in LOADERS.values():
            make(checkpoint.files, sizes)()()


def run_loader(
    name: str,
    files: Sequence[Path],
    reference: Reference,
    warmer: Callable[[Sequence[Path]], Callable[[], None]] | None = None,
    enter: Callable[[], None] | None = None,
    settle: bool = False,
) -> Outcome:
    """Run one round of the loader `name` over `files`, in a process of its own.

    warmer: started before the load and ended after it; its time counts (see peers.py).
    enter, settle: see measure(). The caller sees to the cache state. Raises PagecacheError when
    the loader fails.
    """
    sizes = [path.stat().st_size for path in files]

    def work() -> Outcome:
        start = LOADERS[name](files, sizes)

        def warmed() -> Loaded:
            stop = warmer(files) if warmer else None
            loaded = start()
            if stop:
                stop()
            return loaded

        # safe_open delivers tensors, which leaves out headers; the others deliver all bytes.
        return measure(warmed, reference, name != "safe_open", enter, settle)

    return in_child(work, f"loading with {name}")


def run_direct(
    files: Sequence[Path], reference: Reference, plan: Plan, huge: bool = False
) -> Outcome:
    """Run one round of direct I/O by `plan`: what the device gives when nothing is in the way.

    huge: into reserved huge pages (directio.reserved()).
    """

    def work() -> Outcome:
        start = read_into(files, plan, huge)

        def load() -> Loaded:
            buffers = start()
            return lambda: [[(0, buffer)] for buffer in buffers]

        return measure(load, reference, whole=True)

    return in_child(work, f"direct I/O ({plan})")
