# SPDX-License-Identifier: Apache-2.0
"""pagecache-bpf record: record what each part of a model goes through while it is loaded."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pagecache_bpf.cli.output import Output, pairs
from pagecache_bpf.cli.parser import Group
from pagecache_bpf.errors import PagecacheError, UsageError
from pagecache_bpf.units import format_size

if TYPE_CHECKING:
    from pagecache_bpf.recording.format import Recording
    from pagecache_bpf.recording.recorder import Recorder
    from pagecache_bpf.weights.models import Model

GROUP = Group.LOOK
HELP = "record a load: what was hit, prefetched, missed, evicted, and who waited"
DESCRIPTION = """\
Runs COMMAND and records what the files below PATH go through until it ends: accesses and what they
found in the page cache, what was prefetched or read in and when, what was evicted and why, how long
which reader slept for I/O, and the device's throughput. Without COMMAND it records whatever reads
the files until Ctrl-C, or for --seconds, and says on stderr when it has begun. Works with a policy
attached and without one; `report` makes a page of the file. COMMAND's exit code is returned."""
EXAMPLES = (
    (
        "pagecache-bpf record /models/llama-3-8b -o load.pcrec -- python load.py",
        "a load from its start to its end",
    ),
    ("pagecache-bpf record /models/llama-3-8b --seconds 60", "whatever reads it in a minute"),
)
JSON = {
    "record": {
        "recording": "the file that was written",
        "seconds": "how long was recorded",
        "accessed_bytes": "bytes that readers wanted",
        "hit_bytes": "of these: cached, used before or prefetched in time",
        "ahead_bytes": "of these: first use of what the kernel's readahead had brought",
        "late_bytes": "of these: prefetched, but their reader had to wait",
        "miss_bytes": "of these: read in by the call or fault that wanted them",
        "prefetched_bytes": "brought in by a policy",
        "stall_ns": "time that readers slept for I/O, in nanoseconds",
        "lost_events": "events that are missing for lack of room",
        "policy": 'the policy that governed the files, "" for none',
        "engine": "what ran it",
        "exit_code": "of the command; null without one",
    }
}
NOT_EXECUTABLE, NOT_FOUND = 126, 127  # as the shell counts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of record."""
    parser.add_argument("path", metavar="PATH", help="weight file, directory or snapshot")
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        default="load.pcrec",
        help="the recording (default: load.pcrec)",
    )
    parser.add_argument(
        "--seconds", type=float, metavar="N", help="without COMMAND: end after so many seconds"
    )
    parser.add_argument(
        "--template",
        metavar="FILE",
        help="I/O template to compare the order of reads with (default: the policy's, or one "
        "derived from the headers)",
    )
    parser.add_argument("--name", metavar="NAME", help="name of the model (default: by its path)")
    parser.add_argument(
        "command",
        metavar="COMMAND",
        nargs="*",
        help="what loads the model, with its arguments, after --",
    )


def run(args: argparse.Namespace, out: Output) -> int:
    """Record, write the file, say what is in it."""
    from pagecache_bpf.cli.tagging import require_root
    from pagecache_bpf.explain import device_speed
    from pagecache_bpf.recording import expected_order, format
    from pagecache_bpf.recording.recorder import Recorder, tensors_of
    from pagecache_bpf.weights.models import resolve

    require_root("record a load")
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if command and args.seconds is not None:
        raise UsageError("--seconds goes without a COMMAND", "a command ends by itself")
    if args.seconds is not None and not 0 < args.seconds < 1e6:
        raise UsageError(f"{args.seconds} is not a time to record", "it is more than 0 seconds")
    output = Path(args.output)
    if not output.absolute().parent.is_dir() or output.is_dir():
        raise UsageError(
            f"{output} cannot be written", "", "Name a file in a directory that exists"
        )
    model = resolve(args.path, args.name)
    template = _template(args.template)
    policy, engine = _governed_by(model)
    with Recorder(model) as recorder:
        code = None
        if command:
            code = _follow(command, recorder)
        else:
            until = "until Ctrl-C" if args.seconds is None else f"for {args.seconds:g} s"
            out.remark(f"recording {model.name} {until}")
            _wait(recorder, args.seconds)
        recording = recorder.finish(
            policy=policy, engine=engine, command=shlex.join(command), exit_code=code
        )
    recording.tensors = tensors_of(model)
    recording.expected = expected_order.of_model(
        model, recording.cell_bytes, template, "" if template else policy
    )
    speed = device_speed.last(os.stat(model.files[0]).st_dev)
    recording.device_limit = speed.bytes_per_second if speed else None
    format.write(recording, output)
    data = _summary(recording, output)
    out.emit(data, lambda console: console.print(pairs(_rows(data))))
    if recording.lost:
        out.warn(f"{recording.lost} events are not in the recording: there was no room for them")
    return code or 0


