# SPDX-License-Identifier: Apache-2.0
"""pagecache-bpf simulate: replay a trace against a policy, LRU and the optimum."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pagecache_bpf.cli.knobs import add_knobs
from pagecache_bpf.cli.output import Output, table
from pagecache_bpf.cli.parser import Group
from pagecache_bpf.errors import UsageError
from pagecache_bpf.simulate import TOTALS
from pagecache_bpf.units import format_size, parse_size

if TYPE_CHECKING:
    from rich.console import Console

    from pagecache_bpf.simulate.simulator import Result

GROUP = Group.POLICIES
HELP = "replay a trace against a policy, LRU and the optimum"
DESCRIPTION = """\
Replays who read what against a policy, without a kernel and without root: the policy's own C,
compiled for this machine, decides over a model of the page cache. Beside it stand the kernel's
two lists as they are without a policy, LRU, and Belady's optimum, which knows the future.

A trace has lines `TIME CONSUMER FILE OFFSET LENGTH` (seconds, sizes in bytes or as 2MiB), or JSON
objects with t, consumer, file, offset, length and cgroup. Other JSON lines describe a file (file,
size, model, governed) or write to a map of the policy (t, hint, key, value). docs/policies.md
says it in full. A template (`template record`) is a trace of one load by itself. What the model
does not have: the kernel's own readahead, mappings, dirty pages, and the time that reading
takes."""
EXAMPLES = (
    ("pagecache-bpf simulate --policy cyclic --trace scan.trace --memory 64GiB", ""),
    (
        "pagecache-bpf simulate --policy maio --trace llama.template --memory 8GiB",
        "one load, as `template record` or `template derive` has it",
    ),
    (
        "pagecache-bpf simulate --policy maio --trace t.trace --memory 8GiB --report maio.html",
        "the same page as `report` makes, beside the optimum",
    ),
    (
        "pagecache-bpf simulate --policy ./mine.bpf.c --trace t.jsonl --memory 40G --json",
        "your own policy, compiled first",
    ),
)


JSON = {
    "simulate": {
        "policy": "the policy",
        "knobs.*": "each knob with its value",
        "trace": "the trace's file",
        "memory_bytes": "the cache's size",
        "unit_bytes": "size of the model's pages",
        "files": "files in the trace",
        "distinct_bytes": "different bytes that the trace reads, in whole pages",
        "results[].name": "the policy's name, default (the kernel's lists), lru or optimum",
        **{f"results[].{name}": text for name, text in TOTALS.items()},
        "results[].of_optimum": "hit_bytes as a part of the optimum's; null if that has none",
        "results[].gauges.*": "what the policy keeps count of, at the end",
        "page": "the page that was written; null without --report",
        "results[].ended": "how the policy ended itself; null if it did not",
    }
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of simulate."""
    parser.add_argument(
        "--policy",
        required=True,
        help="name of a policy (`policy list`), or the path of a .bpf.c file",
    )
    parser.add_argument("--trace", required=True, type=Path, metavar="FILE", help="the trace")
    parser.add_argument(
        "--memory", required=True, metavar="SIZE", help="the page cache there is: 64GiB"
    )
    add_knobs(parser)
    parser.add_argument(
        "--unit",
        metavar="SIZE",
        help="size of the model's pages (default: 4KiB, more for traces of more than 8 GB)",
    )
    parser.add_argument(
        "--report",
        type=Path,
        metavar="PAGE",
        help="also write a page that shows the replay beside the optimum, as `report` does",
    )


