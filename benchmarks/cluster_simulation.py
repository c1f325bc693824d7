# SPDX-License-Identifier: Apache-2.0
"""A simulated cluster: nodes with GPUs, a device, a page cache; replicas that come and go.

What happens: a request for a model goes to a replica that is there; without one (or when all have
CONCURRENCY requests) a replica is started on a node that the placement chooses, which loads the
model at the speeds of the score, one load after the other on a device.  A replica without a request
goes after KEEP_ALIVE seconds; its pages stay.  A node's page cache drops what was least recently
used, by bytes, so a model can be there in part; other files, read once at PRESSURE bytes a second,
take their turn in it.

What is left out: the engine's own start, failures, more than one node for a model.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from benchmarks.placement_trace import Requests
from pagecache_bpf.placement.labels import LabelPlan
from pagecache_bpf.placement.load_score import ModelScore, NodeScores

GPUS = 8
CONCURRENCY = 8
KEEP_ALIVE = 60.0
SERVICE = 10.0
CACHE = 200e9
PRESSURE = 100e6
HOST_TO_DEVICE = 24e9
#: Measured: an array of pegainfer#951, two NVMe of ATOM#1767 and PPC/MAIO (FAST'26), a striped one.
DEVICES = (0.32e9, 3.2e9, 5.93e9, 12e9)
SHARES = (0.05, 0.35, 0.4, 0.2)
#: A node looks at its page cache so often; placements that are told see no later state.
LOOK = 15.0


@dataclass
class Replica:
    """A model on a node; ready: when it is loaded; last: when its last request came to an end."""

    model: int
    node: int
    ready: float
    active: int = 0
    last: float = 0.0


@dataclass
class Outcome:
    """What a run counted: seconds of each cold start, bytes read from devices, labels written."""

    seconds: list[float] = field(default_factory=list)
    read: float = 0.0
    requests: int = 0
    unplaced: int = 0
    writes: list[float] = field(default_factory=list)


#: From a cluster, a model and the nodes that can take it to one of them.
Placement = Callable[["Cluster", int, npt.NDArray[np.int64]], int]


class Cluster:
    """The state of all nodes; `now` is the simulated time in seconds."""

    def __init__(self, nodes: int, requests: Requests, seed: int, *, labels: bool = False) -> None:
        """Start with empty page caches.

        Args:
            nodes: how many.
            requests: what will be asked.
            seed: of the devices and of ties.
            labels: whether the nodes publish labels, which takes time to simulate.
        """
        self.random = np.random.default_rng(seed)
        self.nodes, self.requests, self.now = nodes, requests, 0.0
        self.device = self.random.choice(DEVICES, size=nodes, p=SHARES)
        self.free = np.full(nodes, GPUS)
        self.device_free = np.zeros(nodes)
        #: Bytes by model and node: as they are, and as the node last told.
        self.resident: dict[int, dict[int, float]] = defaultdict(dict)
        self.told: dict[int, dict[int, float]] = defaultdict(dict)
        self.labels: dict[int, dict[int, int]] = defaultdict(dict)
        self.outcome = Outcome()
        self._cached: list[OrderedDict[int, float]] = [OrderedDict() for _ in range(nodes)]
        self._used = np.zeros(nodes)
        self._pressed = np.zeros(nodes)
        self._loading: dict[int, dict[int, float]] = defaultdict(dict)
        self._replicas: dict[int, list[Replica]] = defaultdict(list)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._number = self._chunks = 0
        self._due: set[int] = set()
        self._known: list[set[int]] = [set() for _ in range(nodes)]
        self._plans = [LabelPlan(f"node-{node}") for node in range(nodes)] if labels else []
        for node in range(nodes) if labels else ():
            self._plans[node].update(0.0, self._scores(node))

    def run(self, placement: Placement, warm_up: float) -> Outcome:
        """Let all requests come.

        Args:
            placement: chooses the node of a new replica.
            warm_up: seconds from the start that are not counted.
        """
        for time, model in zip(
            self.requests.times.tolist(), self.requests.models.tolist(), strict=True
        ):
            self._until(time)
            if time >= warm_up and not self.outcome.requests:
                self.outcome = Outcome()
            self.outcome.requests += time >= warm_up
            self._request(model, placement)
        return self.outcome

    def _at(self, time: float, what: Callable[[], None]) -> None:
        self._number += 1
        heapq.heappush(self._events, (time, self._number, what))

    def _until(self, time: float) -> None:
        while self._events and self._events[0][0] <= time:
            self.now, _, what = heapq.heappop(self._events)
            what()
        self.now = time

    def _request(self, model: int, placement: Placement) -> None:
        open_ones = [replica for replica in self._replicas[model] if replica.active < CONCURRENCY]
        if open_ones:
            replica = min(
                open_ones, key=lambda replica: (max(replica.ready, self.now), replica.active)
            )
        else:
            feasible = np.flatnonzero(self.free >= self.requests.gpus[model])
            if not len(feasible):
                self.outcome.unplaced += 1
                return
            replica = self._start(model, placement(self, model, feasible))
        replica.active += 1
        self._at(max(self.now, replica.ready) + SERVICE, lambda: self._finished(replica))

    def _finished(self, replica: Replica) -> None:
        replica.active -= 1
        replica.last = self.now
        if not replica.active:
            self._at(self.now + KEEP_ALIVE, lambda: self._expire(replica))

    def _expire(self, replica: Replica) -> None:
        if replica.active or replica.last + KEEP_ALIVE > self.now:
            return
        alive = self._replicas[replica.model]
        if replica in alive:
            alive.remove(replica)
            self.free[replica.node] += self.requests.gpus[replica.model]

    def _start(self, model: int, node: int) -> Replica:
        """Load a model on a node; what is cached is what is there now, whatever was told."""
        self._press(node)
        ready = float(self.finish_times(model)[node])
        self.outcome.seconds.append(ready - self.now)
        if node not in self._loading[model]:
            cached = self.resident[model].get(node, 0.0)
            absent = float(self.requests.sizes[model]) - cached
            self.outcome.read += absent
            if absent:
                self.device_free[node] = ready - cached / HOST_TO_DEVICE
        self._loading[model][node] = ready
        self.free[node] -= self.requests.gpus[model]
        replica = Replica(model, node, ready)
        self._replicas[model].append(replica)
        self._at(ready, lambda: self._loaded(model, node))
        return replica

    def by_node(self, values: Mapping[int, float]) -> npt.NDArray[np.float64]:
        """Return a value for each node, 0 where there is none.

        Args:
            values: by node.
        """
        found = np.zeros(self.nodes)
        found[list(values)] = list(values.values())
        return found

    def finish_times(self, model: int) -> npt.NDArray[np.float64]:
        """Return when a load of a model that begins now would be done, for each node."""
        size = float(self.requests.sizes[model])
        cached = self.by_node(self.resident[model])
        absent = size - cached
        begin = np.where(absent > 0, np.maximum(self.now, self.device_free), self.now)
        done = begin + absent / self.device + cached / HOST_TO_DEVICE
        for node, ready in self._loading[model].items():  # its pages serve this load, too
            done[node] = max(ready, self.now) + size / HOST_TO_DEVICE
        return np.asarray(done, dtype=np.float64)

    def _loaded(self, model: int, node: int) -> None:
        if self._loading[model].get(node, 0.0) <= self.now:
            self._loading[model].pop(node, None)
        self._press(node)  # what came before this model is older than it
        cached = self._cached[node]
        size = float(self.requests.sizes[model])
        self._used[node] += size - cached.pop(model, 0.0)
        cached[model] = self.resident[model][node] = size
        self._evict(node, self._used[node] - CACHE)
        self._look_later(node, self.now)

    def _press(self, node: int) -> None:
        """Let other files have come since the last time, as the newest in the page cache."""
        read = (self.now - self._pressed[node]) * PRESSURE
        self._pressed[node] = self.now
        if read:
            self._chunks -= 1
            self._cached[node][self._chunks] = read
            self._used[node] += read
        self._evict(node, self._used[node] - CACHE)

    def _evict(self, node: int, surplus: float) -> None:
        """Drop bytes, the least recently used first; numbers below 0 are other files."""
        cached = self._cached[node]
        while surplus > 0 and cached:
            oldest = next(iter(cached))
            gone = min(surplus, cached[oldest])
            surplus -= gone
            self._used[node] -= gone
            cached[oldest] -= gone
            if oldest >= 0:
                self.resident[oldest][node] = cached[oldest]
            if cached[oldest] <= 0:
                del cached[oldest]
                self.resident.get(oldest, {}).pop(node, None)

    def _models(self, node: int) -> dict[int, float]:
        """Return the bytes of the models in a page cache."""
        return {model: size for model, size in self._cached[node].items() if model >= 0}

    def _look_later(self, node: int, earliest: float) -> None:
        """Look at the next turn of a node after a time; turns are LOOK seconds apart."""
        if node not in self._due:
            self._due.add(node)
            phase = node * LOOK / self.nodes
            turn = math.floor((earliest - phase) / LOOK + 1e-6) + 1
            self._at(phase + LOOK * turn, lambda: self._look(node))

    def _look(self, node: int) -> None:
        """Tell what is cached now, and look again as long as that can become less."""
        self._due.discard(node)
        self._press(node)
        models = self._models(node)
        for model in self._known[node] - models.keys():
            self.told[model].pop(node, None)
        for model, size in models.items():
            self.told[model][node] = size
        self._known[node] = set(models)
        if self._plans:
            self._publish(node)
        if models:
            # Before the page cache is full nothing goes; labels have to be renewed even so.
            full = self.now + (CACHE - self._used[node]) / PRESSURE
            self._look_later(node, self.now if self._plans else max(self.now, full))

    def _scores(self, node: int) -> NodeScores:
        models = tuple(
            ModelScore(
                *(str(model), str(model), int(self.requests.sizes[model]), int(size)),
                *(float(self.device[node]), HOST_TO_DEVICE),
            )
            for model, size in self._models(node).items()
        )
        return NodeScores(f"node-{node}", 0, 0, None, (), models)

    def _publish(self, node: int) -> None:
        change = self._plans[node].update(self.now, self._scores(node))
        if change is None:
            return
        self.outcome.writes.append(self.now)
        for key in change.gone:
            self.labels[int(key.rpartition("/")[2])].pop(node, None)
        for key, value in change.values.items():
            self.labels[int(key.rpartition("/")[2])][node] = int(value)
