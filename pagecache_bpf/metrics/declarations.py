# SPDX-License-Identifier: Apache-2.0
"""The one declaration of every metric: name, kind, HELP text, labels, and how it is read.

The exporter, docs/metrics.md (which tools/generate_docs.py writes), the keys of `stats --json` and
`top` come from here, and what is counted in the kernel comes here from the ABI
(PAGECACHE_COUNTERS, PAGECACHE_OBSERVED).

Names follow the Prometheus rules: base units (bytes, seconds), the unit in the name, _total for
counters.  Labels have few values: models by name, never files; a process is no label either.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from pagecache_bpf.kernel.abi import COUNTERS, OBSERVED, Counter
from pagecache_bpf.metrics import score_metrics
from pagecache_bpf.metrics.collect import ModelStats, PolicyStats, StatsSnapshot, TemplateStats

Sample = tuple[Sequence[str], float]
PREFIX = "pagecache_"
MODEL = ("model", "policy", "engine")
#: A model's residency is told by so many parts: rows of the dashboard's heat map.
PARTS = 32
POLICY = ("policy", "engine")
LABELS = {
    "model": "the model's name, as attach or tag gave it",
    "policy": "the policy that governs it",
    "engine": "struct_ops or agent: what runs the policy",
    "access": "read: read() and its like; mmap: faults in a mapping",
    "result": (
        "hit: cached, used before or prefetched for the model; "
        "ahead: first use of what readahead had brought; miss: absent"
    ),
    "source": (
        "demand: the read or fault that wanted them; readahead: the kernel, beyond that; "
        "requested: readahead(), fadvise() or madvise(); prefetched: a policy"
    ),
    "outcome": (
        "useful: used, and there in time; late: used, its reader had to wait; "
        "wasted: left the cache unused"
    ),
    "cause": (
        "reclaim: memory was short; drop: a policy; fadvise: an application; "
        "truncate: truncated or deleted; other: drop_caches, unmount, direct I/O, unknown"
    ),
    "order": ("followed: accessed as the template says; strayed: otherwise, or prefetched in vain"),
    "node": "number of a NUMA node",
    "part": (
        f"00 to {PARTS - 1}: equal parts of the model, its files one after the other by their names"
    ),
    "kind": (
        "invalid_answer, refused_call, lost_request (the ring buffer was full), "
        "or read_ and the name of an errno"
    ),
    "level": "how much the observer sees on this kernel",
    "reason": "why it was refused, or lost; a few fixed texts",
    "version": "of pagecache-bpf",
    "content": score_metrics.CONTENT,
}


@dataclass(frozen=True)
class Metric:
    """A metric; name is as exported (counters end in _total), kind is counter or gauge.

    read: the samples of a snapshot, label values in the order of labels.
    """

    name: str
    kind: str
    help: str
    labels: tuple[str, ...]
    read: Callable[[StatsSnapshot | None], Iterable[Sample]]


def _of_models(value: Callable[[ModelStats], Iterable[Sample]]) -> Callable[..., Iterator[Sample]]:
    """Make a function that yields samples of each model, with the model's labels in front."""

    def read(snapshot: StatsSnapshot | None) -> Iterator[Sample]:
        for model in snapshot.models if snapshot else ():
            for labels, number in value(model):
                yield (*model.key, *labels), number

    return read


def _of_policies(
    value: Callable[[PolicyStats], Iterable[Sample]], *, ended: bool = False
) -> Callable[..., Iterator[Sample]]:
    """Make a function that yields samples of each attached policy; ended: of ended ones, too."""

    def read(snapshot: StatsSnapshot | None) -> Iterator[Sample]:
        for policy in snapshot.policies if snapshot else ():
            if ended or not policy.ended:
                for labels, number in value(policy):
                    yield (policy.name, policy.engine, *labels), number

    return read


@dataclass(frozen=True)
class _Family:
    """Counters that differ in the value of labels only: one metric."""

    pattern: str
    name: str
    help: str
    labels: tuple[str, ...]


