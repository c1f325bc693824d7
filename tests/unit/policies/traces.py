# SPDX-License-Identifier: Apache-2.0
"""What the tests of single policies share: traces, and replaying them beside the alternatives."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from pagecache_bpf.policy.catalog import find
from pagecache_bpf.simulate import simulator as simulation
from pagecache_bpf.simulate.trace import Trace

MIB = 1 << 20


@cache
def simulator(policy: str) -> simulation.Simulator:
    """The policy, compiled once a session."""
    return simulation.Simulator(find(policy))


@dataclass
class Compared:
    """The same trace by the policy, the kernel's order, LRU and the optimum."""

    policy: simulation.Result
    default: simulation.Result
    lru: simulation.Result
    optimum: simulation.Result


def compare(policy: str, trace: Trace, memory: int, **knobs: int) -> Compared:
    """Replay a trace in all four ways."""
    it = simulator(policy)
    trace.settle()
    found = Compared(
        it.replay(trace, memory, knobs=knobs),
        it.replay(trace, memory, policy=False),
        it.replay(trace, memory, policy=False, order=simulation.LRU),
        simulation.best(trace, memory),
    )
    assert found.policy.ended is None
    assert found.policy.totals["peak_bytes"] <= memory
    return found


class Script(Trace):
    """A trace that is written by a test; its clock moves on by a millisecond a read."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 1.0

    def has(self, name: str, mib: int, model: str = "", governed: bool = True) -> str:
        """Describe a file."""
        file = self.files[self.file(name)]
        file.size, file.governed = mib * MIB, governed
        file.model = model or file.model
        self.settle()
        return name

    def scan(
        self,
        name: str,
        start: int = 0,
        stop: int | None = None,
        by: str = "c",
        cgroup: str = "",
        piece: int = 128 << 10,
    ) -> None:
        """Read a file in pieces of that many bytes; start and stop in bytes."""
        size = self.files[self.file(name)].size
        for offset in range(start, size if stop is None else stop, piece):
            self.add(self.seconds, by, name, offset, min(piece, size - offset), cgroup)
            self.seconds += 0.001

    def wait(self, seconds: float) -> None:
        """Nothing happens for a while."""
        self.seconds += seconds

    def tell(self, name: str, key: dict[str, Any], **value: Any) -> None:
        """Write to a map of the policy."""
        self.hint(self.seconds, name, key, value)
