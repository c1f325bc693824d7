# SPDX-License-Identifier: Apache-2.0
"""Records a template from a real load: the accesses that the observer tells of become extents.

An access that goes on where the process was, or shortly behind, prolongs its extent; one elsewhere
begins another.  What a process has read before is cached by then and left out.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pagecache_bpf.errors import PagecacheError, UsageError
from pagecache_bpf.kernel.file_pages import PAGE_SIZE
from pagecache_bpf.kernel.kernelfs import LIVE
from pagecache_bpf.templates.intervals import Intervals
from pagecache_bpf.templates.template import (
    EXTENT,
    MAX_CONSUMERS,
    MAX_EXTENTS,
    Template,
)
from pagecache_bpf.templates.traces import describe
from pagecache_bpf.weights.models import Model

GAP = 128 << 10
_POLL_MS = 50


@dataclass
class _Run:
    """Pages that one process reads one after the other."""

    file: int
    start: int
    end: int


@dataclass
class _Process:
    """What one process has read so far, in the order in which it did."""

    name: str
    runs: list[_Run] = field(default_factory=list)


@dataclass
class AccessRecorder:
    """Collects accesses in the order in which they come, in pages.

    Attributes:
        gap: pages between two accesses that are joined.
        wanted: tells whether a process, by its number, is to be recorded.
        overflown: accesses that were left out, since there are MAX_EXTENTS already.
    """

    gap: int = GAP // PAGE_SIZE
    wanted: Callable[[int], bool] = lambda tgid: True
    overflown: int = 0
    _processes: dict[int, _Process | None] = field(default_factory=dict)
    _runs: int = 0

    def add(self, file: int, tgid: int, index: int, nr: int) -> None:
        """Add an access.

        Args:
            file: the number of the file.
            tgid: the process.
            index: the first page that it accesses.
            nr: pages.
        """
        if tgid not in self._processes:
            known = self.wanted(tgid) and len(self._processes) < MAX_CONSUMERS
            self._processes[tgid] = _Process(_name_of(tgid)) if known else None
        process = self._processes[tgid]
        if process is None or nr <= 0:
            return
        end = index + nr
        # memcpy() from a mapping touches the last page of a range first, and threads take turns.
        for run in reversed(process.runs[-8:]):
            near = run.start - self.gap <= index and index <= run.end + self.gap
            if run.file == file and near and end + self.gap >= run.start:
                run.start, run.end = min(run.start, index), max(run.end, end)
                return
        if self._runs >= MAX_EXTENTS:
            self.overflown += 1
            return
        self._runs += 1
        process.runs.append(_Run(file, index, end))

    def template(self, paths: Sequence[Path], names: Sequence[str], loader: str) -> Template:
        """Make the template of what has been collected.

        Args:
            paths: the files by their numbers.
            names: what they are called below the model's directory.
            loader: whose order it is.

        Returns:
            The template, with a consumer for each process that has read something.

        Raises:
            PagecacheError: nothing was collected.
        """
        files = tuple(describe(path, name) for path, name in zip(paths, names, strict=True))
        rows: list[tuple[int, int, int, int, int]] = []
        consumers: list[str] = []
        for process in self._processes.values():
            own = _extents(process.runs, [file.size for file in files]) if process else []
            if not own:
                continue
            rows += [(len(consumers), file, at, length, length) for file, at, length in own]
            consumers.append(f"{len(consumers)} {process.name}" if process else "")
        if not rows:
            raise PagecacheError(
                "nothing was recorded",
                "no process of the command read any of the files",
                "Check --path, and that the command does not read with O_DIRECT",
            )
        return Template(files, tuple(consumers), np.array(rows, EXTENT), "recorded", loader)


def _extents(runs: Sequence[_Run], sizes: Sequence[int]) -> list[tuple[int, int, int]]:
    """Return file, offset and length in bytes of what each run reads for the first time."""
    seen: dict[int, Intervals] = {}
    found = []
    for run in runs:
        size = sizes[run.file]
        for start, end in seen.setdefault(run.file, Intervals()).add(run.start, run.end):
            begin, stop = start * PAGE_SIZE, min(end * PAGE_SIZE, size)
            if begin < stop:
                found.append((run.file, begin, stop - begin))
    return found


def _name_of(tgid: int) -> str:
    """Return the name of a process, or "process" if it has ended."""
    return LIVE.read(f"/proc/{tgid}/comm") or "process"


@dataclass(frozen=True)
class RecordedTemplate:
    """The result of record().

    Attributes:
        template: what the command has read.
        exit_code: how the command ended, as subprocess tells it.
        lost: accesses that are missing.
    """

    template: Template
    exit_code: int
    lost: int


def record(model: Model, command: Sequence[str], gap: int = GAP) -> RecordedTemplate:
    """Run a command and record what its processes read of a model's files.  Root only.

    Args:
        model: whose files are observed.
        command: the program and its arguments.
        gap: bytes between two accesses that are joined.

    Returns:
        The template, and how the command ended.

    Raises:
        UsageError: there is no such command.
        UnsupportedError: nothing on this kernel tells of reads.
        PagecacheError: nothing was read.

    Source: FAST'26 PPC/MAIO, sections 3.2 and 4.1, which record one load without prefetch.
    """
    from pagecache_bpf.kernel.file_key import key_of, open_to_read
    from pagecache_bpf.observer import Move, Observer

    numbers: dict[bytes, int] = {}
    recorder = AccessRecorder(max(0, gap) // PAGE_SIZE)
    with Observer(moves="all") as observer:
        for number, path in enumerate(model.files):
            fd = open_to_read(path)
            try:
                observer.tag(fd, model.name, path=str(path))
                numbers[key_of(fd)] = number
            finally:
                os.close(fd)
        with _running(command) as process:
            recorder.wanted = lambda tgid: _in_session(tgid, process.pid)

            def receive(move: Move) -> None:
                number = numbers.get(bytes(move.file))
                if number is not None:
                    recorder.add(number, move.tgid, move.index, move.nr)

            while process.poll() is None:
                observer.poll(receive, _POLL_MS)
            while observer.poll(receive, 0):
                pass
        lost = int(observer.snapshot()["lost_events"]) + recorder.overflown
    template = recorder.template(model.files, model.names, Path(command[0]).name)
    return RecordedTemplate(template, process.returncode, lost)


@contextmanager
def _running(command: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """Run the command in a session of its own, which its children share; end it afterwards."""
    try:
        process = subprocess.Popen(command, start_new_session=True)
    except OSError as error:
        raise UsageError(f"{command[0]} cannot be run", error.strerror or str(error)) from error
    try:
        yield process
    finally:
        if process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def _in_session(tgid: int, session: int) -> bool:
    """Tell whether a process belongs to the command; one that has ended is taken for one."""
    try:
        return os.getsid(tgid) == session
    except (ProcessLookupError, PermissionError):
        return True
