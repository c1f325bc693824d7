# SPDX-License-Identifier: Apache-2.0
"""pagecache-bpf score: how long a load of each model would take on this machine now."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from pagecache_bpf.cli.output import Output, pairs, table
from pagecache_bpf.cli.parser import Group
from pagecache_bpf.cli.scoring import add_score_arguments, watch_of
from pagecache_bpf.errors import PagecacheError, UsageError
from pagecache_bpf.units import format_size

if TYPE_CHECKING:
    from rich.console import Console

    from pagecache_bpf.placement.load_score import NodeScores

GROUP = Group.LOOK
HELP = "how long a load of each model would take on this machine now"
DESCRIPTION = """\
Tells for each MODEL how long a load of it would take here now, at best: what is absent from the
page cache at the speed of the device, what is cached at the speed of the host. That is what
schedulers rank machines by (docs/cluster.md, which also says where the estimate errs).

A model has the same content identity on every machine, whatever its path and its name.

MODEL is a path as for `explain`, or a directory of models; without any, the tagged models are
scored (root). Needs no root for files that the caller owns or may write; of others the controller
is asked, and what nobody tells counts as absent."""
EXAMPLES = (
    ("pagecache-bpf score /models", "all models of a directory"),
    ("pagecache-bpf score /models/llama-3-8b --no-probe --json", "for scripts"),
    ("pagecache-bpf score ORG/NAME --host-to-device-speed 25GB", "with a known PCIe link"),
)
JSON = {
    "score": {
        "node": "name of the machine: NODE_NAME of the environment, or the host's name",
        "time_ns": "when the kernel was asked, in ns since 1970",
        "age_seconds": "how long ago that was",
        "free_budget_bytes": "what the machine may still cache; null if it is not known",
        "running[]": "a model that is being loaded now",
        "models[].model": "the model's name",
        "models[].content": "its content identity",
        "models[].bytes": "size of all files",
        "models[].resident_bytes": "bytes in the page cache; null if that is not told",
        "models[].fraction": "share in the page cache, 0 to 1",
        "models[].device_bytes_per_second": "speed of the device; null if it is not known",
        "models[].host_to_device_bytes_per_second": "speed of cached pages",
        "models[].seconds": "time of a load now; null if the device's speed is not known",
        "models[].cold_seconds": "time of a load with nothing cached, or null",
        "models[].warm_seconds": "time of a load with all of it cached",
        "missing[]": "what was asked for and cannot be scored, and why",
    }
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of score."""
    parser.add_argument(
        "models", metavar="MODEL", nargs="*", help="path, repository, or directory of models"
    )
    add_score_arguments(parser)


def run(args: argparse.Namespace, out: Output) -> int:
    """Score; a model that cannot be looked at fails the command when it was the only one."""
    from pagecache_bpf.placement.node_watch import models_at

    if not args.models:
        import os

        if os.geteuid() != 0:
            raise UsageError("no model is named", "only root sees what is tagged", "Name a MODEL")
    if len(args.models) == 1:
        models_at(args.models[0])  # its own error says more than a note
    scores = watch_of(args, args.models).scores()
    if args.models and not scores.models:
        raise PagecacheError("nothing can be scored", "; ".join(scores.missing))
    for text in scores.missing if not out.json else ():
        out.warn(text)
    out.emit(scores.as_json(), lambda console: _human(console, scores))
    return 0


def _human(console: Console, scores: NodeScores) -> None:
    budget = scores.free_budget_bytes
    rows: list[tuple[str, Any]] = [
        ("node", scores.node),
        ("may still cache", "not known" if budget is None else format_size(budget)),
    ]
    if scores.running:
        rows.append(("loading now", ", ".join(scores.running)))
    console.print(pairs(rows))
    console.print()
    if not scores.models:
        console.print("no model is tagged; name one: `pagecache-bpf score MODEL`")
        return
    columns = [
        ("model", "path"),
        ("content", "text"),
        ("size", "number"),
        ("cached", "number"),
        ("load", "number"),
        ("cold", "number"),
        ("warm", "number"),
    ]
    lines = [
        [
            model.model,
            model.content,
            format_size(model.bytes),
            "not told" if model.resident_bytes is None else f"{model.fraction:.0%}",
            *map(_seconds, (model.seconds, model.cold_seconds, model.warm_seconds)),
        ]
        for model in scores.models
    ]
    console.print(table(columns, lines))


def _seconds(value: float | None) -> str:
    if value is None:
        return "not known"
    return f"{value:.1f} s" if value >= 10 else f"{value:.2f} s"
