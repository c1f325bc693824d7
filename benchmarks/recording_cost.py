# SPDX-License-Identifier: Apache-2.0
"""What recording a load costs it: paired loads with and without a recorder beside them.

Each round reads a file cold (readahead, or a policy on the engine that is named) and warm: by the
safetensors library, which takes and adds up each tensor, and by readers that do nothing else, with
read() and with a byte of each page of a mapping.  Each time once with a recorder and once without,
in an order that turns; what counts is the reader's own time, and memory is touched before it
starts.  The recorder is the process that load(record=...) starts.  In a guest the module's engine
is measured the same way: python -m benchmarks.guest -- python -m benchmarks.recording_cost
--engine struct_ops.  Root only.  Writes build/bench/recording_cost.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from benchmarks import hosted, memory
from benchmarks.cachestat import drop, resident_bytes
from benchmarks.native import file_system, read_ahead
from pagecache_bpf.errors import PagecacheError
from pagecache_bpf.loads.recording import LoadRecording
from pagecache_bpf.recording import format
from pagecache_bpf.weights.models import Model, resolve

_MIB = 1 << 20
#: A reader prints the seconds that it took.
_READERS = {
    "read 1 MiB": """
import os, sys, time
fd = os.open(sys.argv[1], os.O_RDONLY)
buffer = bytearray(1 << 20)
begun = time.perf_counter()
while os.readv(fd, [buffer]):
    pass
print(time.perf_counter() - begun)
""",
    "mmap": """
import mmap, os, sys, time
fd = os.open(sys.argv[1], os.O_RDONLY)
with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as mapping:
    begun = time.perf_counter()
    total = sum(mapping[at] for at in range(0, len(mapping), 4096))
    print(time.perf_counter() - begun)
""",
}
_READERS["safetensors"] = """
import sys, time
from safetensors import safe_open
begun = time.perf_counter()
with safe_open(sys.argv[1], framework="np") as file:
    total = sum(float(file.get_tensor(name).sum()) for name in file.keys())
print(time.perf_counter() - begun)
"""
#: Names of workloads: whether the file is cold, and which reader reads it.
WORKLOADS = {
    "cold, safetensors": (True, "safetensors"),
    "warm, safetensors": (False, "safetensors"),
    "cold, read 1 MiB": (True, "read 1 MiB"),
    "cold, mmap": (True, "mmap"),
    "warm, read 1 MiB": (False, "read 1 MiB"),
    "warm, mmap": (False, "mmap"),
}


def one_load(path: Path, reader: str, cold: bool) -> float:
    """Return the seconds of a reader; the cache is as it is to be, or it fails."""
    if cold:
        drop([path])
        if resident_bytes([path]):
            raise PagecacheError(f"{path} stays in the page cache")
    elif resident_bytes([path]) < path.stat().st_size:
        path.read_bytes()
    memory.touch()
    done = subprocess.run(
        [sys.executable, "-c", _READERS[reader], str(path)],
        check=True,
        capture_output=True,
        text=True,
    )
    return float(done.stdout)


def recorded_load(model: Model, reader: str, cold: bool, output: Path) -> float:
    """Return the seconds of a reader that is recorded."""
    recording = LoadRecording(model, output)
    try:
        return one_load(model.files[0], reader, cold)
    finally:
        recording.end()


def attach(engine: str, path: Path) -> None:
    """Attach the policy on an engine, or nothing."""
    if engine == "none":
        return
    command = [sys.executable, "-m", "pagecache_bpf", "attach", "sequential", "--engine", engine]
    subprocess.run([*command, str(path)], check=True, stdout=subprocess.DEVNULL)


def detach() -> None:
    """Detach all policies."""
    command = [sys.executable, "-m", "pagecache_bpf", "detach", "--all"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def measure(options: argparse.Namespace, where: Path, say: hosted.Say) -> dict[str, Any]:
    """Measure all workloads in paired rounds."""
    path, output = where / "model.safetensors", where / "load.pcrec"
    tensor = np.random.default_rng(1).random((16, _MIB // 4), np.float32)  # of 16 MiB
    save_file({f"t{number}": tensor for number in range(options.size // 16)}, path)
    os.sync()
    model = resolve(str(path))
    rows: dict[str, dict[str, Any]] = {
        name: {"without_s": [], "recorded_s": []} for name in options.workload or WORKLOADS
    }
    attach(options.engine, path)
    try:
        for number in range(options.rounds):
            for name, row in rows.items():
                cold, reader = WORKLOADS[name]
                for recorded in (True, False) if number % 2 else (False, True):
                    if recorded:
                        row["recorded_s"].append(recorded_load(model, reader, cold, output))
                        row["lost"] = format.read(output).lost
                        row["recording_bytes"] = output.stat().st_size
                    else:
                        row["without_s"].append(one_load(path, reader, cold))
            say(f"round {number + 1}/{options.rounds}")
    finally:
        if options.engine != "none":
            detach()
    for row in rows.values():
        pairs = zip(row["without_s"], row["recorded_s"], strict=True)
        row["ratios"] = [with_it / without for without, with_it in pairs]
        row["ratio"] = statistics.median(row["ratios"])
    return {
        "engine": options.engine,
        "kernel": os.uname().release,
        "fs": file_system(path),
        "read_ahead_kb": options.read_ahead,
        "bytes": options.size * _MIB,
        "rounds": options.rounds,
        "rows": rows,
    }


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.recording_cost", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--rounds", type=int, default=11, help="default: 11")
    parser.add_argument("--size", type=int, default=512, metavar="MIB", help="default: 512")
    parser.add_argument("--engine", choices=("none", "agent", "struct_ops"), default="none")
    parser.add_argument(
        "--workload", action="append", choices=sorted(WORKLOADS), help="default: all; repeatable"
    )
    parser.add_argument(
        "--read-ahead", type=int, default=128, metavar="KIB", help="of the device (default: 128)"
    )
    parser.add_argument("--directory", type=Path, default=None, help="where the file is made")
    parser.add_argument("--out", type=Path, default=hosted.BUILD / "bench" / "recording_cost.json")
    options = parser.parse_args()
    begun = time.monotonic()
    with (
        tempfile.TemporaryDirectory(dir=options.directory) as directory,
        read_ahead(Path(directory), options.read_ahead),
        # The file, and the tensors that are made of it.
        memory.backed(2 * options.size * _MIB),
    ):
        found = measure(options, Path(directory), hosted.progress())
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    print(
        f"engine {found['engine']}, Linux {found['kernel']}, {found['fs']}, read_ahead_kb "
        f"{options.read_ahead}, {options.size} MiB, {options.rounds} paired rounds, quartiles"
    )
    for name, row in found["rows"].items():
        low, _, high = statistics.quantiles(row["ratios"], n=4)
        print(
            f"{name:20} {statistics.median(row['without_s']):8.3f} s  with a recorder "
            f"{row['ratio'] - 1:+.1%} ({low - 1:+.1%} to {high - 1:+.1%}), "
            f"{row['recording_bytes']:,} bytes, {row['lost']} lost"
        )
    print(f"{time.monotonic() - begun:.0f} s")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except PagecacheError as error:
        sys.exit(str(error))
