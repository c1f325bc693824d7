# SPDX-License-Identifier: Apache-2.0
"""Eviction by policy beside the kernel's own, in memory cgroups, with classic LRU and MGLRU.

Each case runs in a fresh cgroup with the kernel's default and with the policy it is for, round by
round, cold each time. What counts is bytes read from the device: hits are what was wanted and not
read. Where it says so the optimum for the same accesses, in the memory the cgroup really had,
stands beside. Writes build/bench/eviction.json.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from functools import cache

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import hosted, schema, show
from benchmarks.cgroups import reclaim_by
from benchmarks.eviction_cases import (
    BESIDE_UNLIMITED,
    CASES,
    Lab,
    Measured,
    cyclic_optimum,
    multiplex_optimum,
)
from benchmarks.guest.devices import scaled_device
from pagecache_bpf.kernel import kmod

_MIB = 1 << 20
_LRU = {False: "classic", True: "mglru"}


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of this benchmark's options."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.eviction", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--case", action="append", choices=tuple(CASES), help="default: all")
    parser.add_argument("--policy", help="instead of the one that the case is for")
    parser.add_argument("--limit", type=int, default=64, metavar="MIB", help="default: 64")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument("--delay", type=float, default=1.0, metavar="MS", help="default: 1")
    parser.add_argument("--fs", choices=("ext4", "xfs"), default="ext4", help="default: ext4")
    parser.add_argument(
        "--lru", choices=("classic", "mglru", "both"), default="both", help="default: both"
    )
    parser.add_argument(
        "--icount",
        action="store_true",
        help="the guest's clock counts instructions: other work of this machine does not show",
    )
    hosted.add_common(parser, "eviction")
    return parser


def measure(options: argparse.Namespace, say: hosted.Say) -> schema.Report:
    """Measure in the guest: all cases, both LRUs, round by round."""
    kmod.load()
    facts = {"delay_ms": options.delay, "read_ahead_kb": 128, "cap_bytes_per_s": None}
    report = schema.Report(schema.machine(device=facts, limit_bytes=options.limit * _MIB))
    with scaled_device(0, options.fs, 0) as device:
        lab = Lab(device.mount / "lab", options.limit * _MIB)
        lab.root.mkdir()
        device.set_delay(options.delay)
        for name in options.case or CASES:
            for generations in {"classic": (False,), "mglru": (True,)}.get(
                options.lru, (False, True)
            ):
                with reclaim_by("generations" if generations else "classic"):
                    report.rows += _case(options, lab, name, generations, say)
    return report


def _case(
    options: argparse.Namespace, lab: Lab, name: str, generations: bool, say: hosted.Say
) -> list[schema.Row]:
    run, intended = CASES[name]
    policy = options.policy or intended
    rows: dict[str | None, schema.Row] = {}
    found: dict[str | None, list[Measured]] = {None: [], policy: []}
    unlimited: list[Measured] = []
    which = f"{name} {_LRU[generations]}"
    for number in range(1, options.rounds + 1):
        for state in found:
            measured = run(lab, state)
            found[state].append(measured)
            say(_told(f"{which} {number}/{options.rounds} {state or 'default'}", measured))
        if name in BESIDE_UNLIMITED:
            unlimited.append(run(lab, policy, limited=False))
            say(_told(f"{which} {number}/{options.rounds} {policy}, no limit", unlimited[-1]))
    for state, all_rounds in found.items():
        row = rows[state] = schema.Row(
            case=name,
            loader="mmap" if name.startswith("mapped") else "read",
            fs=options.fs,
            wanted_bytes=all_rounds[0].wanted_bytes,
            policy=state,
            engine="struct_ops" if state else None,
            seconds=[outcome.seconds for outcome in all_rounds],
            device_bytes_rounds=[outcome.device_bytes for outcome in all_rounds],
        )
        row.extra = {
            "lru": _LRU[generations],
            "state": "attached" if state else "default",
            "limit_bytes": lab.limit,
            "hit_bytes": int(statistics.median(outcome.hit_bytes for outcome in all_rounds)),
            **{
                key: statistics.median(outcome.numbers[key] for outcome in all_rounds)
                for key in all_rounds[0].numbers
            },
        }
        held = max(outcome.capacity_bytes for outcome in found[None])
        if name == "cyclic":
            row.extra["optimum_hit_bytes"] = _cyclic_optimum(lab.part(1.5), held)
        if name == "multiplex":
            row.extra["optimum_reread_bytes"] = _multiplex_optimum(lab.part(2 / 3), held)
        if unlimited and state:
            seconds = [outcome.seconds for outcome in unlimited]
            row.extra["unlimited_s"] = statistics.median(seconds)
            row.extra["unlimited_rounds_s"] = seconds
            row.extra["unlimited_numbers"] = [outcome.numbers for outcome in unlimited]
    return list(rows.values())


_cyclic_optimum, _multiplex_optimum = cache(cyclic_optimum), cache(multiplex_optimum)


def _told(which: str, measured: Measured) -> str:
    numbers = {name: round(value, 3) for name, value in measured.numbers.items()}
    return (
        f"{which}: {measured.device_bytes >> 20} of {measured.wanted_bytes >> 20} MiB read, "
        f"{measured.seconds:.2f} s {numbers}"
    )


def says(row: schema.Row, default: schema.Row | None) -> str:
    """Return the number that the case is about, as a sentence for the table."""
    extra = row.extra
    if "neighbor_share" in extra or "read_share" in extra:
        if "read_share" in extra:
            text = f"read {extra['read_share']:.2f}x"
        else:
            text = f"neighbor keeps {extra['neighbor_share']:.0%}"
        if extra.get("unlimited_s") and row.median_s:
            text += f", load {row.median_s / extra['unlimited_s']:.2f}x of unlimited"
        return text
    if "optimum_hit_bytes" in extra:
        return f"hits {extra['hit_bytes'] / max(1, extra['optimum_hit_bytes']):.1%} of optimum"
    if "optimum_reread_bytes" in extra:
        text = (
            f"reread {extra['reread_bytes'] / max(1, extra['optimum_reread_bytes']):.2f}x optimum"
        )
        if default is not None and row is not default:
            text += (
                f", {extra['reread_bytes'] / max(1, default.extra['reread_bytes']):.0%} of default"
            )
        return text
    if "resident_share" in extra:
        return f"{extra['resident_share']:.0%} of weights still resident"
    if default is not None and row is not default and row.median_s and default.median_s:
        return f"{default.median_s / row.median_s:.2f}x as fast"
    return ""


def show_table(report: schema.Report, console: Console) -> None:
    """Print one line per case, LRU and state."""
    limit = report.machine["limit_bytes"] >> 20
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=0,
        title=f"Eviction by policy, cgroup of {limit} MiB, medians",
        title_style="bold",
    )
    for heading in ("case", "LRU", "evicted by"):
        table.add_column(heading, no_wrap=True)
    for heading in ("MB wanted", "MB read", "s"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("which means")
    for row in report.rows:
        default = next(iter(report.select(case=row.case, lru=row.extra["lru"], policy=None)), None)
        table.add_row(
            row.case,
            row.extra["lru"],
            row.policy or "kernel",
            show.megabytes(row.wanted_bytes),
            show.megabytes(row.device_bytes or 0),
            f"{row.median_s:.1f}",
            says(row, default),
        )
    console.print(table)


def main() -> int:
    """Parse, run on this side or the other, show."""
    options = make_parser().parse_args()
    if options.inside:
        schema.write(options.inside, measure(options, hosted.progress()))
        return 0
    argv = ["--limit", str(options.limit), "--rounds", str(options.rounds)]
    argv += ["--delay", str(options.delay), "--fs", options.fs, "--lru", options.lru]
    argv += ["--policy", options.policy] if options.policy else []
    for case in options.case or ():
        argv += ["--case", case]
    wanted = 20 * options.limit * _MIB
    options.memory = options.memory or "2G"
    report = hosted.run_inside("benchmarks.eviction", argv, options, wanted, None, options.icount)
    return hosted.finish(report, options, lambda console: show_table(report, console))


if __name__ == "__main__":
    sys.exit(hosted.guarded(main))
