# SPDX-License-Identifier: Apache-2.0
"""The file format of recordings: an SQLite database, version 1.

SQLite because a recording is tables, because its reader comes with Python, because whoever has a
question of his own can ask it in SQL, and because a file that was cut short is found out.  Tables:

    meta      key, value        format, version, model, policy, engine, command, kernel, started_ns
                                (CLOCK_REALTIME), tick_ns, cell_bytes, seconds, lost, exit_code,
                                device, device_limit (bytes per second), uncounted, template
    files     id, path, bytes
    resident  file, cell, bytes            what was in the page cache when the recording began
    tensors   file, name, offset, bytes    in the order of the file
    readers   tgid, name
    events    file, cell, tick, tgid, and a column for each counter of kernel.abi.RECORDED
    samples   time_ns, device_bytes, headroom      since the start; device_bytes is a counter,
                                headroom is NULL where no memory cgroup limits the reader
    phases    time_ns, name, tgid          what a process marked with pagecache_bpf.phase()
    template  consumer, file, offset, bytes     in which order each consumer was expected to want
                                what, by the template that meta.template names; joined where a
                                cell, or the size of the recording, tells no more

Byte counts are bytes, times are nanoseconds.  A reader of a later version refuses what it does not
know by `version`; tables and columns that are added do not change it.
"""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pagecache_bpf.errors import PagecacheError, UsageError
from pagecache_bpf.kernel.abi import RECORDED
from pagecache_bpf.recording.phases import Phase

FORMAT = "pagecache-bpf recording"
VERSION = 1
#: Recording.engine of a load that never ran.
SIMULATION = "simulation"
COUNTERS = tuple(counter.name for counter in RECORDED)
#: An event: what happened in a cell of a file during one interval, by one reader.
EVENT = np.dtype(
    [
        ("file", "<i4"),
        ("cell", "<i4"),
        ("tick", "<i4"),
        ("tgid", "<i4"),
        *((name, "<i8") for name in COUNTERS),
    ]
)
#: A range that a template lists, in the order of each consumer.
EXPECTED = np.dtype([("consumer", "<i4"), ("file", "<i4"), ("offset", "<i8"), ("bytes", "<i8")])
_META_NUMBERS = ("started_ns", "tick_ns", "cell_bytes", "lost", "exit_code")

_SCHEMA = f"""
CREATE TABLE meta (key TEXT PRIMARY KEY, value);
CREATE TABLE files (id INTEGER PRIMARY KEY, path TEXT, bytes INTEGER);
CREATE TABLE resident (file INTEGER, cell INTEGER, bytes INTEGER);
CREATE TABLE tensors (file INTEGER, name TEXT, offset INTEGER, bytes INTEGER);
CREATE TABLE readers (tgid INTEGER PRIMARY KEY, name TEXT);
CREATE TABLE events (file INTEGER, cell INTEGER, tick INTEGER, tgid INTEGER,
    {", ".join(f"{name} INTEGER" for name in COUNTERS)});
CREATE TABLE samples (time_ns INTEGER, device_bytes INTEGER, headroom INTEGER);
CREATE TABLE phases (time_ns INTEGER, name TEXT, tgid INTEGER);
CREATE TABLE template (consumer INTEGER, file INTEGER, offset INTEGER, bytes INTEGER);
"""


@dataclass(frozen=True)
class RecordedFile:
    """A file of the model: its path as it was named, and its size in bytes."""

    path: str
    bytes: int


@dataclass(frozen=True)
class RecordedTensor:
    """A tensor: its file's place in Recording.files, its name, offset and length in bytes."""

    file: int
    name: str
    offset: int
    bytes: int


@dataclass(frozen=True)
class Sample:
    """A look at the device and the reader's memory.

    Attributes:
        time_ns: nanoseconds since the recording began.
        device_bytes: bytes that the device has read since then, whoever asked.
        headroom: bytes that the reader's memory cgroup still takes; None: nothing limits it.
    """

    time_ns: int
    device_bytes: int
    headroom: int | None = None


@dataclass(frozen=True)
class ExpectedOrder:
    """In which order a template expects the bytes to be wanted.

    Attributes:
        source: where the template is from, and whose order it is; "": there is none.
        ranges: an array of EXPECTED, grouped by consumer, in the order of each.
    """

    source: str = ""
    ranges: npt.NDArray[Any] = field(default_factory=lambda: np.zeros(0, EXPECTED))


