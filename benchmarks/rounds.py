# SPDX-License-Identifier: Apache-2.0
"""Interleaved cold rounds: default, policy attached, detached again, and the device's limit.

Devices and guests drift, so only neighbors in time are compared: each round runs every
state and every loader once, cold each time, and the direct-I/O limit beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from benchmarks import loaders, schema
from benchmarks.cachestat import Sample, Sampler, drop
from benchmarks.directio import SWEEP, Plan
from benchmarks.disks import device_bytes_read, difference
from pagecache_bpf.errors import PagecacheError
from pagecache_bpf.weights.models import Model

ENGINE = "struct_ops"
STATES = ("default", "attached", "detached")
_PICTURE_LOADER = "safe_open"


class Control(Protocol):
    """Attaches a policy to a checkpoint and takes it away again."""

    def attach(self, policy: str, root: Path) -> None:
        """Attach the policy and tag what is in `root`."""

    def detach(self, policy: str, root: Path) -> None:
        """Untag and detach; nothing of the policy stays."""


@contextmanager
def attached(control: Control, policy: str, root: Path) -> Iterator[None]:
    """Attached inside the block, gone after it whatever happens (also on Ctrl-C)."""
    control.attach(policy, root)
    try:
        yield
    finally:
        control.detach(policy, root)


@dataclass
class Case:
    """A checkpoint on a device, and what makes this case differ from others.

    labels (fs aside) go into every row: delay_ms, cap_bytes_per_s, ...  huge_pages: for direct
    I/O, reserved ones.
    """

    checkpoint: Model
    fs: str
    reference: loaders.Reference
    labels: dict[str, Any] = field(default_factory=dict)
    engine: str = ENGINE
    huge_pages: bool = False

    @property
    def files(self) -> tuple[Path, ...]:
        """The files to load."""
        return self.checkpoint.files


def new_case(checkpoint: Model, fs: str, source: Model, **labels: Any) -> Case:
    """Return a case whose contents on the device were compared with their source.

    Raises PagecacheError when the copy on the device is not the source's bytes.
    """
    reference = loaders.Reference(checkpoint.files)
    for origin, content in zip(source.files, reference.contents, strict=True):
        position = 0
        with origin.open("rb") as file:
            while piece := file.read(4 << 20):
                if content[position : position + len(piece)] != piece:
                    raise PagecacheError(f"the copy of {origin} on the device is damaged")
                position += len(piece)
        if position != len(content):
            raise PagecacheError(f"the copy of {origin} on the device has another size")
    return Case(checkpoint, fs, reference, labels)


def cold(case: Case, run: Callable[[], loaders.Outcome]) -> tuple[loaders.Outcome, int | None]:
    """Drop the case's pages, prove it, run, and count what the device had to read."""
    drop(case.files)
    return _as_it_is(case, run)


def _as_it_is(case: Case, run: Callable[[], loaders.Outcome]) -> tuple[loaders.Outcome, int | None]:
    """Run with what is in the page cache, and count what the device had to read."""
    before = device_bytes_read(case.files[0])
    outcome = run()
    after = device_bytes_read(case.files[0])
    if outcome.device_bytes is not None:
        return outcome, outcome.device_bytes
    return outcome, difference(before, after)


def _row(case: Case, loader: str, state: str, policy: str | None) -> schema.Row:
    on = state == "attached"
    return schema.Row(
        case=case.checkpoint.name,
        loader=loader,
        fs=case.fs,
        wanted_bytes=case.reference.size,
        policy=policy if on else None,
        engine=case.engine if on else None,
        extra={"state": state, **case.labels},
    )


def record(row: schema.Row, outcome: loaders.Outcome, device: int | None) -> None:
    """Add one round to a row; a row is correct when all its rounds were."""
    row.seconds.append(outcome.seconds)
    row.correct = row.correct and outcome.correct
    if device is not None:
        row.device_bytes_rounds.append(device)


def best_plan(
    case: Case,
    plans: Iterable[Plan] = SWEEP,
    say: Callable[[str], None] = lambda _: None,
) -> Plan:
    """Find the direct-I/O plan that reads the case fastest here, by one try of each."""
    tried: list[tuple[float, Plan]] = []
    for plan in plans:
        seconds = cold(case, partial(_direct, case, plan))[0].seconds
        tried.append((seconds, plan))
        say(f"direct I/O {plan}: {case.reference.size / seconds / 1e6:.1f} MB/s")
    return min(tried, key=lambda pair: pair[0])[1]


def _direct(case: Case, plan: Plan) -> loaders.Outcome:
    return loaders.run_direct(case.files, case.reference, plan, case.huge_pages)


