# SPDX-License-Identifier: Apache-2.0
"""The ways a load can be served, the best first; which one is taken is told with the reason."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from pagecache_bpf.errors import PagecacheError, UsageError
from pagecache_bpf.loads.report import NONE, Report
from pagecache_bpf.models import Model
from pagecache_bpf.topology import Placement

#: Narrows what load() tries; see begin().
VARIABLE = "PAGECACHE_BPF_API"


@dataclass(frozen=True)
class Wish:
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


class Way(Protocol):
    """A load that is being served."""

    def report(self) -> Report:
        """How it goes.  Raises PagecacheError, OSError."""

    def finish(self, keep: bool) -> Report:
        """End it; its last report.  Raises PagecacheError, OSError."""

    def forget(self) -> None:
        """Let go of it in a child process, where it is not ours; nothing may be waited for."""


class Nothing:
    """No way at all: the kernel reads as ever."""

    def __init__(self, report: Report) -> None:
        self._report = report

    def report(self) -> Report:
        """Says why."""
        return self._report

    def finish(self, keep: bool) -> Report:
        """Nothing is to be undone."""
        return replace(self._report, done=True)

    def forget(self) -> None:
        """Nothing to let go of."""


def begin(wish: Wish) -> Way:
    """Serve a load in the best way there is.  Never raises because this machine cannot.

    PAGECACHE_BPF_API in the environment narrows it: "alone" to what this process can do by
    itself, "off" to nothing.
    """
    reasons: list[str] = []
    ways = [_remote, _direct, _alone]
    asked = os.environ.get(VARIABLE, "")
    if asked in ("alone", "off"):
        reasons.append(f"{VARIABLE} is {asked}")
        del ways[: 2 if asked == "alone" else 3]
    for try_it in ways:
        try:
            return try_it(wish, tuple(reasons))
        except (PagecacheError, OSError) as error:
            reasons.append(_reason(error))
        except Exception as error:  # a bug of ours must not end a server
            reasons.append(f"unexpected {type(error).__name__}: {error}")
    return Nothing(wish.blank(NONE, "none", "; ".join(reasons)))


def _remote(wish: Wish, reasons: Sequence[str]) -> Way:
    from pagecache_bpf.loads.remote import Remote

    return Remote(wish)


def _direct(wish: Wish, reasons: Sequence[str]) -> Way:
    if os.geteuid() != 0:
        raise PagecacheError("attaching a policy takes root")
    from pagecache_bpf.loads.direct import Direct

    return Direct(wish)


def _alone(wish: Wish, reasons: Sequence[str]) -> Way:
    from pagecache_bpf.loads.window import Window

    return Window(wish, "; ".join(reasons))


def _reason(error: BaseException) -> str:
    if isinstance(error, PagecacheError):
        return f"{error.what}: {error.why}" if error.why else error.what
    return str(error)


def check_policy(name: str) -> None:
    """Raise UsageError for a policy that does not come with this package and is not attached
    by a controller.
    """
    from pagecache_bpf.policies import names

    known = names()
    if name in known or not known:
        return
    served: list[str] = []
    try:
        from pagecache_bpf.controller.protocol import Client

        with Client() as client:
            served = list(client.hello().get("policies", ()))
    except PagecacheError:
        pass
    if name not in served:
        raise UsageError(
            f"there is no policy {name}",
            f"known are {', '.join(sorted({*known, *served}))}",
            "Leave `policy` out to have one chosen",
        )


def numbers(source: dict[str, Any], *names: str) -> int:
    """The sum of some counters."""
    return sum(int(source.get(name, 0)) for name in names)
