# SPDX-License-Identifier: Apache-2.0
"""`make demo`: what a policy does for the load of a model, measured while you watch.

Loads a real checkpoint (all-MiniLM-L6-v2) and a generated Llama-shaped one, cold, by the
unmodified safetensors library and by plain read(), with the kernel's own readahead, with the
policy attached and with it detached again; each load checked byte for byte.  MODEL=dir loads
your own checkpoint instead, SIZE=256M sizes the generated one.  Results and a picture go to
build/demo/.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from rich.console import Console

from benchmarks import checkpoints, cold_load, hosted, schema, show
from benchmarks.cachestat import Sample
from pagecache_bpf.errors import PagecacheError

OUT = hosted.BUILD / "demo"
_ROUNDS = 3


def make_parser() -> argparse.ArgumentParser:
    """The demo's options; `make demo` sets them from the environment."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    env = os.environ.get
    parser.add_argument(
        "--model",
        type=Path,
        default=Path(env("MODEL", "")) if env("MODEL") else None,
        metavar="DIR",
        help="directory of safetensors shards (environment: MODEL)",
    )
    parser.add_argument(
        "--size",
        type=hosted.size_argument,
        default=env("SIZE") or "64M",
        help="of the generated checkpoint (default: 64M; environment: SIZE)",
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=env("ROUNDS") or str(_ROUNDS),
        help="cold loads of each kind (default: 3; environment: ROUNDS)",
    )
    parser.add_argument("--policy", default="sequential")
    parser.add_argument("--fs", choices=("ext4", "xfs"), default="ext4")
    return parser


def _settings(options: argparse.Namespace, sources: list[checkpoints.Checkpoint]) -> list[str]:
    """The demo is one cold_load run: the standard scaled device, two loaders, a picture."""
    argv = ["--fs", options.fs, "--policy", options.policy, "--rounds", str(options.rounds)]
    argv += ["--loader", "safe_open", "--loader", "read", "--detached-rounds", "1", "--picture"]
    for source in sources:
        argv += ["--model", str(source.root)]
    return argv


def _sources(options: argparse.Namespace, say: hosted.Say) -> list[checkpoints.Checkpoint]:
    if options.model is not None:
        return [checkpoints.load_dir(options.model)]
    say(f"making a Llama-shaped checkpoint of {options.size >> 20} MiB")
    llama = checkpoints.generate(hosted.MODELS / f"llama-{options.size >> 20}M", options.size)
    say("getting all-MiniLM-L6-v2")
    return [llama, checkpoints.minilm(hosted.MODELS / "all-MiniLM-L6-v2")]


def draw(report: schema.Report, directory: Path) -> list[Path]:
    """Draw the first case's residency over time; returns the files, none without samples."""
    rows = [row for row in report.rows if "residency" in row.extra]
    if not rows:
        return []
    rows = [row for row in rows if row.case == rows[0].case]
    names = [show.state_text(row) for row in rows]
    curves = {
        name: [Sample(at, resident) for at, resident in row.extra["residency"]]
        for name, row in zip(names, rows, strict=True)
    }
    ends = {name: row.extra["residency_end_s"] for name, row in zip(names, rows, strict=True)}
    first = rows[0]
    delay, cap = first.extra["delay_ms"], show.megabytes(first.extra["cap_bytes_per_s"])
    title = (
        f"Cold load of {first.case} by {first.loader}: {first.fs}, "
        f"{delay:g} ms per request, {cap} MB/s"
    )
    outputs = [directory / "residency.svg", directory / "residency.png"]
    show.plot_residency(curves, first.wanted_bytes, title, outputs, ends)
    return outputs


def summary(report: schema.Report) -> list[str]:
    """The result in a sentence per case and loader."""
    lines = []
    for row in report.rows:
        if row.policy is None:
            continue
        speedup, share = row.extra["speedup"], row.extra["of_limit"]
        lines.append(
            f"{row.case} by {row.loader}: {speedup:.1f} times faster with {row.policy}, "
            f"{share:.0%} of what direct I/O gets from this device."
        )
    return lines


def main() -> int:
    """Make the input ready, boot the guest, measure, show."""
    options = make_parser().parse_args()
    if options.rounds < 1:
        raise PagecacheError("no rounds, no result", f"ROUNDS is {options.rounds}", "Ask for 1")
    say = hosted.progress()
    sources = _sources(options, say)
    settings = cold_load.make_parser().parse_args(_settings(options, sources))
    settings.out = OUT / "results.json"
    say("booting a guest with a stock kernel; it stands for a machine with a slow device:")
    say(
        f"    {settings.delay:g} ms per request, {show.megabytes(settings.cap)} MB/s, "
        f"read_ahead_kb {cold_load.READ_AHEAD_KB}; loads start with nothing in the page cache"
    )
    report = cold_load.run(settings, sources)
    say("done")

    def display(console: Console) -> None:
        console.print()
        show.print_cold(report, console)
        for line in summary(report):
            console.print(line, highlight=False)
        for path in pictures:
            console.print(f"picture: {path.relative_to(hosted.ROOT)}", highlight=False)

    pictures = draw(report, OUT)
    return hosted.finish(report, settings, display)


if __name__ == "__main__":
    sys.exit(hosted.guarded(main))
