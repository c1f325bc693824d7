# SPDX-License-Identifier: Apache-2.0
"""Makes one page of one or two recordings: a file that a browser opens, with all it needs inside.

What varies is data and never markup: numbers and names travel compressed and in base64, and the
page's script puts names where text belongs, so a file or tensor may be called anything.
"""

from __future__ import annotations

import base64
import html
import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pagecache_bpf.errors import UsageError
from pagecache_bpf.kernel.abi import RECORDED
from pagecache_bpf.recording.format import COUNTERS, SIMULATION, Recording
from pagecache_bpf.reporting import template_line
from pagecache_bpf.reporting.grid import Grid
from pagecache_bpf.units import format_size

ASSETS = Path(__file__).resolve().parent / "assets"
#: The parts of the page's script; each uses what those before it have defined.
SCRIPT = ("data", "summary", "panels", "map", "series", "tables", "controls")
#: A load that used so much of what its device gives was limited by the device.
DEVICE_BOUND = 0.85
#: Readers that slept so much of the time waited for the device, or for prefetch.
STALLED = 0.3


def _packed(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data, 9)).decode("ascii")


def _array(values: npt.NDArray[Any], dtype: str) -> str:
    return _packed(np.ascontiguousarray(values.astype(dtype)).tobytes())


def summary(recording: Recording) -> dict[str, Any]:
    """Return the numbers of a load as a whole.

    Args:
        recording: the load.

    Returns:
        Bytes by what accesses found, seconds, and the share of the device, None where its speed is
        not known.
    """
    total = {name: recording.total(name) for name in COUNTERS}
    hit = total["hit_bytes"] + total["useful_bytes"]
    accessed = hit + total["ahead_bytes"] + total["late_bytes"] + total["miss_bytes"]
    read = recording.samples[-1].device_bytes if recording.samples else 0
    seconds = active_seconds(recording)
    share = None
    if recording.device_limit and seconds:
        share = read / seconds / recording.device_limit
    return {
        **total,
        "accessed_bytes": accessed,
        "all_hit_bytes": hit,
        "device_bytes": read,
        "seconds": recording.seconds,
        "active_seconds": seconds,
        "device_share": share,
    }


def active_seconds(recording: Recording) -> float:
    """Return the time from the first event of a recording to its last, in seconds.

    Args:
        recording: the load.

    Returns:
        Seconds; 0 if nothing was recorded.
    """
    ticks = recording.events["tick"]
    if not len(ticks):
        return 0.0
    return float(int(ticks.max()) - int(ticks.min()) + 1) * recording.tick_ns / 1e9


def verdict(recording: Recording) -> str:
    """Say in a sentence what limited a load.

    Args:
        recording: the load.

    Returns:
        The sentence, for the top of the page: the memory, the device, readers that waited, or that
        none of them did.
    """
    numbers = summary(recording)
    accessed, seconds = numbers["accessed_bytes"], numbers["active_seconds"]
    if not accessed:
        return "No process read any of the files while this was recorded."
    if recording.engine == SIMULATION:
        return (
            f"A simulation: {numbers['all_hit_bytes'] / accessed:.1%} of what was read was in the "
            f"cache, the device gave {format_size(numbers['device_bytes'])}."
        )
    stalled = numbers["stall_ns"] / 1e9 / max(seconds, 1e-9)
    share = numbers["device_share"]
    lost = numbers["reclaimed_bytes"] / accessed
    if lost > 0.1:
        return (
            f"Memory was short: {format_size(numbers['reclaimed_bytes'])} were reclaimed during "
            f"the load, {lost:.0%} of what was read."
        )
    if share is not None and share >= DEVICE_BOUND:
        return f"The device limited the load: it gave {share:.0%} of what it can."
    if stalled >= STALLED:
        text = f"Readers waited for I/O {stalled:.0%} of the time"
        if share is not None:
            text += f", while the device gave {share:.0%} of what it can"
        return text + ": reading ahead earlier or further would help."
    if numbers["device_bytes"] * 10 < accessed:
        return "The files were in the page cache already: the load read from memory."
    return (
        f"The reader limited the load: it waited for I/O only {stalled:.0%} of the time, its own "
        "work took the rest."
    )


