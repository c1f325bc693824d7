# SPDX-License-Identifier: Apache-2.0
"""What the framework costs readers it does nothing for.

Paired runs in a guest: each round measures cached reads (1 MiB and 4 KiB pread, page touches of a
fresh mapping), cold reads, reads of what a memory cgroup of half the file's size cannot hold (from
a device that answers at once) and plain reclaim (memory.reclaim of cached pages) in every state,
one after the other, in an order that rotates; a state's cost is the median over the rounds of its
ratio to the same round's "no module". The guest's clock counts instructions (1 ns each) while a CPU
runs, so that costs below the noise of an emulated machine show; --clock host takes the host's
instead. Writes build/bench/overhead.json.
"""

from __future__ import annotations

import argparse
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import hosted, schema
from benchmarks.cachestat import drop, resident_bytes
from benchmarks.control import pagecache_bpf
from benchmarks.disks import device_bytes_read
from benchmarks.guest.cgroups import LRU_GEN, Group, group
from benchmarks.guest.devices import ScaledDevice, scaled_device
from benchmarks.rounds import ENGINE
from pagecache_bpf.errors import PagecacheError

READBENCH = hosted.BUILD / "bench" / "readbench"
_SOURCE = Path(__file__).parent / "native" / "readbench.c"
_MIB = 1 << 20
_FILE_BYTES = 16 * _MIB

_EVERY_ACCESS = str(hosted.BUILD / "bpf" / "test" / "every_access.bpf.o")
_RECLAIM = str(hosted.BUILD / "bpf" / "test" / "reclaim_default.bpf.o")

