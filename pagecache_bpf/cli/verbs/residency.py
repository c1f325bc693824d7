# SPDX-License-Identifier: Apache-2.0
"""pagecache-bpf residency: how much of a model is in the page cache."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from pagecache_bpf.cli.output import Output, pairs, table
from pagecache_bpf.cli.parser import Group
from pagecache_bpf.units import format_size, plural

if TYPE_CHECKING:
    from rich.console import Console

    from pagecache_bpf.explain.model_residency import Resident

GROUP = Group.LOOK
HELP = "show how much of a model is in the page cache"
DESCRIPTION = """\
Asks the kernel how much of the model that PATH stands for is in the page cache now, by file and,
with --tensors, by tensor. Nothing is read but, for tensors, the headers. Needs no root for files
that the caller owns or may write; of others the kernel tells nothing, and the controller is asked
if it runs."""
EXAMPLES = (
    ("pagecache-bpf residency /models/llama-3-8b", "by file"),
    ("pagecache-bpf residency ORG/NAME --tensors", "by tensor"),
)
JSON = {
    "residency": {
        "model": "the model's name",
        "time_ns": "when the kernel was asked, in ns since 1970",
        "bytes": "size of all files",
        "resident_bytes": "bytes of them in the page cache; null if that is not told to this user",
        "fraction": "share of them, from 0 to 1; null if that is not told",
        "files[].path": "a file, below the model's directory",
        "files[].bytes": "its size",
        "files[].resident_bytes": "bytes of it in the page cache, or null",
        "tensors[].name": "with --tensors: a tensor",
        "tensors[].bytes": "its size",
        "tensors[].resident_bytes": "bytes of it in whole cached pages, or null",
        "unknown_tensors[]": "a file whose tensors are not known, and why",
    }
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of residency."""
    parser.add_argument("path", metavar="PATH", help="file, directory, or name of a repository")
    parser.add_argument("--tensors", action="store_true", help="list tensors, too")


def run(args: argparse.Namespace, out: Output) -> int:
    """Count the cached pages of the weights and print them."""
    from pagecache_bpf.explain.model_residency import look
    from pagecache_bpf.loads.through_controller import residency_or_none
    from pagecache_bpf.weights.models import resolve

    model = resolve(args.path)
    found = look(model, args.tensors, residency_or_none)
    data = {
        "model": model.name,
        "time_ns": found.time_ns,
        "bytes": found.bytes,
        "resident_bytes": found.resident_bytes,
        "fraction": found.fraction,
        "files": [{"path": item.name, **_sizes(item)} for item in found.files],
        "tensors": [{"name": item.name, **_sizes(item)} for item in found.tensors],
        "unknown_tensors": list(found.why),
    }

    def human(console: Console) -> None:
        console.print(
            pairs(
                [
                    ("model", f"{model.name}, {plural(len(found.files), 'file')}"),
                    ("size", format_size(found.bytes)),
                    ("cached", _cached(found.resident_bytes, found.bytes)),
                ]
            )
        )
        for title, items in (("file", found.files), ("tensor", found.tensors)):
            if items:
                rows = [[item.name, format_size(item.bytes), _of(item)] for item in items]
                console.print()
                console.print(
                    table([(title, "text"), ("size", "number"), ("cached", "number")], rows)
                )
        for why in found.why:
            out.warn(f"the tensors of {why}")

    out.emit(data, human)
    return 0


def _sizes(item: Resident) -> dict[str, Any]:
    return {"bytes": item.bytes, "resident_bytes": item.resident_bytes}


def _of(item: Resident) -> str:
    return _cached(item.resident_bytes, item.bytes)


def _cached(resident: int | None, size: int) -> str:
    """Return bytes and their share, for people."""
    if resident is None:
        return "not told to this user"
    return f"{format_size(resident)} ({resident / size:.0%})" if size else format_size(resident)
