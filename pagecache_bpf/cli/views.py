# SPDX-License-Identifier: Apache-2.0
"""What stats, watch and top have in common: columns, numbers as people read them, JSON keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from pagecache_bpf.kernel.abi import COUNTERS, OBSERVED
from pagecache_bpf.metrics import collect, declarations
from pagecache_bpf.metrics.collect import ModelStats, Rates, StatsSnapshot
from pagecache_bpf.units import format_size

UNKNOWN = "-"
NOTHING = "nothing is tagged (`pagecache-bpf attach POLICY PATH`)"


@dataclass(frozen=True)
class Row:
    """A model at one time, and what happened since the time before; None: there was none."""

    model: ModelStats
    rates: Rates | None = None


@dataclass(frozen=True)
class Column:
    """A column of watch and top.

    key: sorts by it in top.  width: what its values need.  rank: those with the highest go first
    where there is no room.  source: the metric it shows, or whose rate;
    suffix: what its meaning says more.  value: what is sorted
    by, largest first; None: not known.
    """

    title: str
    key: str
    width: int
    rank: int
    source: str
    suffix: str
    value: Callable[[Row], float | None]
    show: Callable[[float], str]

    def text(self, row: Row) -> str:
        """Print the value of a model in this column.

        Args:
            row: the model with its rates.

        Returns:
            The text; UNKNOWN where there is no value.
        """
        value = self.value(row)
        return UNKNOWN if value is None else self.show(value)

    @property
    def help(self) -> str:
        """What it means, as the metric's declaration says."""
        known = declarations.find(declarations.PREFIX + self.source).help if self.source else ""
        return f"{known}{self.suffix}"


def percent(ratio: float | None) -> str:
    """Print a ratio; one that is almost, but not, all or nothing is not rounded to it.

    Args:
        ratio: from 0 to 1; None: not known.

    Returns:
        "12.5%", "<0.1%", ">99.9%", or UNKNOWN.
    """
    if ratio is None:
        return UNKNOWN
    if 0 < ratio < 0.001:
        return "<0.1%"
    if 0.999 < ratio < 1:
        return ">99.9%"
    return f"{ratio:.1%}"


def speed(bytes_per_second: float) -> str:
    """Print a rate in MB/s, as devices are sold.

    Args:
        bytes_per_second: the rate.

    Returns:
        "1,234.5 MB/s", in units of 1,000,000 bytes.
    """
    return f"{bytes_per_second / 1e6:,.1f} MB/s"


def _rate(read: Callable[[Rates], float | None]) -> Callable[[Row], float | None]:
    """Make a function of a row's rate since the last look; None for what is not observed."""
    return lambda row: read(row.rates) if row.rates and row.model.observed else None


def _size(value: float) -> str:
    return format_size(int(value))


COLUMNS = (
    Column("cached", "c", 10, 0, "resident_bytes", "", lambda r: r.model.resident_bytes, _size),
    Column("size", "z", 10, 5, "model_bytes", "", lambda r: r.model.bytes, _size),
    Column("hit", "h", 6, 1, "hit_ratio", "", lambda r: r.model.hit_ratio, percent),
    Column(
        *("hit now", "n", 9, 4, "", "The same, since the last look"),
        *(_rate(lambda r: r.hit_ratio), percent),
    ),
    Column(
        *("accessed", "a", 13, 2, "accessed_bytes_total", ", a second"),
        *(_rate(lambda r: r.accessed), speed),
    ),
    Column(
        *("added", "r", 13, 6, "added_bytes_total", ", a second"),
        *(_rate(lambda r: r.added), speed),
    ),
    Column(
        *("stall", "s", 9, 3, "stall_seconds_total", "; one reader all the time is 100%"),
        *(_rate(lambda r: r.stalled), percent),
    ),
)


def rows(before: StatsSnapshot | None, after: StatsSnapshot) -> list[Row]:
    """Put each model beside what has changed since an earlier look.

    Args:
        before: the earlier snapshot; None: this is the first.
        after: the later one.

    Returns:
        A row for each model of the later snapshot; its rates are None without an earlier one.
    """
    changes = collect.rates(before, after) if before else {}
    return [Row(model, changes.get(model.key)) for model in after.models]


