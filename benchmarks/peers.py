# SPDX-License-Identifier: Apache-2.0
"""What people do today to load faster.

Warmers run before or beside an unmodified loader: each is a function of the files that starts it
and returns what ends it, and its time counts.  Loaders that replace it need torch and so an
environment of their own, build/peers (make peers); see peer_loader.py.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from benchmarks import hosted, memory
from benchmarks.loaders import Outcome
from pagecache_bpf.errors import PagecacheError

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
    """Prefetch as inference servers do it: threads that read all shards beside the loader.

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

#: Loaders that replace the unmodified one: name to the package it comes in.
REPLACEMENTS = {
    "run:ai streamer": "runai_model_streamer",
    "fastsafetensors": "fastsafetensors",
}
PYTHON = hosted.BUILD / "peers" / "bin" / "python"


def available() -> list[str]:
    """Return the warmers that this machine has."""
    return [name for name in PEERS if name not in _NEEDS or shutil.which(_NEEDS[name])]


def run_replacement(name: str, files: Sequence[Path]) -> Outcome:
    """Run one round of another loader, in an interpreter that is ready when the clock starts.

    Raises PagecacheError when it fails.
    """
    process = subprocess.Popen(
        [PYTHON, "-m", "benchmarks.peer_loader", name, *map(str, files)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=hosted.ROOT,
    )
    assert process.stdin is not None and process.stdout is not None
    with process:
        said = process.stdout.readline()
        if said == "ready\n":
            memory.touch()
            out, err = process.communicate("\n")
        else:
            out, err = said, process.communicate()[1]
    if process.returncode != 0:
        reason = (err.strip().splitlines() or ["it gave no reason"])[-1]
        raise PagecacheError(f"loading with {name} failed", reason)
    return Outcome(**json.loads(out.splitlines()[-1]))


def replacements() -> tuple[dict[str, Callable[[Sequence[Path]], Outcome]], dict[str, str]]:
    """Return the other loaders that this machine has, and why it has not the others."""
    have: dict[str, Callable[[Sequence[Path]], Outcome]] = {}
    lack: dict[str, str] = {
        name: f"{program} is not installed"
        for name, program in _NEEDS.items()
        if not shutil.which(program)
    }
    for name, package in REPLACEMENTS.items():
        if not PYTHON.exists():
            lack[name] = "build/peers is absent: make peers"
            continue
        done = subprocess.run([PYTHON, "-c", f"import {package}"], capture_output=True, text=True)
        if done.returncode == 0:
            have[name] = partial(run_replacement, name)
        else:
            lack[name] = (done.stderr.strip().splitlines() or ["it cannot be imported"])[-1]
    return have, lack
