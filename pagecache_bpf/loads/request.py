# SPDX-License-Identifier: Apache-2.0
"""What the caller of load() asks for, and what every load that is being served can do.

It knows nothing of how a load is served.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pagecache_bpf.loads.report import Report

if TYPE_CHECKING:
    from pagecache_bpf.topology import Placement
    from pagecache_bpf.weights.models import Model


@dataclass(frozen=True)
class LoadRequest:
    """What the caller of load() wants; everything in it has been checked.

    Attributes:
        model: the files.
        policy: name of the policy that is to serve it; None: the best there is.
        budget: bytes of it that may be in the page cache at a time; None: no bound.
        devices: the accelerators that it is for.
        node: the NUMA node next to all of them; None: there is none, or it is not known.
        template: path of an I/O template; None: none was given.
        keep: leave the pages in the cache at the end.
        wait: seconds to queue for the budget.
        record: where a recording of the load goes; None: none is made.
        device_limit: bytes per second that the files' device gives, if that is known.
    """

    model: Model
    policy: str | None = None
    budget: int | None = None
    devices: tuple[Placement, ...] = ()
    node: int | None = None
    template: str | None = None
    keep: bool = False
    wait: float = 0.0
    record: Path | None = None
    device_limit: float | None = None

    def blank(self, engine: str, via: str, why: str = "") -> Report:
        """Make a report without numbers.

        Args:
            engine: which engine serves it.
            via: who asked that engine.
            why: why it is not a better one.
        """
        return Report(
            model=self.model.name,
            path=str(self.model.root),
            files=len(self.model.files),
            bytes=self.model.size,
            engine=engine,
            via=via,
            why=why,
            policy=self.policy,
            devices=tuple(device.as_json() for device in self.devices),
            node=self.node,
            budget_bytes=self.budget,
        )

    def differences(self, other: LoadRequest) -> list[str]:
        """Name what another request of the same files asks for differently."""
        pairs = {
            "policy": (self.policy, other.policy),
            "budget": (self.budget, other.budget),
            "devices": (
                tuple(device.name for device in self.devices),
                tuple(device.name for device in other.devices),
            ),
            "template": (self.template, other.template),
            "record": (self.record, other.record),
        }
        return [name for name, (mine, theirs) in pairs.items() if mine != theirs]


class LoadOver(Exception):
    """The load was over before it was served; whoever starts it takes everything back."""


class ControllerConnection(Protocol):
    """What the start of a load may be waiting for; ipc.client.LineClient is one."""

    def interrupt(self) -> None:
        """Make the call that waits for an answer fail.  From any thread."""

    def disconnect(self) -> None:
        """Close this process's end."""


class Starting:
    """Tells the thread that starts a load when that load is over already."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._over = False
        self._connections: list[ControllerConnection] = []

    def check(self) -> None:
        """Raise LoadOver if the load is over."""
        if self._over:
            raise LoadOver

    def waits_for(self, connection: ControllerConnection) -> None:
        """Have a connection interrupted when the load is over, until done().

        Raises:
            LoadOver: it is over already.
        """
        with self._lock:
            self._connections.append(connection)
        self.check()

    def cancel(self) -> None:
        """Say that the load is over: whatever waits for an answer fails."""
        with self._lock:
            self._over = True
            for connection in self._connections:
                with suppress(OSError):  # it has ended by itself
                    connection.interrupt()

    def done(self) -> None:
        """Forget the connections: the load is served now, or will not be."""
        with self._lock:
            self._connections = []

    def forget(self) -> None:
        """Close a forked child's ends of the connections; its parent goes on with them."""
        for connection in list(self._connections):
            with suppress(OSError):
                connection.disconnect()


class ServedLoad(Protocol):
    """A load that is being served."""

    def report(self) -> Report:
        """Tell how it goes.  Raises PagecacheError, OSError."""

    def finish(self, keep: bool) -> Report:
        """End it and return its last report.  Raises PagecacheError, OSError.

        Args:
            keep: leave its pages in the cache.
        """

    def forget(self) -> None:
        """Let go of it in a child process, where it is not ours; nothing may be waited for."""


def numbers(source: dict[str, Any], *names: str) -> int:
    """Add up some counters; those that are not there count as 0."""
    return sum(int(source.get(name, 0)) for name in names)
