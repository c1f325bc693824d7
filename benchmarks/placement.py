# SPDX-License-Identifier: Apache-2.0
"""Where replicas start, simulated: the scheduler's default, ours, all or nothing, an oracle.

    python -m benchmarks.placement --nodes 10 100 1000
    python -m benchmarks.placement --nodes 100 --trace BurstGPT_1.csv

Writes build/bench/placement.json and prints a table.  The schedulers are modeled as they decide:

default         kube-scheduler's NodeResourcesFit, LeastAllocated: the node with the most free GPUs
labels          the same and preferred node affinity on our labels (100 above 89, 40 above 49)
extender        the same and our extender (weight 5): 0 to 10 by seconds to load, as last told
extender, all   the same with percentageOfNodesToScore: 100
all or nothing  ServerlessLLM: wait and size over bandwidth; cached is what is cached as a whole
oracle          knows each page cache and each device's queue at the moment; not the future

kube-scheduler scores a sample of the nodes of a large cluster (1000: 42%, 10,000: 5%), in turn;
only `extender, all`, all or nothing and the oracle see every node.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.cluster_simulation import GPUS, HOST_TO_DEVICE, Cluster, Outcome, Placement
from benchmarks.placement_trace import Requests, from_csv, generated
from pagecache_bpf.errors import PagecacheError
from pagecache_bpf.placement.extender import MOST_POINTS

OUT = Path("build/bench/placement.json")
Nodes = npt.NDArray[np.int64]


class Sampled:
    """kube-scheduler's sample of feasible nodes: so many, from where the last one ended.

    Source: numFeasibleNodesToFind() of Kubernetes' pkg/scheduler/schedule_one.go.
    """

    def __init__(self, score: Callable[[Cluster, int, Nodes], npt.NDArray[np.float64]]) -> None:
        self._score, self._next = score, 0

    def __call__(self, cluster: Cluster, model: int, feasible: Nodes) -> int:
        """Return the node with the highest score in the sample."""
        chosen = feasible
        wanted = sample_size(cluster.nodes)
        if len(feasible) > wanted:
            begin = int(np.searchsorted(feasible, self._next))
            chosen = feasible[np.arange(begin, begin + wanted) % len(feasible)]
            self._next = (int(chosen[-1]) + 1) % cluster.nodes
        return best(cluster, chosen, self._score(cluster, model, chosen))


def sample_size(nodes: int) -> int:
    """Return how many feasible nodes kube-scheduler scores by default."""
    if nodes < 100:
        return nodes
    return max(100, nodes * max(5, 50 - nodes // 125) // 100)


def best(cluster: Cluster, nodes: Nodes, scores: npt.NDArray[np.float64]) -> int:
    """Return a node with the highest score; which one of several is chance."""
    return int(cluster.random.choice(nodes[scores == scores.max()]))


def least_allocated(cluster: Cluster, model: int, nodes: Nodes) -> npt.NDArray[np.float64]:
    """Score by free GPUs, 0 to 100."""
    left = cluster.free[nodes] - cluster.requests.gpus[model]
    return np.asarray(np.floor(100 * left / GPUS), dtype=np.float64)


def affinity(cluster: Cluster, model: int, nodes: Nodes) -> npt.NDArray[np.float64]:
    """Add preferred node affinity on labels; NodeAffinity has weight 2 by default."""
    values = cluster.by_node(cluster.labels[model])[nodes]
    sums = 100.0 * (values > 89) + 40.0 * (values > 49)
    most = sums.max()
    added = 2 * np.floor(100 * sums / most) if most else np.zeros(len(nodes))
    return np.asarray(least_allocated(cluster, model, nodes) + added, dtype=np.float64)


def extender(cluster: Cluster, model: int, nodes: Nodes) -> npt.NDArray[np.float64]:
    """Add our extender with weight 5: a point of it is worth 10 of the scheduler's."""
    return least_allocated(cluster, model, nodes) + 5 * 10 * extender_points(cluster, model, nodes)


def extender_points(cluster: Cluster, model: int, nodes: Nodes) -> npt.NDArray[np.float64]:
    """Return what placement.extender would answer, for thousands of nodes at once."""
    size = float(cluster.requests.sizes[model])
    cached = cluster.by_node(cluster.told[model])[nodes]
    seconds = (size - cached) / cluster.device[nodes] + cached / HOST_TO_DEVICE
    return np.asarray(np.floor(MOST_POINTS * (seconds.min() / seconds)), dtype=np.float64)


def everywhere(score: Callable[[Cluster, int, Nodes], npt.NDArray[np.float64]]) -> Placement:
    """Return the placement that scores every node."""
    return lambda cluster, model, nodes: best(cluster, nodes, score(cluster, model, nodes))


