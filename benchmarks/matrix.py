# SPDX-License-Identifier: Apache-2.0
"""Never slower than without us: every loader, device, memory and policy beside the default.

    python -m benchmarks.matrix --short --list     # the cells, nothing is run
    python -m benchmarks.matrix --short            # this machine's disk, about 15 minutes
    python -m benchmarks.matrix --device native-4096 --device guest-20ms-64MB

A round attaches each policy once, runs every reader cold under it, under the kernel's default and
beside direct I/O, and is written to build/bench/matrix.json before the next begins.  Started again
it goes on where it stopped (--seconds N ends it after the round in which N seconds are over).
Ratios are of the same round; the cache is dropped and cachestat(2) says that it is before each
load; device bytes are the block device's own count, until it is idle again.
"""

from __future__ import annotations

import argparse
import os
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import (
    cgroups,
    checkpoints,
    directio,
    engines,
    hosted,
    loaders,
    matrix_cells,
    matrix_readers,
    matrix_show,
    memory,
    native,
    rounds,
    schema,
)
from benchmarks.cachestat import drop
from benchmarks.control import CommandLine
from benchmarks.guest.devices import scaled_device
from benchmarks.matrix_cells import Reader, Setting
from pagecache_bpf.errors import PagecacheError, PrivilegeError, UsageError
from pagecache_bpf.policy.agent_device import SOCKET
from pagecache_bpf.weights.models import Model, resolve

DEFAULT = "default"
_ROUNDS = 7
#: What a reader's process takes of its cgroup beside page cache: its stack, its modules.
_PROCESS_BYTES = 48 << 20
#: What is touched before a random reader, which fills little.
_RANDOM_BYTES = 256 << 20
State = tuple[str, str]  # policy and engine; DEFAULT and ""


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of this benchmark's options."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.matrix",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--short", action="store_true", help="a choice of cells, in minutes")
    parser.add_argument("--list", action="store_true", help="print the cells and run nothing")
    parser.add_argument("--rounds", type=int, default=_ROUNDS, help="of each cell (default: 7)")
    parser.add_argument("--seconds", type=float, help="begin no round after so many seconds")
    parser.add_argument("--device", action="append", metavar="NAME", help="only these (--list)")
    parser.add_argument("--setting", action="append", metavar="TEXT", help="only with this name")
    parser.add_argument("--reader", action="append", metavar="NAME", help="only these (--list)")
    parser.add_argument("--show", action="store_true", help="only show what was measured")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw it (.svg or .png)")
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    hosted.add_common(parser, "matrix")
    return parser


def chosen(options: argparse.Namespace) -> list[Setting]:
    """Return the settings that the options ask for.  Raises UsageError when there is none."""
    found = [
        setting
        for setting in matrix_cells.settings(options.short)
        if (not options.device or setting.device.name in options.device)
        and (not options.setting or any(text in setting.name for text in options.setting))
    ]
    if not found or any(name not in matrix_cells.BY_NAME for name in options.reader or ()):
        raise UsageError("no such cells", "", "See `python -m benchmarks.matrix --list`")
    return found


def usable(options: argparse.Namespace, setting: Setting) -> list[Reader]:
    """Return the readers that the options ask for in a setting and that can run here."""
    readers = matrix_cells.readers(setting, options.short, options.reader or ())
    return [reader for reader in readers if not matrix_cells.absent(reader, setting)]


def row_of(rows: Sequence[schema.Row], setting: Setting, loader: str, state: State) -> Any:
    """Return the row of a reader in a setting and a state; None where there is none yet."""
    labels = {**setting.labels, "state": state[0], "engine_of_state": state[1]}
    for row in rows:
        if row.loader == loader and all(row.extra.get(key) == labels[key] for key in labels):
            return row
    return None


def rounds_done(rows: Sequence[schema.Row], setting: Setting, names: Sequence[str]) -> int:
    """Whole rounds of a setting that are there: of every reader, in every state.

    Args:
        rows: what was measured.
        setting: which one.
        names: its readers that can be measured.

    Returns:
        The rounds; 0 when any row is missing.
    """
    found = [row_of(rows, setting, name, state) for name in names for state in states_of(setting)]
    return min((len(row.seconds) if row else 0 for row in found), default=0)


