# SPDX-License-Identifier: Apache-2.0
"""One look at what both engines count: per policy, and per model what its readers found.

Root only.  Everything that shows numbers (stats, watch, top, export) starts from a StatsSnapshot.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from pagecache_bpf.errors import UsageError
from pagecache_bpf.kernel.file_pages import PAGE_SIZE

if TYPE_CHECKING:
    from pagecache_bpf.kernel.control_device import PolicyStatus
    from pagecache_bpf.placement.load_score import NodeScores
    from pagecache_bpf.policy.engines import Engines


@dataclass(frozen=True)
class ObserverState:
    """How much the observer sees: its level, the tracepoints it lacks, events it lost.

    level: full, degraded (only what enters and leaves the cache) or off.  uncounted: counters
    that it therefore leaves out.
    """

    level: str
    missing: tuple[str, ...] = ()
    lost_events: int = 0
    uncounted: tuple[str, ...] = ()


class Counted:
    """Something that the observer counts for; counters is empty where it does not."""

    counters: Mapping[str, int]

    def total(self, *parts: str) -> int:
        """Add up observed counters of read() and of mmap.

        Args:
            parts: the ends of their names: those named read_PART and mmap_PART are added.

        Returns:
            The sum, in the unit of the counters; what is not counted counts as 0.
        """
        return sum(
            self.counters.get(f"{how}_{part}", 0) for how in ("read", "mmap") for part in parts
        )

    @property
    def accessed_bytes(self) -> int:
        """Bytes that its readers accessed."""
        return self.total("hit_bytes", "ahead_bytes", "miss_bytes")

    @property
    def hit_ratio(self) -> float | None:
        """Of the bytes accessed, the part that was there: hits / accessed.  None without any.

        First use of what the kernel's readahead had brought is no hit: see ahead_ratio.
        """
        return self.total("hit_bytes") / self.accessed_bytes if self.accessed_bytes else None

    @property
    def ahead_ratio(self) -> float | None:
        """Of the bytes accessed, the part that the kernel's readahead had just brought."""
        return self.total("ahead_bytes") / self.accessed_bytes if self.accessed_bytes else None

    @property
    def stall_seconds(self) -> float:
        """How long its readers slept for I/O."""
        return self.total("stall_ns") / 1e9


@dataclass(frozen=True)
class ConsumerStats(Counted):
    """A process that reads a model; counters as the model has them."""

    tgid: int
    comm: str
    alive: bool
    counters: Mapping[str, int]


@dataclass(frozen=True)
class TemplateStats:
    """How an I/O template does: bytes that came as it says, and those that did not.

    dropped: whether the policy has given it up.
    """

    model: str
    source: str
    followed_bytes: int
    strayed_bytes: int
    jumps: int
    dropped: bool


@dataclass(frozen=True)
class PolicyStats:
    """A policy; attached_ns is wall-clock time, 0 for one that has ended by itself.

    lost_requests, read_errors (by errno): of engine agent only.  kept_bytes, keep_max_bytes: what
    its evict hook keeps from reclaim, and the bound of that.
    """

    name: str
    engine: str
    attached_ns: int
    governed_bytes: int
    inflight_bytes: int
    counters: Mapping[str, int] = field(default_factory=dict)
    lost_requests: int = 0
    read_errors: Mapping[int, int] = field(default_factory=dict)
    templates: tuple[TemplateStats, ...] = ()
    kept_bytes: int = 0
    keep_max_bytes: int = 0

    @property
    def ended(self) -> bool:
        """Whether it has ended by itself and is not cleared away."""
        return not self.attached_ns


@dataclass(frozen=True)
class ModelStats(Counted):
    """A model under one policy; bytes is its size.

    observed: whether the observer counts it; without, counters is empty.  resident_by_node: by
    the number of the NUMA node; empty where that is not known.  since_ns: when it was tagged, in
    ns since 1970, 0 if that is not known.  counters: since then.  totals: since the observer
    began, so that they only grow; for Prometheus.  resident_parts: bytes of each of some equal
    parts of the model in the page cache, its files one after the other; for Prometheus, and empty
    where nobody asked.
    """

    model: str
    policy: str
    engine: str
    files: int
    bytes: int
    resident_bytes: int
    resident_by_node: Mapping[str, int] = field(default_factory=dict)
    observed: bool = False
    counters: Mapping[str, int] = field(default_factory=dict)
    consumers: tuple[ConsumerStats, ...] = ()
    since_ns: int = 0
    totals: Mapping[str, int] = field(default_factory=dict)
    resident_parts: tuple[int, ...] = ()

    @property
    def key(self) -> tuple[str, str, str]:
        """What tells its rows apart: model, policy, engine."""
        return self.model, self.policy, self.engine


