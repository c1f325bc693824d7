# SPDX-License-Identifier: Apache-2.0
"""What the caller of load() asks for, and what every load that is being served can do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from pagecache_bpf.loads.report import Report
from pagecache_bpf.topology import Placement
from pagecache_bpf.weights.models import Model


@dataclass(frozen=True)
class LoadRequest:
    """What the caller of load() wants; everything in it has been checked.

    budget: bytes of it that may be in the page cache at a time.  template: path of a template,
    or None.  wait: seconds to queue for the budget.
    """

    model: Model
    policy: str | None = None
    budget: int | None = None
    devices: tuple[Placement, ...] = ()
    node: int | None = None
    template: str | None = None
    keep: bool = False
    wait: float = 0.0

    def blank(self, engine: str, via: str, why: str = "") -> Report:
        """A report without numbers."""
        return Report(
            model=self.model.name,
            path=str(self.model.root),
            files=len(self.model.files),
            bytes=self.model.size,
            engine=engine,
            via=via,
            why=why,
            policy=self.policy,
            devices=tuple(each.as_json() for each in self.devices),
            node=self.node,
            budget_bytes=self.budget,
        )


class ServedLoad(Protocol):
    """A load that is being served."""

    def report(self) -> Report:
        """How it goes.  Raises PagecacheError, OSError."""

    def finish(self, keep: bool) -> Report:
        """End it; its last report.  Raises PagecacheError, OSError."""

    def forget(self) -> None:
        """Let go of it in a child process, where it is not ours; nothing may be waited for."""


def numbers(source: dict[str, Any], *names: str) -> int:
    """The sum of some counters."""
    return sum(int(source.get(name, 0)) for name in names)
