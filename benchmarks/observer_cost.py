# SPDX-License-Identifier: Apache-2.0
"""What observing costs, on this machine's own kernel.

Untagged: cached reads of a file that nobody tagged, at full speed on every core at once, with
and without an observer that has another file tagged; one after the other in each round, in an
order that turns, and compared with the same round's run without.  Tagged: the same reads of
the tagged file, and a cold load of it, with the CPU time that the observing process takes (it
answers a snapshot a second) for each GB.  Writes build/bench/observer_cost.json.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import nullcontext
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import hosted, schema
from benchmarks.cachestat import drop, resident_bytes
from benchmarks.native import file_system, read_ahead
from benchmarks.overhead import READBENCH, build_readbench
from pagecache_bpf.errors import PagecacheError, PrivilegeError
from pagecache_bpf.observer import Observer

_MIB = 1 << 20
_CACHED_BYTES = 64 * _MIB
#: readbench's mode and block, and the bytes of one run.
WORKLOADS: dict[str, tuple[str, int, int]] = {
    "cached pread 1M": ("pread", _MIB, 4096 * _MIB),
    "cached pread 128K": ("pread", 128 << 10, 4096 * _MIB),
    "cached pread 4K": ("pread", 4096, 1024 * _MIB),
    "cached mmap": ("mmap", 4096, 4096 * _MIB),
}
STATES = {"none": "no observer", "untagged": "file untagged", "tagged": "file tagged"}


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of this benchmark's options."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.observer_cost", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--rounds", type=int, default=15, help="default: 15")
    parser.add_argument(
        "--cold", type=int, default=1024, metavar="MIB", help="of the cold load (default: 1024)"
    )
    parser.add_argument("--json", action="store_true", help="print the results")
    parser.add_argument("--out", type=Path, default=hosted.BUILD / "bench" / "observer_cost.json")
    return parser


def on_every_core(path: Path, mode: str, block: int, count: int) -> float:
    """Nanoseconds a call, the mean of one reader on each core at the same time."""
    cores = sorted(os.sched_getaffinity(0))
    command = [str(READBENCH), str(path), mode, str(block), str(count)]
    readers = [
        subprocess.Popen(["taskset", "-c", str(core), *command], stdout=subprocess.PIPE, text=True)
        for core in cores
    ]
    times = [float(reader.communicate(timeout=300)[0]) for reader in readers]
    return statistics.mean(times)


def cached(options: argparse.Namespace, where: Path, say: hosted.Say) -> list[schema.Row]:
    """Every workload in every state, in each round."""
    path, other = where / "read.bin", where / "other.bin"
    for file in (path, other):
        file.write_bytes(os.urandom(_MIB) * (_CACHED_BYTES // _MIB))
        os.sync()
    rows = {
        (work, state): schema.Row(
            case=work,
            loader=mode,
            fs=file_system(path),
            wanted_bytes=count,
            extra={"state": state, "ns_per_call": []},
        )
        for work, (mode, _, count) in WORKLOADS.items()
        for state in STATES
    }
    order = list(STATES)
    for number in range(1, options.rounds + 1):
        for state in order:
            path.read_bytes()
            if resident_bytes([path]) < _CACHED_BYTES:
                raise PagecacheError(f"{path} does not stay in the page cache", "too little memory")
            with Observer() if state != "none" else nullcontext() as observer:
                if observer:
                    tag(observer, path if state == "tagged" else other)
                for work, (mode, block, count) in WORKLOADS.items():
                    ns = on_every_core(path, mode, block, count)
                    rows[work, state].extra["ns_per_call"].append(ns)
                    rows[work, state].seconds.append(ns * 1e-9 * count / block)
        order = order[1:] + order[:1]
        say(f"round {number}/{options.rounds}")
    for (work, _), row in rows.items():
        base = rows[work, "none"].seconds
        ratios = [now / was for was, now in zip(base, row.seconds, strict=True)]
        row.extra["ratio"] = statistics.median(ratios)
        row.extra["ratios"] = ratios
    return list(rows.values())


def tag(observer: Observer, path: Path) -> None:
    """Observe a file."""
    with path.open("rb") as file:
        observer.tag(file.fileno(), "cost", path=str(path))


def cold(options: argparse.Namespace, where: Path, say: hosted.Say) -> list[schema.Row]:
    """Cold loads with and without the observer: their time, and the observer's CPU time."""
    path, size = where / "cold.bin", options.cold * _MIB
    with path.open("wb") as out:
        piece = os.urandom(_MIB)
        for _ in range(options.cold):
            out.write(piece)
        os.fsync(out.fileno())
    rows = {
        state: schema.Row(
            case="cold read", loader="cat", fs=file_system(path), wanted_bytes=size,
            extra={"state": state, "cpu_s_per_gb": []},
        )
        for state in ("none", "tagged")
    }  # fmt: skip
    order = list(rows)
    for number in range(1, max(3, options.rounds // 3) + 1):
        for state in order:
            drop([path])
            with Observer() if state == "tagged" else nullcontext() as observer:
                if observer:
                    tag(observer, path)
                seconds, cpu = _one_load(path, observer)
            rows[state].seconds.append(seconds)
            rows[state].extra["cpu_s_per_gb"].append(cpu / (size / 1e9))
        order.reverse()
        say(f"cold round {number}")
    for row in rows.values():
        row.extra["cpu_s_per_gb"] = statistics.median(row.extra["cpu_s_per_gb"])
        pairs = zip(rows["none"].seconds, row.seconds, strict=True)
        row.extra["ratio"] = statistics.median(now / was for was, now in pairs)
    return list(rows.values())


def _one_load(path: Path, observer: Observer | None) -> tuple[float, float]:
    """Return the seconds of a cold `cat`, and CPU seconds of this process meanwhile."""
    done = threading.Event()

    def serve() -> None:
        while not done.wait(1):
            if observer:
                observer.snapshot()

    server = threading.Thread(target=serve)
    before, begun = time.process_time(), time.monotonic()
    server.start()
    subprocess.run(["cat", path], stdout=subprocess.DEVNULL, check=True)
    seconds = time.monotonic() - begun
    if observer:
        observer.snapshot()
    cpu = time.process_time() - before
    done.set()
    server.join()
    return seconds, cpu


def show_table(report: schema.Report, console: Console) -> None:
    """Print one line per workload and state."""
    table = Table(box=box.SIMPLE_HEAD, padding=0, title="Cost of observing", title_style="bold")
    for heading in ("reads", "state"):
        table.add_column(heading, no_wrap=True)
    for heading in ("ns/call", "cost", "quartiles", "CPU s/GB"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in report.rows:
        extra, first = row.extra, row.extra["state"] == "none"
        quartiles = ""
        if not first and len(extra.get("ratios", ())) > 1:
            low, _, high = statistics.quantiles(extra["ratios"], n=4, method="inclusive")
            quartiles = f"{low - 1:+.1%}..{high - 1:+.1%}"
        ns = extra.get("ns_per_call")
        cpu = extra.get("cpu_s_per_gb")
        table.add_row(
            *(row.case if first else "", STATES[extra["state"]]),
            f"{statistics.median(ns):.0f}" if ns else "",
            "" if first else f"{extra['ratio'] - 1:+.2%}",
            quartiles,
            "" if cpu is None else f"{cpu:.4f}",
        )
    console.print(table)


def main() -> int:
    """Parse, measure, show."""
    options = make_parser().parse_args()
    if os.geteuid() != 0:
        raise PrivilegeError("only root can observe", "", "Run the benchmark with sudo")
    build_readbench()
    say = hosted.progress()
    with tempfile.TemporaryDirectory(dir=hosted.BUILD, prefix="observer-cost-") as scratch:
        where = Path(scratch)
        report = schema.Report(schema.machine(device={"read_ahead_kb": 128}))
        with read_ahead(where, 128):
            report.rows = cached(options, where, say) + cold(options, where, say)
    return hosted.finish(report, options, lambda console: show_table(report, console))


if __name__ == "__main__":
    sys.exit(hosted.guarded(main))
