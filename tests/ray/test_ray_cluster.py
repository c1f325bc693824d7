# SPDX-License-Identifier: Apache-2.0
"""Requests and replicas go where the pages are, on a real Ray cluster: make test-ray."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray", reason="ray is not installed")

import ray

from benchmarks.cgroups import Group
from pagecache_bpf.kernel.kernelfs import LIVE
from pagecache_bpf.ray import LOOK, SECONDS, node_seconds, warm_nodes
from pagecache_bpf.weights.files import IN_MEMORY
from tests.ray import cluster as running
from tests.unit import weights

MODELS = ["a", "b", "c", "d", "e", "f"]


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, dict[str, str]]]:
    """The cluster, and the directory of the models by node id."""
    root = tmp_path_factory.mktemp("models")
    if LIVE.fstype(root.stat().st_dev) in IN_MEMORY:
        pytest.skip("the temporary directory is in memory (give --basetemp on a disk)")
    directories = running.make_models(root, MODELS, 4096)
    with running.cluster() as made:
        ids = sorted(node["NodeID"] for node in ray.nodes())
        yield made, dict(zip(ids, map(str, directories), strict=True))


def place(directories: dict[str, str], homes: dict[str, str], share: float = 1.0) -> None:
    """Have each model cached on one node only."""
    for node, directory in directories.items():
        for model, home in homes.items():
            path = Path(directory) / model / "model.safetensors"
            running.set_cached(path, share if node == home else 0.0)


def ask(handle: Any, model: str, method: str = "__call__") -> Any:
    return getattr(handle.options(multiplexed_model_id=model), method).remote().result(timeout_s=60)


def wait_for_news(
    handle: Any, directories: dict[str, str], homes: dict[str, str], limit: float = 60.0
) -> None:
    """Wait until each replica has told twice of the state that place() made."""
    deadline = time.monotonic() + limit
    first: dict[str, int] = {}
    ready: set[str] = set()
    while len(ready) < running.NODES and time.monotonic() < deadline:
        node, told = handle.looks.remote().result(timeout_s=60)
        seconds = told.get(SECONDS, {})
        warm = {model for model, home in homes.items() if home == node}
        size = (Path(directories[node]) / next(iter(homes)) / "model.safetensors").stat().st_size
        limit_s = size / running.DEVICE / 2  # a cached copy loads ten times faster
        known = all((seconds.get(model, math.inf) < limit_s) == (model in warm) for model in homes)
        if seconds and known:
            first.setdefault(node, told[LOOK])
            if told[LOOK] >= first[node] + 2:
                ready.add(node)
        time.sleep(0.05)
    assert len(ready) == running.NODES


def spread(directories: dict[str, str], models: list[str]) -> dict[str, str]:
    """A home for each model, by turns."""
    ids = sorted(directories)
    return {model: ids[number % len(ids)] for number, model in enumerate(models)}


def test_requests_go_where_the_pages_are(nodes: tuple[Any, dict[str, str]]) -> None:
    _, directories = nodes
    handle = running.deploy("ours", directories, MODELS, ours=True)
    homes = spread(directories, MODELS)
    place(directories, homes)
    wait_for_news(handle, directories, homes)
    for model in MODELS[3:]:  # no replica has one of them: only the page cache tells them apart
        assert ask(handle, model)[0] == homes[model]
    for model in MODELS[3:]:  # the replica that has it
        node, _ = ask(handle, model)
        assert node == homes[model]
    ray.serve.delete("ours")


def test_what_is_read_is_charged_to_the_raylet_that_serves(
    nodes: tuple[Any, dict[str, str]],
) -> None:
    """Each has a memory cgroup of its own; nothing of a model is cached when its request comes."""
    made, directories = nodes
    if not made.groups:
        pytest.skip("raylets have memory cgroups of their own only as root")
    handle = running.deploy("charged", directories, MODELS, ours=True)
    place(directories, spread(directories, MODELS), share=0.0)  # checked by cachestat
    before = {node: charged(group) for node, group in made.groups.items()}
    served, _ = ask(handle, "a")
    size = (Path(directories[served]) / "a" / "model.safetensors").stat().st_size
    for node, group in made.groups.items():
        grown = charged(group) - before[node]
        assert grown > size * 0.9 if node == served else grown < size // 2, (node, grown)
    ray.serve.delete("charged")


def charged(group: Group) -> int:
    """Bytes of files in the page cache that a group is charged for."""
    lines = (group.path / "memory.stat").read_text().splitlines()
    found = dict(line.split() for line in lines)
    return int(found.get("file", found.get("cache", 0)))


def test_lies_and_silence_cost_no_request(nodes: tuple[Any, dict[str, str]]) -> None:
    """A node that says nonsense is last, and one that says nothing new counts as unknown."""
    _, directories = nodes
    ids = sorted(directories)
    handle = running.deploy("lies", directories, MODELS, ours=True, lie=ids[0])
    homes = dict.fromkeys(MODELS, ids[1])
    place(directories, homes)
    wait_for_news(handle, directories, homes)
    assert ask(handle, "a")[0] == ids[1]
    hushed: set[str] = set()
    deadline = time.monotonic() + 60
    while len(hushed) < running.NODES and time.monotonic() < deadline:
        hushed.add(handle.hush.remote().result(timeout_s=60))
    time.sleep(21)  # longer than stale_s: the statistics are worth nothing now
    assert {ask(handle, model)[0] for model in MODELS} <= set(ids)
    ray.serve.delete("lies")


def test_new_replicas_start_on_warm_nodes(nodes: tuple[Any, dict[str, str]]) -> None:
    """By label selector; node_seconds() looks on each node through its own path."""
    _, directories = nodes
    ids = sorted(directories)
    place(directories, dict.fromkeys(["a"], ids[2]))
    path = Path(directories[ids[2]]) / "a"
    seconds = node_seconds(path, speeds=running.SPEEDS)
    assert set(seconds) == set(ids)
    # All raylets see this machine's files: the one path is as warm from each of them.
    assert len({round(value, 9) for value in seconds.values() if value is not None}) == 1
    assert warm_nodes(seconds) == {}
    options = warm_nodes({ids[0]: 3.0, ids[1]: None, ids[2]: 0.5})
    assert options["label_selector"] == {"ray.io/node-id": f"in({ids[2]})"}

    class Replica:
        def where(self) -> str:
            return str(ray.get_runtime_context().get_node_id())

    actor_class: Any = ray.remote(Replica)
    actors = [actor_class.options(num_cpus=0, **options).remote() for _ in range(3)]
    assert set(ray.get([actor.where.remote() for actor in actors], timeout=60)) == {ids[2]}
    gone = warm_nodes({ids[0]: 3.0, ids[1]: None, "f" * 56: 0.5})
    anywhere = actor_class.options(num_cpus=0, **gone).remote()
    assert ray.get(anywhere.where.remote(), timeout=60) in ids
    for actor in (*actors, anywhere):
        ray.kill(actor)


def test_a_dead_raylet_costs_no_request(nodes: tuple[Any, dict[str, str]]) -> None:
    """Last, as it takes a node away: requests for what was warm there are served by others."""
    made, directories = nodes
    handle = running.deploy("dying", directories, MODELS, ours=True)
    # Not the first one, where the driver and Serve's controller are.
    victim = made.list_all_nodes()[-1]
    homes = dict.fromkeys(MODELS, victim.node_id)
    place(directories, homes)
    wait_for_news(handle, directories, homes)
    assert ask(handle, "a")[0] == victim.node_id
    made.remove_node(victim, allow_graceful=False)
    for model in MODELS:
        deadline = time.monotonic() + 60
        while True:
            try:
                node, _ = ask(handle, model)
                break
            except (ray.exceptions.RayError, TimeoutError):  # a request that was on its way there
                assert time.monotonic() < deadline
        assert node in directories
    ray.serve.delete("dying")


def test_the_example_serves_each_model(tmp_path: Path) -> None:
    """As a user runs it, in a Ray of its own."""
    sizes = {}
    for name, rows in (("a", 1021), ("b", 2039)):
        (tmp_path / name).mkdir()
        file = tmp_path / name / "model.safetensors"
        weights.safetensors(file, {name: (rows, 512)})
        sizes[name] = file.stat().st_size
    done = subprocess.run(
        [sys.executable, "examples/ray_serve.py", *(f"{name}={tmp_path / name}" for name in sizes)],
        capture_output=True,
        text=True,
        env={**os.environ, "RAY_ADDRESS": "local"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for name, size in sizes.items():
        assert f"{name}: {size} bytes in " in done.stdout
