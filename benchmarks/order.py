# SPDX-License-Identifier: Apache-2.0
"""Cold loads in another order than the file's: default, sequential, and maio with a template.

Reversed layers, interleaved shards, half of the model, one tensor-parallel rank of two and of
eight, two ranks at once; each by safetensors. In a guest on the scaled device (20 ms a request,
64 MB/s, read_ahead_kb 128), or with --native on this machine's own kernel and disk, with engine
agent and beside whole-file warmers. Writes build/bench/order.json.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from benchmarks import checkpoints, hosted, loaders, memory, native, orders, peers, rounds, schema
from benchmarks.control import CommandLine, pagecache_bpf
from benchmarks.guest.devices import scaled_device
from pagecache_bpf.cli.output import table
from pagecache_bpf.errors import PagecacheError, PrivilegeError
from pagecache_bpf.weights.models import Model

READ_AHEAD_KB = 128
POLICIES = (None, "sequential", "maio")
_WIDTH = 144


class Templates(CommandLine):
    """Attaches maio with a template that is derived for the order, before the clock runs."""

    def __init__(self, engine: str, scratch: Path, gap: str = "") -> None:
        super().__init__(engine)
        self.scratch = scratch
        self.gap = ["--gap", gap] if gap else []
        self.template: Path | None = None

    def derive(self, order: orders.Order, root: Path) -> None:
        """`pagecache-bpf template derive`, told the order of the tensors."""
        names = self.scratch / "names"
        names.write_text("".join(f"{name}\n" for name in order.names))
        self.template = self.scratch / "template"
        words = ["template", "derive", str(root), "--list", str(names), *order.options]
        words += self.gap
        pagecache_bpf(*words, "--output", str(self.template))

    def attach(self, policy: str, root: Path) -> None:
        """Attach a policy as a user does."""
        # The policy alone is measured; what the observer costs is another benchmark's.
        words = ["--no-observe"]
        words += [] if self.engine == "auto" else ["--engine", self.engine]
        if policy == "maio":
            words += ["--template", str(self.template)]
        self._run(["attach", *words, policy, str(root)])


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of this benchmark's options."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.order", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--native", action="store_true", help="on this machine's own kernel")
    parser.add_argument("--rounds", type=int, help="of each (default: 3; 5 with --native)")
    parser.add_argument("--only", action="append", metavar="TEXT", help="orders with this name")
    parser.add_argument("--delay", type=float, default=20.0, metavar="MS", help="per request")
    parser.add_argument("--cap", type=hosted.size_argument, default=64_000_000, metavar="BYTES")
    parser.add_argument(
        "--size",
        type=hosted.size_argument,
        help="of the generated Llama-shaped checkpoint (default: 64M; 2G with --native)",
    )
    parser.add_argument(
        "--gap", default="", metavar="SIZE", help="of `template derive`: read along what is less"
    )
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    hosted.add_common(parser, "order")
    return parser


def _wanted_orders(options: argparse.Namespace, copy: Model) -> list[orders.Order]:
    every = orders.make(copy)
    return [
        order
        for order in every
        if not options.only or any(text in order.name for text in options.only)
    ]


def measure(
    case: rounds.Case,
    control: Templates,
    wanted: Sequence[orders.Order],
    count: int,
    warmers: Sequence[str],
    say: hosted.Say,
) -> list[schema.Row]:
    """Measure all rounds of all orders, states taking turns."""
    rows: list[schema.Row] = []
    for order in wanted:
        control.derive(order, case.checkpoint.root)
        states = {policy: _row(case, order, policy) for policy in POLICIES}
        more = {name: _row(case, order, None, name) for name in warmers}

        def one(row: schema.Row, run: Callable[[], loaders.Outcome], number: int) -> None:
            rounds.record(row, *rounds.cold(case, run))
            read = row.device_bytes_rounds[-1] / 1e6 if row.device_bytes_rounds else 0
            what = f"{row.loader}, {row.extra['state']}"
            say(f"{number}/{count} {what}: {row.seconds[-1]:.2f} s, {read:.1f} MB read")

        for number in range(1, count + 1):
            run = partial(orders.run, order, case.reference)
            for policy, row in states.items():
                if policy is None:
                    one(row, run, number)
                    continue
                with rounds.attached(control, policy, case.checkpoint.root):
                    one(row, run, number)
            for name, row in more.items():
                one(row, partial(run, peers.PEERS[name]), number)
        _compare(states, more)
        rows += [*states.values(), *more.values()]
    return rows


def _row(
    case: rounds.Case, order: orders.Order, policy: str | None, warmer: str = ""
) -> schema.Row:
    state = warmer or policy or "default"
    return schema.Row(
        case=case.checkpoint.name,
        loader=order.name,
        fs=case.fs,
        wanted_bytes=order.wanted,
        policy=policy,
        engine=case.engine if policy else None,
        extra={
            "state": state,
            "file_bytes": case.reference.size,
            "wanted_page_bytes": order.wanted_pages,
            **case.labels,
        },
    )


def _compare(states: dict[str | None, schema.Row], more: dict[str, schema.Row]) -> None:
    """Note how many times faster than each of the others a row is, by medians."""
    every = [*states.values(), *more.values()]
    for row in every:
        row.extra["speedup_over"] = {
            other.extra["state"]: other.median_s / row.median_s
            for other in every
            if other is not row and other.median_s and row.median_s
        }


def measure_in_guest(options: argparse.Namespace, say: hosted.Say) -> schema.Report:
    """Measure in the guest: everything on one scaled device."""
    loaders.warm_up()
    source = checkpoints.load_dir(options.model, "llama")
    device = {"read_ahead_kb": READ_AHEAD_KB, "delay_ms": options.delay}
    report = schema.Report(
        schema.machine(device={**device, "cap_bytes_per_s": options.cap or None})
    )
    with (
        scaled_device(0, "ext4", 0, READ_AHEAD_KB) as disk,
        tempfile.TemporaryDirectory(dir="/dev/shm") as scratch,
    ):
        copy = checkpoints.copy_to(source, disk.mount / source.root.name)
        case = rounds.new_case(copy, "ext4", source)
        case.labels = {"delay_ms": options.delay, "cap_bytes_per_s": options.cap or None}
        disk.set_delay(options.delay)
        control = Templates("struct_ops", Path(scratch), options.gap)
        wanted = _wanted_orders(options, copy)
        report.rows = measure(case, control, wanted, options.rounds, (), say)
        disk.set_delay(0)
    return report


def measure_here(options: argparse.Namespace, say: hosted.Say) -> schema.Report:
    """Measure on this machine, with engine agent, beside the warmers."""
    import os

    if os.geteuid() != 0:
        raise PrivilegeError("only root can attach a policy", "", "Run the benchmark with sudo")
    loaders.warm_up()
    source = checkpoints.generate(hosted.MODELS / f"llama-{options.size}", options.size)
    case = rounds.Case(
        source, native.file_system(source.root), loaders.Reference(source.files), engine="agent"
    )
    report = schema.Report(schema.machine(device=native.facts(READ_AHEAD_KB)))
    wanted = _wanted_orders(options, source)
    with (
        native.read_ahead(source.root, READ_AHEAD_KB),
        native.memory_of(source),
        tempfile.TemporaryDirectory(dir="/dev/shm") as scratch,
    ):
        control = Templates("agent", Path(scratch), options.gap)
        report.rows = measure(case, control, wanted, options.rounds, peers.available(), say)
    return report


def _of_cap(row: schema.Row) -> str:
    """Return the share of what a device with a cap can do: the wanted pages and nothing else."""
    cap = row.extra.get("cap_bytes_per_s")
    if not cap or not row.median_s:
        return ""
    return f"{row.extra['wanted_page_bytes'] / cap / row.median_s:.0%}"


def print_order(report: schema.Report, console: Console) -> None:
    """Print one line a row."""
    lines = []
    for row in report.rows:
        read = row.device_bytes
        over = row.extra.get("speedup_over", {})
        lines.append(
            [
                row.loader,
                row.extra["state"],
                f"{row.median_s:.2f}" if row.median_s else "",
                f"{over['default']:.2f}" if "default" in over else "",
                f"{over['sequential']:.2f}" if "sequential" in over else "",
                f"{read / 1e6:.1f}" if read else "",
                f"{row.wanted_bytes / 1e6:.1f}",
                f"{row.extra['wanted_page_bytes'] / 1e6:.1f}",
                f"{read / row.extra['wanted_page_bytes']:.3f}" if read else "",
            ]
        )
    columns = [("order", "text"), ("state", "text"), ("median s", "number")]
    columns += [("x default", "number"), ("x sequential", "number")]
    columns += [("read MB", "number"), ("wanted MB", "number"), ("in pages", "number")]
    columns += [("read/wanted", "number")]
    shares = [_of_cap(row) for row in report.rows]
    if any(shares):
        columns += [("of cap", "number")]
        lines = [[*line, share] for line, share in zip(lines, shares, strict=True)]
    # Numbers take what 80 columns have, and would leave nothing for the words.
    console.width = max(_WIDTH, console.width)
    console.print(table(columns, lines))


def main() -> int:
    """Parse, run on this side or the other, show."""
    options = make_parser().parse_args()
    options.size = options.size or (2 << 30 if options.native else 64 << 20)
    options.rounds = options.rounds or (5 if options.native else 3)
    say = hosted.progress()
    if options.native:
        memory.with_huge_malloc()
        report = measure_here(options, say)
        return hosted.finish(report, options, lambda console: print_order(report, console))
    if options.inside:
        schema.write(options.inside, measure_in_guest(options, say))
        return 0
    source = checkpoints.generate(hosted.MODELS / f"llama-{options.size}", options.size)
    argv = ["--model", str(source.root.resolve()), "--rounds", str(options.rounds)]
    argv += ["--delay", str(options.delay), "--cap", str(options.cap)]
    for text in options.only or ():
        argv += ["--only", text]
    argv += ["--gap", options.gap] if options.gap else []
    if not source.files:
        raise PagecacheError(f"no checkpoint in {source.root}")
    report = hosted.run_inside("benchmarks.order", argv, options, source.size, options.cap or None)
    return hosted.finish(report, options, lambda console: print_order(report, console))


if __name__ == "__main__":
    sys.exit(hosted.guarded(main))
