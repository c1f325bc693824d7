# SPDX-License-Identifier: Apache-2.0
"""Nodes that exist in the API server only: Node objects with a heartbeat, and no kubelet.

The scheduler takes them for nodes; a pod that lands on one stays Pending there.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from typing import Any

from pagecache_bpf.errors import PagecacheError
from tests.cluster.machine import Machine

_LEASES = "kube-node-lease"


def _now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def node(name: str) -> dict[str, Any]:
    """A Node, as a kubelet registers it."""
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {
            "name": name,
            "labels": {"kubernetes.io/hostname": name, "kubernetes.io/os": "linux"},
        },
    }


def _status() -> dict[str, Any]:
    now = _now()[:19] + "Z"
    room = {"cpu": "64", "memory": "256Gi", "pods": "200"}
    ready = {
        "type": "Ready",
        "status": "True",
        "reason": "Simulated",
        "lastHeartbeatTime": now,
        "lastTransitionTime": now,
    }
    return {"capacity": room, "allocatable": room, "conditions": [ready]}


def _lease(name: str) -> dict[str, Any]:
    return {
        "apiVersion": "coordination.k8s.io/v1",
        "kind": "Lease",
        "metadata": {"name": name, "namespace": _LEASES},
        "spec": {"holderIdentity": name, "leaseDurationSeconds": 40, "renewTime": _now()},
    }


@contextmanager
def simulated(cluster: Machine, names: Sequence[str]) -> Iterator[None]:
    """Have these nodes, ready, until the block ends."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(5):
            for name in names:
                path = f"/apis/coordination.k8s.io/v1/namespaces/{_LEASES}/leases/{name}"
                with suppress(PagecacheError):  # the next beat comes
                    cluster.api.patch(path, {"spec": {"renewTime": _now()}})

    cluster.apply(*(node(name) for name in names), *(_lease(name) for name in names))
    for name in names:
        cluster.api.patch(f"/api/v1/nodes/{name}/status", {"status": _status()})
    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        cluster.kubectl("delete", "nodes", *names)


def lands(cluster: Machine, *pods: dict[str, Any]) -> list[str]:
    """Create pods, wait until each is bound, and delete them; returns the names of the nodes."""
    cluster.apply(*pods)
    names = [pod["metadata"]["name"] for pod in pods]

    def bound() -> list[str]:
        told = json.loads(cluster.kubectl("get", "pods", *names, "-o", "json"))
        items = told.get("items", [told])
        nodes = [item["spec"].get("nodeName", "") for item in items]
        return nodes if all(nodes) else []

    try:
        found: list[str] = cluster.wait(f"{names} are bound", bound)
        return found
    finally:
        words = ("--grace-period=0", "--force", "--wait=true")
        cluster.kubectl("delete", "pods", *names, *words)
