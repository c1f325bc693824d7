# SPDX-License-Identifier: Apache-2.0
"""pagecache-bpf watch: what happens to each model, line by line."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from datetime import datetime, timezone
from typing import TYPE_CHECKING

from pagecache_bpf.cli import views
from pagecache_bpf.cli.output import TROUBLESHOOTING, Output
from pagecache_bpf.cli.parser import Group
from pagecache_bpf.errors import UsageError

if TYPE_CHECKING:
    from pagecache_bpf.metrics.collect import StatsSnapshot

GROUP = Group.LOOK
HELP = "print what happens to each model, at an interval"
DESCRIPTION = """\
Prints a line for each model at every interval, until Ctrl-C: what of it is cached, its hit ratio
since it was tagged and since the line before, what its readers want and what comes into the
cache in MB/s, and how long readers sleep for I/O (100%: one of them, all the time). With --json
each line is a JSON document as of `stats`, with rates."""
EXAMPLES = (
    ("pagecache-bpf watch", ""),
    ("pagecache-bpf watch --interval 0.5 --count 20 --json >load.jsonl", "record a load"),
)
JSON = {"watch": {**views.JSON, **views.RATES_JSON}}
HEADER_EVERY = 20  # lines
MIN_SECONDS, MAX_SECONDS = 0.1, 86400.0


def seconds(text: str) -> float:
    """Read the value of --interval; argparse calls it.

    Args:
        text: what was typed, such as "2" or "0.5".

    Returns:
        Seconds, from MIN_SECONDS to MAX_SECONDS.

    Raises:
        UsageError: it is no number, or outside of these.
    """
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not MIN_SECONDS <= value <= MAX_SECONDS:
        raise UsageError(
            f"{text!r} is not an interval",
            f"it is a number of seconds from {MIN_SECONDS} to {MAX_SECONDS:.0f}",
            "Write it like 1 or 0.5",
            f"{TROUBLESHOOTING}#is-not-an-interval",
        )
    return value


def count(text: str) -> int:
    """Read the value of --count; argparse calls it.

    Args:
        text: what was typed.

    Returns:
        A number above 0.

    Raises:
        UsageError: it is none.
    """
    if not (text.isascii() and text.isdigit() and int(text)):
        raise UsageError(f"{text!r} is not a count", "it is a whole number above 0")
    return int(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of watch."""
    parser.add_argument(
        "--interval", metavar="S", type=seconds, default=1.0, help="seconds between (default: 1)"
    )
    parser.add_argument(
        "--count", metavar="N", type=count, help="end after N intervals (default: at Ctrl-C)"
    )
    parser.add_argument("--model", metavar="NAME", help="only this model")


def run(args: argparse.Namespace, out: Output) -> int:
    """Print until the count is reached, Ctrl-C, or the reader of the output has gone."""
    from pagecache_bpf.cli.tagging import require_root

    require_root("read the counters")
    before: StatsSnapshot | None = None
    lines = 0
    due = time.monotonic()
    try:
        for number in itertools.count():
            now = _take(args.model)
            if out.json:
                print(json.dumps(views.as_json(before, now)))
            else:
                lines = _print(before, now, lines)
            sys.stdout.flush()
            before = now
            if args.count is not None and number >= args.count:
                return 0
            due += args.interval
            time.sleep(max(0.0, due - time.monotonic()))
            due = max(due, time.monotonic() - args.interval)  # do not catch up after a stop
    except KeyboardInterrupt:  # how it is meant to end
        return 0
    raise AssertionError("unreachable")


def _take(model: str | None) -> StatsSnapshot:
    """Take a snapshot; a model that is not tagged yet may be later, and is no error."""
    from dataclasses import replace

    from pagecache_bpf.metrics import collect

    snapshot = collect.take()
    if model is None:
        return snapshot
    models = tuple(stats for stats in snapshot.models if stats.model == model)
    return replace(snapshot, models=models)


def _print(before: StatsSnapshot | None, now: StatsSnapshot, lines: int) -> int:
    """Print a table's next lines; returns how many there are by now."""
    rows = views.rows(before, now)
    width = max([len("model"), *(len(row.model.model) for row in rows)])
    if lines % HEADER_EVERY == 0 and rows:
        titles = "".join(f"{column.title:>14}" for column in views.COLUMNS)
        print(f"{'time':<10}{'model':<{width}}{titles}")
    clock = datetime.fromtimestamp(now.time_ns / 1e9, tz=timezone.utc).astimezone()
    for row in rows:
        texts = "".join(f"{column.text(row):>14}" for column in views.COLUMNS)
        print(f"{clock:%H:%M:%S}  {row.model.model:<{width}}{texts}")
    if not rows:
        print(f"{clock:%H:%M:%S}  {views.NOTHING}")
        return 0
    return lines + 1
