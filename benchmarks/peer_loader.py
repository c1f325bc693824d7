# SPDX-License-Identifier: Apache-2.0
"""A loader of other people's, run cold in an interpreter that has it: make peers.

`python -m benchmarks.peer_loader NAME FILE...` gets ready, says so on stdout, waits for a line on
stdin, loads, and then prints its outcome as JSON.  Imports and a first load of a tiny file are
not timed.  What it got is compared with the files as direct I/O reads them, after the clock has
stopped, one file at a time: torch and a whole reference would not fit beside each other.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Tensors = dict[str, Any]


def runai(files: Sequence[Path]) -> Tensors:
    """run:ai model streamer, into tensors in memory."""
    from runai_model_streamer import SafetensorsStreamer

    with SafetensorsStreamer() as streamer:
        streamer.stream_files([str(path) for path in files])
        return dict(streamer.get_tensors())


def fastsafetensors(files: Sequence[Path]) -> Tensors:
    """Load with fastsafetensors without GPUDirect, into tensors in memory."""
    from fastsafetensors import SafeTensorsFileLoader

    loader = SafeTensorsFileLoader(None, "cpu", nogds=True)
    loader.add_filenames({0: [str(path) for path in files]})
    buffers = loader.copy_files_to_device()
    _KEPT.append((loader, buffers))  # the tensors lie in its memory
    return {name: buffers.get_tensor(name) for name in loader.get_keys()}


_KEPT: list[Any] = []
LOADERS: dict[str, Callable[[Sequence[Path]], Tensors]] = {
    "run:ai streamer": runai,
    "fastsafetensors": fastsafetensors,
}


def compare(files: Sequence[Path], tensors: Tensors) -> tuple[int, bool]:
    """Return the bytes that the tensors hold, and whether they are the files'."""
    import numpy as np
    import torch

    from benchmarks.checkpoints import data_offsets
    from benchmarks.directio import read_whole

    total, right = 0, True
    for path in files:
        true = np.frombuffer(read_whole(path), np.uint8)
        for name, (offset, size) in data_offsets(path).items():
            if size:
                got = tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy()
                right = right and np.array_equal(got, true[offset : offset + size])
                total += got.size
    return total, right


def main() -> int:
    """Load once, as the parent asks for it."""
    name, files = sys.argv[1], [Path(word) for word in sys.argv[2:]]
    load = LOADERS[name]
    from benchmarks import memory
    from benchmarks.checkpoints import generate
    from benchmarks.disks import device_bytes_read, difference

    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        load(generate(Path(directory) / "tiny", 1 << 20, shards=1).files)
    memory.reserve(sum(path.stat().st_size for path in files))
    print("ready", flush=True)
    sys.stdin.readline()
    before = device_bytes_read(files[0])
    begun = time.monotonic()
    tensors = load(files)
    ended = time.monotonic()
    after = device_bytes_read(files[0])
    total, right = compare(files, tensors)
    outcome = {
        "seconds": ended - begun,
        "loaded_bytes": total,
        "correct": right,
        "begun_s": begun,
        "ended_s": ended,
        "device_bytes": difference(before, after),
    }
    print(json.dumps(outcome), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