#: Patterns of observed counters; a group of the pattern is the value of the label of its name.
_FAMILIES = (
    _Family(
        r"(?P<access>read|mmap)_(?P<result>hit|ahead|miss)_bytes",
        "accessed_bytes_total",
        "Bytes that readers accessed, and how they found them",
        ("access", "result"),
    ),
    _Family(
        r"(?P<access>read|mmap)_stall_ns",
        "stall_seconds_total",
        "Time that readers slept for I/O on tagged files",
        ("access",),
    ),
    _Family(
        r"(?P<source>demand|readahead|requested|prefetched)_bytes",
        "added_bytes_total",
        "Bytes that entered the page cache, by who brought them",
        ("source",),
    ),
    _Family(
        r"prefetch_(?P<outcome>useful|late|wasted)_bytes",
        "prefetch_outcome_bytes_total",
        "Bytes that a policy prefetched, by what became of them",
        ("outcome",),
    ),
    _Family(
        r"evicted_(?P<cause>reclaim|drop|fadvise|truncate|other)_bytes",
        "evicted_bytes_total",
        "Bytes that left the page cache, by cause",
        ("cause",),
    ),
)
#: Sums of the others: the reader's query can add up.
_SUMS = frozenset({"read_bytes", "mmap_bytes", "added_bytes", "removed_bytes"})


def _observed() -> Iterator[Metric]:
    """Yield a metric for each counter of the observer."""
    rest = [counter for counter in OBSERVED if counter.name not in _SUMS]
    for family in _FAMILIES:
        members = [
            (match, counter)
            for counter in rest
            if (match := re.fullmatch(family.pattern, counter.name))
        ]
        rest = [counter for counter in rest if not re.fullmatch(family.pattern, counter.name)]

        def read(
            model: ModelStats,
            members: list[tuple[re.Match[str], Counter]] = members,
            labels: tuple[str, ...] = family.labels,
        ) -> Iterator[Sample]:
            for match, counter in members:
                if counter.name in model.totals:
                    values = [match[label] for label in labels]
                    yield values, _base(counter, model.totals[counter.name])

        yield Metric(
            f"{PREFIX}{family.name}",
            "counter",
            family.help,
            (*MODEL, *family.labels),
            _of_models(read),
        )
    for counter in rest:

        def one(model: ModelStats, counter: Counter = counter) -> Iterator[Sample]:
            if counter.name in model.totals:
                yield (), _base(counter, model.totals[counter.name])

        text = _sentence(f"bytes {counter.help}" if counter.unit == "bytes" else counter.help)
        yield Metric(f"{PREFIX}{_name(counter)}_total", "counter", text, MODEL, _of_models(one))


def _policy_counters() -> Iterator[Metric]:
    """Yield a metric for each counter that engines keep for a policy."""
    whole = ""
    for counter in COUNTERS:
        part = counter.help.removeprefix("of these: ")
        whole = whole if part != counter.help else counter.help
        text = f"{whole}, of these: {part}" if part != counter.help else counter.help
        if counter.unit == "bytes":
            text += ", in bytes"

        def read(policy: PolicyStats, counter: Counter = counter) -> Iterator[Sample]:
            if counter.name in policy.counters:
                yield (), _base(counter, policy.counters[counter.name])

        yield Metric(
            f"{PREFIX}policy_{_name(counter)}_total",
            "counter",
            _sentence(text),
            POLICY,
            _of_policies(read),
        )


def _name(counter: Counter) -> str:
    """Return a counter's name in Prometheus' base units (seconds, bytes)."""
    return re.sub("_ns$", "_seconds", counter.name)


def _base(counter: Counter, value: int) -> float:
    return value / 1e9 if counter.unit == "ns" else value


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def _errors(policy: PolicyStats) -> Iterator[Sample]:
    yield ("invalid_answer",), policy.counters.get("invalid_answers", 0)
    yield ("refused_call",), policy.counters.get("refused_calls", 0)
    yield ("lost_request",), policy.lost_requests
    for code, number in policy.read_errors.items():
        yield (f"read_{errno.errorcode.get(code, code)}",), number


