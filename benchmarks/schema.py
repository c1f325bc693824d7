# SPDX-License-Identifier: Apache-2.0
"""The one shape of every result file: a machine and rows of measurements.

    {"machine": {...}, "rows": [{"case", "engine", "policy", "loader", "fs", "seconds": [...],
     "median_s", "device_bytes", "wanted_bytes", "limit_s", "correct", ...}]}

The kernel's default has "policy": null and "engine": null. Keys may be added, never renamed.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from pagecache_bpf.errors import PagecacheError

_KEYS = (
    "case",
    "engine",
    "policy",
    "loader",
    "fs",
    "seconds",
    "median_s",
    "device_bytes",
    "wanted_bytes",
    "limit_s",
    "correct",
)


@dataclass
class Row:
    """One case measured: times in seconds, sizes in bytes.

    seconds holds one entry per round; device_bytes is the median of what a round read from
    the block device; limit_s is the median of direct I/O in the same run (None: not measured).
    `extra` is merged into the JSON object.
    """

    case: str
    loader: str
    fs: str
    wanted_bytes: int
    policy: str | None = None
    engine: str | None = None
    seconds: list[float] = field(default_factory=list)
    device_bytes_rounds: list[int] = field(default_factory=list)
    limit_s: float | None = None
    correct: bool = True
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def median_s(self) -> float | None:
        """Median of the rounds, None when there are none."""
        return statistics.median(self.seconds) if self.seconds else None

    @property
    def device_bytes(self) -> int | None:
        """Median bytes that a round read from the device, None when not counted."""
        rounds = self.device_bytes_rounds
        return int(statistics.median(rounds)) if rounds else None

    def as_json(self) -> dict[str, Any]:
        """Return the row as the schema has it."""
        return {
            "case": self.case,
            "engine": self.engine,
            "policy": self.policy,
            "loader": self.loader,
            "fs": self.fs,
            "seconds": [round(second, 6) for second in self.seconds],
            "median_s": self.median_s,
            "device_bytes": self.device_bytes,
            "wanted_bytes": self.wanted_bytes,
            "limit_s": self.limit_s,
            "correct": self.correct,
            "device_bytes_rounds": self.device_bytes_rounds,
            **self.extra,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Row:
        """Read a row back; raises PagecacheError when a key is missing."""
        missing = [key for key in _KEYS if key not in data]
        if missing:
            raise PagecacheError("not a benchmark row", f"it lacks {', '.join(missing)}")
        known = {*_KEYS, "device_bytes_rounds"}
        return cls(
            case=data["case"],
            loader=data["loader"],
            fs=data["fs"],
            wanted_bytes=data["wanted_bytes"],
            policy=data["policy"],
            engine=data["engine"],
            seconds=list(data["seconds"]),
            device_bytes_rounds=list(data.get("device_bytes_rounds", [])),
            limit_s=data["limit_s"],
            correct=data["correct"],
            extra={key: value for key, value in data.items() if key not in known},
        )


@dataclass
class Report:
    """A result file: what it was measured on, and the rows."""

    machine: dict[str, Any]
    rows: list[Row] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Return the whole file as the schema has it."""
        return {"machine": self.machine, "rows": [row.as_json() for row in self.rows]}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Report:
        """Read back; raises PagecacheError when it is not a result."""
        if not isinstance(data.get("machine"), dict) or not isinstance(data.get("rows"), list):
            raise PagecacheError("not a benchmark result", "it needs 'machine' and 'rows'")
        return cls(data["machine"], [Row.from_json(row) for row in data["rows"]])

    def select(self, **keys: object) -> list[Row]:
        """Rows whose fields (or extra keys) equal all of `keys`."""

        def value(row: Row, key: str) -> object:
            return row.extra[key] if key in row.extra else getattr(row, key, None)

        return [
            row for row in self.rows if all(value(row, key) == want for key, want in keys.items())
        ]


def write(path: Path, report: Report) -> None:
    """Write atomically: a reader sees the old file or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".partial")
    try:
        with os.fdopen(fd, "w") as out:
            json.dump(report.as_json(), out, indent=2)
            out.write("\n")
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def read(path: Path) -> Report:
    """Read a result file; raises PagecacheError when it is missing or malformed."""
    try:
        data = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise PagecacheError(f"cannot read the results in {path}", str(error)) from error
    if not isinstance(data, dict):
        raise PagecacheError(f"cannot read the results in {path}", "not a JSON object")
    return Report.from_json(data)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _virtualised() -> str | None:
    """Return what the machine pretends to be, from DMI; None on bare metal or where unreadable."""
    try:
        vendor = Path("/sys/class/dmi/id/sys_vendor").read_text().strip()
    except OSError:
        return None
    return vendor or None


def machine(**extra: object) -> dict[str, Any]:
    """Describe the machine the benchmark runs on; `extra` says what it was run against."""
    return {
        "kernel": platform.release(),
        "architecture": platform.machine(),
        "cpus": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "vendor": _virtualised(),
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in ("safetensors", "numpy", "ml_dtypes")},
        },
        **extra,
    }


def fill_limits(rows: Iterable[Row], same: Callable[[Row], object]) -> None:
    """Give each row the median of the direct-I/O row it belongs with (`same` gives the key)."""
    rows = list(rows)
    limits = {same(row): row.median_s for row in rows if row.loader == "direct"}
    for row in rows:
        row.limit_s = limits.get(same(row))
