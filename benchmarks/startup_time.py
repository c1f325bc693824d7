# SPDX-License-Identifier: Apache-2.0
"""How long load(), its means, attach and `run` take before a byte of weights is read.

    python -m benchmarks.startup_time --rounds 7

Each round measures every case once, so that a busy machine slows all of them alike.  A case is
its own process with a run directory of its own: "cold" is the first in it, with the agent to be
started; "warm" the second, with the agent running.  As root the policy is attached on engine
agent; other users are served by threads of their own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

SIZE_BYTES = 64 << 20

#: Prints seconds by name, as JSON.
LOAD = """
import json, sys, time
begun = time.perf_counter()
import pagecache_bpf as pc
times = {"import": time.perf_counter() - begun}
for name in ("cold", "warm"):
    begun = time.perf_counter()
    load = pc.load(sys.argv[1])
    times[f"load() {name}"] = time.perf_counter() - begun
    load.ready()
    times[f"ready {name}"] = time.perf_counter() - begun
    begun = time.perf_counter()
    load.done()
    times[f"done() {name}"] = time.perf_counter() - begun
begun = time.perf_counter()
with pc.load(sys.argv[1]):
    pass
times["empty load"] = time.perf_counter() - begun
print(json.dumps(times))
"""
COMMANDS = {
    "true": ["true"],
    "run -- true": [
        sys.executable,
        "-m",
        "pagecache_bpf",
        "run",
        "--weights",
        "{file}",
        "--",
        "true",
    ],
}
# Measures a command; its exit is part of it.
TIMED = """
import subprocess, sys, time
begun = time.perf_counter()
subprocess.run(sys.argv[1:], check=True, stderr=subprocess.DEVNULL)
print(time.perf_counter() - begun)
"""


def measure(file: Path) -> dict[str, float]:
    """Measure every case once.

    Args:
        file: a weight file.

    Returns:
        Seconds by case.
    """
    with tempfile.TemporaryDirectory(prefix="startup-cost-") as directory:
        environment = {**os.environ, "PAGECACHE_BPF_RUN_DIR": directory}
        times: dict[str, float] = json.loads(_run([LOAD, str(file)], environment))
    for name, words in COMMANDS.items():
        with tempfile.TemporaryDirectory(prefix="startup-cost-") as directory:
            environment = {**os.environ, "PAGECACHE_BPF_RUN_DIR": directory}
            command = [word.format(file=file) for word in words]
            times[name] = float(_run([TIMED, *command], environment))
    return times


def _run(words: list[str], environment: dict[str, str]) -> str:
    """Run Python code with arguments and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", *words], env=environment, text=True, capture_output=True, check=True
    )
    return done.stdout


def main() -> int:
    """Print the quartiles of every case."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7, help="rounds (default: 7)")
    parser.add_argument("--json", action="store_true", help="every measurement, in seconds")
    args = parser.parse_args()
    rounds = []
    with tempfile.TemporaryDirectory(prefix="startup-cost-") as directory:
        file = Path(directory, "model.gguf")
        file.write_bytes(os.urandom(SIZE_BYTES))
        for _ in range(args.rounds):
            rounds.append(measure(file))
    if args.json:
        print(json.dumps(rounds))
        return 0
    print(f"{'milliseconds':<16}{'first quartile':>16}{'median':>10}{'third quartile':>16}")
    for name in rounds[0]:
        values = [1000 * times[name] for times in rounds]
        low, median, high = (
            statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
        )
        print(f"{name:<16}{low:>16.1f}{median:>10.1f}{high:>16.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
