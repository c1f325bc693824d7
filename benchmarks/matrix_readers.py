# SPDX-License-Identifier: Apache-2.0
"""The readers of benchmarks.matrix: each one cold load in a process of its own, checked.

Each counts its own CPU seconds and the device's bytes up to its end, what was read ahead of it and
came later included.
"""

from __future__ import annotations

import mmap
import os
import random
import resource
import shlex
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

from benchmarks import engines, hosted, loaders, memory, orders
from benchmarks.disks import device_bytes_read, difference, settled_bytes_read
from benchmarks.loaders import Loaded, Outcome, Reference
from benchmarks.matrix_cells import Reader
from pagecache_bpf.errors import PagecacheError
from pagecache_bpf.weights.models import Model

#: Random reads of a load: by size, so many at most, and of a small model a sixteenth.
_READS = {4096: 1000, 128 << 10: 400}
Enter = Callable[[], None]
Run = Callable[[Model, Reference, Enter, int], Outcome]


def _by_loader(name: str, model: Model, reference: Reference, enter: Enter, _: int) -> Outcome:
    return loaders.run_loader(name, model.files, reference, enter=enter, settle=True)


def _by_ranks(name: str, model: Model, reference: Reference, _: Enter, __: int) -> Outcome:
    order = next(order for order in _orders(model.root) if order.name == name)
    before = device_bytes_read(model.files[0])
    outcome = orders.run(order, reference)
    read = difference(before, settled_bytes_read(model.files[0]))
    return replace(outcome, device_bytes=read)


@cache
def _orders(root: Path) -> list[orders.Order]:
    from benchmarks import checkpoints

    return orders.make(checkpoints.load_dir(root))


def wanted(reader: Reader, model: Model) -> int:
    """Return the bytes that a reader wants of a model, whole pages."""
    if reader.kind == "ranks":
        order = next(order for order in _orders(model.root) if order.name == reader.name)
        return order.wanted_pages
    if reader.kind == "random":
        return len(places(reader, model, 0)) * _piece(reader)
    return model.size


def _piece(reader: Reader) -> int:
    return 128 << 10 if "128 KiB" in reader.name else 4096


def places(reader: Reader, model: Model, seed: int) -> list[tuple[int, int]]:
    """Choose where a random reader reads in a round: (number of a file, offset), none twice."""
    piece = _piece(reader)
    sizes = [path.stat().st_size for path in model.files]
    pieces = [(number, at) for number, size in enumerate(sizes) for at in range(size // piece)]
    count = min(_READS[piece], max(1, len(pieces) // 16))
    chosen = random.Random(f"{reader.name} {seed}").sample(pieces, count)
    return [(number, at * piece) for number, at in chosen]


def _at_random(
    reader: Reader, model: Model, reference: Reference, enter: Enter, seed: int
) -> Outcome:
    where, piece = places(reader, model, seed), _piece(reader)
    mapped = "pread" not in reader.name

    def start() -> Loaded:
        fds = [os.open(path, os.O_RDONLY | os.O_CLOEXEC) for path in model.files]
        got: list[list[tuple[int, bytes]]] = [[] for _ in fds]
        if not mapped:
            for number, at in where:
                got[number].append((at, os.pread(fds[number], piece, at)))
        else:
            maps = [mmap.mmap(fd, 0, prot=mmap.PROT_READ) for fd in fds]
            if "MADV_RANDOM" in reader.name:
                for memory in maps:
                    memory.madvise(mmap.MADV_RANDOM)
            for number, at in where:
                got[number].append((at, maps[number][at : at + piece]))
            for memory in maps:
                memory.close()
        for fd in fds:
            os.close(fd)
        return lambda: list(got)

    def work() -> Outcome:
        return loaders.measure(start, reference, whole=False, enter=enter, settle=True)

    return loaders.in_child(work, reader.name)


def _by_program(
    words: Callable[[Model], list[str]], model: Model, _: Reference, enter: Enter, __: int
) -> Outcome:
    """Run a program; that it read every byte is its exit status to tell."""

    def work() -> Outcome:
        memory.touch()
        enter()
        before = device_bytes_read(model.files[0])
        begun = time.monotonic()
        done = subprocess.run(words(model), capture_output=True, text=True, cwd=hosted.ROOT)
        ended = time.monotonic()
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        if done.returncode != 0:
            reason = (done.stderr.strip().splitlines() or ["it gave no reason"])[-1]
            raise PagecacheError(f"`{words(model)[0]}` failed", reason)
        read = difference(before, settled_bytes_read(model.files[0]))
        cpu = used.ru_utime + used.ru_stime
        return Outcome(ended - begun, model.size, True, begun, ended, read, cpu)

    return loaders.in_child(work, words(model)[0])


def engine_of(reader: Reader) -> str:
    """Return the function of tests/engines/start.py that starts an engine."""
    return reader.name.replace(".", "_").lower()


def _by_engine(reader: Reader, model: Model, enter: Enter) -> Outcome:
    """Start an engine; its seconds are those of its load, its bytes and CPU those of the start.

    That it has read every byte rightly its answer tells: it is that of the first start.
    """
    memory.touch()
    before = device_bytes_read(model.files[0])
    made = engines.start(engine_of(reader), model.root, enter)
    read = difference(before, settled_bytes_read(model.files[0]))
    correct = _answers.setdefault((reader.name, model.root), made.answer) == made.answer
    return Outcome(
        made.load_seconds, model.size, correct, made.begun_s, made.ended_s, read, made.cpu_s
    )


#: What the engines have answered at first, by reader and model.
_answers: dict[tuple[str, Path], object] = {}


def _cp(model: Model) -> list[str]:
    return [
        "sh",
        "-c",
        'for f in "$@"; do cp -- "$f" /dev/null || exit 1; done',
        "cp",
        *_names(model),
    ]


def _fio(model: Model) -> list[str]:
    names = ":".join(name.replace(":", r"\:") for name in _names(model))
    options = "--name=m --rw=read --bs=1M --ioengine=io_uring --iodepth=16 --direct=0"
    return ["fio", *shlex.split(options), "--invalidate=0", "--readonly", f"--filename={names}"]


def _names(model: Model) -> list[str]:
    return [str(path) for path in model.files]


#: Readers from front to back.
WHOLE: dict[str, Run] = {
    "safe_open": partial(_by_loader, "safe_open"),
    "read 1 MiB": partial(_by_loader, "read_1m"),
    "read 16 MiB": partial(_by_loader, "read_16m"),
    "pread by 8 threads": partial(_by_loader, "pread_8"),
    "mmap by pages": partial(_by_loader, "mmap"),
    "cp": partial(_by_program, _cp),
    "io_uring, buffered (fio)": partial(_by_program, _fio),
}


def run(reader: Reader, model: Model, reference: Reference, enter: Enter, seed: int) -> Outcome:
    """Load once; the caller sees to the cache state.

    Args:
        reader: by what and in which order.
        model: what is loaded.
        reference: its true bytes.
        enter: moves the calling process into the cgroup of the setting.
        seed: of the round; the same places are read in each of its states.

    Returns:
        The load.

    Raises:
        PagecacheError: the reader failed.
    """
    if reader.kind == "engine":
        return _by_engine(reader, model, enter)
    if reader.kind == "random":
        return _at_random(reader, model, reference, enter, seed)
    if reader.kind == "ranks":
        return _by_ranks(reader.name, model, reference, enter, seed)
    return WHOLE[reader.name](model, reference, enter, seed)