def cut(rows: Sequence[schema.Row], setting: Setting, names: Sequence[str], count: int) -> None:
    """Forget what a round that was interrupted has left: rows of these readers keep `count`."""
    for row in rows:
        if row.loader in names and all(
            row.extra.get(key) == value for key, value in setting.labels.items()
        ):
            del row.seconds[count:], row.device_bytes_rounds[count:]
            for key in ("reader_cpu_s", "our_cpu_s"):
                del row.extra.get(key, [])[count:]


def states_of(setting: Setting) -> list[State]:
    """Return the default, and each policy on each engine."""
    ours = [
        (policy, engine) for engine in setting.device.engines for policy in matrix_cells.POLICIES
    ]
    return [(DEFAULT, ""), *ours]


def agent_pid() -> int | None:
    """Return the process of engine agent, None when none runs."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        try:
            connection.connect(str(SOCKET))
        except OSError:
            return None
        data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return int(struct.unpack("3i", data)[0])


def our_cpu_s() -> float:
    """CPU seconds so far of the agent, of the processes it has started and of those that ended."""
    agent = agent_pid()
    if agent is None:
        return 0.0
    ticks = os.sysconf("SC_CLK_TCK")
    total = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, fields = stat.parent.name, stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(name) == agent:
            total += sum(int(value) for value in fields[11:15])
        elif int(fields[1]) == agent:
            total += sum(int(value) for value in fields[11:13])
    return total / ticks


class Bench:
    """Measures rounds of settings into a report, and writes it after each."""

    def __init__(self, report: schema.Report, save: Callable[[], None], say: hosted.Say) -> None:
        self.report, self._save, self.say = report, save, say

    def round(
        self,
        setting: Setting,
        case: rounds.Case,
        readers: Sequence[Reader],
        number: int,
        huge: bool,
    ) -> None:
        """Run one round: all readers in all states, in an order that rotates."""
        turn = number % len(readers)
        readers = [*readers[turn:], *readers[:turn]]
        states = states_of(setting)
        states = states[number % len(states) :] + states[: number % len(states)]
        for policy, engine in states:
            control = CommandLine(engine or "auto")
            root = case.checkpoint.root
            ours = rounds.attached(control, policy, root) if engine else nullcontext()
            with ours:
                for reader in readers:
                    self._load(setting, case, reader, (policy, engine), number)
        self._limit(setting, case, huge)
        self._save()

    def _row(self, setting: Setting, case: rounds.Case, loader: str, state: State) -> schema.Row:
        row = row_of(self.report.rows, setting, loader, state)
        if row is None:
            ours = state[1] or None
            row = schema.Row(
                case=setting.name,
                loader=loader,
                fs=case.fs,
                wanted_bytes=case.reference.size,
                policy=state[0] if ours else None,
                engine=ours,
                extra={
                    **setting.labels,
                    "state": state[0],
                    "engine_of_state": state[1],
                    "reader_cpu_s": [],
                    "our_cpu_s": [],
                },
            )
            self.report.rows.append(row)
        assert isinstance(row, schema.Row)
        return row

    def _load(
        self, setting: Setting, case: rounds.Case, reader: Reader, state: State, number: int
    ) -> None:
        row = self._row(setting, case, reader.name, state)
        row.wanted_bytes = matrix_readers.wanted(reader, case.checkpoint)
        drop(case.files)
        with _memory_of(reader, case.checkpoint), memory_limit(setting) as enter:
            before = our_cpu_s() if state[1] else 0.0
            outcome = matrix_readers.run(reader, case.checkpoint, case.reference, enter, number)
            ours = our_cpu_s() - before if state[1] else 0.0
        rounds.record(row, outcome, outcome.device_bytes)
        row.extra["reader_cpu_s"].append(outcome.cpu_s)
        row.extra["our_cpu_s"].append(ours)

    def _limit(self, setting: Setting, case: rounds.Case, huge: bool) -> None:
        """Direct I/O beside the round, by the plan that was the best before the first."""
        row = self._row(setting, case, "direct", ("limit", ""))
        plans = {str(plan): plan for plan in native.SWEEP}
        if "plan" not in row.extra:
            row.extra["plan"] = str(rounds.best_plan(case, native.SWEEP))
        run = partial(
            loaders.run_direct, case.files, case.reference, plans[row.extra["plan"]], huge
        )
        rounds.record(row, *rounds.cold(case, run))


def _memory_of(reader: Reader, model: Model) -> AbstractContextManager[object]:
    """Have what a load takes be memory that the host has given already."""
    if reader.kind == "random":
        return memory.backed(_RANDOM_BYTES)
    if reader.kind == "engine":
        return engines.memory_of(model.size)
    return native.memory_of(model)


@contextmanager
def memory_limit(setting: Setting) -> Iterator[Callable[[], None]]:
    """Make the cgroup of a setting; yield what a process calls to go into it.

    It goes there with its buffers allocated: the limit is for what comes after, the page cache.
    """
    if setting.memory == matrix_cells.AMPLE:
        yield lambda: None
        return
    limit = int(setting.size * matrix_cells.TIGHT_SHARE) + _PROCESS_BYTES
    if setting.model != matrix_cells.GENERATED:
        limit += 2 * setting.size + engines.PROCESS_BYTES
    with cgroups.group(f"matrix-{os.getpid()}", limit) as group:
        yield group.enter


def measure_here(
    options: argparse.Namespace, wanted: Sequence[Setting], report: schema.Report, say: hosted.Say
) -> None:
    """Rounds on this machine: the first of every setting, then the second, and so on."""
    if os.geteuid() != 0:
        raise PrivilegeError("only root can attach a policy", "", "Run the benchmark with sudo")
    loaders.warm_up()
    bench = Bench(report, lambda: schema.write(options.out, report), say)
    begun = time.monotonic()
    models: dict[tuple[int, int, str], tuple[Model, loaders.Reference]] = {}
    for number in range(options.rounds):
        for setting in wanted:
            readers = usable(options, setting)
            names = [reader.name for reader in readers]
            if not readers or rounds_done(report.rows, setting, names) > number:
                continue
            if options.seconds and time.monotonic() - begun > options.seconds:
                say("time is over; started again it goes on here")
                return
            cut(report.rows, setting, names, number)
            key = setting.size, setting.shards, setting.model
            if key not in models:
                if sum(size for size, _, _ in models) + setting.size > 4 << 30:
                    models.clear()
                model = _model_of(setting)
                models[key] = model, loaders.Reference(model.files)
            model, reference = models[key]
            fs = native.file_system(model.root)
            sizes = [path.stat().st_size for path in model.files]
            with (
                native.read_ahead(model.root, setting.device.read_ahead_kb),
                directio.reserved(sizes) as huge,
            ):
                case = rounds.Case(model, fs, reference, engine="agent", huge_pages=huge)
                at = time.monotonic()
                bench.round(setting, case, readers, number, huge)
            say(
                f"round {number + 1}/{options.rounds} {setting.name}: {time.monotonic() - at:.0f} s"
            )


def _model_of(setting: Setting) -> Model:
    """Make the model that the readers of a setting load, once."""
    if setting.model == matrix_cells.GENERATED:
        root = hosted.MODELS / f"llama-{setting.size}-{setting.shards}"
        return checkpoints.generate(root, setting.size, setting.shards)
    root = engines.make(setting.model, hosted.MODELS / f"engine-{setting.model}-{engines.LAYERS}")
    return resolve(root)


def measure_inside(options: argparse.Namespace, say: hosted.Say) -> schema.Report:
    """Measure in the guest: the settings of one device, all rounds."""
    loaders.warm_up()
    report = schema.Report(schema.machine(short=False))
    source = checkpoints.load_dir(options.model)
    wanted = chosen(options)
    device = wanted[0].device
    bench = Bench(report, lambda: None, say)
    with ExitStack() as stack:
        disk = stack.enter_context(scaled_device(0, "ext4", 0, device.read_ahead_kb))
        copy = checkpoints.copy_to(source, disk.mount / source.root.name)
        case = rounds.new_case(copy, "ext4", source)
        disk.set_delay(device.delay_ms or 0)
        for number in range(options.rounds):
            for setting in wanted:
                bench.round(setting, case, usable(options, setting), number, False)
                say(f"round {number + 1}/{options.rounds} {setting.name}")
        disk.set_delay(0)
    return report


def measure_guest(
    options: argparse.Namespace, wanted: Sequence[Setting], report: schema.Report, say: hosted.Say
) -> None:
    """Measure from the host: a guest for each device and model; what it has measured is kept."""
    by_guest: dict[tuple[str, int, int], list[Setting]] = {}
    for setting in wanted:
        names = [reader.name for reader in usable(options, setting)]
        if not rounds_done(report.rows, setting, names):
            key = setting.device.name, setting.size, setting.shards
            by_guest.setdefault(key, []).append(setting)
    for (device, size, shards), settings in by_guest.items():
        say(f"a guest for {device}, {shards} shards")
        root = hosted.MODELS / f"llama-{size}-{shards}"
        source = checkpoints.generate(root, size, shards)
        argv = ["--model", str(source.root.resolve()), "--rounds", str(options.rounds)]
        argv += ["--device", device]
        for setting in settings:
            argv += ["--setting", setting.name]
        for name in options.reader or ():
            argv += ["--reader", name]
        cap = settings[0].device.cap_bytes_per_s or None
        part = hosted.run_inside("benchmarks.matrix", argv, options, source.size, cap)
        report.rows += part.rows
        report.machine.setdefault("guests", {})[device] = part.machine
        schema.write(options.out, report)


def opened(options: argparse.Namespace) -> schema.Report:
    """Return the report to go on with, or a new one.

    Raises UsageError when the one that is there was measured elsewhere or in the other form.
    """
    machine = schema.machine(short=options.short)
    if not options.out.exists():
        return schema.Report(machine)
    report = schema.read(options.out)
    for key in ("kernel", "cpus", "memory_bytes", "short"):
        if report.machine.get(key) != machine[key]:
            raise UsageError(
                f"{options.out} cannot be gone on with",
                f"its {key} is {report.machine.get(key)!r}, here it is {machine[key]!r}",
                "Name another file with --out, or remove that one",
            )
    return report


def list_cells(options: argparse.Namespace) -> None:
    """Print every cell that the options ask for, and why one is not measured."""
    for cell in matrix_cells.cells(chosen(options), options.short, options.reader or ()):
        words = [cell.setting.name, cell.reader.name, f"{cell.policy} on {cell.engine}"]
        print(" | ".join([*words, *([cell.absent] if cell.absent else [])]))


def main() -> int:
    """Parse, go on with what is there, show."""
    options = make_parser().parse_args()
    if options.inside:
        schema.write(options.inside, measure_inside(options, hosted.progress()))
        return 0
    if options.rounds < 1:
        raise UsageError("no rounds, no result", f"--rounds is {options.rounds}", "Ask for 1")
    if options.list:
        list_cells(options)
        return 0
    report = opened(options)
    wanted = chosen(options)
    if not options.show:
        memory.with_huge_malloc()
        say = hosted.progress()
        here = [setting for setting in wanted if setting.device.native]
        if here:
            measure_here(options, here, report, say)
        there = [setting for setting in wanted if not setting.device.native]
        if there:
            measure_guest(options, there, report, say)
    if options.picture:
        matrix_show.draw(report, options.picture)
    if options.show and not report.rows:
        raise PagecacheError(f"nothing was measured: {options.out}", "", "Run it without --show")
    return hosted.finish(
        report, options, lambda console: matrix_show.print_matrix(report, wanted, console)
    )


if __name__ == "__main__":
    sys.exit(hosted.guarded(main))
