# SPDX-License-Identifier: Apache-2.0
"""What loading a model would do here: bytes to read, time, cache, and what would have to go.

Nothing is loaded and nothing is changed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from pagecache_bpf.errors import PagecacheError, PrivilegeError
from pagecache_bpf.explain import device_speed
from pagecache_bpf.kernel import cgroups
from pagecache_bpf.kernel.cachestat import resident_pages_or_none
from pagecache_bpf.kernel.cgroups import Memory
from pagecache_bpf.kernel.file_pages import PAGE_SIZE
from pagecache_bpf.weights.models import Model


@dataclass(frozen=True)
class File:
    """A file of the model; resident is None for a caller whom the kernel does not tell."""

    path: Path
    size: int
    resident: int | None


@dataclass(frozen=True)
class MemoryPlace:
    """Somewhere the pages have to fit: the host, or a memory cgroup.  All in bytes.

    bound: None for the host.  free: what fits in at once; room: what fits in when everything
    that can be reclaimed is.  reclaimed: what has to go; missing: what does not fit even so.
    """

    name: str
    bound: int | None
    used: int
    free: int
    room: int
    reclaimed: int
    missing: int


@dataclass(frozen=True)
class DryRun:
    """What a load of the model would do, at best; sizes in bytes, seconds None if unknown.

    speed_source: "probe", "last" or "none", and then speed_why says why.  window: no more than
    this is kept at a time, as by a policy that drops behind its readers; None: all is kept.
    """

    model: Model
    files: tuple[File, ...]
    speed: device_speed.Speed | None
    speed_source: str
    speed_why: str
    memory: Memory
    places: tuple[MemoryPlace, ...]
    window: int | None = None

    @property
    def peak(self) -> int:
        """Bytes of it that are in the page cache at most."""
        return self.size if self.window is None else min(self.size, self.window)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def resident(self) -> int | None:
        """Bytes of it in the page cache; None if the kernel does not tell of some file."""
        if any(file.resident is None for file in self.files):
            return None
        return sum(file.resident or 0 for file in self.files)

    @property
    def to_read(self) -> int:
        """Bytes to read; what is in the cache counts as absent where that is not known."""
        return sum(file.size - min(file.resident or 0, file.size) for file in self.files)

    @property
    def seconds(self) -> float | None:
        """The time that takes at the device's speed."""
        return self.to_read / self.speed.bytes_per_second if self.speed else None

    @property
    def tightest(self) -> MemoryPlace | None:
        """Where most is missing, or else most has to go; None if all fits in at once."""
        worst = max(self.places, key=lambda place: (place.missing, place.reclaimed), default=None)
        return worst if worst and worst.reclaimed else None

    @property
    def fits(self) -> bool:
        """Whether the peak fits into every place."""
        return not any(place.missing for place in self.places)


def dry_run(
    model: Model, memory: Memory, *, may_probe: bool = True, window: int | None = None
) -> DryRun:
    """Estimate what a load would read, how long it would take, and what would have to go.

    Args:
        model: its files are opened.
        memory: the cgroup that the pages would be charged to.
        may_probe: read from the device to measure it; else its last measured speed is taken.
        window: bytes that are read ahead at a time; by default the policy's.

    Returns:
        The estimate, with what it is based on.

    Raises:
        UsageError: the model has no bytes to read.
        PrivilegeError: a file may not be opened.
    """
    files = tuple(_look(path) for path in model.files)
    speed, source, why = _speed(model, files, may_probe)
    found = DryRun(model, files, speed, source, why, memory, (), window)
    places = _places(memory, min(found.to_read, found.peak), found.resident or 0)
    return replace(found, places=tuple(places))


def _look(path: Path) -> File:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise PrivilegeError(f"{path} cannot be opened", error.strerror or str(error)) from error
    try:
        pages = resident_pages_or_none(fd)
        return File(path, os.fstat(fd).st_size, None if pages is None else pages * PAGE_SIZE)
    finally:
        os.close(fd)


def _speed(
    model: Model, files: tuple[File, ...], may_probe: bool
) -> tuple[device_speed.Speed | None, str, str]:
    """Return a device's speed, where it is from, and why there is none."""
    device = model.files[0].stat().st_dev
    why = "it was not measured since the machine was booted"
    last = device_speed.last(device)
    if last and last.bytes >= device_speed.ENOUGH_BYTES > sum(file.size for file in files):
        may_probe = False
    if may_probe:
        # What was read lately may come from a cache of the device itself.
        coldest = sorted(files, key=lambda file: (file.resident or 0) / max(file.size, 1))
        try:
            speed = device_speed.measure([file.path for file in coldest])
        except PagecacheError as error:
            why = error.why
        except OSError as error:
            why = error.strerror or str(error)
        else:
            device_speed.remember(device, speed)
            return speed, "probe", ""
    return (last, "last", "") if last else (None, "none", why)


def _places(memory: Memory, to_read: int, resident: int) -> Iterable[MemoryPlace]:
    host = cgroups.host_memory()
    total, free = host.get("MemTotal", 0), host.get("MemFree", 0)
    available = host.get("MemAvailable", free)
    # The model's own pages are part of what could be reclaimed, but are to stay.
    yield _place("host", None, total - free, free, available - resident, to_read)
    for level in memory.levels:
        if level.bound is not None and level.headroom is not None and level.free is not None:
            own = min(resident, level.reclaimable)  # if they are charged here
            name = f"cgroup {level.path}"
            room = level.headroom - own
            yield _place(name, level.bound, level.used, level.free, room, to_read)


def _place(
    name: str, bound: int | None, used: int, free: int, room: int, wanted: int
) -> MemoryPlace:
    room = max(0, room)
    return MemoryPlace(
        name, bound, used, free, room, max(0, wanted - free), max(0, wanted - max(room, free))
    )
