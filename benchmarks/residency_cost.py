# SPDX-License-Identifier: Apache-2.0
"""What it costs to ask how much of a model of many shards is in the page cache.

    python -m benchmarks.residency_cost

The shards are small: what counts is how many there are.  Each round starts a Python process of its
own that asks four times: with nothing imported but what inference engines import anyway (the first
look brings in this package's own modules, too), once more, by again(), and by a loop of nothing but
openat(2), cachestat(2) and close(2).  The floor is that loop in C, of as many files, if there is a
compiler.  CPU time is measured, all of it of one thread and none of it waiting, so that others on
the machine take little part; of all rounds the median is printed, and the least.  Needs no root.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from benchmarks.checkpoints import hub_snapshot

_ASK = """
import collections, contextlib, ctypes, dataclasses, inspect, json, logging, os, pathlib, socket
import sys, time, typing
import pagecache_bpf
clock, path = time.process_time, sys.argv[1]
times = [clock()]
found = pagecache_bpf.residency(path)
times.append(clock())
found = pagecache_bpf.residency(path)
times.append(clock())
found.again()
times.append(clock())
call = ctypes.CDLL(None).syscall
call.argtypes = (ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint)
whole, answer = (ctypes.c_uint64 * 2)(), (ctypes.c_uint64 * 5)()
names, at = list(found.files), (ctypes.addressof(whole), ctypes.addressof(answer))
times.append(clock())
for name in names:
    fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    call(451, fd, *at, 0)
    os.close(fd)
times.append(clock())
del times[3:4]
print([after - before for before, after in zip(times, times[1:])])
"""
_FLOOR = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
int main(int argc, char **argv)
{
	struct timespec a, b;
	uint64_t range[2] = { 0, 0 }, answer[5], pages = 0;
	clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &a);
	for (int i = 1; i < argc; i++) {
		int fd = open(argv[i], O_RDONLY | O_CLOEXEC | O_NONBLOCK);
		syscall(451, fd, range, answer, 0);
		pages += answer[0];
		close(fd);
	}
	clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &b);
	printf("%.9f\n", (double)(b.tv_sec - a.tv_sec) + (double)(b.tv_nsec - a.tv_nsec) / 1e9);
	return pages == 0;
}
"""


def _make(directory: Path, shards: int, tensors: int) -> None:
    """Write the shards, each with as many tensors, and their index."""
    directory.mkdir()
    where: dict[str, str] = {}
    for number in range(1, shards + 1):
        name = f"model-{number:05}-of-{shards:05}.safetensors"
        names = [f"model.layers.{number}.part.{part}.weight" for part in range(tensors)]
        save_file({name: np.full(1024, number, np.float16) for name in names}, directory / name)
        where |= dict.fromkeys(names, name)
    index = {"metadata": {"total_size": 0}, "weight_map": where}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _floor(scratch: Path, files: list[str]) -> list[float]:
    """Return the seconds of the loop in C; none without a compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        return []
    program = scratch / "floor"
    (scratch / "floor.c").write_text(_FLOOR)
    subprocess.run([compiler, "-O2", "-o", program, scratch / "floor.c"], check=True)
    done = subprocess.run([program, *files], check=True, capture_output=True, text=True)
    return [float(done.stdout)]


def main() -> None:
    """Measure, and print a line for each layout and way to ask."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--shards", type=int, default=1000)
    parser.add_argument("--tensors", type=int, default=20, help="of a shard")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--directory", type=Path, help="where to make the files (a disk)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.directory) as made:
        scratch = Path(made)
        _make(scratch / "plain", args.shards, args.tensors)
        snapshot = hub_snapshot(scratch / "plain", scratch / "hub")
        for layout, path in (("directory", scratch / "plain"), ("snapshot", snapshot)):
            files = [str(file.resolve()) for file in path.glob("*.safetensors")]
            times: dict[str, list[float]] = {}
            for _ in range(args.rounds):
                command = [sys.executable, "-c", _ASK, str(path)]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                ways = ("first look", "second look", "again()", "the calls alone, Python")
                for way, seconds in zip(ways, json.loads(done.stdout), strict=True):
                    times.setdefault(way, []).append(seconds)
                for seconds in _floor(scratch, files):
                    times.setdefault("the calls alone, C", []).append(seconds)
            for way, found in times.items():
                typical, least = statistics.median(found) * 1e3, min(found) * 1e3
                print(f"{layout:10} {way:24} {typical:6.1f} ms, at least {least:.1f}")


if __name__ == "__main__":
    main()
