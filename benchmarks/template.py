# SPDX-License-Identifier: Apache-2.0
"""How long it takes to derive a template and to lay it out, and until the first prefetch.

Derives the template of a generated index of 1,000 shards and 100,000 tensors, in a process of
its own each time; as root it then attaches maio (engine agent) and measures from a reader's first
access to the first page of another file in the cache. Writes build/bench/template.json.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console

from benchmarks import hosted, schema
from benchmarks.cachestat import PAGE_SIZE, cachestat, drop
from benchmarks.checkpoints import generate
from benchmarks.control import CommandLine
from benchmarks.loaders import Outcome, in_child
from pagecache_bpf.cli.output import table
from tests.unit.test_template_derive import large_model

SHARDS, TENSORS = 1000, 100


def _derive(root: Path) -> tuple[Outcome, int]:
    """Derive and lay out; peak memory of the process, in bytes, comes as the outcome's size."""

    def work() -> Outcome:
        begun = time.monotonic()
        from pagecache_bpf.templates import derive
        from pagecache_bpf.templates.layout import lay_out
        from pagecache_bpf.weights.models import resolve

        template = derive(resolve(root))
        derived = time.monotonic()
        layout = lay_out([("model", template)])
        ended = time.monotonic()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        right = len(template.files) == SHARDS and len(layout.arrays["template_steps"]) >= SHARDS
        return Outcome(derived - begun, peak, right, derived, ended)

    outcome = in_child(work, "deriving")
    return outcome, outcome.loaded_bytes


def _first_prefetch(root: Path, control: CommandLine) -> float:
    """Return the seconds from a first access to the first page that nobody has read."""
    files = sorted(root.glob("*.safetensors"))
    control.attach("maio", root)
    try:
        drop(files)
        fd = os.open(files[0], os.O_RDONLY)
        # Far behind what the kernel reads ahead by itself.
        far = 4 << 20
        begun = time.monotonic()
        os.pread(fd, PAGE_SIZE, 0)
        while not cachestat(fd, far, 1 << 20).cached:
            if time.monotonic() > begun + 10:
                break
        seconds = time.monotonic() - begun
        os.close(fd)
        return seconds
    finally:
        control.detach("maio", root)


def main() -> int:
    """Measure and show."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.template", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--rounds", type=int, default=5)
    hosted.add_common(parser, "template")
    options = parser.parse_args()
    report = schema.Report(schema.machine())
    size = SHARDS * TENSORS * 65536
    with tempfile.TemporaryDirectory() as scratch:
        large_model(Path(scratch), SHARDS, TENSORS)
        derive = schema.Row("1,000 shards, 100,000 tensors", "derive", "", size)
        layout = schema.Row(derive.case, "lay out", "", size)
        peaks = []
        for _ in range(options.rounds):
            outcome, peak = _derive(Path(scratch))
            derive.seconds.append(outcome.seconds)
            derive.correct = derive.correct and outcome.correct
            layout.seconds.append(outcome.ended_s - outcome.begun_s)
            peaks.append(peak)
        derive.extra["peak_memory_bytes"] = max(peaks)
        report.rows += [derive, layout]
    if os.geteuid() == 0:
        checkpoint = generate(hosted.MODELS / f"llama-{64 << 20}", 64 << 20)
        control = CommandLine("agent")
        first = schema.Row("llama", "first prefetch", "", checkpoint.size, "maio", "agent")
        for _ in range(options.rounds):
            first.seconds.append(_first_prefetch(checkpoint.root, control))
        report.rows.append(first)

    def show(console: Console) -> None:
        lines = [
            [
                row.loader,
                f"{(row.median_s or 0) * 1e3:.1f}",
                f"{max(row.seconds) * 1e3:.1f}",
                f"{row.extra['peak_memory_bytes'] >> 20} MiB"
                if "peak_memory_bytes" in row.extra
                else "",
            ]
            for row in report.rows
        ]
        columns = [("what", "text"), ("median ms", "number"), ("worst ms", "number")]
        console.print(table([*columns, ("peak memory", "text")], lines))

    return hosted.finish(report, options, show)


if __name__ == "__main__":
    sys.exit(hosted.guarded(main))
