# SPDX-License-Identifier: Apache-2.0
"""`make demo`: what a policy does for the load of a model, measured while you watch.

Loads a real checkpoint (all-MiniLM-L6-v2) and a generated Llama-shaped one, cold, by the
unmodified safetensors library and by plain read(), with the kernel's own readahead, with the
policy attached and with it detached again, beside direct I/O; each load checked byte for byte.
All of it on this machine's own kernel with engine agent; two more loads are recorded, and a page of
them shows what went on.  MODEL=dir loads your own checkpoint instead, SIZE=256M sizes the generated
one.

`make demo-guest` (--guest) has the rest: the same in a guest with the module on a slow device;
there the real one is then loaded by a user without root inside `with pagecache_bpf.load(path)`, as
a server does when it starts, and the generated one with its layers backwards.  Results and
pictures go to build/demo/.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from shutil import disk_usage

from rich.console import Console

from benchmarks import (
    checkpoints,
    cold_load,
    hosted,
    load_api,
    memory,
    native,
    rounds,
    schema,
    show,
)
from benchmarks.cachestat import Sample, drop
from benchmarks.control import CommandLine, pagecache_bpf
from pagecache_bpf.errors import PagecacheError, PrivilegeError
from pagecache_bpf.kernel.cgroups import host_memory
from pagecache_bpf.weights.models import Model

OUT = hosted.BUILD / "demo"
_ROUNDS = 3
_NATIVE_BYTES, _GUEST_BYTES = 1 << 30, 64 << 20
#: What is recorded: every tensor of some files, by the safetensors library.
_LOADER = """
import sys
import ml_dtypes
from safetensors import safe_open
for path in sys.argv[1:]:
    with safe_open(path, framework="numpy") as file:
        for name in file.keys():
            file.get_tensor(name)
"""


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the demo's options; `make demo` sets them from the environment."""
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
        default=env("SIZE") or None,
        help="of the generated checkpoint (default: 1G here, as far as memory and disk allow, "
        "64M in the guest; environment: SIZE)",
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=env("ROUNDS") or str(_ROUNDS),
        help="cold loads of each kind (default: 3; environment: ROUNDS)",
    )
    parser.add_argument("--policy", default="sequential")
    parser.add_argument("--fs", choices=("ext4", "xfs"), default="ext4")
    parser.add_argument("--guest", action="store_true", help="in a guest with the module instead")
    return parser


def _arguments(options: argparse.Namespace, sources: list[Model]) -> list[str]:
    """Return the options of cold_load for one half of the demo: two loaders, a picture."""
    argv = ["--fs", options.fs, "--policy", options.policy, "--rounds", str(options.rounds)]
    argv += ["--loader", "safe_open", "--loader", "read", "--detached-rounds", "1", "--picture"]
    for source in sources:
        argv += ["--model", str(source.root)]
    return argv


def _sources(options: argparse.Namespace, size: int, say: hosted.Say) -> list[Model]:
    if options.model is not None:
        return [checkpoints.load_dir(options.model)]
    say(f"making a Llama-shaped checkpoint of {size >> 20} MiB, 10 seconds a GiB, once")
    llama = _generated(size)
    say("getting all-MiniLM-L6-v2, 90 MB, once")
    return [llama, checkpoints.minilm(hosted.MODELS / "all-MiniLM-L6-v2")]


def _generated(size: int) -> Model:
    return checkpoints.generate(hosted.MODELS / f"llama-{size >> 20}M", size)


def native_size(wanted: int, memory: int, disk: int) -> int:
    """Return how many bytes of a checkpoint this machine can take: those wanted, or a half, ...

    A round holds it four times in memory: cached, loaded, as the reference, and read directly.
    """
    size = wanted
    while size > 64 << 20 and (size * 5 > memory or size * 2 > disk):
        size //= 2
    return size


def on_this_kernel(options: argparse.Namespace, say: hosted.Say) -> tuple[schema.Report, Model]:
    """Measure on this machine's own kernel; returns the first of the models, too.

    Raises PagecacheError where it cannot be done.
    """
    if os.geteuid() != 0:
        raise PrivilegeError("only root can attach a policy", "", "sudo make demo")
    hosted.MODELS.mkdir(parents=True, exist_ok=True)
    free = host_memory().get("MemAvailable", 0)
    size = options.size or native_size(_NATIVE_BYTES, free, disk_usage(hosted.MODELS).free)
    sources = _sources(options, size, say)
    say(f"cold loads, {options.rounds} rounds of default, policy and direct I/O: 1 to 2 minutes")
    say(f"    policy {options.policy} on tracepoints, its reads by the agent; for the time of it")
    say(f"    read_ahead_kb is {cold_load.READ_AHEAD_KB}")
    settings = cold_load.make_parser().parse_args(_arguments(options, sources))
    return cold_load.run_native(settings, sources, with_peers=False), sources[0]