def run(args: argparse.Namespace, out: Output) -> int:
    """Replay the trace with the policy and print the hits and reads."""
    from pagecache_bpf.policy import catalog
    from pagecache_bpf.simulate import recorded, simulator

    info = catalog.find(args.policy)
    knobs = catalog.parse_knobs(info, dict(args.knob))
    memory = parse_size(args.memory)
    trace = recorded.read(args.trace)
    unit = parse_size(args.unit) if args.unit else simulator.unit_for(trace)
    if unit & (unit - 1) or unit < simulator.SMALLEST_UNIT:
        raise UsageError(f"{args.unit} is not a page size", "it has to be a power of 2, from 4KiB")
    if args.report is not None and (args.report.is_dir() or not args.report.parent.is_dir()):
        raise UsageError(
            f"{args.report} cannot be written", "", "Name a file in a directory that exists"
        )
    results = simulator.compare(info, trace, memory, knobs, unit)
    first = results[-1].totals
    data = {
        "policy": info.name,
        "knobs": {knob.name: knobs.get(knob.name, knob.default) for knob in info.knobs},
        "trace": str(args.trace),
        "memory_bytes": memory,
        "unit_bytes": unit,
        "files": len(trace.files),
        "distinct_bytes": first["read_bytes"] - first["reread_bytes"],
        "results": [_result(result, results[-1]) for result in results],
        "page": None if args.report is None else str(args.report),
    }
    for result in results:
        if result.ended:
            out.warn(f"the policy ended itself: {result.ended}")
    _warn_of_harm(
        out, results, {knob.name: knobs.get(knob.name, knob.default) for knob in info.knobs}
    )
    if args.report is not None:
        from pagecache_bpf.reporting import page
        from pagecache_bpf.simulate import replay_recording

        name = args.trace.stem
        replay = replay_recording.record(
            simulator.Simulator(info), trace, memory, unit=unit, knobs=knobs, name=name
        )
        best = replay_recording.record_best(trace, memory, unit=unit, name=name)
        page.replace(args.report, page.page([replay, best], [info.name, "optimum"]))
    out.emit(data, lambda console: _print(console, data, results))
    return 0


def _warn_of_harm(out: Output, results: list[Result], knobs: dict[str, int]) -> None:
    """Say that a policy reads more than LRU, by more than what it may read ahead in vain."""
    policy, lru = results[0], next(result for result in results if result.name == "lru")
    window = knobs.get("window_kib", 0) << 10
    more = policy.totals["read_bytes"] - lru.totals["read_bytes"]
    if more > window:
        out.warn(
            f"{policy.name} reads {format_size(more)} more from the device than LRU: it harms this "
            "load with so much memory; give it more, or a smaller window or budget, or leave the "
            "load to the kernel"
        )


def _share(result: Result, optimum: Result) -> float | None:
    return result.hit_bytes / optimum.hit_bytes if optimum.hit_bytes else None


def _result(result: Result, optimum: Result) -> dict[str, Any]:
    return {
        "name": result.name,
        **result.totals,
        "of_optimum": _share(result, optimum),
        "gauges": result.gauges,
        "ended": result.ended,
    }


def _print(console: Console, data: dict[str, Any], results: list[Result]) -> None:
    console.print(
        f"{format_size(results[-1].totals['wanted_bytes'])} read of "
        f"{format_size(data['distinct_bytes'])} in {data['files']} files, "
        f"{format_size(data['memory_bytes'])} of cache, "
        f"pages of {format_size(data['unit_bytes'])}\n"
    )
    lines = []
    for result in results:
        wanted, share = result.totals["wanted_bytes"], _share(result, results[-1])
        lines.append(
            [
                result.name,
                format_size(result.hit_bytes),
                f"{result.hit_bytes / wanted:.1%}",
                format_size(result.totals["ahead_bytes"]),
                format_size(result.totals["read_bytes"]),
                format_size(result.reread_bytes),
                f"{share:.1%}" if share is not None else "-",
            ]
        )
    kinds = ("hit", "of reads", "read ahead", "device read", "reread", "of optimum")
    console.print(table([("evicted by", "text"), *((kind, "number") for kind in kinds)], lines))
    for name, value in results[0].gauges.items():
        console.print(f"{name} at the end: {value:,}")
    if data["page"]:
        console.print(f"page: {data['page']}", highlight=False)
