# SPDX-License-Identifier: Apache-2.0
"""Publishes the labels of a node, in one of two ways, and takes expired ones away.

Through Node Feature Discovery: a file in its local source, with the time of expiry in it; NFD does
the rest, and our process needs no right in the cluster.  Or by patching the Node itself; Kubernetes
has no labels that expire, so the time stands in an annotation beside them, which the agent itself
and sweep() obey.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

from pagecache_bpf.errors import PagecacheError
from pagecache_bpf.placement.kubernetes_api import KubernetesApi
from pagecache_bpf.placement.labels import DOMAIN, LabelChange

NFD_DIRECTORY = Path("/etc/kubernetes/node-feature-discovery/features.d")
NFD_FILE = "pagecache-bpf"
EXPIRES = f"{DOMAIN}/labels-expire"


class Publisher(Protocol):
    """Something that makes a change of a node's labels known."""

    def publish(self, change: LabelChange) -> None:
        """Publish a change of the node's labels.

        Args:
            change: labels to set and to remove, and when they expire.

        Raises:
            PagecacheError: it could not be; the caller tries again.
        """


class NfdFile:
    """The file that NFD's local source reads."""

    def __init__(self, directory: Path = NFD_DIRECTORY) -> None:
        """Publish into a directory.

        Args:
            directory: NFD's features.d on this node.
        """
        self._path = directory / NFD_FILE

    def publish(self, change: LabelChange) -> None:
        """Replace the file as a whole: NFD passes over names that begin with a dot.

        Args:
            change: labels to set, and when they expire; what it removes is not in the new file.

        Raises:
            PagecacheError: the file cannot be written.
        """
        new = self._path.with_name(f".{NFD_FILE}.{os.getpid()}")
        try:
            new.write_text(nfd_text(change), encoding="utf-8")
            new.replace(self._path)
        except OSError as error:
            with suppress(OSError):
                new.unlink()
            raise PagecacheError(
                "the labels cannot be published",
                f"{self._path}: {error.strerror}",
                "Mount NFD's features.d of the node there, or use --labels api",
            ) from error


def nfd_text(change: LabelChange) -> str:
    """Write a feature file of Node Feature Discovery with the labels of a change.

    Args:
        change: labels to set, and when they expire.

    Returns:
        The file's text.
    """
    lines = [f"{key}={value}" for key, value in change.values.items()]
    return "\n".join([f"# +expiry-time={timestamp(change.expires)}", *lines]) + "\n"


class NodePatch:
    """The Node object of this node."""

    def __init__(self, api: KubernetesApi, node: str) -> None:
        """Publish on a node.

        Args:
            api: may get and patch it.
            node: its name.
        """
        self._api, self._path = api, _path(node)

    def read(self) -> tuple[dict[str, str], dict[str, str]]:
        """Return the labels and the annotations that it has now.

        Returns:
            Both by key; empty where the node has none.

        Raises:
            PagecacheError: it cannot be read.
        """
        metadata = self._api.get(self._path).get("metadata") or {}
        return dict(metadata.get("labels") or {}), dict(metadata.get("annotations") or {})

    def publish(self, change: LabelChange) -> None:
        """Set the labels, remove those that are gone, and set when they expire: one write.

        Args:
            change: labels to set and to remove, and when they expire.

        Raises:
            PagecacheError: the API server does not take it.
        """
        labels: dict[str, str | None] = {**change.values, **dict.fromkeys(change.gone)}
        expires = timestamp(change.expires) if change.values else None
        self._api.patch(
            self._path, {"metadata": {"labels": labels, "annotations": {EXPIRES: expires}}}
        )


def sweep(api: KubernetesApi, now: float) -> list[str]:
    """Take away labels whose time is over: their agent has gone.

    Args:
        api: may list and patch nodes.
        now: seconds since 1970.

    Returns:
        Names of the nodes that were changed.

    Raises:
        PagecacheError: the API server does not answer, or does not take it.
    """
    changed = []
    for node in api.items("/api/v1/nodes", metadata=True):
        metadata = node.get("metadata") or {}
        stale = expired(metadata.get("labels") or {}, metadata.get("annotations") or {}, now)
        if stale:
            labels = dict.fromkeys(stale)
            body: Any = {"metadata": {"labels": labels, "annotations": {EXPIRES: None}}}
            api.patch(_path(metadata["name"]), body)
            changed.append(str(metadata["name"]))
    return changed


def expired(labels: Mapping[str, str], annotations: Mapping[str, str], now: float) -> list[str]:
    """Return the keys of our labels that have to go.

    Args:
        labels: of a node.
        annotations: of the same node; without a time in EXPIRES, or with one that is none, nothing
            is ours: NFD's have theirs elsewhere.
        now: seconds since 1970.

    Returns:
        The keys, sorted; empty: they have not expired.
    """
    try:
        ends = datetime.fromisoformat(annotations[EXPIRES].replace("Z", "+00:00")).timestamp()
    except (KeyError, ValueError, AttributeError):
        return []
    return sorted(key for key in labels if key.startswith(f"{DOMAIN}/")) if now > ends else []


def timestamp(seconds: float) -> str:
    """Return a time as RFC 3339 has it, in UTC and whole seconds.

    Args:
        seconds: since 1970.

    Returns:
        Such as "2026-01-31T12:00:00Z".
    """
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def _path(node: str) -> str:
    return f"/api/v1/nodes/{quote(node, safe='')}"