def as_json(before: StatsSnapshot | None, after: StatsSnapshot) -> dict[str, Any]:
    """Return a snapshot with rates, as `watch` prints it.

    Args:
        before: an earlier snapshot; None: there is none.
        after: the later one.

    Returns:
        What metrics.collect.as_json() returns, and the `rates` of each model, null where they are
        not known.
    """
    data = collect.as_json(after)
    changes = collect.rates(before, after) if before else {}
    for model, row in zip(after.models, data["models"], strict=True):
        change = changes.get(model.key)
        row["rates"] = asdict(change) if change and model.observed else None
    return data


#: Keys of `stats --json`, and with those below of each line of `watch --json`.
JSON = {
    "time_ns": "when, in ns since 1970",
    "engines.struct_ops": "whether the module is loaded",
    "engines.agent": "whether the agent runs",
    "observer": "null if it does not run",
    "observer.level": "full, degraded (only what enters and leaves the cache) or off",
    "observer.missing[]": "events that nothing tells of here",
    "observer.uncounted[]": "counters that are left out for want of them",
    "observer.lost_events": declarations.find("pagecache_observer_lost_events_total").help,
    "policies[].name": "the policy",
    "policies[].engine": "struct_ops or agent",
    "policies[].state": "attached, or ended (by itself; not detached yet)",
    "policies[].attached_ns": "since when, in ns since 1970; 0 if it has ended",
    "policies[].governed_bytes": declarations.find("pagecache_policy_governed_bytes").help,
    "policies[].inflight_bytes": declarations.find("pagecache_policy_inflight_bytes").help,
    "policies[].kept_bytes": declarations.find("pagecache_policy_kept_bytes").help,
    "policies[].keep_max_bytes": declarations.find("pagecache_policy_keep_max_bytes").help,
    "policies[].lost_requests": "of engine agent: requests that found the ring buffer full",
    "policies[].read_errors.*": "of engine agent: failed reads by errno",
    **{
        f"policies[].counters.{counter.name}": f"{counter.help} ({counter.unit})"
        for counter in COUNTERS
    },
    "policies[].templates[].model": "the model that an I/O template of the policy is for",
    "policies[].templates[].source": "derived, recorded or imported",
    "policies[].templates[].followed_bytes": "bytes that were accessed as it says",
    "policies[].templates[].strayed_bytes": "bytes accessed otherwise, or prefetched in vain",
    "policies[].templates[].jumps": declarations.find("pagecache_template_jumps_total").help,
    "policies[].templates[].dropped": "whether the policy has given it up",
    "models[].model": "the model",
    "models[].policy": "the policy that governs it",
    "models[].engine": "what runs that policy",
    "models[].files": declarations.find("pagecache_model_files").help,
    "models[].bytes": declarations.find("pagecache_model_bytes").help,
    "models[].resident_bytes": declarations.find("pagecache_resident_bytes").help,
    "models[].resident_by_node.*": f"{declarations.find('pagecache_resident_node_bytes').help}; "
    "empty if that is not known",
    "models[].since_ns": "when it was tagged, in ns since 1970: its counters began at 0 then; 0 if "
    "it is not observed",
    "models[].observed": "whether the observer counts it; counters is empty if not",
    "models[].hit_ratio": f"{declarations.find('pagecache_hit_ratio').help}; null without any",
    **{
        f"models[].counters.{counter.name}": f"{counter.help} ({counter.unit})"
        for counter in OBSERVED
    },
    "models[].consumers[].tgid": "a process that has read it",
    "models[].consumers[].comm": "its name",
    "models[].consumers[].alive": "whether it still runs",
    "models[].consumers[].counters.*": "the same counters, of this process",
}
RATES_JSON = {
    "models[].rates": "since the line before; null in the first line and if not observed",
    "models[].rates.accessed": "bytes accessed, a second",
    "models[].rates.added": "bytes that entered the page cache, a second",
    "models[].rates.stalled": "seconds that readers slept for I/O, a second",
    "models[].rates.hit_ratio": "hits of the bytes accessed; null without any",
    "models[].rates.ahead_ratio": "first use of readahead of the bytes accessed; null without any",
}
