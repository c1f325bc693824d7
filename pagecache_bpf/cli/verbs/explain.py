# SPDX-License-Identifier: Apache-2.0
"""pagecache-bpf explain: what a load would do here, without doing it."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, Any

from pagecache_bpf.cli.output import Output, pairs, table
from pagecache_bpf.cli.parser import Group
from pagecache_bpf.errors import PagecacheError
from pagecache_bpf.units import format_cached, format_duration, format_size, parse_size, plural

if TYPE_CHECKING:
    from rich.console import Console

    from pagecache_bpf.explain.estimate import DryRun

GROUP = Group.LOOK
HELP = "dry run: what loading a model would read, and what would have to go"
DESCRIPTION = """\
Tells what loading a model would do here: the bytes to read, what of them is in the page cache
already, the time that takes at the device's speed, the cache it fills, whether that fits into
the memory of the host and of the memory cgroup, and what would have to go.

Nothing is loaded. The device's speed is measured by reading from the files for half a second
past the page cache (direct I/O), which takes bandwidth from whoever else uses the device; with
--no-probe the last measured speed is taken instead.

Needs no root, only the right to read the files. What of a file is in the page cache the kernel
tells its owner, root and those who may write it; for others it counts as absent."""
EXAMPLES = (
    ("pagecache-bpf explain /models/llama-3-8b", ""),
    ("pagecache-bpf explain /models/llama-3-8b --pid 4711", "in the cgroup of that server"),
    (
        "pagecache-bpf explain /models/llama-3-8b --window 64MiB",
        "with a policy that drops behind: maio, drop_behind=1",
    ),
    ("pagecache-bpf explain model.gguf --no-probe --json", "for scripts"),
)
_PLACE_JSON = {
    "name": "host, or cgroup and its path",
    "bound_bytes": "its limit: the lower of memory.max and memory.high; null for the host",
    "used_bytes": "what is used of it",
    "free_bytes": "what fits in without anything having to go",
    "room_bytes": "what fits in when all that can be reclaimed is, but for the model's own pages",
    "reclaimed_bytes": "what would have to go",
    "missing_bytes": "what does not fit even so: as much of the model goes before it is wanted",
}
JSON = {
    "explain": {
        "model": "the model's name",
        "files[].path": "a file of it",
        "files[].size_bytes": "its size",
        "files[].resident_bytes": "bytes of it in the page cache; null if the kernel does not tell",
        "left_out[].path": "what looks like weights beside them and is not read,",
        "left_out[].why": "and why not",
        "size_bytes": "size of all files",
        "resident_bytes": "bytes of them in the page cache; null if the kernel does not tell",
        "to_read_bytes": "bytes that a load would read",
        "speed.bytes_per_second": "the device's speed; null if it is not known",
        "speed.source": "probe (measured now), last (measured before) or none",
        "speed.measured_ns": "when it was measured, in ns since 1970; null if it is not known",
        "speed.measured_bytes": "by reading how much; null if it is not known",
        "speed.why": "why it is not known; null if it is",
        "seconds": "time to read at that speed; null if the speed is not known",
        "peak_cache_bytes": "bytes of it in the page cache at most: its size, or --window",
        "cgroup.path": "the memory cgroup looked at",
        "cgroup.version": "1 or 2: of the hierarchy; null if there is no memory controller",
        **{f"places[].{key}": text for key, text in _PLACE_JSON.items()},
        "fits": "whether the peak fits into each place",
        "limited_by": "the place where most does not fit or has to go; null if all is free",
        "at_risk[].model": "a governed model (root only) that is among what could have to go",
        "at_risk[].policy": "its policy",
        "at_risk[].resident_bytes": "bytes of it in the page cache",
    }
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of explain."""
    parser.add_argument("path", metavar="PATH", help="file, directory or Hugging Face snapshot")
    parser.add_argument(
        "--no-probe", action="store_true", help="do not read; take the last measured speed"
    )
    parser.add_argument(
        "--window",
        metavar="SIZE",
        type=parse_size,
        help="no more than this stays in the cache, as with a policy that drops behind its "
        "readers (default: all of it)",
    )
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--pid", metavar="PID", type=int, help="look at the memory cgroup of this process"
    )
    group.add_argument(
        "--cgroup", metavar="PATH", help="look at this memory cgroup (default: the caller's)"
    )


def run(args: argparse.Namespace, out: Output) -> int:
    """Explain; that the model does not fit is an answer and no error."""
    from pagecache_bpf.explain.estimate import dry_run
    from pagecache_bpf.kernel import cgroups
    from pagecache_bpf.weights.models import resolve

    model = resolve(args.path)
    if args.cgroup is not None:
        memory = cgroups.of_path(args.cgroup)
    else:
        memory = cgroups.of_process(args.pid)
    found = dry_run(model, memory, may_probe=not args.no_probe, window=args.window)
    data = _as_json(found, _at_risk(found) if found.tightest else [])
    out.emit(data, lambda console: _human(console, data))
    return 0


