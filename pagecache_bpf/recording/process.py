# SPDX-License-Identifier: Apache-2.0
"""A recorder of its own process, for load(record=...): it takes nothing of the loader's time.

`python -m pagecache_bpf.recording.process` reads lines of JSON: first a Task, then what becomes
known of the policy, as {"policy": ..., "engine": ...}.  It answers with one line when it records,
and with another one when the recording is written.  Its input ends with the load, or with the
process that loads: what was recorded until then is written in both cases.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pagecache_bpf.errors import PagecacheError
from pagecache_bpf.kernel.cachestat import resident_pages_or_none
from pagecache_bpf.kernel.file_key import open_to_read
from pagecache_bpf.kernel.kernelfs import LIVE
from pagecache_bpf.recording import expected_order, format
from pagecache_bpf.recording.recorder import Recorder, tensors_of, yield_to_the_load
from pagecache_bpf.weights.models import Model


@dataclass(frozen=True)
class Task:
    """What is to be recorded.

    Attributes:
        model: name of the model.
        root: what it was named by.
        files: paths of its files.
        output: where the recording goes.
        pid: the process that loads it.
        device_limit: bytes per second that the device gives, if that is known.
        template: path of the I/O template that the load was given, if it was.
    """

    model: str
    root: str
    files: list[str]
    output: str
    pid: int
    device_limit: float | None = None
    template: str | None = None

    def as_line(self) -> bytes:
        """Return the task as the first line of the recorder's input.

        Returns:
            JSON with a line feed, in UTF-8.
        """
        return json.dumps(asdict(self)).encode() + b"\n"


def main() -> int:
    """Record until the input ends; errors are told to whoever waits for the answers.

    Returns:
        The exit status: 0 if the recording was written.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the load's to obey
    lines = _Lines(sys.stdin.fileno())
    try:
        given = next(line for batch in iter(lambda: lines.take(3600), None) for line in batch)
        task = Task(**given)
        _record(task, lines)
    except PagecacheError as error:
        _say({"error": f"{error.what}: {error.why}" if error.why else error.what})
        return 1
    except Exception as error:  # whoever waits has no other way to learn of it
        _say({"error": f"unexpected {type(error).__name__}: {error}"})
        return 1
    _say({"recording": task.output})
    return 0


def _record(task: Task, lines: _Lines) -> None:
    model = Model(task.model, Path(task.root), tuple(map(Path, task.files)))
    known: dict[str, str] = {}
    with Recorder(model) as recorder:
        yield_to_the_load()
        recorder.follow(task.pid)
        _say({"phases": recorder.phase_socket})
        while (batch := lines.take(0)) is not None and os.getppid() == task.pid:
            for line in batch:
                known |= line
            recorder.poll()
        command = LIVE.read(f"/proc/{task.pid}/cmdline") or ""
        recording = recorder.finish(
            policy=str(known.get("policy") or ""),
            engine=str(known.get("engine") or ""),
            command=" ".join(command.split("\0")).strip(),
        )
    with _left_as_it_was(model):
        recording.tensors = tensors_of(model)
        recording.expected = expected_order.of_model(
            model, recording.cell_bytes, Path(task.template) if task.template else None
        )
    recording.device_limit = task.device_limit
    format.write(recording, Path(task.output))


@contextmanager
def _left_as_it_was(model: Model) -> Iterator[None]:
    """Drop what reading headers brings into the cache of files that had nothing there.

    The load has ended, and dropped its pages: they are not to come back.
    """
    fds = [open_to_read(path) for path in model.files]
    try:
        empty = [fd for fd in fds if resident_pages_or_none(fd) == 0]
        yield
        for fd in empty:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        for fd in fds:
            os.close(fd)


class _Lines:
    """Lines of JSON objects from a pipe, without waiting for them."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._rest = b""

    def take(self, timeout: float) -> list[dict[str, Any]] | None:
        """Return the lines that have come; None: there will be no more."""
        if not select.select([self._fd], [], [], timeout)[0]:
            return []
        data = os.read(self._fd, 1 << 20)
        if not data:
            return None
        *whole, self._rest = (self._rest + data).split(b"\n")
        return [json.loads(line) for line in whole]


def _say(answer: dict[str, str]) -> None:
    try:
        print(json.dumps(answer), flush=True)
    except OSError:  # whoever asked has gone
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


if __name__ == "__main__":
    sys.exit(main())