@dataclass
class Recording:
    """What is known of one load.

    Attributes:
        model: the model's name.
        policy: the policy that governed its files, "" for the kernel's default.
        engine: what ran the policy.
        command: the command that loaded it, "" if the recording was made for a time.
        kernel: the kernel's release.
        started_ns: when the recording began, CLOCK_REALTIME.
        seconds: how long it took.
        tick_ns: the length of an interval.
        cell_bytes: the size of a cell of a file.
        files: the files, in the order of the model.
        resident: bytes in the page cache at the start, by (file, cell).
        tensors: the tensors, where the format of the files says what lies where.
        readers: names of the processes that read, by number.
        events: an array of EVENT.
        samples: looks at the device and the memory, in the order of time.
        phases: what processes marked; times since the start.
        device: the block device, MAJOR:MINOR.
        device_limit: bytes per second that it gives at best, as last measured; None: unknown.
        lost: events that are missing here because there was no room.
        exit_code: of the command; None without one.
        uncounted: counters that this kernel cannot count.
        expected: the order of the template that was followed, or that would have been derived.
    """

    model: str
    policy: str = ""
    engine: str = ""
    command: str = ""
    kernel: str = ""
    started_ns: int = 0
    seconds: float = 0.0
    tick_ns: int = 0
    cell_bytes: int = 0
    files: list[RecordedFile] = field(default_factory=list)
    resident: dict[tuple[int, int], int] = field(default_factory=dict)
    tensors: list[RecordedTensor] = field(default_factory=list)
    readers: dict[int, str] = field(default_factory=dict)
    events: npt.NDArray[Any] = field(default_factory=lambda: np.zeros(0, EVENT))
    samples: list[Sample] = field(default_factory=list)
    phases: list[Phase] = field(default_factory=list)
    device: str = ""
    device_limit: float | None = None
    lost: int = 0
    exit_code: int | None = None
    uncounted: tuple[str, ...] = ()
    expected: ExpectedOrder = field(default_factory=ExpectedOrder)

    def total(self, counter: str) -> int:
        """Return the sum of one counter over the whole load.

        Args:
            counter: a name of kernel.abi.RECORDED.

        Returns:
            The sum, in the counter's unit.
        """
        return int(self.events[counter].sum())


