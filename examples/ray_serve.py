# SPDX-License-Identifier: Apache-2.0
"""Serves several models with Ray Serve; requests go to where the page cache has theirs.

    python examples/ray_serve.py NAME=DIRECTORY [NAME=DIRECTORY ...]

Asks for each model once, and prints which replica answered and how long its load took.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.config import RequestRouterConfig

from pagecache_bpf.ray import ResidencyRouter, RoutingStats


@serve.deployment(
    num_replicas=2,
    ray_actor_options={"num_cpus": 0.5},
    request_router_config=RequestRouterConfig(
        request_router_class=ResidencyRouter, request_routing_stats_period_s=1
    ),
)
class Server:
    """Holds one model at a time; here it only reads the files."""

    def __init__(self, models: dict[str, str]) -> None:
        self.models = models
        self.stats = RoutingStats(models)

    def record_routing_stats(self) -> dict[str, object]:
        """Serve calls this on each replica, every second."""
        return self.stats.record()

    @serve.multiplexed(max_num_models_per_replica=1)  # type: ignore[untyped-decorator]
    async def get_model(self, name: str) -> int:
        """Load a model in place of the one that the replica holds."""
        return sum(len(path.read_bytes()) for path in Path(self.models[name]).glob("*.safetensors"))

    async def __call__(self) -> str:
        """Answer a request: load its model if this replica holds another."""
        began = time.perf_counter()
        name = serve.get_multiplexed_model_id()
        size = await self.get_model(name)
        took = time.perf_counter() - began
        node = ray.get_runtime_context().get_node_id()
        return f"{name}: {size} bytes in {took:.3f} s on node {node[:8]}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="+", metavar="NAME=DIRECTORY")
    models = dict(word.split("=", 1) for word in parser.parse_args().models)
    deployment: Any = Server
    handle = serve.run(deployment.bind(models), route_prefix=None)
    for name in models:
        print(handle.options(multiplexed_model_id=name).remote().result(), flush=True)
    serve.shutdown()
