# SPDX-License-Identifier: Apache-2.0
"""Cold loads inside `with pagecache_bpf.load(path)` against the same loads without it.

On the scaled device in a guest (20 ms a request, 64 MB/s, read_ahead_kb 128): the real
all-MiniLM-L6-v2 by safetensors, as user nobody, with nothing around it and inside
`with pagecache_bpf.load(path)`, served by `pagecache-bpf serve`; then a generated checkpoint with
its layers backwards, by default, with `sequential` and with `maio` and a derived template.
Writes build/bench/load_api.json.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from rich.console import Console

import pagecache_bpf
from benchmarks import checkpoints, hosted, loaders, order, orders, rounds, schema
from benchmarks.guest.devices import scaled_device
from pagecache_bpf.cli.output import table
from pagecache_bpf.errors import PagecacheError
from pagecache_bpf.policy.observing import VARIABLE
from pagecache_bpf.weights.models import Model

NOBODY = 65534
STATES = {"plain": "as it is", "load": "in load()"}
_CONFIG = '[socket]\nmode = "0666"\n[loads]\npolicies = ["sequential"]\n'


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of this benchmark's options."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.load_api", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--rounds", type=int, default=3, help="of each (default: 3)")
    parser.add_argument("--delay", type=float, default=20.0, metavar="MS", help="per request")
    parser.add_argument("--cap", type=hosted.size_argument, default=64_000_000, metavar="BYTES")
    parser.add_argument("--model", type=Path, metavar="DIR", help="instead of MiniLM")
    parser.add_argument("--generated", type=Path, help=argparse.SUPPRESS)
    hosted.add_common(parser, "load_api")
    return parser


@contextmanager
def controller(directory: Path) -> Iterator[None]:
    """`pagecache-bpf serve` with its socket in the usual place, answering inside the block.

    Raises PagecacheError when it does not start.
    """
    config = directory / "config.toml"
    config.write_text(_CONFIG)
    errors = directory / "serve.stderr"
    with errors.open("w") as err:
        process = subprocess.Popen(
            [sys.executable, "-m", "pagecache_bpf", "serve", "--json", "--config", str(config)],
            stdout=subprocess.PIPE,
            stderr=err,
            text=True,
            env={**os.environ, VARIABLE: "on"},  # for the report
        )
    assert process.stdout is not None
    try:
        # It prints one JSON object when it is ready, whose last brace is at the margin.
        if "}\n" not in iter(process.stdout.readline, ""):
            raise PagecacheError("`pagecache-bpf serve` does not start", errors.read_text())
        yield
    finally:
        process.terminate()
        process.wait(30)
        process.stdout.close()


def _nobody() -> None:
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)


def _plain(_: Sequence[Path]) -> Callable[[], None]:
    _nobody()
    return lambda: None


def _in_load(report: int, files: Sequence[Path]) -> Callable[[], None]:
    """Return what the user adds; `report` is a descriptor for the words of the load's report."""
    _nobody()
    load = pagecache_bpf.load(files[0].parent)

    def done() -> None:
        os.write(report, f"{load.done()}\n".encode())

    return done


def api_rows(case: rounds.Case, count: int, scratch: Path, say: hosted.Say) -> list[schema.Row]:
    """Measure all rounds with and without the API, taking turns."""
    rows = {
        state: schema.Row(
            case=case.checkpoint.name,
            loader="safe_open",
            fs=case.fs,
            wanted_bytes=case.reference.size,
            engine=case.engine if state == "load" else None,
            extra={"state": text, **case.labels},
        )
        for state, text in STATES.items()
    }
    told = scratch / "report"
    # A fork finds what load() needs imported, as in a server that has started.
    pagecache_bpf.load(case.checkpoint.root).done()
    for number in range(1, count + 1):
        for state, row in rows.items():
            with told.open("wb", buffering=0) as out:
                warmer = partial(_in_load, out.fileno()) if state == "load" else _plain
                run = partial(loaders.run_loader, "safe_open", case.files, case.reference, warmer)
                rounds.record(row, *rounds.cold(case, run))
            row.extra["report"] = told.read_text().strip()
            say(f"{number}/{count} {case.checkpoint.name} {STATES[state]}: {row.seconds[-1]:.2f} s")
    plain, load = rows["plain"], rows["load"]
    if plain.median_s and load.median_s:
        load.extra["speedup"] = plain.median_s / load.median_s
    return [*rows.values()]


def measure(options: argparse.Namespace, say: hosted.Say) -> schema.Report:
    """Measure in the guest: both parts on one device."""
    loaders.warm_up()
    labels = {"delay_ms": options.delay, "cap_bytes_per_s": options.cap or None}
    device = {"read_ahead_kb": order.READ_AHEAD_KB, **labels}
    report = schema.Report(schema.machine(device=device))
    with (
        scaled_device(0, "ext4", 0, order.READ_AHEAD_KB) as disk,
        tempfile.TemporaryDirectory(dir="/dev/shm") as scratch,
    ):
        cases = []
        for path in (options.model, options.generated):
            source = checkpoints.load_dir(path)
            copy = checkpoints.copy_to(source, disk.mount / source.root.name)
            cases.append(rounds.new_case(copy, "ext4", source, **labels))
        disk.set_delay(options.delay)
        with controller(Path(scratch)):
            report.rows = api_rows(cases[0], options.rounds, Path(scratch), say)
        control = order.Templates("struct_ops", Path(scratch))
        wanted = orders.make(cases[1].checkpoint)[:1]
        report.rows += order.measure(cases[1], control, wanted, options.rounds, (), say)
        disk.set_delay(0)
    return report


def run(options: argparse.Namespace, model: Model, generated: Model) -> schema.Report:
    """Measure from the host: boot the guest and measure there."""
    argv = ["--model", str(model.root.resolve()), "--generated", str(generated.root.resolve())]
    argv += ["--rounds", str(options.rounds), "--delay", str(options.delay)]
    argv += ["--cap", str(options.cap)]
    size = model.size + generated.size
    return hosted.run_inside("benchmarks.load_api", argv, options, size, options.cap or None)


def print_load_api(report: schema.Report, console: Console) -> None:
    """Print one line a row, and what load() said of itself."""
    lines = []
    for row in report.rows:
        times = row.extra.get("speedup") or row.extra.get("speedup_over", {}).get("default")
        lines.append(
            [
                row.case,
                row.loader,
                row.extra["state"],
                f"{row.median_s:.2f}" if row.median_s else "",
                f"{times:.1f}x" if times else "",
                f"{row.device_bytes / 1e6:.1f}" if row.device_bytes else "",
            ]
        )
    columns = [("model", "text"), ("loaded by, in order", "text"), ("state", "text")]
    columns += [("median s", "number"), ("speed", "number"), ("read MB", "number")]
    console.print(table(columns, lines))
    for row in report.rows:
        if row.extra.get("report"):
            console.print("print(load.report()) says:", highlight=False)
            console.print(row.extra["report"], highlight=False)


def main() -> int:
    """Parse, run on this side or the other, show."""
    options = make_parser().parse_args()
    say = hosted.progress()
    if options.inside:
        schema.write(options.inside, measure(options, say))
        return 0
    if options.model is None:
        model = checkpoints.minilm(hosted.MODELS / "all-MiniLM-L6-v2")
    else:
        model = checkpoints.load_dir(options.model)
    generated = checkpoints.generate(hosted.MODELS / f"llama-{64 << 20}", 64 << 20)
    report = run(options, model, generated)
    return hosted.finish(report, options, lambda console: print_load_api(report, console))


if __name__ == "__main__":
    sys.exit(hosted.guarded(main))
