# SPDX-License-Identifier: Apache-2.0
"""What the caller of load() asks for, and what every load that is being served can do.

It knows nothing of how a load is served.
"""

from __future__ import annotations

import os
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
        prefetch: read the files from the beginning of the load on, before their reader does.
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
    prefetch: bool = False

    def blank(self, engine: str, via: str, why: str = "") -> Report:
        """Make a report of this load that has no numbers yet.

        Args:
            engine: which engine serves it, as in Report.engine.
            via: who asked that engine, as in Report.via.
            why: why it is not a better one; empty for the best.

        Returns:
            The report.
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
        """Compare with another request of the same files.

        Args:
            other: the other request.

        Returns:
            Names of what it asks for differently, such as "policy"; empty: both can share one load.
        """
        pairs = {
            "policy": (self.policy, other.policy),
            "budget": (self.budget, other.budget),
            "devices": (
                tuple(device.name for device in self.devices),
                tuple(device.name for device in other.devices),
            ),
            "template": (self.template, other.template),
            "record": (self.record, other.record),
            "prefetch": (self.prefetch, other.prefetch),
        }
        return [name for name, (mine, theirs) in pairs.items() if mine != theirs]


def device_limit(model: Model) -> float | None:
    """Look up what the device of a model gives at best.

    Args:
        model: the files.

    Returns:
        Bytes per second; None: that was not measured, or there are no files.
    """
    from pagecache_bpf.explain import device_speed

    speed = device_speed.last(os.stat(model.files[0]).st_dev) if model.files else None
    return speed.bytes_per_second if speed else None


class LoadOver(Exception):
    """The load was over before it was served; whoever starts it takes everything back."""


class ControllerConnection(Protocol):
    """What the start of a load may be waiting for; ipc.client.LineClient is one."""

    def interrupt(self) -> None:
        """Make the call that waits for an answer fail.  From any thread."""

    def disconnect(self) -> None:
        """Close this process's end of the connection."""


class Starting:
    """Tells the thread that starts a load when that load is over already."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._over = False
        self._hurried = threading.Event()
        self._connections: list[ControllerConnection] = []

    def check(self) -> None:
        """Check that the load is not over yet.

        Raises:
            LoadOver: it is.
        """
        if self._over:
            raise LoadOver

    def hurry(self) -> None:
        """Say that somebody waits for the load to be served.  From any thread."""
        self._hurried.set()

    def wait(self, seconds: float) -> bool:
        """Let time pass in which the load is neither over nor waited for.

        Args:
            seconds: how long at most.

        Returns:
            Whether somebody waits for it to be served.

        Raises:
            LoadOver: the load is over.
        """
        hurried = self._hurried.wait(seconds)
        self.check()
        return hurried

    def waits_for(self, connection: ControllerConnection) -> None:
        """Have a connection interrupted when the load is over, until done().

        Args:
            connection: the connection on which the start of the load waits for an answer.

        Raises:
            LoadOver: the load is over already.
        """
        with self._lock:
            self._connections.append(connection)
        self.check()

    def cancel(self) -> None:
        """Say that the load is over: whatever waits for an answer fails."""
        with self._lock:
            self._over = True
            self._hurried.set()
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
        """Tell how the load goes.

        Returns:
            The report.

        Raises:
            PagecacheError: what serves it cannot be asked.
            OSError: the connection to what serves it fails.
        """

    def finish(self, keep: bool) -> Report:
        """End the load.

        Args:
            keep: leave its pages in the page cache; otherwise those go that were not there before
                it.

        Returns:
            The last report.

        Raises:
            PagecacheError: what serves it cannot be asked.
            OSError: the connection to what serves it fails.
        """

    def forget(self) -> None:
        """Close what a child of fork() has of the load, which stays the parent's; do not wait."""


def numbers(source: dict[str, Any], *names: str) -> int:
    """Add up some counters of an answer.

    Args:
        source: counters by name.
        names: those to add; one that is not there counts as 0.

    Returns:
        The sum, in the counters' unit.
    """
    return sum(int(source.get(name, 0)) for name in names)