@dataclass(frozen=True)
class StatsSnapshot:
    """Statistics of all policies and models at one time.

    Attributes:
        time_ns: when they were read, in nanoseconds since 1970.
        engines: by the name of each engine, whether it runs or is loaded.
        observer: what observes the readers; None: nothing does.
        policies: the attached policies.
        models: the tagged models.
        controller: how much the controller has to do and what it has refused, as `clients list`
            tells it; None: none runs.
        scores: how fast this node would load its models; None: nobody asked for them.
    """

    time_ns: int
    engines: Mapping[str, bool]
    observer: ObserverState | None
    policies: tuple[PolicyStats, ...]
    models: tuple[ModelStats, ...]
    controller: Mapping[str, Any] | None = None
    scores: NodeScores | None = None


@dataclass(frozen=True)
class Rates:
    """What happened to a model between two snapshots; ratios are None without any access.

    accessed, added: bytes a second accessed and added to the cache.  stalled: seconds that
    readers slept for I/O, a second (2.0: two of them, all the time).
    """

    accessed: float
    added: float
    stalled: float
    hit_ratio: float | None
    ahead_ratio: float | None


def take(parts: int = 0) -> StatsSnapshot:
    """Ask both engines what they count now.

    Args:
        parts: into how many parts models are cut for ModelStats.resident_parts; 0: it stays empty.

    Returns:
        The snapshot.

    Raises:
        PrivilegeError: the caller is not root.
        UnsupportedError: the module and the agent are of other versions.
        PagecacheError: an engine refuses.
    """
    from pagecache_bpf.metrics import strips
    from pagecache_bpf.policy.engines import AGENT, STRUCT_OPS, Engines

    with Engines() as engines:
        details = engines.agent.details() if engines.agent else {}
        observed = engines.agent.stats() if engines.agent else {}
        attached = [
            _policy(engines, engine, policy, details) for engine, policy in engines.policies()
        ]
        ended = [
            PolicyStats(name, AGENT, 0, 0, 0)
            for name, detail in details.items()
            if "ended" in detail
        ]
        observer = _observer(observed)
        uncounted = frozenset(observer.uncounted if observer else ())
        # A model without files is one that was untagged.
        rows = [row for row in observed.get("models", ()) if row["files"]]
        models = [_observed(row, uncounted) for row in rows]
        known = {model.key for model in models}
        others = [model for model in _tagged(engines) if model.key not in known]
        cut = strips.of_models(engines, parts) if parts else {}
        return StatsSnapshot(
            time.time_ns(),
            {STRUCT_OPS: engines.module is not None, AGENT: engines.agent is not None},
            observer,
            (*attached, *ended),
            tuple(
                replace(model, resident_parts=cut.get(model.key, ()))
                for model in (*models, *others)
            ),
            engines.agent.request("clients")["health"] if engines.agent else None,
        )


def only(snapshot: StatsSnapshot, model: str) -> StatsSnapshot:
    """Narrow a snapshot to one model and the policies that govern it.

    Args:
        snapshot: what take() returned.
        model: the model's name.

    Returns:
        The snapshot without the others.

    Raises:
        UsageError: the model is not tagged.
    """
    models = tuple(stats for stats in snapshot.models if stats.model == model)
    if not models:
        known = ", ".join(sorted({stats.model for stats in snapshot.models}))
        raise UsageError(
            f"no file of a model {model} is tagged",
            f"there are: {known}" if known else "nothing is tagged",
            "`pagecache-bpf tags` lists the tagged files",
        )
    governing = {(stats.policy, stats.engine) for stats in models}
    policies = tuple(
        policy for policy in snapshot.policies if (policy.name, policy.engine) in governing
    )
    return replace(snapshot, models=models, policies=policies)


def rates(before: StatsSnapshot, after: StatsSnapshot) -> dict[tuple[str, str, str], Rates]:
    """Compare two snapshots.

    Args:
        before: the older one.
        after: the newer one.

    Returns:
        What happened in between, by ModelStats.key; counters that began anew count from 0.
    """
    seconds = max((after.time_ns - before.time_ns) / 1e9, 1e-6)
    old = {model.key: model for model in before.models}
    return {model.key: _rates(old.get(model.key), model, seconds) for model in after.models}


def _rates(before: ModelStats | None, after: ModelStats, seconds: float) -> Rates:
    earlier: Mapping[str, int] = before.counters if before else {}
    if any(after.counters.get(name, 0) < value for name, value in earlier.items()):
        earlier = {}
    new = {name: value - earlier.get(name, 0) for name, value in after.counters.items()}
    change = ModelStats(*after.key, 0, 0, 0, counters=new)
    return Rates(
        change.accessed_bytes / seconds,
        new.get("added_bytes", 0) / seconds,
        change.stall_seconds / seconds,
        change.hit_ratio,
        change.ahead_ratio,
    )