def recorded(options: argparse.Namespace, model: Model, say: hosted.Say) -> Path:
    """Record two loads of a model, by default and with the policy; returns the page of them."""
    say(f"recording two loads of {model.name} for the report page: 15 seconds")
    files = [str(path) for path in model.files]
    recordings = {state: OUT / f"{state}.pcrec" for state in ("default", options.policy)}
    control = CommandLine("agent")
    OUT.mkdir(parents=True, exist_ok=True)
    with native.read_ahead(model.root, cold_load.READ_AHEAD_KB):
        for state, output in recordings.items():
            drop(model.files)
            ours = state != "default"
            with rounds.attached(control, state, model.root) if ours else nullcontext():
                command = [sys.executable, "-m", "pagecache_bpf", "record", str(model.root)]
                command += ["--output", str(output), "--", sys.executable, "-c", _LOADER, *files]
                done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                raise PagecacheError("a load could not be recorded", done.stderr.strip())
    page = OUT / "report.html"
    both = [str(recordings[options.policy]), "--compare", str(recordings["default"])]
    pagecache_bpf("report", *both, "--output", str(page))
    return page


def in_the_guest(options: argparse.Namespace, say: hosted.Say) -> schema.Report:
    """Measure on a stock kernel with the module, on a slow device."""
    sources = _sources(options, options.size or _GUEST_BYTES, say)
    settings = cold_load.make_parser().parse_args(_arguments(options, sources))
    say("booting a guest with a stock kernel; it stands for a machine with a slow device:")
    say(
        f"    {settings.delay:g} ms per request, {show.megabytes(settings.cap)} MB/s, "
        f"read_ahead_kb {cold_load.READ_AHEAD_KB}; loads start with nothing in the page cache"
    )
    return cold_load.run(settings, sources)


def start_up(options: argparse.Namespace, say: hosted.Say) -> schema.Report:
    """Measure the Python API around a loader, and a load in another order than the file's."""
    size = options.size or _GUEST_BYTES
    real = _sources(options, size, say)[-1]
    say("booting it again: a user without root, and a loader that goes backwards")
    settings = load_api.make_parser().parse_args(["--rounds", str(options.rounds)])
    return load_api.run(settings, real, _generated(size))


def draw(report: schema.Report, directory: Path, name: str = "residency") -> list[Path]:
    """Draw the first case's residency over time; returns the files, none without samples."""
    rows = [row for row in report.rows if "residency" in row.extra]
    if not rows:
        return []
    rows = [row for row in rows if row.case == rows[0].case]
    states = [show.state_text(row) for row in rows]
    curves = {
        state: [Sample(at, resident) for at, resident in row.extra["residency"]]
        for state, row in zip(states, rows, strict=True)
    }
    ends = {state: row.extra["residency_end_s"] for state, row in zip(states, rows, strict=True)}
    first = rows[0]
    title = f"Cold load of {first.case} by {first.loader}: {first.fs}"
    if first.extra.get("delay_ms") is not None:
        cap = show.megabytes(first.extra["cap_bytes_per_s"])
        title += f", {first.extra['delay_ms']:g} ms per request, {cap} MB/s"
    outputs = [directory / f"{name}.svg", directory / f"{name}.png"]
    show.plot_residency(curves, first.wanted_bytes, title, outputs, ends)
    return outputs


def summary(rows: Sequence[schema.Row]) -> list[str]:
    """Sum the result up in a sentence per case and loader."""
    lines = []
    for row in rows:
        if row.extra["state"] != "attached":
            continue
        speedup, share = row.extra["speedup"], row.extra["of_limit"]
        where = "here" if row.extra.get("host") == "native" else "in the guest"
        lines.append(
            f"{where}, {row.case} by {row.loader}: {speedup:.1f} times faster with {row.policy}, "
            f"{share:.0%} of what direct I/O gets from this device."
        )
    return lines


def main() -> int:
    """Make the input ready, measure here or in a guest, show."""
    options = make_parser().parse_args()
    if options.rounds < 1:
        raise PagecacheError("no rounds, no result", f"ROUNDS is {options.rounds}", "Ask for 1")
    memory.with_huge_malloc()
    say = hosted.progress()
    if options.guest:
        return _show_guest(in_the_guest(options, say), start_up(options, say))
    say("about 3 minutes: making the models, cold loads, a report page")
    report, model = on_this_kernel(options, say)
    page = recorded(options, model, say)
    say("done")
    return _finish(report, [*draw(report, OUT, "residency-native"), page], lambda _: None)


def _show_guest(there: schema.Report, started: schema.Report) -> int:
    report = schema.Report(there.machine, there.rows + started.rows)
    return _finish(
        report,
        draw(there, OUT),
        lambda console: load_api.print_load_api(started, console),
        there.rows,
        "guest-results",
    )


def _finish(
    report: schema.Report,
    made: Sequence[Path],
    more: Callable[[Console], None],
    cold: Sequence[schema.Row] | None = None,
    name: str = "results",
) -> int:
    loads = report.rows if cold is None else cold

    def display(console: Console) -> None:
        console.print()
        console.print(show.one_table(loads, "Cold loads"))
        console.print(show.verdict(loads))
        console.print()
        for line in summary(loads):
            console.print(line, highlight=False)
        console.print()
        more(console)
        for path in made:
            what = "report page" if path.suffix == ".html" else "picture"
            console.print(f"{what}: {path.relative_to(hosted.ROOT)}", highlight=False)

    return hosted.finish(report, argparse.Namespace(out=OUT / f"{name}.json", json=False), display)


if __name__ == "__main__":
    sys.exit(hosted.guarded(main))
