# SPDX-License-Identifier: Apache-2.0
"""Traces: who read which bytes of which file, and when.

Two forms, which may be mixed; empty lines and lines that begin with # mean nothing.  Text, fields
separated by blanks (a file name with blanks needs the other form):

    TIME CONSUMER FILE OFFSET LENGTH        0.25 rank0 model.safetensors 0 2MiB

JSON, one object a line:

    {"t": 0.25, "consumer": "rank0", "file": "model.safetensors", "offset": 0, "length": 2097152,
     "cgroup": "online"}
    {"file": "model.safetensors", "size": 16060522496, "model": "llama", "governed": true}
    {"t": 0.25, "hint": "next_use", "key": {"model": "llama"}, "value": {"due_ns": "+5s"}}

Times are seconds from any start and do not go back.  The second kind describes a file: its size
(default: the last byte read), its model (default: its directory, else its name) and whether the
policy governs it (default: yes).  The third writes to a map of the policy (`policy show`).

An I/O template can stand in a trace's place: see recorded.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from pagecache_bpf.errors import UsageError
from pagecache_bpf.units import parse_size


@dataclass
class TraceFile:
    """A file of a trace; size in bytes."""

    name: str
    size: int
    model: str
    governed: bool = True


@dataclass(frozen=True)
class Access:
    """A read: file and consumer by their numbers in the trace, offset and length in bytes."""

    time_ns: int
    consumer: int
    cgroup: int
    file: int
    offset: int
    length: int


@dataclass(frozen=True)
class HintEvent:
    """A write to a map of the policy, before the access that follows it."""

    time_ns: int
    map: str
    key: dict[str, Any]
    value: dict[str, Any]


@dataclass
class Trace:
    """Files, and what happened to them in the order of time.

    consumers, cgroups, models: their names; numbers are places in these lists, plus 1 for models
    and cgroups, whose 0 means none.
    """

    files: list[TraceFile] = field(default_factory=list)
    events: list[Access | HintEvent] = field(default_factory=list)
    consumers: list[str] = field(default_factory=list)
    cgroups: list[str] = field(default_factory=list)
    models: list[str] = field(default_factory=list)

    @property
    def accesses(self) -> Iterator[Access]:
        """The events of the trace that are reads."""
        return (event for event in self.events if isinstance(event, Access))

    def file(self, name: str) -> int:
        """Number a file by its name; one that is new is added, as part of the model of its folder.

        Args:
            name: the file's, as the trace has it.

        Returns:
            Its place in `files`.
        """
        for number, known in enumerate(self.files):
            if known.name == name:
                return number
        path = PurePosixPath(name)
        self.files.append(TraceFile(name, 0, path.parent.name or path.name))
        return len(self.files) - 1

    def add(
        self,
        seconds: float,
        consumer: str,
        file: str,
        offset: int,
        length: int,
        cgroup: str = "",
    ) -> None:
        """Append a read.

        Args:
            seconds: when it is, from any start; not before the last event.
            consumer: who reads, any name.
            file: the file's name; it is at least as long as what is read of it.
            offset: bytes from its start.
            length: bytes.
            cgroup: whose memory is charged; empty: nobody's in particular.

        Raises:
            ValueError: a number is negative, or the time runs backwards.
        """
        if offset < 0 or length < 0:
            raise ValueError(f"offset {offset} and length {length} cannot be below 0")
        number = self.file(file)
        self.files[number].size = max(self.files[number].size, offset + length)
        self._append(
            Access(
                self._time(seconds),
                _number(self.consumers, consumer),
                _number(self.cgroups, cgroup) + 1 if cgroup else 0,
                number,
                offset,
                length,
            )
        )

    def hint(self, seconds: float, name: str, key: dict[str, Any], value: dict[str, Any]) -> None:
        """Append a write to a map of the policy.

        Args:
            seconds: when it is, not before the last event.
            name: the map's.
            key: the key's fields; names of models and files stand for their numbers.
            value: the value's fields.

        Raises:
            ValueError: the time runs backwards.
        """
        self._append(HintEvent(self._time(seconds), name, key, value))

    def _append(self, event: Access | HintEvent) -> None:
        if self.events and event.time_ns < self.events[-1].time_ns:
            raise ValueError("its time is before that of the line above")
        self.events.append(event)

    @staticmethod
    def _time(seconds: float) -> int:
        if not 0 <= seconds < 2**33:
            raise ValueError(f"{seconds} is not a time in seconds")
        return round(seconds * 1e9)

    def settle(self) -> Trace:
        """Number the models, once all files are known.

        Returns:
            The trace itself.
        """
        self.models = list(dict.fromkeys(file.model for file in self.files))
        return self

    def model_id(self, name: str) -> int:
        """Return the number by which a policy knows a model; settle() gives it.

        Args:
            name: the model's.

        Returns:
            The number, from 1.

        Raises:
            ValueError: no file is part of such a model.
        """
        return self.models.index(name) + 1


def _number(names: list[str], name: str) -> int:
    try:
        return names.index(name)
    except ValueError:
        names.append(name)
        return len(names) - 1


def read(path: Path) -> Trace:
    """Read a trace.

    Args:
        path: the file; docs/policies.md says what its lines are.

    Returns:
        The trace, settled.

    Raises:
        UsageError: it cannot be read, or a line is malformed, which the error names.
    """
    try:
        with path.open(encoding="utf-8") as lines:
            return parse(lines, str(path))
    except UnicodeDecodeError:
        raise UsageError(
            f"{path} is not a trace",
            "it is not text",
            "Give a text trace or an I/O template (pagecache-bpf template derive); a recording is "
            "for pagecache-bpf report",
        ) from None
    except OSError as error:
        raise UsageError(
            f"the trace {path} cannot be read", getattr(error, "strerror", None) or str(error)
        ) from error


def parse(lines: Iterable[str], name: str = "trace") -> Trace:
    """Read the lines of a trace.

    Args:
        lines: the text, line by line.
        name: what errors call it.

    Returns:
        The trace, settled.

    Raises:
        UsageError: a line is malformed, or nothing is read.
    """
    trace = Trace()
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        try:
            _take(trace, text)
        except (ValueError, TypeError, KeyError, UsageError) as error:
            why = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
            raise UsageError(
                f"line {number} of {name} is not one of a trace",
                why,
                "Write TIME CONSUMER FILE OFFSET LENGTH, or JSON (docs/policies.md)",
            ) from error
    if not any(trace.accesses):
        raise UsageError(f"{name} is not a trace", "nothing is read in it")
    return trace.settle()


def _take(trace: Trace, text: str) -> None:
    if not text.startswith("{"):
        time, consumer, file, offset, length = text.split()
        trace.add(float(time), consumer, file, parse_size(offset), parse_size(length))
        return
    data = json.loads(text)
    if "hint" in data:
        trace.hint(float(data["t"]), data["hint"], dict(data["key"]), dict(data["value"]))
    elif "length" in data:
        trace.add(
            float(data["t"]),
            str(data.get("consumer", "")),
            str(data["file"]),
            int(data["offset"]),
            int(data["length"]),
            str(data.get("cgroup", "")),
        )
    else:
        described = trace.files[trace.file(str(data["file"]))]
        described.size = max(described.size, int(data.get("size", 0)))
        described.model = str(data.get("model", described.model))
        described.governed = bool(data.get("governed", described.governed))
