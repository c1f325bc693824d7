# SPDX-License-Identifier: Apache-2.0
"""Fig. 7, 8 and 12 of the paper: whole starts of a real engine, and what the device does then.

transformers starts on the CPU, loads a Llama of its own class and answers; `make test-engines`
makes the environment that it runs in, and tests/engines/start.py tells the seconds of each phase.
Weights are cold at each start, which cachestat(2) confirms; its own packages are cached.
"""

from __future__ import annotations

import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import cgroups, engines, hosted, memory, native
from benchmarks.cachestat import drop
from benchmarks.control import on_agent
from benchmarks.disks import device_bytes_read, settled_bytes_read
from pagecache_bpf.errors import PagecacheError
from pagecache_bpf.weights.models import resolve

_SAMPLE_SECONDS = 0.05
NATIVE, EAGER, PRECACHE, MAIO, EARLY = (
    "Native",
    "EagerLoad",
    "PreCache",
    "maio",
    "run --prefetch",
)
WAYS = (NATIVE, EAGER, PRECACHE, MAIO, EARLY)


@dataclass(frozen=True)
class Start:
    """One start of the engine.

    Attributes:
        phases: seconds of each, as the engine's script tells them.
        seconds: of the whole, from the start of the process to its end.
        device_bytes: read from the device meanwhile, of whatever.
        samples: seconds since the start, and bytes read from the device so far.
    """

    phases: dict[str, float]
    seconds: float
    device_bytes: int
    samples: tuple[tuple[float, int], ...]


def make_models(count: int) -> list[Path]:
    """Make so many models with the engine's own class, once; return their directories.

    Raises PagecacheError where the engine is not installed.
    """
    return [
        engines.make(engines.LLAMA, hosted.MODELS / f"paper-start-{engines.LAYERS}-{number}")
        for number in range(count)
    ]


@contextmanager
def _sampled(path: Path) -> Iterator[list[tuple[float, int]]]:
    """Note what the device below a path has read, all the time, until the block ends."""
    samples: list[tuple[float, int]] = []
    over = threading.Event()
    begun, first = time.monotonic(), device_bytes_read(path) or 0

    def look() -> None:
        while not over.wait(_SAMPLE_SECONDS):
            samples.append((time.monotonic() - begun, (device_bytes_read(path) or 0) - first))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        over.set()
        thread.join()


def start(
    way: str, model: Path, enter: Callable[[], None] | None = None, keep: bool = False
) -> Start:
    """Start the engine once on a model, in one of the paper's ways.

    Args:
        way: one of WAYS.
        model: the model's directory.
        enter: called in each process before it begins: puts it into a cgroup.
        keep: leave what is cached as it is before the start, and after it.

    Returns:
        How it went.
    """
    files = resolve(model).files
    if not keep:
        drop(files)
    command = engines.command("transformers", model)
    if way == EARLY:
        words = [sys.executable, "-m", "pagecache_bpf", "run", "--prefetch"]
        command = [*words, *(["--keep"] if keep else []), "--weights", str(model), "--", *command]
    if way == PRECACHE:
        subprocess.run(["cat", *files], check=True, stdout=subprocess.DEVNULL, preexec_fn=enter)
    before = device_bytes_read(files[0]) or 0
    with (
        on_agent("maio", model) if way == MAIO else nullcontext(),
        tempfile.TemporaryFile("w+") as out,
        tempfile.TemporaryFile("w+") as errors,
        _memory_there(files),
        _sampled(files[0]) as samples,
    ):
        begun = time.monotonic()
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=errors,
            env={**os.environ, **engines.ENVIRONMENT},
            preexec_fn=enter,
        )
        eager = _eager(files, enter) if way == EAGER else None
        code = process.wait(600)
        seconds = time.monotonic() - begun
        if eager is not None:
            eager.kill()
            eager.wait()
        out.seek(0)
        errors.seek(0)
        if code:
            raise PagecacheError(f"{way} did not start", errors.read()[-2000:])
        _, phases = engines.told(out.read())
    after = settled_bytes_read(files[0]) or 0
    return Start(phases, seconds, after - before, tuple(samples))


@contextmanager
def _memory_there(files: Sequence[Path]) -> Iterator[None]:
    """Have what the start takes be memory that the host has given already: pages and tensors."""
    with engines.memory_of(sum(file.stat().st_size for file in files)):
        memory.touch()
        yield


