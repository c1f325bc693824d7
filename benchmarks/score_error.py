# SPDX-License-Identifier: Apache-2.0
"""What the score says of a load, against the load: models of which a part is in the page cache.

    python -m benchmarks.score_error --directory DIR
    python -m benchmarks.score_error --directory DIR --device-limit 64MB

DIR has to be on a disk.  With a limit (root, cgroup) it gives so many bytes a second at most, as
volumes of clouds and storage behind a network do; without, a local disk can be as fast as a
processor copies, and then it is the processor that is measured.

A state is a share of the model and where it lies: at its front, at its end, or in pieces of 4 MiB
that are scattered.  In each state, checked with cachestat, the node's score is asked for as
schedulers get it, and then the model is read into one buffer in two ways: by a loader that reads it
from its front to its end, with our load() (no privilege, own threads) and without.  The speeds in
the score are what it measured once, before.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import pagecache_bpf
from benchmarks import cgroups, hosted, memory
from benchmarks.cachestat import drop
from pagecache_bpf.explain import device_speed
from pagecache_bpf.kernel.cachestat import cachestat
from pagecache_bpf.placement.copy_speed import MEASUREMENTS, CopySpeed
from pagecache_bpf.placement.node_watch import NodeWatch, Speeds
from pagecache_bpf.units import parse_size
from tests.native.readahead import usual_readahead
from tests.unit.weights import safetensors

OUT = Path("build/bench/score_error.json")
SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
PLACES = ("front", "end", "scattered")
WAYS = ("load()", "without")
_BLOCK = 4 << 20
_PIECE = 2 << 20


def set_state(path: Path, share: float, place: str) -> int:
    """Leave a share of a file in the page cache, and nothing else of it.

    Args:
        path: the file.
        share: of its blocks, 0 to 1.
        place: one of PLACES.

    Returns:
        Bytes in the page cache, by cachestat.
    """
    drop([path])
    fd = os.open(path, os.O_RDONLY)
    try:
        blocks = list(range(0, os.fstat(fd).st_size, _BLOCK))
        wanted = round(len(blocks) * share)
        chosen = blocks[:wanted]
        if place == "end":
            chosen = blocks[len(blocks) - wanted :]
        elif place == "scattered":
            chosen = sorted(random.Random(share).sample(blocks, wanted))
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        for offset in chosen:
            os.pread(fd, _BLOCK, offset)
        return cachestat(fd).cached * mmap.PAGESIZE
    finally:
        os.close(fd)


def read(path: Path, buffer: mmap.mmap) -> None:
    """Read a file from its front to its end, as loaders do."""
    fd = os.open(path, os.O_RDONLY)
    try:
        offset = 0
        while got := os.preadv(fd, [buffer], offset):
            offset += got
    finally:
        os.close(fd)


def load_seconds(path: Path, way: str, buffer: mmap.mmap) -> float:
    """Load a model once; returns the seconds from the first call to the last byte."""
    began = time.perf_counter()
    with pagecache_bpf.load(path) if way == "load()" else nullcontext():
        read(path, buffer)
        return time.perf_counter() - began


def measure(path: Path, states: Sequence[tuple[float, str]]) -> list[dict[str, Any]]:
    """Measure each way in each state, in an order that no share follows."""
    rows = []
    # Measured as a node does it; what the machine remembers of its devices knows of no limit.
    copy = CopySpeed()
    device = device_speed.measure([path]).bytes_per_second
    speeds = Speeds(device, max(copy.now() for _ in range(MEASUREMENTS)))
    with mmap.mmap(-1, _PIECE) as buffer:
        buffer.write(bytes(_PIECE))
        work = [(share, place, way) for share, place in states for way in WAYS]
        random.Random(1).shuffle(work)
        for share, place, way in work:
            memory.touch()
            cached = set_state(path, share, place)
            (score,) = NodeWatch([path], speeds=speeds).scores().models
            told = score.seconds
            assert told is not None
            took = load_seconds(path, way, buffer)
            row: dict[str, Any] = {"share": share, "place": place, "way": way, "cached": cached}
            row |= {"device": score.device_rate, "host_to_device": score.host_to_device_rate}
            rows.append(row | {"told_s": told, "took_s": took, "error": abs(told - took) / took})
    return rows


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Errors by way: how many states, the median, the largest, and the bias."""
    made: dict[str, Any] = {}
    for way in WAYS:
        own = [row for row in rows if row["way"] == way]
        ratios = [row["told_s"] / row["took_s"] for row in own]
        made[way] = {
            "states": len(own),
            "median_error": statistics.median(row["error"] for row in own),
            "largest_error": max(row["error"] for row in own),
            "median_told_over_took": statistics.median(ratios),
        }
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--directory", type=Path, required=True, help="on a disk")
    parser.add_argument("--mebibytes", type=int, default=512, help="of the model")
    parser.add_argument(
        "--device-limit", metavar="SIZE", type=parse_size, help="bytes a second that the disk gives"
    )
    args = parser.parse_args(argv)
    states = [(share, place) for share in SHARES[1:-1] for place in PLACES]
    states += [(0.0, "front"), (1.0, "front")]
    with tempfile.TemporaryDirectory(dir=args.directory) as root:
        path = Path(root, "model.safetensors")
        safetensors(path, {f"t.{part}": (args.mebibytes * 256, 512) for part in range(4)})
        os.sync()
        with ExitStack() as stack:
            stack.enter_context(usual_readahead(path))
            stack.enter_context(memory.backed(2 * args.mebibytes << 20))
            if args.device_limit:
                stack.enter_context(cgroups.limited_device(path, args.device_limit))
            rows = measure(path, states)
    given = {"mebibytes": args.mebibytes, "device_limit": args.device_limit}
    result = {**given, "load_average": os.getloadavg(), **summary(rows)}
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps({**result, "rows": rows}, indent=1))
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(hosted.guarded(main))
