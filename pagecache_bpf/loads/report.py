# SPDX-License-Identifier: Apache-2.0
"""What a load tells about itself.

It is cheap to import and knows nothing of how a load is served.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from pagecache_bpf.units import format_duration, format_size, plural, printable

#: Values of Report.engine.
STRUCT_OPS, AGENT, UNPRIVILEGED, NONE = "struct_ops", "agent", "unprivileged", "none"


@dataclass(frozen=True)
class Report:
    """How a load went.  What is not known is None; nothing is estimated.

    Attributes:
        model: the model's name.
        path: the file or directory that was named.
        files: how many files of weights it has.
        bytes: their size.
        engine: "struct_ops", "agent", "unprivileged" (threads of this process) or "none" (the
            kernel's own readahead, as without us).
        via: "controller", "direct" (this process attached the policy), "alone" (threads of this
            process) or "none".
        why: why it is not a better engine; empty for the best.
        policy: the policy's name; None: none serves it.
        done: whether the load is over.
        seconds: since the load began.
        devices: the accelerators that it is for, as `pagecache-bpf topology --json` shows them.
        node: the NUMA node next to all of them.
        budget_bytes: bytes of it that may be in the page cache at a time; None: no bound.
        prefetched_bytes: bytes that were read ahead for it.
        early_bytes: bytes that were read from the load's beginning on, before its reader asked for
            them, as with load(prefetch=True); None: that was not asked for.
        hit_ratio: share of the bytes wanted that were in the page cache by then, 0 to 1.
        stall_seconds: how long its readers waited for the disk, added up over threads.
        resident_before_bytes: bytes of the files in the page cache when it began.
        resident_bytes: bytes of the files in the page cache now.
        evicted_bytes: bytes that were dropped behind it or at its end.
        recording: the file that `pagecache-bpf report` makes a page of; None: there is none.
        notes: what went otherwise than was asked for, in sentences for people.
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
    early_bytes: int | None = None
    hit_ratio: float | None = None
    stall_seconds: float | None = None
    resident_before_bytes: int | None = None
    resident_bytes: int | None = None
    evicted_bytes: int | None = None
    recording: str | None = None
    notes: tuple[str, ...] = field(default=())

    def as_json(self) -> dict[str, Any]:
        """Convert the report for json.dumps().

        Returns:
            The attributes by name.
        """
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
        if self.early_bytes is not None:
            lines.append(f"  read from its beginning on: {_size(self.early_bytes)}")
        for device in self.devices:
            node = "unknown" if device["node"] is None else device["node"]
            lines.append(
                f"  {device['name']}: NUMA node {node}"
                + (f" ({device['why']})" if device["why"] else "")
            )
        if self.recording:
            lines.append(f"  recording: {self.recording}")
        lines += [f"  {note}" for note in self.notes]
        # Names of files are anybody's; only the ends of our own lines are ends of lines.
        return "\n".join(map(printable, lines))


def _size(count: int | None) -> str:
    return "unknown" if count is None else format_size(count)


def _seconds(value: float | None) -> str:
    return "unknown" if value is None else format_duration(round(value * 1e9))
