# SPDX-License-Identifier: Apache-2.0
"""Three raylets on one machine, each with copies of the models of its own, and a deployment.

What a raylet has in the page cache is what its own copies have: no two share a page.  As root, each
raylet has a memory cgroup of its own, too, to which is charged what its workers read.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.cluster_utils import Cluster
from ray.serve.config import RequestRouterConfig

from benchmarks.cgroups import Group, group
from pagecache_bpf.kernel.cachestat import cachestat
from pagecache_bpf.kernel.file_pages import PAGE_SIZE
from pagecache_bpf.kernel.process_tree import descendants
from pagecache_bpf.placement.node_watch import Speeds
from pagecache_bpf.ray import ResidencyRouter, RoutingStats
from tests.unit import weights

NODES = 3
#: No measurement: what is compared is where pages are.
DEVICE = 2e9
SPEEDS = Speeds(device=DEVICE, host_to_device=2e10)


def make_models(root: Path, names: Sequence[str], rows: int) -> list[Path]:
    """Write models for each node; rows: of 1 KiB in each of four tensors."""
    directories = []
    for node in range(NODES):
        directory = root / f"node{node}"
        for name in names:
            (directory / name).mkdir(parents=True)
            tensors = {f"{name}.{part}": (rows, 512) for part in range(4)}
            weights.safetensors(directory / name / "model.safetensors", tensors)
        directories.append(directory)
    return directories


def set_cached(path: Path, share: float) -> None:
    """Leave a share of a file in the page cache, from its start, and check that with the kernel."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # no readahead beyond it
        wanted = int(os.fstat(fd).st_size * share) // PAGE_SIZE * PAGE_SIZE
        for offset in range(0, wanted, 1 << 20):
            os.pread(fd, min(1 << 20, wanted - offset), offset)
        found = cachestat(fd).cached * PAGE_SIZE
        # Some pages more or fewer are left by the kernel's own readahead and by proactive reclaim.
        assert abs(found - wanted) <= max(64 * PAGE_SIZE, wanted // 50), (path, found, wanted)
    finally:
        os.close(fd)


class Raylets(Cluster):
    """The raylets; groups: the memory cgroup of each by its node's id, as root."""

    groups: dict[str, Group]

    def start(self, group: Group | None) -> None:
        """Run one more raylet, with all that belongs to it in a group."""
        node = self.add_node(num_cpus=2, object_store_memory=80 << 20, include_dashboard=False)
        if group is None:
            return
        self.groups[node.node_id] = group
        for _, own in node.live_processes():
            for number in descendants(own.pid):
                with suppress(ProcessLookupError):
                    (group.path / "cgroup.procs").write_text(str(number))


def _stop(made: Raylets) -> None:
    serve.shutdown()
    ray.shutdown()
    made.shutdown()


@contextmanager
def cluster() -> Iterator[Raylets]:
    """Run three raylets with two CPUs each, and Serve's own processes on the first."""
    with ExitStack() as stack:
        groups: list[Group | None] = [None] * NODES
        if os.geteuid() == 0:
            names = [f"raylet-{os.getpid()}-{number}" for number in range(NODES)]
            groups = [stack.enter_context(group(name)) for name in names]
        made = Raylets()
        made.groups = {}
        stack.callback(_stop, made)
        for own in groups:
            made.start(own)
        made.wait_for_nodes()
        ray.init(address=made.address, log_to_driver=False)
        serve.start(proxy_location="Disabled")
        yield made


@serve.deployment
class Server:
    """Reads the model that a request is for, and tells where and how long that took."""

    def __init__(self, directories: Mapping[str, str], names: Sequence[str], lie: str) -> None:
        """Serve.

        Args:
            directories: of the models, by Ray's node id.
            names: of the models.
            lie: id of a node that claims to have everything, and to look again and again.
        """
        self.node = ray.get_runtime_context().get_node_id()
        self.directory = Path(directories[self.node])
        self.stats = RoutingStats({name: self.directory / name for name in names}, speeds=SPEEDS)
        self.names, self.lie, self.silent = names, lie, False
        self.told: dict[str, Any] = {}

    def record_routing_stats(self) -> dict[str, Any]:
        """Called by Serve."""
        if not self.silent:
            self.told = self.stats.record()
        if self.lie == self.node:
            nonsense = {name: -1e300 for name in self.names}
            return {**self.told, "pagecache_seconds_to_load": nonsense}
        return self.told

    @serve.multiplexed(max_num_models_per_replica=1)
    async def get_model(self, model: str) -> float:
        """Read it as a loader does."""
        began = time.perf_counter()
        with (self.directory / model / "model.safetensors").open("rb", buffering=0) as file:
            while file.read(1 << 20):
                pass
        return time.perf_counter() - began

    async def __call__(self) -> tuple[str, float]:
        """Serve a request."""
        took = await self.get_model(serve.get_multiplexed_model_id())
        return self.node, took

    async def looks(self) -> tuple[str, dict[str, Any]]:
        """Tell what the node said last."""
        return self.node, self.told

    async def hush(self) -> str:
        """Say the same from now on."""
        self.silent = True
        return str(self.node)


def deploy(
    name: str, directories: Mapping[str, str], models: Sequence[str], *, ours: bool, lie: str = ""
) -> Any:
    """Deploy three replicas, one a node; with our router or Ray's own."""
    router: dict[str, Any] = {"request_routing_stats_period_s": 0.5}
    if ours:
        router["request_router_class"] = ResidencyRouter
        router["request_router_kwargs"] = {"stale_s": 20.0}
    deployment: Any = Server
    made = deployment.options(
        name=name,
        num_replicas=NODES,
        max_replicas_per_node=1,
        max_ongoing_requests=4,
        ray_actor_options={"num_cpus": 0.5},
        request_router_config=RequestRouterConfig(**router),
    ).bind(dict(directories), list(models), lie)
    return serve.run(made, name=name, route_prefix=None)
