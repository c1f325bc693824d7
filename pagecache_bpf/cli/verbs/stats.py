# SPDX-License-Identifier: Apache-2.0
"""pagecache-bpf stats: what the readers of each model found, once."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

from pagecache_bpf.cli import views
from pagecache_bpf.cli.output import Output, pairs, table
from pagecache_bpf.cli.parser import Group
from pagecache_bpf.units import format_cached, format_count, format_duration, format_size, plural

if TYPE_CHECKING:
    from rich.console import Console

    from pagecache_bpf.metrics.collect import ConsumerStats, ModelStats, StatsSnapshot

GROUP = Group.LOOK
HELP = "show once what the readers of each model found in the page cache"
DESCRIPTION = """\
Shows for each model what of it is in the page cache and, where the observer counts, what its
readers accessed and how they found it since it was tagged: hits (cached, used before, or
prefetched for the model by the policy), first use of what the kernel had read ahead, misses; the
stall (how long they slept for I/O); who added the pages, what of the prefetched ones was useful,
late or wasted, and what evicted them. `-v` shows every counter, docs/metrics.md explains them."""
EXAMPLES = (
    ("pagecache-bpf stats", ""),
    ("pagecache-bpf stats --model llama-3-8b --json", "for scripts"),
)
READERS_SHOWN = 8
JSON = {"stats": views.JSON}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of stats."""
    parser.add_argument("--model", metavar="NAME", help="only this model")


def run(args: argparse.Namespace, out: Output) -> int:
    """Show; that nothing is tagged is an answer and no error."""
    from pagecache_bpf.cli.tagging import require_root
    from pagecache_bpf.metrics import collect
    from pagecache_bpf.policy import exit_history
    from pagecache_bpf.policy.engines import AGENT

    require_root("read the counters")
    snapshot = collect.take()
    if not snapshot.engines[AGENT]:
        for record in exit_history.read():
            if record["kind"] == exit_history.KILLED:
                out.warn(f"{record['policy']} is not attached any more: {record['reason']}")
    if args.model is not None:
        snapshot = collect.only(snapshot, args.model)
    out.emit(collect.as_json(snapshot), lambda console: _human(console, snapshot, args.verbose))
    return 0


def _human(console: Console, snapshot: StatsSnapshot, verbose: bool) -> None:
    from rich.text import Text

    from pagecache_bpf.policy.read_errors import meaning

    observer = snapshot.observer
    if observer and observer.level != "full":
        lacking = f" (lacking: {', '.join(observer.missing)})" if observer.missing else ""
        console.print(f"the observer is {observer.level}{lacking}")
    if observer and observer.lost_events:
        console.print(f"{plural(observer.lost_events, 'event')} lost: counters are too small")
    if not snapshot.models:
        console.print(views.NOTHING)
    for model in snapshot.models:
        governed = f"{model.policy} on {model.engine}, " if model.policy else ""
        console.print(
            Text.assemble((model.model, "bold"), f"  {governed}{plural(model.files, 'file')}")
        )
        console.print(pairs(_facts(model), indent=2))
        console.print()
        if verbose:
            _print_counters(console, model)
    failed = [
        [policy.name, meaning(code), f"{number:,}"]
        for policy in snapshot.policies
        for code, number in policy.read_errors.items()
    ]
    if failed:
        columns = [("policy", "text"), ("reads that failed", "text"), ("times", "number")]
        console.print(table(columns, failed))


def _facts(model: ModelStats) -> list[tuple[str, str]]:
    nodes = ", ".join(
        f"node {node}: {format_size(size)}" for node, size in model.resident_by_node.items()
    )
    cached = f"{format_cached(model.resident_bytes, model.bytes)} of {format_size(model.bytes)}"
    rows = [("cached", f"{cached} ({nodes})" if len(model.resident_by_node) > 1 else cached)]
    if not model.observed:
        return [*rows, ("readers", "not observed")]
    accessed = format_size(model.accessed_bytes)
    if model.accessed_bytes:
        missed = model.total("miss_bytes") / model.accessed_bytes
        accessed += (
            f": {views.percent(model.hit_ratio)} hit, {views.percent(model.ahead_ratio)} read "
            f"ahead by the kernel, {views.percent(missed)} miss"
        )
    stall = format_duration(model.total("stall_ns"))
    since = format_duration(max(time.time_ns() - model.since_ns, 0))
    rows += [("since", f"it was tagged, {since} ago")] if model.since_ns else []
    rows += [("accessed", accessed), ("stall", f"{stall} in all readers together")]
    for title, prefix, names in (
        ("added", "", ("demand", "readahead", "requested", "prefetched")),
        ("prefetched", "prefetch_", ("useful", "late", "wasted")),
        ("evicted", "evicted_", ("reclaim", "drop", "fadvise", "truncate", "other")),
    ):
        values = [(name, model.counters.get(f"{prefix}{name}_bytes", 0)) for name in names]
        text = ", ".join(f"{name} {format_size(value)}" for name, value in values if value)
        if text:
            rows.append((title, text))
    busiest = sorted(model.consumers, key=lambda consumer: -consumer.accessed_bytes)
    rows += [("reader", _consumer(consumer)) for consumer in busiest[:READERS_SHOWN]]
    if len(busiest) > READERS_SHOWN:
        rows.append(("", f"and {len(busiest) - READERS_SHOWN:,} more"))
    return rows


def _consumer(consumer: ConsumerStats) -> str:
    who = f"{consumer.comm} ({consumer.tgid}{'' if consumer.alive else ', ended'})"
    found = f"{format_size(consumer.accessed_bytes)}, {views.percent(consumer.hit_ratio)} hit"
    return f"{who}: {found}, stall {format_duration(consumer.total('stall_ns'))}"


def _print_counters(console: Console, model: ModelStats) -> None:
    from pagecache_bpf.kernel.abi import OBSERVED

    def value(name: str, unit: str) -> str:
        number = model.counters[name]
        return format_duration(number) if unit == "ns" else format_count(number, unit)

    lines = [
        [counter.name, value(counter.name, counter.unit), counter.help]
        for counter in OBSERVED
        if counter.name in model.counters
    ]
    console.print(table([("counter", "text"), ("value", "number"), ("", "text")], lines))
    console.print()
