# SPDX-License-Identifier: Apache-2.0
"""What a load tells about itself.  Cheap to import."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from pagecache_bpf.units import format_duration, format_size, plural

#: Values of Report.engine.
STRUCT_OPS, AGENT, UNPRIVILEGED, NONE = "struct_ops", "agent", "unprivileged", "none"


@dataclass(frozen=True)
class Report:
    """How a load went.  None is what is not known; nothing is estimated.

    engine: struct_ops, agent, unprivileged (this process's own threads) or none (the kernel's
    readahead as ever).  via: controller, direct or alone.  why: why not a better engine; empty
    for the best.  bytes: size of the files.  prefetched_bytes: read ahead for this load.
    hit_ratio: share of the bytes wanted that were in the page cache when they were wanted, 0 to
    1.  stall_seconds: time that readers waited for the disk.  evicted_bytes: dropped behind the
    load.  recording: the file that `pagecache-bpf report` makes a page of.  devices: what each name
    meant, as `pagecache-bpf topology` shows it; node: the NUMA node of all of them.
    """

    model: str
    path: str
    files: int
    bytes: int
    engine: str
    via: str
    why: str = ""
    policy: str | None = None
    done: bool = False
    seconds: float = 0.0
    devices: tuple[dict[str, Any], ...] = ()
    node: int | None = None
    budget_bytes: int | None = None
    prefetched_bytes: int | None = None
    hit_ratio: float | None = None
    stall_seconds: float | None = None
    resident_before_bytes: int | None = None
    resident_bytes: int | None = None
    evicted_bytes: int | None = None
    recording: str | None = None
    notes: tuple[str, ...] = field(default=())

    def as_json(self) -> dict[str, Any]:
        """The same as a dictionary for json.dumps()."""
        return asdict(self)

    def __str__(self) -> str:
        served = f"engine {self.engine}" + (f", policy {self.policy}" if self.policy else "")
        lines = [
            f"{self.model}: {format_size(self.bytes)} in {plural(self.files, 'file')}, "
            f"{'was open for' if self.done else 'open for'} {_seconds(self.seconds)} ({served})"
        ]
        if self.why:
            lines.append(f"  not better because {self.why}")
        lines.append(
            f"  prefetched {_size(self.prefetched_bytes)}, hit ratio "
            f"{'unknown' if self.hit_ratio is None else f'{self.hit_ratio:.1%}'}, "
            f"stalled {_seconds(self.stall_seconds)}"
        )
        lines.append(
            f"  in the page cache {_size(self.resident_before_bytes)} before, "
            f"{_size(self.resident_bytes)} now; evicted {_size(self.evicted_bytes)}"
        )
        for device in self.devices:
            node = "unknown" if device["node"] is None else device["node"]
            lines.append(
                f"  {device['name']}: NUMA node {node}"
                + (f" ({device['why']})" if device["why"] else "")
            )
        if self.recording:
            lines.append(f"  recording: {self.recording}")
        lines += [f"  {note}" for note in self.notes]
        return "\n".join(lines)


def _size(count: int | None) -> str:
    return "unknown" if count is None else format_size(count)


def _seconds(value: float | None) -> str:
    return "unknown" if value is None else format_duration(round(value * 1e9))