def _as_json(found: DryRun, at_risk: list[dict[str, Any]]) -> dict[str, Any]:
    from pagecache_bpf.cli.tagging import left_out_json

    speed = found.speed
    return {
        "model": found.model.name,
        "files": [
            {
                "path": str(file.path),
                "size_bytes": file.size,
                "resident_bytes": file.resident,
            }
            for file in found.files
        ],
        "left_out": left_out_json(found.model.left_out),
        "size_bytes": found.size,
        "resident_bytes": found.resident,
        "to_read_bytes": found.to_read,
        "speed": {
            "bytes_per_second": round(speed.bytes_per_second) if speed else None,
            "source": found.speed_source,
            "measured_ns": speed.time_ns if speed else None,
            "measured_bytes": speed.bytes if speed else None,
            "why": None if speed else found.speed_why,
        },
        "seconds": None if found.seconds is None else round(found.seconds, 3),
        "peak_cache_bytes": found.peak,
        "cgroup": {"path": found.memory.path, "version": found.memory.version},
        "places": [
            {
                "name": place.name,
                "bound_bytes": place.bound,
                "used_bytes": place.used,
                "free_bytes": place.free,
                "room_bytes": place.room,
                "reclaimed_bytes": place.reclaimed,
                "missing_bytes": place.missing,
            }
            for place in found.places
        ],
        "fits": found.fits,
        "limited_by": found.tightest.name if found.tightest else None,
        "at_risk": at_risk,
    }


def _at_risk(found: DryRun) -> list[dict[str, Any]]:
    """Other models that policies govern; what others have in the cache is root's to know."""
    import os

    from pagecache_bpf.kernel.file_pages import PAGE_SIZE
    from pagecache_bpf.policy.engines import Engines

    models: dict[tuple[str, str], int] = {}
    own = {str(file.path) for file in found.files}
    if os.geteuid() == 0:
        try:
            with Engines() as engines:
                for tag in engines.tags():
                    if tag.path not in own and tag.resident_pages:
                        key = tag.model, tag.policy
                        models[key] = models.get(key, 0) + tag.resident_pages * PAGE_SIZE
        except PagecacheError:  # a dry run works without any engine
            return []
    return [
        {"model": model, "policy": policy, "resident_bytes": size}
        for (model, policy), size in models.items()
    ]


def _human(console: Console, data: dict[str, Any]) -> None:
    from rich.text import Text

    from pagecache_bpf.cli.tagging import left_out_row

    console.print(Text.assemble((data["model"], "bold"), f"  {plural(len(data['files']), 'file')}"))
    resident = data["resident_bytes"]
    rows: list[tuple[str, str | Text]] = [
        ("size", format_size(data["size_bytes"])),
        (
            "cached",
            "not told to this user: counted as absent"
            if resident is None
            else format_cached(resident, data["size_bytes"]),
        ),
        ("to read", format_size(data["to_read_bytes"])),
        ("speed", _speed(data["speed"])),
    ]
    if data["seconds"]:
        rows.append(("time", f"{format_duration(round(data['seconds'] * 1e9))} at best"))
    if data["left_out"]:
        rows.append(left_out_row(data["left_out"]))
    rows.append(("peak cache", format_size(data["peak_cache_bytes"])))
    rows.append(("verdict", _verdict(data)))
    console.print(pairs(rows, indent=2))
    console.print()
    columns = [
        ("memory of", "path"),
        ("limit", "number"),
        ("used", "number"),
        ("free", "number"),
        ("room", "number"),
        ("has to go", "number"),
        ("does not fit", "number"),
    ]
    lines = [
        [
            place["name"],
            *(
                "-" if place[f"{key}_bytes"] is None else format_size(place[f"{key}_bytes"])
                for key in ("bound", "used", "free", "room", "reclaimed", "missing")
            ),
        ]
        for place in data["places"]
    ]
    console.print(table(columns, lines))
    if data["at_risk"]:
        console.print()
        columns = [("could have to go", "text"), ("policy", "text"), ("cached", "number")]
        lines = [
            [model["model"], model["policy"], format_size(model["resident_bytes"])]
            for model in data["at_risk"]
        ]
        console.print(table(columns, lines))


def _speed(speed: dict[str, Any]) -> str:
    if speed["source"] == "none":
        return f"not known: {speed['why']}"
    rate = f"{speed['bytes_per_second'] / 1e6:,.0f} MB/s"
    how = f"direct I/O, {format_size(speed['measured_bytes'])}"
    if speed["source"] == "probe":
        return f"{rate} (measured now: {how})"
    age = format_duration(max(time.time_ns() - speed["measured_ns"], 0))
    return f"{rate} (measured {age} ago: {how})"


def _verdict(data: dict[str, Any]) -> str:
    if data["limited_by"] is None:
        return "fits in; nothing has to go"
    place = next(
        candidate for candidate in data["places"] if candidate["name"] == data["limited_by"]
    )
    if not place["missing_bytes"]:
        return f"fits in after {format_size(place['reclaimed_bytes'])} of other files have gone"
    return (
        f"does not fit into {place['name']}: {format_size(place['missing_bytes'])} of the model "
        "leave the cache before they are wanted"
    )
