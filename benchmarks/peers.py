# SPDX-License-Identifier: Apache-2.0
"""What people do today to load faster: warmers that run before or beside an unmodified loader.

Each peer is a function of the files that starts it and returns what ends it; its time counts.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

Stop = Callable[[], None]

_BLOCK = 16 << 20
_THREADS = 8


def _nothing() -> None:
    """There is nothing to end."""


def vmtouch(files: Sequence[Path]) -> Stop:
    """`vmtouch -t`: touch every page, then load."""
    subprocess.run(["vmtouch", "-q", "-t", *files], check=True)
    return _nothing


def cat(files: Sequence[Path]) -> Stop:
    """`cat FILES >/dev/null`, then load."""
    subprocess.run(["cat", *files], check=True, stdout=subprocess.DEVNULL)
    return _nothing


def prefetch_threads(files: Sequence[Path]) -> Stop:
    """As inference servers do it themselves: threads that read all shards, beside the loader.

    Blocks of 16 MiB are read and thrown away, from the front of one shard after the other.
    """
    ended = threading.Event()
    work = iter([(path, offset) for path in files for offset in range(0, _size(path), _BLOCK)])
    lock = threading.Lock()

    def read() -> None:
        buffer = bytearray(_BLOCK)
        while not ended.is_set():
            with lock:
                piece = next(work, None)
            if piece is None:
                return
            fd = os.open(piece[0], os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.preadv(fd, [buffer], piece[1])
            finally:
                os.close(fd)

    threads = [threading.Thread(target=read, daemon=True) for _ in range(_THREADS)]
    for thread in threads:
        thread.start()

    def stop() -> None:
        ended.set()
        for thread in threads:
            thread.join()

    return stop


def _size(path: Path) -> int:
    return path.stat().st_size


PEERS: dict[str, Callable[[Sequence[Path]], Stop]] = {
    "vmtouch -t": vmtouch,
    "cat": cat,
    "prefetch threads": prefetch_threads,
}
_NEEDS = {"vmtouch -t": "vmtouch"}


def available() -> list[str]:
    """The peers that this machine has."""
    return [name for name in PEERS if name not in _NEEDS or shutil.which(_NEEDS[name])]
