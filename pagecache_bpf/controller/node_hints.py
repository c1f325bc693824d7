# SPDX-License-Identifier: Apache-2.0
"""Tells policies on which NUMA node each consumer wants its pages: near its accelerator.

The hints are in a map of each policy (bpf/include/affinity.bpf.h), by process; they go when the
process's last load ends.  "Unknown" is no hint.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pagecache_bpf.controller.engine_control import AGENT, EngineControl
from pagecache_bpf.errors import PagecacheError
from pagecache_bpf.kernel import pid_namespace
from pagecache_bpf.kernel.bpf_maps import BpfMap
from pagecache_bpf.kernel.numa import nodes
from pagecache_bpf.kernel.process_tree import is_alive
from pagecache_bpf.policy import loader
from pagecache_bpf.policy.hint_maps import CONSUMERS


def node_of(devices: Sequence[dict[str, Any]]) -> int | None:
    """Find the node that all of some devices are near.

    Args:
        devices: as the protocol has them.

    Returns:
        Its number; None: it is not known, or there are several.
    """
    found = {device.get("node") for device in devices}
    (node,) = found if len(found) == 1 else (None,)
    return node if node in nodes() else None


class NodeHints:
    """Which NUMA node each process wants its pages on, as policies were told for its loads.

    Args:
        engines: has the policies that are told.
    """

    def __init__(self, engines: EngineControl) -> None:
        self._engines = engines
        self._lock = threading.Lock()
        self._loads: dict[int, dict[str, str]] = {}

    def give(self, load: str, pid: int, policy: str, engine: str, node: int | None) -> bool:
        """Write the hint of a load.

        Args:
            load: its id.
            pid: the process that reads.
            policy: the policy that governs its files.
            engine: the engine that it runs on.
            node: the NUMA node.

        Returns:
            False if the policy takes none, or it cannot be written.
        """
        if node is None or not pid_namespace.is_first():  # the programs know the host's numbers
            return False
        with self._lock:
            self._loads.setdefault(pid, {})[load] = policy
        return self._write(pid, policy, engine, node)

    def forget(self, load: str, pid: int) -> None:
        """Take note that a load is over; its process's hint goes with the last load of a policy.

        Args:
            load: its id.
            pid: the process that read.
        """
        with self._lock:
            mine = self._loads.get(pid, {})
            policy = mine.pop(load, None)
            if policy is None or policy in mine.values():
                return
            if not mine:
                del self._loads[pid]
        engine = self._engines.attached().get(policy)
        if engine is not None:
            self._write(pid, policy, engine, None)

    def _write(self, pid: int, policy: str, engine: str, node: int | None) -> bool:
        if engine == AGENT:
            with self._engines.lock:
                agent = self._engines.service.agents.get(policy)
                if agent is not None:
                    agent.hint(pid, node)
            return agent is not None
        with suppress(OSError, PagecacheError), BpfMap.pinned(_pin(policy)) as found:
            key = pid.to_bytes(4, sys.byteorder)
            if node is None:
                found.delete(key)
            else:
                found.update(key, node.to_bytes(4, sys.byteorder, signed=True))
            return True
        return False


def sweep() -> int:
    """Remove what a killed controller has left in the module's policies.

    Returns:
        How many hints there were of processes that have ended.
    """
    gone = 0
    for policy in loader.pinned():
        with suppress(OSError, PagecacheError), BpfMap.pinned(_pin(policy)) as found:
            pids = [int.from_bytes(key, sys.byteorder) for key in list(found.keys())]
            for pid in pids:
                if not is_alive(pid):
                    found.delete(pid.to_bytes(4, sys.byteorder))
                    gone += 1
    return gone


def _pin(policy: str) -> Path:
    return loader.PIN_ROOT / policy / "maps" / CONSUMERS