def write(recording: Recording, path: Path) -> None:
    """Write a recording; the file is there as a whole or not at all.

    Args:
        recording: what to write.
        path: the file; one that is there is replaced.

    Raises:
        UsageError: it cannot be written there.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    meta = {
        "format": FORMAT,
        "version": VERSION,
        **{
            name: getattr(recording, name)
            for name in ("model", "policy", "engine", "command", "kernel", "seconds", "device")
        },
        **{name: getattr(recording, name) for name in _META_NUMBERS},
        "device_limit": recording.device_limit,
        "uncounted": " ".join(recording.uncounted),
        "template": recording.expected.source,
    }
    try:
        partial.unlink(missing_ok=True)
        with closing(sqlite3.connect(partial)) as database:
            database.executescript(f"PRAGMA journal_mode = OFF; {_SCHEMA}")
            rows = database.executemany
            rows("INSERT INTO meta VALUES (?, ?)", meta.items())
            rows(
                "INSERT INTO files VALUES (?, ?, ?)",
                ((number, file.path, file.bytes) for number, file in enumerate(recording.files)),
            )
            rows(
                "INSERT INTO resident VALUES (?, ?, ?)",
                ((*place, count) for place, count in recording.resident.items()),
            )
            rows(
                "INSERT INTO tensors VALUES (?, ?, ?, ?)",
                (
                    (tensor.file, tensor.name, tensor.offset, tensor.bytes)
                    for tensor in recording.tensors
                ),
            )
            rows("INSERT INTO readers VALUES (?, ?)", recording.readers.items())
            marks = ", ".join("?" * len(EVENT.names or ()))
            rows(f"INSERT INTO events VALUES ({marks})", recording.events.tolist())
            rows(
                "INSERT INTO samples VALUES (?, ?, ?)",
                (
                    (sample.time_ns, sample.device_bytes, sample.headroom)
                    for sample in recording.samples
                ),
            )
            rows("INSERT INTO phases VALUES (?, ?, ?)", recording.phases)
            rows("INSERT INTO template VALUES (?, ?, ?, ?)", recording.expected.ranges.tolist())
            database.commit()
        os.replace(partial, path)
    except (OSError, sqlite3.Error) as error:
        partial.unlink(missing_ok=True)
        raise UsageError(
            f"{path} cannot be written", str(error), "Name a file in a directory with room"
        ) from error


def read(path: Path) -> Recording:
    """Read a recording.

    Args:
        path: the file.

    Returns:
        The recording, with all events in memory.

    Raises:
        UsageError: there is no such file, or it is no recording.
        PagecacheError: it is damaged, or of a version that this package does not know.
    """
    if not path.is_file():
        raise UsageError(f"there is no recording {path}", "", "Make one: pagecache-bpf record")
    try:
        with closing(sqlite3.connect(f"file:{_quoted(path)}?mode=ro", uri=True)) as database:
            return _read(database, path)
    except sqlite3.DatabaseError as error:
        raise UsageError(
            f"{path} is not a recording", str(error), "Make one: pagecache-bpf record"
        ) from error
    except (TypeError, ValueError, OverflowError, KeyError) as error:
        raise PagecacheError(f"{path} is damaged", str(error), "Record the load again") from error


def _read(database: sqlite3.Connection, path: Path) -> Recording:
    rows = database.execute
    meta = dict(rows("SELECT key, value FROM meta"))
    if meta.get("format") != FORMAT:
        raise UsageError(f"{path} is not a recording", "it is another database")
    if meta.get("version") != VERSION:
        raise PagecacheError(
            f"{path} cannot be read",
            f"it has version {meta.get('version')} of the format, this package reads {VERSION}",
            "Use the version of pagecache-bpf that made it, or record the load again",
        )
    columns = ", ".join(EVENT.names or ())
    events = np.array(rows(f"SELECT {columns} FROM events ORDER BY tick").fetchall(), EVENT)
    files = [RecordedFile(str(name), int(size)) for _, name, size in rows("SELECT * FROM files")]
    if len(events) and not 0 <= events["file"].min() <= events["file"].max() < len(files):
        raise ValueError("an event names a file that is not listed")
    expected = _expected(database, str(meta.get("template", "")), len(files))
    limit, code = meta["device_limit"], meta["exit_code"]
    return Recording(
        **{name: str(meta[name]) for name in ("model", "policy", "engine", "command", "kernel")},
        started_ns=int(meta["started_ns"]),
        seconds=float(meta["seconds"]),
        tick_ns=int(meta["tick_ns"]),
        cell_bytes=int(meta["cell_bytes"]),
        files=files,
        resident={(int(a), int(b)): int(c) for a, b, c in rows("SELECT * FROM resident")},
        tensors=[
            RecordedTensor(int(file), str(name), int(offset), int(size))
            for file, name, offset, size in rows("SELECT * FROM tensors")
        ],
        readers={int(tgid): str(name) for tgid, name in rows("SELECT * FROM readers")},
        events=events,
        samples=[Sample(*row) for row in rows("SELECT * FROM samples ORDER BY time_ns")],
        phases=[
            Phase(int(at), str(name), int(tgid))
            for at, name, tgid in rows("SELECT * FROM phases ORDER BY time_ns")
        ],
        device=str(meta["device"]),
        device_limit=None if limit is None else float(limit),
        lost=int(meta["lost"]),
        exit_code=None if code is None else int(code),
        uncounted=tuple(str(meta["uncounted"]).split()),
        expected=expected,
    )


def _expected(database: sqlite3.Connection, source: str, files: int) -> ExpectedOrder:
    """Read the template's order; the first recordings of version 1 have none."""
    if not source:
        return ExpectedOrder()
    rows = database.execute("SELECT consumer, file, offset, bytes FROM template ORDER BY rowid")
    table = np.array(rows.fetchall(), EXPECTED)
    if len(table) and not (
        0 <= table["file"].min() <= table["file"].max() < files
        and table["offset"].min() >= 0
        and table["bytes"].min() >= 0
        and table["consumer"].min() >= 0
        and (np.diff(table["consumer"]) >= 0).all()
    ):
        raise ValueError("a range of the template is of a file that is not listed, or is none")
    return ExpectedOrder(source, table)


def _quoted(path: Path) -> str:
    """Return a path as SQLite's URIs want it: an absolute one, with what has a meaning escaped."""
    from urllib.parse import quote

    return quote(str(path.absolute()))