def _eager(files: Sequence[Path], enter: Callable[[], None] | None) -> subprocess.Popen[bytes]:
    """Have a process read all files with the threads of benchmarks.peers, from now on."""
    code = (
        "import sys, threading\nfrom pathlib import Path\nfrom benchmarks import peers\n"
        "peers.prefetch_threads([Path(name) for name in sys.argv[1:]])\n"
        "for thread in threading.enumerate()[1:]: thread.join()\n"
    )
    words = [sys.executable, "-c", code, *map(str, files)]
    return subprocess.Popen(words, cwd=hosted.ROOT, preexec_fn=enter)


def measure_starts(paper: Any) -> None:
    """Fig. 7 and 8: the phases of a start and the device's bandwidth, with ample memory."""
    (model,) = make_models(1)
    size = resolve(model).size
    _warm(model)
    with native.read_ahead(model, 128):
        for number in paper.rounds("Fig. 7"):
            turn = number % len(WAYS)
            for way in WAYS[turn:] + WAYS[:turn]:
                made = start(way, model)
                row = paper.row("Fig. 7", "transformers", way, size)
                row.seconds.append(made.seconds)
                row.device_bytes_rounds.append(made.device_bytes)
                for phase, seconds in made.phases.items():
                    row.extra.setdefault("phases", {}).setdefault(phase, []).append(seconds)
                row.extra.setdefault("samples", []).append(made.samples)


def measure_swaps(paper: Any) -> None:
    """Fig. 12: two models in turn, each started, asked and ended, in memory for 45% of one."""
    models = make_models(2)
    size = resolve(models[0]).size
    _warm(models[0])
    ways = (NATIVE, EAGER, PRECACHE, EARLY)
    limit = int(0.45 * size) + 2 * size + engines.PROCESS_BYTES
    with native.read_ahead(models[0], 128):
        for number in paper.rounds("Fig. 12"):
            turn = number % len(ways)
            for way in ways[turn:] + ways[:turn]:
                made = _swap(way, models, limit)
                row = paper.row("Fig. 12", "transformers", way, 3 * size)
                row.seconds.append(sum(begun.seconds for begun in made))
                row.device_bytes_rounds.append(sum(begun.device_bytes for begun in made))


def _swap(way: str, models: Sequence[Path], limit: int) -> list[Start]:
    """Start the first model, the second and the first again, in one cgroup."""
    for model in models:
        drop(resolve(model).files)
    with cgroups.group(f"paper-{os.getpid()}", limit) as group:
        return [start(way, model, group.enter, keep=True) for model in (*models, models[0])]


def _warm(model: Path) -> None:
    """Have the engine's packages in the page cache."""
    start(NATIVE, model)


def phases_text(row: Any) -> str:
    """Return the medians of a row's phases, for its line."""
    phases: dict[str, list[float]] = row.extra.get("phases", {})
    return ", ".join(f"{name} {statistics.median(times):.2f}" for name, times in phases.items())


def draw(report: Any, output: Path) -> None:
    """Draw Fig. 8: what the device gives over time in the median start of each way.

    Args:
        report: what was measured.
        output: the file; its suffix chooses the format.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "pagecache-bpf"
    rows = [row for row in report.select(case="Fig. 7") if row.seconds]
    figure, axes = pyplot.subplots(
        len(rows), 1, sharex=True, sharey=True, figsize=(7, 1.4 * len(rows)), layout="constrained"
    )
    for place, row in zip(axes, rows, strict=True):
        middle = row.seconds.index(sorted(row.seconds)[len(row.seconds) // 2])
        samples = [(0.0, 0), *map(tuple, row.extra["samples"][middle])]
        steps = list(itertools.pairwise(samples))
        place.step(
            [later[0] for _, later in steps],
            [(b[1] - a[1]) / (b[0] - a[0]) / 1e9 for a, b in steps],
            color="#2b6cb0",
            linewidth=0.9,
        )
        at = 0.0
        for phase, times in row.extra["phases"].items():
            at += times[middle]
            place.axvline(at, color="#999999", linewidth=0.6, linestyle="--")
            place.annotate(
                phase, (at, 1), xycoords=("data", "axes fraction"), fontsize=6, ha="right"
            )
        place.set_title(row.extra["state"], loc="left", fontsize=8)
        place.tick_params(labelsize=7)
    axes[-1].set_xlabel(
        "seconds since the start of the process; the dashed lines end a phase", fontsize=8
    )
    figure.supylabel("GB/s from the device", fontsize=8)
    output.parent.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {"metadata": {"Date": None}} if output.suffix == ".svg" else {}
    figure.savefig(output, dpi=110, **options)
    pyplot.close(figure)