def all_or_nothing(cluster: Cluster, model: int, nodes: Nodes) -> npt.NDArray[np.float64]:
    """Score as ServerlessLLM's storage-aware scheduler does: less time is more."""
    size = float(cluster.requests.sizes[model])
    whole = cluster.by_node(cluster.told[model])[nodes] >= size
    wait = np.maximum(cluster.device_free[nodes] - cluster.now, 0)
    took = np.where(whole, size / HOST_TO_DEVICE, wait + size / cluster.device[nodes])
    return np.asarray(-took, dtype=np.float64)


def oracle(cluster: Cluster, model: int, nodes: Nodes) -> npt.NDArray[np.float64]:
    """Score by the time that a load begun now will take."""
    return np.asarray(-cluster.finish_times(model)[nodes], dtype=np.float64)


PLACEMENTS: Mapping[str, Callable[[], Placement]] = {
    "default": lambda: Sampled(least_allocated),
    "labels": lambda: Sampled(affinity),
    "extender": lambda: Sampled(extender),
    "extender, all": lambda: everywhere(extender),
    "all or nothing": lambda: everywhere(all_or_nothing),
    "oracle": lambda: everywhere(oracle),
}


def measure(name: str, nodes: int, requests: Requests, warm_up: float, seed: int) -> dict[str, Any]:
    """Run one placement over the requests and return a row of the result."""
    began = time.perf_counter()
    cluster = Cluster(nodes, requests, seed, labels=name == "labels")
    outcome = cluster.run(PLACEMENTS[name](), warm_up)
    return {"nodes": nodes, "placement": name, **summary(outcome, cluster.now - warm_up)} | {
        "simulated_in_s": round(time.perf_counter() - began, 1)
    }


def summary(outcome: Outcome, seconds: float) -> dict[str, Any]:
    """Return the numbers of a run: seconds and bytes of cold starts, writes of labels."""
    times = np.array(outcome.seconds or [0.0])
    by_second = np.bincount(np.array(outcome.writes, dtype=np.int64)) if outcome.writes else [0]
    return {
        "requests": outcome.requests,
        "cold_starts": len(outcome.seconds),
        "unplaced": outcome.unplaced,
        "cold_mean_s": round(float(times.mean()), 2),
        "cold_p99_s": round(float(np.percentile(times, 99)), 2),
        "read_TB": round(outcome.read / 1e12, 2),
        "writes_per_s": round(len(outcome.writes) / max(seconds, 1e-9), 2),
        "most_writes_in_a_second": int(max(by_second)),
    }


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return the rows as a table in Markdown."""
    names = {
        "nodes": "nodes",
        "placement": "placement",
        "cold_starts": "cold starts",
        "cold_mean_s": "mean, s",
        "cold_p99_s": "P99, s",
        "read_TB": "read, TB",
        "writes_per_s": "label writes/s",
        "most_writes_in_a_second": "most in a second",
    }
    lines = [f"| {' | '.join(names.values())} |", "| --: | --- " + "| --: " * 6 + "|"]
    lines += [f"| {' | '.join(str(row[name]) for name in names)} |" for row in rows]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Simulate what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--nodes", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--seconds", type=float, default=1800.0, help="of requests")
    parser.add_argument("--warm-up", type=float, default=600.0, help="seconds not counted")
    parser.add_argument("--skew", type=float, default=1.0, help="exponent of Zipf's law")
    parser.add_argument("--variation", type=float, default=8.0, help="of gaps, over their mean")
    parser.add_argument("--rate", type=float, default=0.1, help="requests a second and node")
    parser.add_argument("--models", type=float, default=4.0, help="models a node")
    parser.add_argument("--trace", type=Path, help="a CSV of requests instead (from_csv)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--placements", nargs="+", choices=PLACEMENTS, default=list(PLACEMENTS))
    args = parser.parse_args(argv)
    rows = []
    try:
        for nodes in args.nodes:
            if args.trace:
                models = max(1, round(args.models * nodes))
                requests = from_csv(args.trace, args.seed, models=models, skew=args.skew)
            else:
                requests = generated(
                    max(1, round(args.models * nodes)),
                    args.rate * nodes,
                    args.seconds,
                    skew=args.skew,
                    variation=args.variation,
                    seed=args.seed,
                )
            for name in args.placements:
                rows.append(measure(name, nodes, requests, args.warm_up, args.seed))
                print(json.dumps(rows[-1]), file=sys.stderr)
    except PagecacheError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    OUT.parent.mkdir(parents=True, exist_ok=True)
    arguments = {name: str(value) for name, value in vars(args).items()}
    result = {"load_average": os.getloadavg(), "arguments": arguments, "rows": rows}
    OUT.write_text(json.dumps(result, indent=2))
    print(table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
