# SPDX-License-Identifier: Apache-2.0
"""pagecache-bpf report: make a page, or a trace for Perfetto, of a recorded load."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pagecache_bpf.cli.output import Output, pairs
from pagecache_bpf.cli.parser import Group
from pagecache_bpf.errors import UsageError
from pagecache_bpf.units import format_size

GROUP = Group.LOOK
HELP = "make a page of a recorded load: every byte of it over time"
DESCRIPTION = """\
Makes one HTML page of a recording (see `record`), which any browser opens without a network: what
limited the load; a map of file offset over time with what was resident, prefetched, read and
evicted; throughput, memory and stalls on the same axis; the tensors and readers that waited longest
in any range. --compare puts a second load beside it. --perfetto writes a trace as well. Needs
neither root nor a kernel of its own."""
EXAMPLES = (
    ("pagecache-bpf report load.pcrec -o load.html", ""),
    ("pagecache-bpf report default.pcrec --compare policy.pcrec", "two loads on one axis"),
)
JSON = {
    "report": {
        "page": "the page that was written",
        "bytes": "its size",
        "trace": "the trace that was written; null without --perfetto",
        "loads[].recording": "a recording that the page shows",
        "loads[].verdict": "what limited that load, in a sentence",
    }
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of report."""
    parser.add_argument("recording", metavar="FILE", help="a recording made by `record`")
    parser.add_argument(
        "-o", "--output", metavar="PAGE", help="the page (default: FILE with .html at its end)"
    )
    parser.add_argument("--compare", metavar="FILE", help="a second recording, on the same axis")
    parser.add_argument(
        "--perfetto", metavar="TRACE", help="also write a trace for Perfetto (extra: perfetto)"
    )


def run(args: argparse.Namespace, out: Output) -> int:
    """Read the recordings, write the page."""
    from pagecache_bpf.recording import format
    from pagecache_bpf.reporting import page, perfetto

    paths = [Path(args.recording)] + ([Path(args.compare)] if args.compare else [])
    recordings = [format.read(path) for path in paths]
    labels = [path.stem for path in paths]
    if len(set(labels)) < len(labels):
        labels = [str(path) for path in paths]
    output = Path(args.output) if args.output else paths[0].with_suffix(".html")
    if output in paths:
        raise UsageError(f"{output} is the recording itself", "", "Name another file with -o")
    if args.perfetto:
        perfetto.write(recordings[0], Path(args.perfetto))
    text = page.page(recordings, labels)
    page.replace(output, text)
    verdicts = [page.verdict(recording) for recording in recordings]
    data: dict[str, Any] = {
        "page": str(output),
        "bytes": len(text.encode()),
        "trace": args.perfetto,
        "loads": [
            {"recording": str(path), "verdict": verdict}
            for path, verdict in zip(paths, verdicts, strict=True)
        ],
    }
    rows = [
        *((label, verdict) for label, verdict in zip(labels, verdicts, strict=True)),
        ("page", f"{output} ({format_size(data['bytes'])}): open it in a browser"),
    ]
    if args.perfetto:
        rows.append(("trace", f"{args.perfetto}: open it in Perfetto's viewer"))
    out.emit(data, lambda console: console.print(pairs(rows)))
    return 0