# State: (words for people, policy attached, whether the file is tagged).
STATES: dict[str, tuple[str, str | None, bool]] = {
    "no module": ("no module", None, False),
    "module": ("module loaded, no policy", None, False),
    "noop tagged": ("noop attached, file tagged", "noop", True),
    "sequential untagged": ("sequential attached, file untagged", "sequential", False),
    "reclaim untagged": ("evict and pressure hooks, file untagged", _RECLAIM, False),
    # Not part of the bound: what a policy's own files pay that is asked about each folio,
    # and what a policy pays that wants to be told of every access.
    "reclaim tagged": ("evict and pressure hooks, file tagged", _RECLAIM, True),
    "access untagged": ("access hook, file untagged", _EVERY_ACCESS, False),
    "access tagged": ("access hook, file tagged", _EVERY_ACCESS, True),
}
# Workload: readbench's mode, block and bytes; cold reads go through the file once.
WORKLOADS: dict[str, tuple[str, int, int]] = {
    "cached pread 1M": ("pread", _MIB, 256 * _MIB),
    "cached pread 4K": ("pread", 4096, 64 * _MIB),
    "cached mmap": ("mmap", 4096, 128 * _MIB),
    "cold pread 128K": ("pread", 128 << 10, _FILE_BYTES),
    "cold mmap": ("mmap", 4096, _FILE_BYTES),
    "full cgroup": ("pread", 128 << 10, 8 * _FILE_BYTES),
    "reclaim": ("reclaim", 4096, _FILE_BYTES * 3 // 4),
}
_FULL_BYTES = _FILE_BYTES // 2
_RECLAIMS = 7  # in a row; one is over in a few ms and may meet anything


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of this benchmark's options."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.overhead", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--rounds", type=int, default=11, help="default: 11")
    parser.add_argument(
        "--delay", type=float, default=2.0, metavar="MS", help="of cold requests (default: 2)"
    )
    parser.add_argument(
        "--only",
        action="append",
        choices=tuple(WORKLOADS),
        metavar="READS",
        help=f"measure these only, of {', '.join(WORKLOADS)}; may be repeated",
    )
    parser.add_argument(
        "--state",
        action="append",
        choices=tuple(STATES),
        metavar="STATE",
        help=f"and these beside no module only, of {', '.join(STATES)}; may be repeated",
    )
    parser.add_argument("--fs", choices=("ext4", "xfs"), default="ext4")
    parser.add_argument(
        "--clock", choices=("instructions", "host"), default="instructions", help="see above"
    )
    hosted.add_common(parser, "overhead")
    return parser


def build_readbench() -> None:
    """Compile the timing program; raises PagecacheError with the compiler's words."""
    READBENCH.parent.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        ["cc", "-O2", "-Wall", "-Werror", "-o", str(READBENCH), str(_SOURCE)],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise PagecacheError(f"cannot compile {_SOURCE}", done.stderr.strip())


@contextmanager
def in_state(name: str, path: Path) -> Iterator[None]:
    """Bring the machine into the state for the block; no module before and after."""
    _, policy, tagged = STATES[name]
    if name == "no module":
        yield
        return
    pagecache_bpf("module", "load")
    try:
        if policy:
            pagecache_bpf("attach", policy, *([str(path)] if tagged else []))
        try:
            yield
        finally:
            if policy:
                pagecache_bpf("detach", Path(policy).name.partition(".")[0])
    finally:
        pagecache_bpf("module", "unload")


def time_reads(path: Path, workload: str) -> float:
    """Nanoseconds a call (or page touched or reclaimed) of one run of the workload."""
    mode, block, count = WORKLOADS[workload]
    command = [str(READBENCH), str(path), mode, str(block), str(count)]
    if not workload.startswith("cached"):
        drop([path])
    if workload == "reclaim":
        with group("pagecache_bench") as memory:
            return statistics.median(time_reclaim(path, memory, count) for _ in range(_RECLAIMS))
    if workload == "full cgroup":
        with group("pagecache_bench", max=_FULL_BYTES) as memory:
            process = memory.start(*command)
            out, errors = process.communicate()
            returncode = process.returncode
    else:
        done = subprocess.run(command, capture_output=True, text=True)
        out, errors, returncode = done.stdout, done.stderr, done.returncode
    if returncode:
        raise PagecacheError(f"{workload} failed", errors.strip())
    return float(out)


def time_reclaim(path: Path, memory: Group, count: int) -> float:
    """Nanoseconds a page that memory.reclaim takes out of the cache."""
    memory.read(path)
    before = resident_bytes([path])
    knob = memory.path / "memory.reclaim"
    with knob.open("wb", buffering=0) as out:
        began = time.perf_counter_ns()
        out.write(str(count).encode())
        ns = time.perf_counter_ns() - began
    gone = before - resident_bytes([path])
    if gone < count // 2:
        raise PagecacheError(f"memory.reclaim took {gone} of {count} bytes out of {path}")
    return ns / (gone / 4096)


def measure(options: argparse.Namespace, say: hosted.Say) -> schema.Report:
    """Measure in the guest: all rounds; one row per workload and state."""
    states = [
        state for state in STATES if not options.state or state in ("no module", *options.state)
    ]
    rows = {
        (work, state): schema.Row(
            case=work,
            loader=WORKLOADS[work][0],
            fs=options.fs,
            wanted_bytes=WORKLOADS[work][2],
            policy=STATES[state][1],
            engine=ENGINE if STATES[state][1] else None,
            extra={"state": state, "tagged": STATES[state][2], "ns_per_call": []},
        )
        for work in options.only or WORKLOADS
        for state in states
    }
    with scaled_device(0, options.fs, 0) as device:
        path = device.mount / "weights.bin"
        path.write_bytes(random.Random(1).randbytes(_FILE_BYTES))
        drop([path])
        order = states
        for number in range(1, options.rounds + 1):
            for state in order:
                with in_state(state, path):
                    _one_state(rows, state, path, device, options.delay)
            order = order[1:] + order[:1]  # no state is always the one measured first
            say(f"round {number}/{options.rounds}")
    device_facts = {
        "delay_ms": options.delay,
        "read_ahead_kb": 128,
        "cap_bytes_per_s": None,
        "clock": options.clock,
        "lru_gen": LRU_GEN.read_text().strip() if LRU_GEN.exists() else None,
    }
    report = schema.Report(schema.machine(device=device_facts), list(rows.values()))
    for (work, _), row in rows.items():
        _compare(row, rows[work, "no module"])
    return report


def _one_state(
    rows: dict[tuple[str, str], schema.Row],
    state: str,
    path: Path,
    device: ScaledDevice,
    delay: float,
) -> None:
    for work, (_, block, count) in WORKLOADS.items():
        if (work, state) not in rows:
            continue
        if work.startswith("cached"):
            _fill(path)
        row = rows[work, state]
        # What a reader in a full cgroup pays is asked of the CPU: the device is left out of it.
        device.set_delay(0 if work == "full cgroup" else delay)
        before = device_bytes_read(path)
        ns = time_reads(path, work)
        after = device_bytes_read(path)
        row.extra["ns_per_call"].append(ns)
        row.seconds.append(ns * 1e-9 * count / block)
        if before is not None and after is not None:
            row.device_bytes_rounds.append(after - before)


def _fill(path: Path) -> None:
    if resident_bytes([path]) < _FILE_BYTES:
        path.read_bytes()
    if resident_bytes([path]) < _FILE_BYTES:
        raise PagecacheError(f"{path} does not stay in the page cache", "too little memory")


def _compare(row: schema.Row, base: schema.Row) -> None:
    """Add the ratio to the same round's "no module": median, quartiles and extremes."""
    ratios = [now / was for was, now in zip(base.seconds, row.seconds, strict=True)]
    row.extra["ratio"] = statistics.median(ratios)
    row.extra["ratio_min"], row.extra["ratio_max"] = min(ratios), max(ratios)
    if len(ratios) > 1:
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
        row.extra["ratio_q1"], row.extra["ratio_q3"] = low, high


def show_table(report: schema.Report, console: Console) -> None:
    """Print one line per workload and state, the cost in percent."""
    table = Table(box=box.SIMPLE_HEAD, padding=0, title="Cost beside no module", title_style="bold")
    table.add_column("reads", no_wrap=True)
    table.add_column("state")
    for heading in ("ns/call", "cost", "quartiles"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in report.rows:
        extra = row.extra
        first = extra["state"] == "no module"
        quartiles = ""
        if not first and "ratio_q1" in extra:
            quartiles = f"{extra['ratio_q1'] - 1:+.1%}..{extra['ratio_q3'] - 1:+.1%}"
        table.add_row(
            row.case if first else "",
            STATES[extra["state"]][0],
            f"{statistics.median(extra['ns_per_call']):.0f}",
            "" if first else f"{extra['ratio'] - 1:+.2%}",
            quartiles,
        )
    console.print(table)


def main() -> int:
    """Parse, run on this side or the other, show."""
    options = make_parser().parse_args()
    if options.inside:
        schema.write(options.inside, measure(options, hosted.progress()))
        return 0
    build_readbench()
    argv = ["--rounds", str(options.rounds), "--delay", str(options.delay), "--fs", options.fs]
    argv += ["--clock", options.clock]
    for work in options.only or ():
        argv += ["--only", work]
    for state in options.state or ():
        argv += ["--state", state]
    report = hosted.run_inside(
        "benchmarks.overhead", argv, options, _FILE_BYTES, None, options.clock == "instructions"
    )
    return hosted.finish(report, options, lambda console: show_table(report, console))


if __name__ == "__main__":
    sys.exit(hosted.guarded(main))