def _templates(
    value: Callable[[TemplateStats], Iterable[Sample]],
) -> Callable[[StatsSnapshot | None], Iterator[Sample]]:
    """Make a function that yields samples of each I/O template, with the labels of its model."""

    def read(snapshot: StatsSnapshot | None) -> Iterator[Sample]:
        for policy in snapshot.policies if snapshot else ():
            for template in policy.templates:
                for labels, number in value(template):
                    yield (template.model, policy.name, policy.engine, *labels), number

    return read


def _template_metrics() -> Iterator[Metric]:
    yield Metric(
        f"{PREFIX}template_bytes_total",
        "counter",
        "Bytes of models with an I/O template, by whether they were accessed as it says",
        (*MODEL, "order"),
        _templates(
            lambda template: [
                (("followed",), template.followed_bytes),
                (("strayed",), template.strayed_bytes),
            ]
        ),
    )
    yield Metric(
        f"{PREFIX}template_jumps_total",
        "counter",
        "Times that a reader went on elsewhere in its I/O template",
        MODEL,
        _templates(lambda template: [((), template.jumps)]),
    )
    yield Metric(
        f"{PREFIX}template_up",
        "gauge",
        "1: the I/O template is followed; 0: the policy has given it up, as it was wrong too often",
        MODEL,
        _templates(lambda template: [((), int(not template.dropped))]),
    )


def _build(_: StatsSnapshot | None) -> Iterator[Sample]:
    import pagecache_bpf

    yield (str(pagecache_bpf.__version__),), 1


def _engines(snapshot: StatsSnapshot | None) -> Iterator[Sample]:
    for engine, there in (snapshot.engines if snapshot else {}).items():
        yield (engine,), int(there)


def _observer(snapshot: StatsSnapshot | None) -> Iterator[Sample]:
    if snapshot and snapshot.observer:
        yield (snapshot.observer.level,), 1


def _lost(snapshot: StatsSnapshot | None) -> Iterator[Sample]:
    if snapshot and snapshot.observer:
        yield (), snapshot.observer.lost_events


def _gauges() -> Iterator[Metric]:
    def gauge(name: str, text: str, labels: tuple[str, ...], read: Callable[..., object]) -> Metric:
        return Metric(f"{PREFIX}{name}", "gauge", text, labels, read)  # type: ignore[arg-type]

    yield gauge("build_info", "1; the version of the exporter", ("version",), _build)
    yield gauge(
        "up",
        "1: the engines could be asked at this scrape; 0: not",
        (),
        lambda s: [((), int(s is not None))],
    )
    yield gauge(
        "engine_up", "1: the module is loaded, the agent runs; 0: not", ("engine",), _engines
    )
    yield gauge("observer_info", "1; how much the observer sees", ("level",), _observer)
    yield gauge(
        "policy_up",
        "1: the policy is attached; 0: it has ended by itself",
        POLICY,
        _of_policies(lambda policy: [((), int(not policy.ended))], ended=True),
    )
    yield gauge(
        "policy_attached_timestamp_seconds",
        "When the policy was attached, in seconds since 1970",
        POLICY,
        _of_policies(lambda policy: [((), policy.attached_ns / 1e9)]),
    )
    yield gauge(
        "policy_governed_bytes",
        "Bytes of all files of the policy in the page cache",
        POLICY,
        _of_policies(lambda policy: [((), policy.governed_bytes)]),
    )
    yield gauge(
        "policy_inflight_bytes",
        "Bytes queued for asynchronous prefetch",
        POLICY,
        _of_policies(lambda policy: [((), policy.inflight_bytes)]),
    )
    yield gauge(
        "policy_kept_bytes",
        "Bytes that the policy's evict hook keeps from reclaim",
        POLICY,
        _of_policies(lambda policy: [((), policy.kept_bytes)]),
    )
    yield gauge(
        "policy_keep_max_bytes",
        "Bytes that it may keep",
        POLICY,
        _of_policies(lambda policy: [((), policy.keep_max_bytes)]),
    )
    yield gauge(
        "model_files", "Files of the model", MODEL, _of_models(lambda model: [((), model.files)])
    )
    yield gauge(
        "model_bytes", "Size of the model", MODEL, _of_models(lambda model: [((), model.bytes)])
    )
    yield gauge(
        "resident_bytes",
        "Bytes of the model in the page cache",
        MODEL,
        _of_models(lambda model: [((), model.resident_bytes)]),
    )
    yield gauge(
        "resident_node_bytes",
        "Bytes of the model in the page cache, by NUMA node",
        (*MODEL, "node"),
        _of_models(
            lambda model: [((node,), size) for node, size in model.resident_by_node.items()]
        ),
    )
    yield gauge(
        "resident_part_bytes",
        "Bytes of the model in the page cache, by part of it",
        (*MODEL, "part"),
        _of_models(
            lambda model: [
                ((f"{part:02}",), size) for part, size in enumerate(model.resident_parts)
            ]
        ),
    )
    yield gauge(
        "consumers",
        "Processes that have read the model",
        MODEL,
        _of_models(lambda model: [((), len(model.consumers))] if model.observed else []),
    )
    yield gauge(
        "hit_ratio",
        "Of the bytes accessed since the model was tagged, the part that was there: 0 to 1",
        MODEL,
        _of_models(lambda model: [((), model.hit_ratio)] if model.hit_ratio is not None else []),
    )