def interleave(
    case: Case,
    policy: str,
    control: Control,
    loader_names: Sequence[str],
    rounds: int,
    plan: Plan,
    detached_rounds: int | None = None,
    say: Callable[[str], None] = lambda _: None,
    others: Mapping[str, Callable[[], loaders.Outcome]] | None = None,
) -> list[schema.Row]:
    """Run the rounds and return one row per state and loader, and one for direct I/O.

    others: more to measure in each round, by the name of its row's loader.

    "Detached again" is measured in the last `detached_rounds` rounds (None: in all): from the
    second round on the default is measured after a detach as well.

    Then each loader loads once more, after the policy's load or its own, and after a plain read:
    what this CPU can do when nothing is read.
    """
    rows = {
        (state, name): _row(case, name, state, policy) for state in STATES for name in loader_names
    }
    more = {name: _row(case, name, "peer", None) for name in others or {}}
    limit = _row(case, "direct", "limit", None)
    limit.extra["plan"] = str(plan)

    def one(row: schema.Row, state: str, number: int, run: Callable[[], loaders.Outcome]) -> None:
        record(row, *cold(case, run))
        speed = case.reference.size / row.seconds[-1] / 1e6
        what = f"round {number}/{rounds} {state:9} {row.loader:9}"
        say(f"{what} {row.seconds[-1]:7.2f} s {speed:7.1f} MB/s")

    def load(state: str, number: int) -> None:
        for name in loader_names:
            run = partial(loaders.run_loader, name, case.files, case.reference)
            one(rows[state, name], state, number, run)

    for number in range(1, rounds + 1):
        load("default", number)
        with attached(control, policy, case.checkpoint.root):
            load("attached", number)
        if detached_rounds is None or number > rounds - detached_rounds:
            load("detached", number)
        for name, run in (others or {}).items():
            one(more[name], "peer", number, run)
        one(limit, "limit", number, partial(_direct, case, plan))

    result = [*rows.values(), *more.values(), limit]
    schema.fill_limits(result, same=lambda _: None)
    for row in result:
        # "safe_open after cat" is compared with safe_open, another loader with the first.
        name = row.loader.split()[0]
        first = rows["default", loader_names[0]] if row.extra["state"] == "peer" else None
        _compare(row, rows.get(("default", name), first))
    with attached(control, policy, case.checkpoint.root):
        for name in loader_names:
            run = partial(loaders.run_loader, name, case.files, case.reference)
            result.append(_again(case, name, run, policy))
    for name, run in (others or {}).items():
        if name.split()[0] not in loader_names:
            result.append(_again(case, name, run))
    return [*result, *(_warm(case, name) for name in loader_names)]


def _compare(row: schema.Row, default: schema.Row | None) -> None:
    """Add the two ratios people want: times faster than the default, share of the limit."""
    if row.median_s and row.limit_s:
        row.extra["of_limit"] = row.limit_s / row.median_s
    if row.median_s and default is not None and default.median_s:
        row.extra["speedup"] = default.median_s / row.median_s
        # Loads of one round share the device's mood: the spread of their ratios is the honest
        # one.  Whoever was measured in fewer rounds was measured in the last ones.
        same_rounds = default.seconds[-len(row.seconds) :]
        pairs = [was / now for was, now in zip(same_rounds, row.seconds, strict=True)]
        row.extra["speedup_min"], row.extra["speedup_max"] = min(pairs), max(pairs)


def _again(
    case: Case, name: str, run: Callable[[], loaders.Outcome], policy: str | None = None
) -> schema.Row:
    """Return the second of two loads."""
    row = _row(case, name, "again", None)
    row.policy = policy
    cold(case, run)
    record(row, *_as_it_is(case, run))
    return row


def _warm(case: Case, name: str) -> schema.Row:
    row = _row(case, name, "warm", None)
    loaders.run_loader("read", case.files, case.reference)  # fills the cache
    run = partial(loaders.run_loader, name, case.files, case.reference)
    record(row, *_as_it_is(case, run))
    return row


def picture(
    case: Case,
    policy: str | None,
    control: Control,
    loader: str,
    interval_s: float = 0.05,
) -> tuple[list[Sample], loaders.Outcome]:
    """Make one extra cold load with residency sampled, kept out of the timed rounds.

    Times of the samples are relative to the start of the load.
    """

    def run() -> tuple[list[Sample], loaders.Outcome]:
        drop(case.files)
        with Sampler(case.files, interval_s) as sampler:
            outcome = loaders.run_loader(loader, case.files, case.reference)
        return [Sample(s.at_s - outcome.begun_s, s.resident) for s in sampler.samples], outcome

    if policy is None:
        return run()
    with attached(control, policy, case.checkpoint.root):
        return run()


def add_pictures(rows: list[schema.Row], policy: str, case: Case, control: Control) -> None:
    """Put residency over time into the rows that the picture compares."""
    for row in rows:
        if row.loader == _PICTURE_LOADER and row.extra["state"] in (
            "default",
            "attached",
        ):
            samples, outcome = picture(case, row.policy, control, row.loader)
            row.correct = row.correct and outcome.correct
            row.extra["residency"] = [[round(s.at_s, 4), s.resident] for s in samples]
            row.extra["residency_end_s"] = outcome.seconds
