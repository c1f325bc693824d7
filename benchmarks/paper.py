# SPDX-License-Identifier: Apache-2.0
"""The tables of the paper (PPC and MAIO, FAST '26, section 5), as far as this machine has them.

    python -m benchmarks.paper table3        # template sizes of the real models; no root
    python -m benchmarks.paper fig6 fig9 fig10 --seconds 200

fig6 has Fig. 6 (loading by Native, EagerLoad, PreCache and maio, with ample memory and with page
cache for 45% of the model) and Fig. 11 without affinity (P: prefetch, P+E: prefetch and drop
behind); fig9 what an empty policy costs readers of cached files; fig10 what listening costs; fig7
(with Fig. 8) and fig12 whole starts of transformers, see benchmarks/paper_starts.py.
Rounds are interleaved; ratios are of one round; each goes into build/bench/paper.json at once, and
a benchmark that is started again adds rounds.  docs/paper.md has the paper's numbers beside them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from rich.console import Console

from benchmarks import (
    checkpoints,
    directio,
    hosted,
    loaders,
    matrix,
    matrix_cells,
    memory,
    native,
    paper_models,
    paper_starts,
    peers,
    rounds,
    schema,
)
from benchmarks.cachestat import drop
from benchmarks.control import on_agent, pagecache_bpf
from benchmarks.matrix_cells import AMPLE, MB, TIGHT, Setting, paired
from benchmarks.overhead import READBENCH, build_readbench
from pagecache_bpf.cli.output import table
from pagecache_bpf.errors import PrivilegeError
from pagecache_bpf.kernel.file_pages import PAGE_SIZE

NATIVE, EAGER, PRECACHE, P, PE = "Native", "EagerLoad", "PreCache", "maio (P)", "maio (P+E)"
_KNOBS = {P: "drop_behind=0", PE: "drop_behind=1"}
_FIG9_BYTES = 512 << 20
_FILES = 1000
#: Results are seconds of so many calls: those of one would be rounded away.
_CALLS = 1_000_000


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of this benchmark's options."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paper",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("figure", nargs="+", choices=tuple(FIGURES), help="what to measure")
    parser.add_argument("--rounds", type=int, default=7, help="of each, in all (default: 7)")
    parser.add_argument("--seconds", type=float, help="begin no round after so many seconds")
    parser.add_argument(
        "--size", type=hosted.size_argument, default=1000 * MB, help="of the model (default: 1G)"
    )
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw Fig. 8 into it (.svg)")
    hosted.add_common(parser, "paper")
    return parser


class Paper:
    """The report that rounds are added to."""

    def __init__(self, options: argparse.Namespace, say: hosted.Say) -> None:
        self.options, self.say = options, say
        self.begun = time.monotonic()
        path: Path = options.out
        self.report = schema.read(path) if path.exists() else schema.Report(schema.machine())

    def row(self, case: str, loader: str, state: str, wanted: int) -> schema.Row:
        """Return the row of a case, a loader and a state, made when there is none."""
        for row in self.report.rows:
            if (row.case, row.loader, row.extra["state"]) == (case, loader, state):
                return row
        made = schema.Row(case, loader, "", wanted, extra={"state": state})
        self.report.rows.append(made)
        return made

    def rounds(self, case: str) -> Iterator[int]:
        """Yield the rounds of a case that are still to be measured; write the report after each."""
        rows = [row for row in self.report.rows if row.case == case]
        done = min((len(row.seconds) for row in rows), default=0)
        for row in rows:
            del row.seconds[done:], row.device_bytes_rounds[done:]
        for number in range(done, self.options.rounds):
            if self.options.seconds and time.monotonic() - self.begun > self.options.seconds:
                self.say(f"{case}: time is over, {number} rounds are there")
                return
            yield number
            schema.write(self.options.out, self.report)
            self.say(f"{case}: round {number + 1}/{self.options.rounds}")


def table3(paper: Paper) -> None:
    """Table 3: the bytes of a template and of its model."""
    for name, (shape, _, _) in paper_models.MODELS.items():
        with tempfile.TemporaryDirectory(dir=hosted.BUILD) as scratch:
            root = Path(scratch)
            size = paper_models.write(shape, root)
            output = root / "template"
            for order in ("keys", "natural"):
                begun = time.monotonic()
                words = ["template", "derive", str(root), "--order", order]
                pagecache_bpf(*words, "--output", str(output))
                row = paper.row("Table 3", name, f"order {order}", size)
                row.seconds = [time.monotonic() - begun]
                row.extra["template_bytes"] = output.stat().st_size
                paper.say(f"{name}, {order}: {output.stat().st_size} bytes")
    schema.write(paper.options.out, paper.report)


def _all_in_cache(enter: Callable[[], None], files: tuple[Path, ...]) -> None:
    """PreCache: the whole model is read beforehand, in the cgroup of the load."""

    def work() -> loaders.Outcome:
        enter()
        peers.cat(files)
        return loaders.Outcome(0, 0, True, 0, 0)

    loaders.in_child(work, "cat")


def fig6(paper: Paper) -> None:
    """Fig. 6 and Fig. 11: loading, by memory."""
    size = paper.options.size
    model = checkpoints.generate(hosted.MODELS / f"llama-{size}-4", size)
    reference = loaders.Reference(model.files)
    loaders.warm_up()
    case = rounds.Case(model, native.file_system(model.root), reference, engine="agent")
    sizes = [path.stat().st_size for path in model.files]
    iterators = {share: paper.rounds(f"Fig. 6, {share}") for share in (AMPLE, TIGHT)}
    with native.read_ahead(model.root, 128), directio.reserved(sizes) as huge:
        # Both memories take turns, so that a run that ends early has as much of each.
        while iterators:
            for share in list(iterators):
                number = next(iterators[share], None)
                if number is None:
                    del iterators[share]
                    continue
                setting = Setting(matrix_cells.NATIVE[0], size, len(model.files), share)
                _loads(paper, setting, case, number)
                plan = directio.Plan(2 << 20, 8)
                run = partial(loaders.run_direct, model.files, reference, plan, huge)
                limit = paper.row(f"Fig. 6, {share}", "safe_open", "direct I/O", model.size)
                rounds.record(limit, *rounds.cold(case, run))


def _loads(paper: Paper, setting: Setting, case: rounds.Case, number: int) -> None:
    states = [NATIVE, EAGER, PRECACHE, P, PE]
    turn = number % len(states)
    files = case.files
    for state in states[turn:] + states[:turn]:
        row = paper.row(f"Fig. 6, {setting.memory}", "safe_open", state, case.reference.size)
        knob = _KNOBS.get(state)
        with (
            on_agent("maio", case.checkpoint.root, "--knob", knob) if knob else nullcontext(),
            matrix.memory_limit(setting) as enter,
            memory.backed(setting.size),
        ):
            drop(files)
            if state == PRECACHE:
                _all_in_cache(enter, files)
            warmer = peers.prefetch_threads if state == EAGER else None
            outcome = loaders.run_loader("safe_open", files, case.reference, warmer, enter, True)
            rounds.record(row, outcome, outcome.device_bytes)


def fig9(paper: Paper) -> None:
    """Fig. 9: what an empty policy costs readers of what is cached, and stat()."""
    build_readbench()
    with tempfile.TemporaryDirectory(dir=hosted.BUILD, prefix="paper-") as scratch:
        root = Path(scratch)
        data = root / "data"
        with data.open("wb") as out:
            for _ in range(_FIG9_BYTES >> 20):
                out.write(os.urandom(1 << 20))
            os.fsync(out.fileno())
        many = root / "many"
        many.mkdir()
        for number in range(_FILES):
            (many / str(number)).write_text("")
        work: dict[str, Callable[[], float]] = {
            "read 1 MiB, cached": partial(_readbench, data, "pread", 1 << 20, 8 << 30),
            "mmap, cached": partial(_readbench, data, "mmap", PAGE_SIZE, 4 << 30),
            "stat, 1000 files": partial(_stats, many),
            "read 1 MiB, cold": partial(_cold_read, data),
        }
        for number in paper.rounds("Fig. 9"):
            states = ("none", "noop") if number % 2 else ("noop", "none")
            for state in states:
                ours = on_agent("noop", data, "--no-observe") if state == "noop" else nullcontext()
                with ours:
                    for name, run in work.items():
                        peers.cat([data])
                        row = paper.row("Fig. 9", name, state, _FIG9_BYTES)
                        row.seconds.append(run())


def _readbench(data: Path, mode: str, block: int, count: int) -> float:
    done = subprocess.run(
        [READBENCH, data, mode, str(block), str(count)], check=True, capture_output=True, text=True
    )
    return float(done.stdout) / 1e9 * _CALLS


def _stats(many: Path) -> float:
    paths = [str(path) for path in many.iterdir()]
    begun = time.monotonic()
    for _ in range(200):
        for path in paths:
            os.stat(path)
    return (time.monotonic() - begun) / (200 * len(paths)) * _CALLS


def _cold_read(data: Path) -> float:
    drop([data])
    return _readbench(data, "pread", 1 << 20, _FIG9_BYTES)


def fig10(paper: Paper) -> None:
    """Fig. 10: memory and CPU of what listens, while cached files are read and while one loads."""
    size = paper.options.size
    model = checkpoints.generate(hosted.MODELS / f"llama-{size}-4", size)
    reference = loaders.Reference(model.files)
    loaders.warm_up()
    with native.read_ahead(model.root, 128):
        for _ in paper.rounds("Fig. 10"):
            for policy in ("noop", "maio"):
                with on_agent(policy, model.root):
                    time.sleep(2)
                    for state in ("idle", "cached", "cold"):
                        if state == "cold":
                            drop(model.files)
                        _listen(paper, policy, state, model.files, reference)


def _listen(
    paper: Paper, policy: str, state: str, files: tuple[Path, ...], reference: loaders.Reference
) -> None:
    before, begun = matrix.our_cpu_s(), time.monotonic()
    if state == "idle":
        time.sleep(3)
    else:
        loaders.run_loader("read_1m", files, reference)
    seconds = time.monotonic() - begun
    row = paper.row("Fig. 10", policy, state, reference.size)
    row.seconds.append(seconds)
    row.extra.setdefault("cpu_share", []).append((matrix.our_cpu_s() - before) / seconds)
    row.extra.setdefault("memory_bytes", []).append(_memory())


def _memory() -> int:
    """Proportional share of memory (PSS) of the agent and what it has started, in bytes."""
    agent = matrix.agent_pid()
    total = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            if int(stat.parent.name) == agent or parent == agent:
                text = (stat.parent / "smaps_rollup").read_text()
                total += int(text.partition("Pss:")[2].split()[0]) * 1024
        except OSError:
            continue
    return total


FIGURES: dict[str, Callable[[Paper], None]] = {
    "table3": table3,
    "fig6": fig6,
    "fig9": fig9,
    "fig10": fig10,
    "fig7": paper_starts.measure_starts,
    "fig12": paper_starts.measure_swaps,
}


def lines(report: schema.Report) -> list[list[str]]:
    """Make a line a row: medians, beside the first state of the same case and loader."""
    made = []
    for row in report.rows:
        same = report.select(case=row.case, loader=row.loader)
        first = next((other for other in same if other.extra["state"] in (NATIVE, "none")), row)
        limit = next((other for other in same if other.extra["state"] == "direct I/O"), None)
        ratio = paired(first.seconds, row.seconds) if first is not row else None
        notes = []
        device = row.device_bytes
        if "template_bytes" in row.extra:
            kilobytes, gib = row.extra["template_bytes"] / 1e3, row.wanted_bytes / 2**30
            notes.append(f"{kilobytes:.0f} KB of {gib:.0f} GiB")
        if text := paper_starts.phases_text(row):
            notes.append(text)
        if "cpu_share" in row.extra:
            notes.append(f"CPU {statistics.median(row.extra['cpu_share']):.1%} of one")
            notes.append(f"{statistics.median(row.extra['memory_bytes']) / 2**20:.0f} MiB")
        made.append(
            [
                row.case,
                row.loader,
                row.extra["state"],
                str(len(row.seconds)),
                f"{row.median_s:.4g}" if row.median_s else "",
                f"{ratio.median:.3f} ({ratio.low:.3f}-{ratio.high:.3f})" if ratio else "",
                f"{limit.median_s / row.median_s:.0%}"
                if limit and limit.median_s and row.median_s
                else "",
                f"{device / row.wanted_bytes:.2f}" if device is not None else "",
                ", ".join(notes),
            ]
        )
    return made


def show(report: schema.Report, console: Console) -> None:
    """Print one line a row."""
    columns = [("figure", "text"), ("case", "text"), ("state", "text"), ("rounds", "number")]
    columns += [("median s", "number"), ("times the first", "number"), ("of limit", "number")]
    columns += [("read/wanted", "number"), ("", "text")]
    console.width = max(160, console.width)
    console.print(table(columns, lines(report)))


def main() -> int:
    """Parse, measure, show."""
    options = make_parser().parse_args()
    if os.geteuid() != 0 and set(options.figure) != {"table3"}:
        raise PrivilegeError("only root can attach a policy", "", "Run the benchmark with sudo")
    memory.with_huge_malloc()
    paper = Paper(options, hosted.progress())
    for name in options.figure:
        FIGURES[name](paper)
    if options.picture:
        paper_starts.draw(paper.report, options.picture)
    return hosted.finish(paper.report, options, lambda console: show(paper.report, console))


if __name__ == "__main__":
    sys.exit(hosted.guarded(main))
