# SPDX-License-Identifier: Apache-2.0
"""Ray Serve's own router against ours: a request for each of six models, on three raylets.

    build/venv-ray/bin/python -m benchmarks.ray_routing --directory DIR

Needs the environment of `make test-ray`.  In each round, and for each router in turn, every model
is cached on one raylet only (checked with cachestat) and asked for once: what counts is where the
request goes, and the seconds until its answer, which include the load.  DIR has to be on a disk.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

OUT = Path("build/bench/ray_routing.json")
MODELS = ("a", "b", "c", "d", "e", "f")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print both routers."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--directory", type=Path, required=True, help="on a disk")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--mebibytes", type=int, default=64, help="of each model")
    args = parser.parse_args(argv)
    import ray

    from tests.ray import cluster as running
    from tests.ray.test_ray_cluster import ask, place, spread, wait_for_news

    seconds: dict[str, list[float]] = {"default": [], "ours": []}
    warm: dict[str, int] = {"default": 0, "ours": 0}
    with (
        tempfile.TemporaryDirectory(dir=args.directory) as root,
        running.cluster(),
    ):
        made = running.make_models(Path(root), MODELS, args.mebibytes * 256)
        ids = sorted(node["NodeID"] for node in ray.nodes())
        directories = dict(zip(ids, map(str, made), strict=True))
        handles = {
            name: running.deploy(name, directories, MODELS, ours=name == "ours") for name in seconds
        }
        for number in range(args.rounds):
            # The homes move, so that what a replica still has is not where the pages are.
            order = MODELS[number % len(MODELS) :] + MODELS[: number % len(MODELS)]
            homes = spread(directories, list(order))
            for name in sorted(seconds, reverse=bool(number % 2)):
                place(directories, homes)
                wait_for_news(handles[name], directories, homes)
                for model in order:
                    began = time.perf_counter()
                    node, _ = ask(handles[name], model)
                    seconds[name].append(time.perf_counter() - began)
                    warm[name] += node == homes[model]
    rows: dict[str, Any] = {
        name: {
            "requests": len(times),
            "to_the_warm_node": warm[name],
            "mean_s": statistics.fmean(times),
            "median_s": statistics.median(times),
            "p99_s": sorted(times)[int(len(times) * 0.99)],
        }
        for name, times in seconds.items()
    }
    result = {"load_average": os.getloadavg(), "rounds": args.rounds, "routers": rows}
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(result, indent=2))
    print(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
