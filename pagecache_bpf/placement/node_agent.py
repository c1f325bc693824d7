# SPDX-License-Identifier: Apache-2.0
"""What runs on each node of a cluster: it publishes labels and brings in what is asked for."""

from __future__ import annotations

import threading
from collections.abc import Callable

from pagecache_bpf.errors import PagecacheError
from pagecache_bpf.placement.labels import LabelPlan
from pagecache_bpf.placement.node_labels import NodePatch, Publisher, expired
from pagecache_bpf.placement.node_watch import NodeWatch
from pagecache_bpf.placement.prewarm import asked_for, plan_prewarm
from pagecache_bpf.weights.models import Model

#: Annotations are read so often, in seconds: each time is a request to the API server.
ANNOTATIONS_EVERY = 60.0


class NodeAgent:
    """Looks, publishes and prewarms, a round at a time."""

    def __init__(
        self,
        watch: NodeWatch,
        plan: LabelPlan,
        *,
        publisher: Publisher | None = None,
        node: NodePatch | None = None,
        prefetch: Callable[[Model], object] | None = None,
        budget: int | None = None,
        warn: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Do nothing yet.

        Args:
            watch: the models of this node.
            plan: when which labels are published.
            publisher: where; None: nowhere.
            node: the Node object, for its annotations and, at the start, our old labels on it.
            prefetch: reads a model into the page cache and returns when that is done; None: what
                annotations ask for is left.
            budget: bytes that one round of prewarming may bring in; None: half of what is free.
            warn: is told what failed; the same sentence once in a row.
        """
        self._watch, self._plan = watch, plan
        self._publisher, self._node = publisher, node
        self._prefetch, self._budget, self._warn = prefetch, budget, warn
        self._said = ""
        self._asked: list[str] = []
        self._read_at: float | None = None
        self._reading: threading.Thread | None = None
        self._adopted = node is None

    def round(self, now: float) -> None:
        """Do what is due.  Never raises: what fails is tried again in a later round.

        Args:
            now: seconds since 1970.
        """
        scores = self._watch.scores()
        try:
            self._look_at_node(now)
            change = self._plan.update(now, scores) if self._publisher else None
            if change is not None and self._publisher is not None:
                try:
                    self._publisher.publish(change)
                except PagecacheError:
                    self._plan.failed(change)
                    raise
        except PagecacheError as error:
            self._tell(str(error))
            return
        reading = self._reading is not None and self._reading.is_alive()
        if self._prefetch is None or not self._asked or reading:
            self._tell("; ".join(scores.missing))
            return
        planned = plan_prewarm(self._asked, scores, self._budget)
        self._tell("; ".join((*scores.missing, *planned.left)))
        if planned.read:
            model = self._watch.model_of(planned.read[0].content)
            if model is not None:
                self._reading = threading.Thread(target=self._read, args=(model,), daemon=True)
                self._reading.start()

    def wait_for_prewarming(self, seconds: float) -> None:
        """Wait until what is being read is there.

        Args:
            seconds: at most.
        """
        if self._reading is not None:
            self._reading.join(seconds)

    def _look_at_node(self, now: float) -> None:
        """Read the Node object when it is due: once for old labels, and for annotations."""
        wanted = self._prefetch is not None or not self._adopted
        due = self._read_at is None or now - self._read_at >= ANNOTATIONS_EVERY
        if self._node is None or not wanted or not due:
            return
        self._read_at = now
        labels, annotations = self._node.read()
        if not self._adopted:
            self._plan.adopt(dict.fromkeys(expired(labels, annotations, float("inf")), "0"))
            self._adopted = True
        self._asked = asked_for(annotations)

    def _read(self, model: Model) -> None:
        assert self._prefetch is not None
        try:
            self._prefetch(model)
        except (PagecacheError, OSError) as error:
            self._tell(f"{model.name} is not brought in: {error}")

    def _tell(self, text: str) -> None:
        if text and text != self._said:
            self._warn(text)
        self._said = text
