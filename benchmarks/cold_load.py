# SPDX-License-Identifier: Apache-2.0
"""Cold loads of a checkpoint: kernel default, policy attached, detached again, device limit.

Runs in a guest on the scaled device: each request delayed by dm-delay, the bandwidth capped
by QEMU, read_ahead_kb 128. With --native it runs on this machine's own kernel and disk, with
engine agent and beside today's warmers. Writes build/bench/cold_load.json.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from benchmarks import checkpoints, hosted, loaders, memory, native, rounds, schema, show
from benchmarks.control import CommandLine
from benchmarks.guest.devices import ScaledDevice, scaled_device
from pagecache_bpf.weights.models import Model

READ_AHEAD_KB = 128


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of this benchmark's options."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cold_load", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--policy", default="sequential")
    parser.add_argument(
        "--engine", default="auto", help="in a guest: auto, agent or struct_ops (default: auto)"
    )
    parser.add_argument("--fs", action="append", choices=("ext4", "xfs"), help="default: both")
    parser.add_argument("--loader", action="append", choices=tuple(loaders.LOADERS))
    parser.add_argument(
        "--native", action="store_true", help="on this machine's own kernel, not in a guest"
    )
    parser.add_argument("--rounds", type=int, help="of each (default: 5; 7 with --native)")
    parser.add_argument(
        "--delay",
        type=float,
        default=20.0,
        metavar="MS",
        help="per request, ms (default: 20, about 1 ms on a native machine)",
    )
    parser.add_argument(
        "--sweep",
        type=_delays,
        default=[],
        metavar="MS,MS,...",
        help="more delays, with --sweep-rounds rounds each",
    )
    parser.add_argument("--sweep-rounds", type=int, default=3)
    parser.add_argument(
        "--cap",
        type=hosted.size_argument,
        default=64_000_000,
        metavar="BYTES",
        help="device bandwidth per second; 0: none (default: 64MB)",
    )
    parser.add_argument(
        "--size",
        type=hosted.size_argument,
        help="of the generated Llama-shaped checkpoint (default: 64M; 4G with --native)",
    )
    parser.add_argument(
        "--model",
        type=Path,
        action="append",
        metavar="DIR",
        help="directory of safetensors shards to load instead (may be given several times)",
    )
    parser.add_argument(
        "--detached-rounds",
        type=int,
        metavar="N",
        help="measure 'detached again' in the last N rounds only (default: in all)",
    )
    parser.add_argument(
        "--picture", action="store_true", help="record residency over time too, of the first case"
    )
    hosted.add_common(parser, "cold_load")
    return parser


def _delays(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers") from error


def measure(options: argparse.Namespace, sources: list[Model], say: hosted.Say) -> schema.Report:
    """Measure in the guest: run every case, one file system after the other."""
    control = CommandLine(options.engine)
    loaders.warm_up()
    report = schema.Report(
        schema.machine(
            device={
                "read_ahead_kb": READ_AHEAD_KB,
                "delay_ms": options.delay,
                "sweep_ms": options.sweep,
                "cap_bytes_per_s": options.cap or None,
            },
            kernel_problems=[],
        )
    )
    for fs in options.fs or ("ext4", "xfs"):
        with scaled_device(0, fs, 0, READ_AHEAD_KB) as device:
            for source in sources:
                say(f"{fs}: copying {source.name}, {source.size / 1e6:.0f} MB, onto the device")
                copy = checkpoints.copy_to(source, device.mount / source.root.name)
                case = rounds.new_case(copy, fs, source)
                if options.engine != "auto":
                    case.engine = options.engine
                picture = options.picture and not report.rows  # of the first case
                report.rows += _measure_case(options, device, case, control, picture, say)
    for line, output in control.transcript[:2]:
        say(f"$ {line}\n{output}")
    return report


def _measure_case(
    options: argparse.Namespace,
    device: ScaledDevice,
    case: rounds.Case,
    control: CommandLine,
    picture: bool,
    say: hosted.Say,
) -> list[schema.Row]:
    rows: list[schema.Row] = []
    names = options.loader or list(loaders.LOADERS)
    delays = [(options.delay, options.rounds)]
    delays += [(ms, options.sweep_rounds) for ms in options.sweep if ms != options.delay]
    for delay, count in delays:
        device.set_delay(delay)
        case.labels = {
            "host": "guest",
            "delay_ms": delay,
            "cap_bytes_per_s": options.cap or None,
        }
        say(f"{case.fs}: {case.checkpoint.name} at {delay:g} ms per request")
        plan = rounds.best_plan(case, say=say)
        rows += rounds.interleave(
            case, options.policy, control, names, count, plan, options.detached_rounds, say
        )
        if picture and delay == options.delay:
            rounds.add_pictures(rows, options.policy, case, control)
    device.set_delay(0)
    return rows


def inputs(options: argparse.Namespace) -> list[Model]:
    """Return the checkpoints to load, made or fetched if need be."""
    if options.model:
        return [checkpoints.load_dir(path) for path in options.model]
    return [checkpoints.generate(hosted.MODELS / f"llama-{options.size}", options.size)]


def guest_arguments(options: argparse.Namespace, sources: list[Model]) -> list[str]:
    """Return the options of the same run as seen from inside the guest."""
    argv: list[Any] = ["--policy", options.policy, "--engine", options.engine]
    argv += ["--rounds", options.rounds]
    argv += ["--delay", options.delay, "--cap", options.cap]
    argv += ["--sweep-rounds", options.sweep_rounds]
    for fs in options.fs or ():
        argv += ["--fs", fs]
    for name in options.loader or ():
        argv += ["--loader", name]
    if options.sweep:
        argv += ["--sweep", ",".join(f"{ms:g}" for ms in options.sweep)]
    if options.detached_rounds is not None:
        argv += ["--detached-rounds", options.detached_rounds]
    if options.picture:
        argv += ["--picture"]
    for source in sources:
        argv += ["--model", source.root.resolve()]
    return [str(word) for word in argv]


def run(options: argparse.Namespace, sources: list[Model]) -> schema.Report:
    """Measure from the host: boot the guest and measure there."""
    wanted = sum(source.size for source in sources)
    argv = guest_arguments(options, sources)
    return hosted.run_inside("benchmarks.cold_load", argv, options, wanted, options.cap or None)


def run_native(
    options: argparse.Namespace, sources: list[Model], with_peers: bool = True
) -> schema.Report:
    """Measure here, one checkpoint after the other."""
    report: schema.Report | None = None
    for source in sources:
        part = native.measure(
            source,
            options.policy,
            options.rounds,
            options.loader or ["safe_open"],
            READ_AHEAD_KB,
            hosted.progress(),
            with_peers,
            options.picture and report is None,
        )
        if report is None:
            report = part
        else:
            report.rows += part.rows
    assert report is not None
    return report


def main() -> int:
    """Parse, run on this side or the other, show."""
    options = make_parser().parse_args()
    options.size = options.size or (4 << 30 if options.native else 64 << 20)
    options.rounds = options.rounds or (7 if options.native else 5)
    if options.native:
        memory.with_huge_malloc()
        report = run_native(options, inputs(options))
        return hosted.finish(report, options, lambda console: show.print_cold(report, console))
    if options.inside:
        report = measure(options, inputs(options), hosted.progress())
        schema.write(options.inside, report)
        return 0
    report = run(options, inputs(options))
    return hosted.finish(report, options, lambda console: show.print_cold(report, console))


if __name__ == "__main__":
    sys.exit(hosted.guarded(main))