def as_json(snapshot: StatsSnapshot) -> dict[str, Any]:
    """Return a snapshot as `stats --json` prints it.

    Args:
        snapshot: what take() returned.

    Returns:
        Keys and values for JSON.
    """
    return {
        "time_ns": snapshot.time_ns,
        "engines": dict(snapshot.engines),
        "observer": asdict(snapshot.observer) if snapshot.observer else None,
        "policies": [
            {**asdict(policy), "state": "ended" if policy.ended else "attached"}
            for policy in snapshot.policies
        ],
        "models": [_model_as_json(model) for model in snapshot.models],
    }


def _model_as_json(model: ModelStats) -> dict[str, Any]:
    data = {**asdict(model), "hit_ratio": model.hit_ratio}
    for name in ("totals", "resident_parts"):  # of use to Prometheus only
        del data[name]
    return data


def replays(engines: Engines, engine: str, policy: str) -> list[dict[str, Any]]:
    """Describe how well the templates of an attached policy predict what is read.

    Args:
        engines: the engines that policies run on.
        engine: the engine of this one, "agent" or "struct_ops".
        policy: the name of the policy.

    Returns:
        TemplateReplay.as_json() of each template; none for a policy that takes none.
    """
    from pagecache_bpf.policy import loader

    if engine == "agent":
        assert engines.agent is not None
        if "template_steps" not in engines.agent.map_ids(policy):
            return []
    elif not (loader.PIN_ROOT / policy / "maps" / "template_steps").exists():
        return []
    # Only now, as it needs numpy, whose import takes longer than all else that `status` does.
    from pagecache_bpf.templates.policy_arrays import state

    return [replay.as_json() for replay in state(engines, policy)]


def _policy(
    engines: Engines,
    engine: str,
    status: PolicyStatus,
    details: Mapping[str, Mapping[str, Any]],
) -> PolicyStats:
    more = details.get(status.name, {}) if engine == "agent" else {}
    return PolicyStats(
        status.name,
        engine,
        status.attached_ns,
        status.governed_pages * PAGE_SIZE,
        status.inflight_pages * PAGE_SIZE,
        status.counters,
        more.get("lost", 0),
        {int(code): number for code, number in more.get("errors", {}).items()},
        tuple(_template(replay) for replay in replays(engines, engine, status.name)),
        status.kept_pages * PAGE_SIZE,
        status.keep_max_pages * PAGE_SIZE,
    )


def _template(row: Mapping[str, Any]) -> TemplateStats:
    return TemplateStats(**{member.name: row[member.name] for member in fields(TemplateStats)})


def _observer(answer: Mapping[str, Any]) -> ObserverState | None:
    if not answer:
        return None
    return ObserverState(
        str(answer["level"]),
        tuple(answer["missing"]),
        answer["lost_events"],
        tuple(answer["uncounted"]),
    )


def _observed(row: Mapping[str, Any], uncounted: Collection[str]) -> ModelStats:
    """Make a model's statistics from the observer's, without the zeros of what it cannot count."""

    def since(row: Mapping[str, Any]) -> dict[str, int]:
        before = row["counters_before"]
        return {
            name: max(0, value - before[name])
            for name, value in row["counters"].items()
            if name not in uncounted
        }

    nodes = row["resident_by_node"]
    consumers = tuple(
        ConsumerStats(consumer["tgid"], consumer["comm"], consumer["alive"], counters)
        for consumer in row["consumers"]
        # One that has read nothing since is of an earlier time.
        if any((counters := since(consumer)).values())
    )
    return ModelStats(
        row["model"],
        row["policy"] or "",
        row["engine"] or "",
        row["files"],
        row["bytes"],
        row["resident_bytes"],
        nodes if isinstance(nodes, dict) else {},
        True,
        since(row),
        consumers,
        row["since_ns"],
        {name: value for name, value in row["counters"].items() if name not in uncounted},
    )


def _tagged(engines: Engines) -> Iterable[ModelStats]:
    """Make the statistics of models that no observer watches: their tags, no accesses."""
    if not engines.module:
        return []
    from pagecache_bpf.kernel.control_device import size_on_disk
    from pagecache_bpf.policy.engines import STRUCT_OPS

    found: dict[tuple[str, str], list[int]] = {}
    for tag in engines.module.tags():
        if tag.active:
            row = found.setdefault((tag.model, tag.policy), [0, 0, 0])
            for index, value in enumerate((1, size_on_disk(tag) or 0, tag.resident_pages)):
                row[index] += value
    return [
        ModelStats(model, policy, STRUCT_OPS, files, size, pages * PAGE_SIZE)
        for (model, policy), (files, size, pages) in found.items()
    ]