def _template(name: str | None) -> Path | None:
    """Return the template's path once it could be read.  Raises UsageError, PagecacheError."""
    if name is None:
        return None
    from pagecache_bpf import templates

    templates.read(Path(name))
    return Path(name)


def _governed_by(model: Model) -> tuple[str, str]:
    """Return the policy that governs the model's files now, and its engine; "" where none does."""
    from pagecache_bpf.kernel.file_key import identity_at
    from pagecache_bpf.policy.engines import Engines

    try:
        here = identity_at(model.files[0])[:3]
        with Engines() as engines:
            for tag in engines.tags():
                if tag.active and (
                    tag.identity[:3] == here or os.path.realpath(tag.path) == str(model.files[0])
                ):
                    return tag.policy, engines.engine_of(tag.policy) or ""
    except PagecacheError:
        pass
    return "", ""


def _follow(command: Sequence[str], recorder: Recorder) -> int:
    """Run the command while recording; Ctrl-C is the command's to obey."""
    from pagecache_bpf.recording.recorder import yield_to_the_load

    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process = subprocess.Popen(
            command,
            env={**os.environ, **recorder.environment},
            restore_signals=True,
        )
    except OSError as error:
        signal.signal(signal.SIGINT, before)
        failed = UsageError(f"{command[0]} cannot be run", error.strerror or str(error))
        failed.exit_code = NOT_FOUND if isinstance(error, FileNotFoundError) else NOT_EXECUTABLE
        raise failed from None
    try:
        recorder.follow(process.pid)
        yield_to_the_load()
        while process.poll() is None:
            recorder.poll()
        return process.returncode if process.returncode >= 0 else 128 - process.returncode
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
        signal.signal(signal.SIGINT, before)


def _wait(recorder: Recorder, seconds: float | None) -> None:
    """Record until Ctrl-C, or for a time."""
    until = None if seconds is None else time.monotonic() + seconds
    try:
        while until is None or time.monotonic() < until:
            recorder.poll()
    except KeyboardInterrupt:
        pass


def _summary(recording: Recording, output: Path) -> dict[str, Any]:
    from pagecache_bpf.reporting.page import summary

    numbers = summary(recording)
    told = ("accessed", "ahead", "late", "miss", "prefetched")
    return {
        "recording": str(output),
        "seconds": recording.seconds,
        "hit_bytes": numbers["all_hit_bytes"],
        **{f"{name}_bytes": numbers[f"{name}_bytes"] for name in told},
        "stall_ns": numbers["stall_ns"],
        "lost_events": recording.lost,
        "policy": recording.policy,
        "engine": recording.engine,
        "exit_code": recording.exit_code,
    }


def _rows(data: dict[str, Any]) -> list[tuple[str, str]]:
    accessed = data["accessed_bytes"] or 1
    shares = ", ".join(
        f"{data[f'{name}_bytes'] / accessed:.1%} {text}"
        for name, text in (
            ("hit", "hit"),
            ("ahead", "just read ahead by the kernel"),
            ("late", "prefetched late"),
            ("miss", "missed"),
        )
    )
    by = f"{data['policy']} on {data['engine']}" if data["policy"] else "the kernel's default"
    return [
        ("recorded", f"{data['seconds']:.2f} s under {by}"),
        ("accessed", f"{format_size(data['accessed_bytes'])}: {shares}"),
        ("prefetched", format_size(data["prefetched_bytes"])),
        ("stalled", f"{data['stall_ns'] / 1e9:.3f} s in all readers together"),
        ("recording", data["recording"]),
        ("see it", f"pagecache-bpf report {shlex.quote(data['recording'])}"),
    ]
