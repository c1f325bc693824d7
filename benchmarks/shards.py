# SPDX-License-Identifier: Apache-2.0
"""Cold loads of a model of many files: default, and policies with and without a session.

At the end of each file the device stands still until the next one is opened; in a session
(pagecache_bpf.kernel.lending) the module reads on into that one.  In a guest on the scaled device
(20 ms a request, 64 MB/s, read_ahead_kb 128).  Writes build/bench/shards.json.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from rich.console import Console

from benchmarks import checkpoints, hosted, loaders, rounds, schema
from benchmarks.control import CommandLine
from benchmarks.guest.devices import scaled_device
from pagecache_bpf.cli.output import table
from pagecache_bpf.kernel.lending import Session

READ_AHEAD_KB = 128
#: Policy, and whether the files are lent to it.
STATES = (
    (None, False),
    ("sequential", False),
    ("sequential", True),
    ("maio", False),
    ("maio", True),
)


class Control(CommandLine):
    """Attaches as a user does, and lends the files as a load does."""

    def attach(self, policy: str, root: Path) -> None:
        """Attach a policy; maio with the template that is derived from the files' headers."""
        # The policy alone is measured; what the observer costs is another benchmark's.
        self._run(["attach", "--no-observe", policy, str(root)])


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of this benchmark's options."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.shards", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--rounds", type=int, default=3, help="of each state (default: 3)")
    parser.add_argument("--shards", type=int, default=16, help="files of the model (default: 16)")
    parser.add_argument("--delay", type=float, default=20.0, metavar="MS", help="per request")
    parser.add_argument("--cap", type=hosted.size_argument, default=64_000_000, metavar="BYTES")
    parser.add_argument("--size", type=hosted.size_argument, default=64 << 20, help="of the model")
    parser.add_argument(
        "--loader", choices=sorted(loaders.LOADERS), default="read", help="(default: read)"
    )
    parser.add_argument(
        "--icount",
        action="store_true",
        help="the guest's clock counts instructions: other work of this machine does not show "
        "(the cap is of the machine's clock: give --cap 0)",
    )
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    hosted.add_common(parser, "shards")
    return parser


@contextmanager
def _governed(
    control: Control, case: rounds.Case, policy: str | None, session: bool
) -> Iterator[None]:
    """In the block the state holds."""
    if policy is None:
        yield
        return
    with rounds.attached(control, policy, case.checkpoint.root), Session() as lent:
        for path in case.files if session else ():
            fd = os.open(path, os.O_RDONLY)
            lent.lend(fd)
            os.close(fd)
        yield


def measure_in_guest(options: argparse.Namespace, say: hosted.Say) -> schema.Report:
    """Measure in the guest: everything on one scaled device, the states taking turns."""
    loaders.warm_up()
    source = checkpoints.load_dir(options.model, "llama")
    device = {"read_ahead_kb": READ_AHEAD_KB, "delay_ms": options.delay}
    device["cap_bytes_per_s"] = options.cap or None
    report = schema.Report(schema.machine(device=device))
    with scaled_device(0, "ext4", 0, READ_AHEAD_KB) as disk:
        copy = checkpoints.copy_to(source, disk.mount / source.root.name)
        case = rounds.new_case(copy, "ext4", source)
        disk.set_delay(options.delay)
        control = Control("struct_ops")
        rows = {state: _row(case, options.loader, *state) for state in STATES}
        for number in range(1, options.rounds + 1):
            for state, row in rows.items():
                with _governed(control, case, *state):
                    run = partial(loaders.run_loader, options.loader, case.files, case.reference)
                    rounds.record(row, *rounds.cold(case, run))
                read = row.device_bytes_rounds[-1] / 1e6 if row.device_bytes_rounds else 0
                what = f"{number}/{options.rounds} {row.extra['state']}"
                say(f"{what}: {row.seconds[-1]:.2f} s, {read:.1f} MB read")
        disk.set_delay(0)
    report.rows = list(rows.values())
    return report


def _row(case: rounds.Case, loader: str, policy: str | None, session: bool) -> schema.Row:
    state = policy or "default"
    return schema.Row(
        case=case.checkpoint.name,
        loader=loader,
        fs=case.fs,
        wanted_bytes=case.reference.size,
        policy=policy,
        engine=case.engine if policy else None,
        extra={
            "state": f"{state}, in a session" if session else state,
            "files": len(case.files),
            "wanted_page_bytes": sum(-(-path.stat().st_size // 4096) * 4096 for path in case.files),
        },
    )


def print_shards(report: schema.Report, console: Console) -> None:
    """Print one line a state."""
    default = report.rows[0].median_s
    lines = []
    for row in report.rows:
        read, wanted = row.device_bytes, row.extra["wanted_page_bytes"]
        seconds = row.median_s
        lines.append(
            [
                row.extra["state"],
                f"{row.extra['files']}",
                f"{seconds:.2f}" if seconds else "",
                f"{default / seconds:.2f}" if seconds and default else "",
                f"{read / 1e6:.2f}" if read else "",
                f"{read / wanted:.3f}" if read else "",
            ]
        )
    columns = [("state", "text"), ("files", "number"), ("median s", "number")]
    columns += [("x default", "number"), ("read MB", "number"), ("read/wanted", "number")]
    console.print(table(columns, lines))


def main() -> int:
    """Parse, run on this side or the other, show."""
    options = make_parser().parse_args()
    if options.inside:
        schema.write(options.inside, measure_in_guest(options, hosted.progress()))
        return 0
    directory = hosted.MODELS / f"llama-{options.size}-{options.shards}"
    source = checkpoints.generate(directory, options.size, options.shards)
    argv = ["--model", str(source.root.resolve()), "--rounds", str(options.rounds)]
    argv += ["--delay", str(options.delay), "--cap", str(options.cap), "--loader", options.loader]
    report = hosted.run_inside(
        "benchmarks.shards", argv, options, source.size, options.cap or None, options.icount
    )
    return hosted.finish(report, options, lambda console: print_shards(report, console))


if __name__ == "__main__":
    sys.exit(hosted.guarded(main))