def _of_controller(name: str) -> Callable[[StatsSnapshot | None], Iterator[Sample]]:
    """Make a function that yields a number of the controller's, or one for each reason."""

    def read(snapshot: StatsSnapshot | None) -> Iterator[Sample]:
        found = (snapshot.controller or {}).get(name) if snapshot else None
        if isinstance(found, dict):
            yield from (((reason,), count) for reason, count in found.items())
        elif found is not None:
            yield (), found

    return read


def _controller_metrics() -> Iterator[Metric]:
    def metric(name: str, kind: str, text: str, key: str, *labels: str) -> Metric:
        return Metric(f"{PREFIX}controller_{name}", kind, text, labels, _of_controller(key))

    yield metric("connections", "gauge", "Connections to the controller now", "connections")
    yield metric("accepted_connections_total", "counter", "Connections taken so far", "accepted")
    yield metric(
        "refusals_total",
        "counter",
        "What the controller refused before a request was read, by reason",
        "refused",
        "reason",
    )
    yield metric("requests_waiting", "gauge", "Requests that wait for a thread", "requests_waiting")
    yield metric("requests_running", "gauge", "Requests that are worked on", "requests_running")
    yield metric(
        "thread_failures_total",
        "counter",
        "Threads that could not be started",
        "threads_not_started",
    )
    yield metric("loads_waiting", "gauge", "Loads that wait for room in a budget", "loads_waiting")
    yield metric(
        "prefetch_queued_bytes",
        "gauge",
        "Bytes that clients have asked to prefetch and are not read yet",
        "prefetch_bytes",
    )
    yield metric("inspectors", "gauge", "Processes that read headers of clients now", "inspectors")
    yield metric(
        "inspectors_filtered",
        "gauge",
        "1 if most system calls are kept from these processes (seccomp)",
        "inspectors_filtered",
    )
    yield metric(
        "inspectors_started_total",
        "counter",
        "Processes that read headers of clients, so far",
        "inspectors_started",
    )
    yield metric(
        "inspectors_lost_total",
        "counter",
        "Of these, ended in the middle of a job, by reason",
        "inspectors_lost",
        "reason",
    )


METRICS: tuple[Metric, ...] = (
    *_gauges(),
    *_observed(),
    *_policy_counters(),
    *_template_metrics(),
    *_controller_metrics(),
    *(
        Metric(f"{PREFIX}{name}", "gauge", text, labels, read)
        for name, text, labels, read in score_metrics.GAUGES
    ),
    Metric(
        f"{PREFIX}errors_total",
        "counter",
        "What went wrong, by kind; readers got the kernel's own behavior instead",
        (*POLICY, "kind"),
        _of_policies(_errors),
    ),
    Metric(
        f"{PREFIX}observer_lost_events_total",
        "counter",
        "Events that the observer could not note, so that its numbers are too small",
        (),
        _lost,
    ),
)


def find(name: str) -> Metric:
    """Return a metric by its name.

    Args:
        name: with prefix and unit, as Prometheus has it.

    Returns:
        The metric.

    Raises:
        KeyError: there is none.
    """
    return _BY_NAME[name]


_BY_NAME = {metric.name: metric for metric in METRICS}
