# SPDX-License-Identifier: Apache-2.0
"""Random 4 KiB reads of a governed file: does the policy read what nobody wants?

Counts the bytes the device had to read for a fixed series of random reads, by pread() and by
touching a mapping, with the kernel's default and with the policy. A random reader must not be
punished: at most 5% more. Writes build/bench/random_read.json.
"""

from __future__ import annotations

import argparse
import mmap
import os
import random
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import hosted, loaders, rounds, schema, show
from benchmarks.cachestat import PAGE_SIZE
from benchmarks.control import CommandLine
from benchmarks.guest.devices import scaled_device
from pagecache_bpf.weights.models import Model

READS = 997  # a prime: a count that turns up in the results did not get there by rounding
_FILE_BYTES = 256 << 20
_LIMIT = 1.05


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of this benchmark's options."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.random_read", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--policy", default="sequential")
    parser.add_argument("--fs", action="append", choices=("ext4", "xfs"), help="default: both")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument("--reads", type=int, default=READS, help=f"default: {READS}")
    parser.add_argument("--delay", type=float, default=2.0, metavar="MS", help="default: 2")
    parser.add_argument("--seed", type=int, default=1)
    hosted.add_common(parser, "random_read")
    return parser


def _by_pread(path: Path, offsets: list[int]) -> list[bytes]:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    pages = [os.pread(fd, PAGE_SIZE, offset) for offset in offsets]
    os.close(fd)
    return pages


def _by_mmap(path: Path, offsets: list[int]) -> list[bytes]:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        return [mapped[offset : offset + PAGE_SIZE] for offset in offsets]


READERS = {"pread": _by_pread, "mmap": _by_mmap}


def _run(
    read: Callable[[Path, list[int]], list[bytes]],
    path: Path,
    offsets: list[int],
    reference: loaders.Reference,
) -> loaders.Outcome:
    begun = time.monotonic()
    pages = read(path, offsets)
    ended = time.monotonic()
    right = reference.matches([list(zip(offsets, pages, strict=True))])
    return loaders.Outcome(ended - begun, sum(map(len, pages)), right, begun, ended)


def measure(options: argparse.Namespace, say: hosted.Say) -> schema.Report:
    """Measure in the guest: the same reads in both states, round by round."""
    control = CommandLine()
    device_facts = {"delay_ms": options.delay, "read_ahead_kb": 128, "cap_bytes_per_s": None}
    report = schema.Report(schema.machine(device=device_facts))
    for fs in options.fs or ("ext4", "xfs"):
        with scaled_device(0, fs, 0) as device:
            path = device.mount / "weights" / "model.bin"
            path.parent.mkdir()
            random_bytes = random.Random(options.seed)
            with path.open("wb") as out:
                for _ in range(_FILE_BYTES >> 20):
                    out.write(random_bytes.randbytes(1 << 20))
            case = rounds.Case(
                Model("random 4K", path.parent, (path,)), fs, loaders.Reference([path])
            )
            device.set_delay(options.delay)
            report.rows += _measure_fs(options, case, control, say)
    return report


def _measure_fs(
    options: argparse.Namespace, case: rounds.Case, control: CommandLine, say: hosted.Say
) -> list[schema.Row]:
    rows = {
        (name, policy): schema.Row(
            case=case.checkpoint.name,
            loader=name,
            fs=case.fs,
            wanted_bytes=options.reads * PAGE_SIZE,
            policy=policy,
            engine=rounds.ENGINE if policy else None,
            extra={"state": "attached" if policy else "default", "reads": options.reads},
        )
        for name in READERS
        for policy in (None, options.policy)
    }
    path = case.files[0]
    for number in range(1, options.rounds + 1):
        # Other places each round, the same ones for every row of a round.
        places = random.Random(f"{options.seed} {number}")
        pages = places.sample(range(_FILE_BYTES // PAGE_SIZE), options.reads)
        offsets = [page * PAGE_SIZE for page in pages]
        for policy in (None, options.policy):
            root = case.checkpoint.root
            with rounds.attached(control, policy, root) if policy else nullcontext():
                for name, read in READERS.items():
                    run = partial(_run, read, path, offsets, case.reference)
                    rounds.record(rows[name, policy], *rounds.cold(case, run))
        say(f"{case.fs}: round {number}/{options.rounds}")
    for (name, _), row in rows.items():
        base = rows[name, None].device_bytes
        if base and row.device_bytes is not None:
            row.extra["device_ratio"] = row.device_bytes / base
    return list(rows.values())


def show_table(report: schema.Report, console: Console) -> None:
    """Print one line per file system, reader and policy."""
    table = Table(box=box.SIMPLE_HEAD, padding=0, title="Random 4 KiB reads", title_style="bold")
    for heading in ("fs", "by", "readahead by"):
        table.add_column(heading, no_wrap=True)
    for heading in ("MB wanted", "MB read", "to default", "median s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in report.rows:
        ratio = row.extra.get("device_ratio")
        table.add_row(
            row.fs,
            row.loader,
            show.state_text(row),
            show.megabytes(row.wanted_bytes),
            show.megabytes(row.device_bytes or 0),
            f"{ratio - 1:+.2%}" if ratio else "-",
            f"{row.median_s:.2f}",
            style="red" if ratio and ratio > _LIMIT else "",
        )
    console.print(table)


def main() -> int:
    """Parse, run on this side or the other, show."""
    options = make_parser().parse_args()
    if options.inside:
        schema.write(options.inside, measure(options, hosted.progress()))
        return 0
    argv = ["--policy", options.policy, "--rounds", str(options.rounds)]
    argv += ["--reads", str(options.reads), "--delay", str(options.delay)]
    argv += ["--seed", str(options.seed)]
    for fs in options.fs or ():
        argv += ["--fs", fs]
    report = hosted.run_inside("benchmarks.random_read", argv, options, _FILE_BYTES, None)
    return hosted.finish(report, options, lambda console: show_table(report, console))


if __name__ == "__main__":
    sys.exit(hosted.guarded(main))
