# SPDX-License-Identifier: Apache-2.0
"""Writes a recording as a trace for Perfetto (ui.perfetto.dev), with the package `perfetto`.

A track for each reader with its accesses and stalls, one for each file with what came and went,
one for the phases, and counters: device, resident bytes, bytes that were prefetched and not used.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pagecache_bpf.errors import UnsupportedError, UsageError
from pagecache_bpf.recording.format import Recording
from pagecache_bpf.reporting.grid import Grid

_SEQUENCE = 1  # all packets are of one producer
_READS = ("miss_bytes", "late_bytes", "ahead_bytes", "useful_bytes", "hit_bytes")
_MOVES = {
    "prefetched_bytes": "prefetched",
    "read_bytes": "read in",
    "reclaimed_bytes": "reclaimed",
    "dropped_bytes": "dropped",
    "discarded_bytes": "discarded",
}
_WHAT = {
    "miss_bytes": "missed",
    "late_bytes": "prefetched late",
    "ahead_bytes": "just read ahead",
    "useful_bytes": "prefetched in time",
    "hit_bytes": "hit",
}


def write(recording: Recording, path: Path) -> None:
    """Write the trace.

    Args:
        recording: the load.
        path: the file, by convention NAME.pftrace.

    Raises:
        UnsupportedError: the package perfetto is not installed.
        UsageError: the file cannot be written.
    """
    try:
        from perfetto.trace_builder.proto_builder import StreamingTraceProtoBuilder
    except ImportError as error:
        raise UnsupportedError(
            "no trace can be written",
            f"the Python package perfetto is missing ({error})",
            "Install it: pip install 'pagecache-bpf[perfetto]'",
        ) from error
    try:
        with path.open("wb") as file:
            _Trace(StreamingTraceProtoBuilder(file), recording).write()
    except OSError as error:
        raise UsageError(f"{path} cannot be written", error.strerror or str(error)) from error


class _Trace:
    """Packets of one recording, in the order in which they are written."""

    def __init__(self, builder: Any, recording: Recording) -> None:
        self._builder = builder
        self._recording = recording
        self._tracks = 0

    def write(self) -> None:
        """Write all tracks and their events."""
        recording = self._recording
        readers = {
            tgid: self._process(tgid, name or "reader")
            for tgid, name in sorted(recording.readers.items())
        }
        files = [self._track(file.path) for file in recording.files]
        self._phases()
        tick = recording.tick_ns
        columns = {name: recording.events[name].tolist() for name in (*_READS, *_MOVES, "stall_ns")}
        places = zip(
            *(recording.events[name].tolist() for name in ("file", "cell", "tick", "tgid")),
            strict=True,
        )
        for at, (file, cell, number, tgid) in enumerate(places):
            begin = number * tick
            where = {"file": recording.files[file].path, "offset": cell * recording.cell_bytes}
            found = {name: columns[name][at] for name in _READS if columns[name][at]}
            stall = columns["stall_ns"][at]
            if tgid in readers and (found or stall):
                name = _WHAT[next(iter(found))] if found else "stalled"
                self._slice(readers[tgid], begin, tick, name, {**where, **found, "stall_ns": stall})
            for counter, name in _MOVES.items():
                if columns[counter][at]:
                    size = {"bytes": columns[counter][at], "offset": where["offset"]}
                    self._slice(files[file], begin, tick, name, size)
        self._counters()

    def _packet(self, at: int | None = None) -> Any:
        packet = self._builder.create_packet()
        packet.trusted_packet_sequence_id = _SEQUENCE
        if at is not None:
            packet.timestamp = at
        return packet

    def _descriptor(self, name: str) -> tuple[int, Any]:
        self._tracks += 1
        packet = self._packet()
        packet.track_descriptor.uuid = self._tracks
        packet.track_descriptor.name = name
        return self._tracks, packet

    def _track(self, name: str) -> int:
        uuid, packet = self._descriptor(name)
        self._builder.write_packet(packet)
        return uuid

    def _process(self, tgid: int, name: str) -> int:
        uuid, packet = self._descriptor(name)
        packet.track_descriptor.process.pid = tgid
        packet.track_descriptor.process.process_name = name
        self._builder.write_packet(packet)
        return uuid

    def _slice(self, track: int, begin: int, length: int, name: str, more: dict[str, Any]) -> None:
        from perfetto.protos.perfetto.trace.perfetto_trace_pb2 import TrackEvent

        packet = self._packet(begin)
        event = packet.track_event
        event.type, event.track_uuid, event.name = TrackEvent.TYPE_SLICE_BEGIN, track, name
        for key, value in more.items():
            note = event.debug_annotations.add()
            note.name = key
            if isinstance(value, int):
                note.int_value = value
            else:
                note.string_value = str(value)
        self._builder.write_packet(packet)
        packet = self._packet(begin + length)
        packet.track_event.type = TrackEvent.TYPE_SLICE_END
        packet.track_event.track_uuid = track
        self._builder.write_packet(packet)

    def _phases(self) -> None:
        phases = self._recording.phases
        if not phases:
            return
        track = self._track("phases")
        ends = [phase.time_ns for phase in phases[1:]] + [int(self._recording.seconds * 1e9)]
        for phase, end in zip(phases, ends, strict=True):
            self._slice(track, phase.time_ns, max(0, end - phase.time_ns), phase.name, {})

    def _counters(self) -> None:
        from perfetto.protos.perfetto.trace.perfetto_trace_pb2 import CounterDescriptor, TrackEvent

        grid = Grid(self._recording)
        series = grid.series()
        for name, what in (
            ("device", "device bytes read"),
            ("resident", "resident bytes"),
            ("unused", "prefetched, not used yet"),
        ):
            if name not in series:
                continue
            track, packet = self._descriptor(what)
            packet.track_descriptor.counter.unit = CounterDescriptor.UNIT_SIZE_BYTES
            self._builder.write_packet(packet)
            for column, value in enumerate(series[name]):
                packet = self._packet(grid.begin_ns + int((column + 1) * grid.column_ns))
                packet.track_event.type = TrackEvent.TYPE_COUNTER
                packet.track_event.track_uuid = track
                packet.track_event.counter_value = int(value)
                self._builder.write_packet(packet)