def payload(recording: Recording) -> dict[str, Any]:
    """Return what the page's script needs of a recording; arrays are compressed, in base64.

    Args:
        recording: the load.

    Returns:
        What is written into the page as JSON; the script in reporting/assets reads these keys.
    """
    grid = Grid(recording)
    details = grid.details
    tensors = recording.tensors
    names = "\0".join(tensor.name.replace("\0", "") for tensor in tensors)
    starts = np.array([grid.bases[tensor.file] + tensor.offset for tensor in tensors], np.float64)
    return {
        "model": recording.model,
        "policy": recording.policy,
        "engine": recording.engine,
        "command": recording.command,
        "kernel": recording.kernel,
        "started": recording.started_ns / 1e6,
        "verdict": verdict(recording),
        "summary": summary(recording),
        "limit": recording.device_limit,
        "lost": recording.lost,
        "begin": grid.begin_ns / 1e9,
        "template": _template(grid),
        "uncounted": list(recording.uncounted),
        "rows": grid.rows,
        "columns": grid.columns,
        "columnSeconds": grid.column_ns / 1e9,
        "totalBytes": grid.total_bytes,
        "files": [
            {"path": file.path, "base": base, "bytes": file.bytes}
            for file, base in zip(recording.files, grid.bases, strict=True)
        ],
        "readers": [
            {"tgid": tgid, "name": recording.readers.get(tgid, "")} for tgid in grid.readers
        ],
        "phases": [
            [(phase.time_ns - grid.begin_ns) / 1e9, phase.name, phase.tgid]
            for phase in recording.phases
        ],
        "window": _array(grid.window(), "<i4"),
        "picture": _array(grid.picture(), "<u1"),
        "series": {name: _array(np.array(row), "<f4") for name, row in grid.series().items()},
        "stalls": _array(grid.stalls() / 1e9, "<f4"),
        "details": {
            "count": len(details.row),
            "row": _array(details.row, "<i4"),
            "column": _array(details.column, "<i4"),
            "reader": _array(details.reader, "<i4"),
            "counters": _array(details.counters.T, "<f4"),
        },
        "tensors": {
            "count": len(tensors),
            "names": _packed(names.encode(errors="replace")),
            "start": _array(starts, "<f8"),
            "bytes": _array(np.array([tensor.bytes for tensor in tensors], np.float64), "<f8"),
        },
    }


def _template(grid: Grid) -> dict[str, Any] | None:
    """Return the line of the template over the map; None: the recording has none."""
    found = template_line.line(grid)
    if found is None:
        return None
    return {
        "source": grid.recording.expected.source,
        "cells": _array(found.cells, "<i4"),
        "place": _array(found.place, "<f8"),
        "distance": found.distance,
    }


def page(recordings: Sequence[Recording], labels: Sequence[str]) -> str:
    """Return the page of one recording, or of two that are compared.

    Args:
        recordings: the loads, one or two.
        labels: what they are called on the page, in the same order.

    Returns:
        A whole HTML document.
    """
    loads = [
        {"label": label, **payload(recording)}
        for label, recording in zip(labels, recordings, strict=True)
    ]
    data = {
        "loads": loads,
        "counters": [{"name": counter.name, "help": counter.help} for counter in RECORDED],
    }
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=True)
    parts = {
        "title": html.escape(f"{recordings[0].model}: a recorded load"),
        "style": _asset("uPlot.min.css") + _asset("page.css"),
        "library": _asset("uPlot.iife.min.js"),
        "script": "\n".join(_asset(f"{part}.js") for part in SCRIPT),
        # Inside of a script element only "</" and "<!--" have a meaning.
        "data": text.replace("<", "\\u003c"),
    }
    result = _asset("page.html")
    for name, content in parts.items():
        result = result.replace(f"{{{{{name}}}}}", content, 1)
    return result


def replace(path: Path, text: str) -> None:
    """Write a page as a whole or not at all.

    Args:
        path: the file; one that is there is replaced.
        text: what page() has returned.

    Raises:
        UsageError: it cannot be written there.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UsageError(f"{path} cannot be written", error.strerror or str(error)) from error


def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")
