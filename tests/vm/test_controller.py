# SPDX-License-Identifier: Apache-2.0
"""The controller with the module: loads on engine struct_ops, and what outlives a kill."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cachestat import PAGE_SIZE, resident_pages
from pagecache_bpf.ipc.public_client import PublicClient
from pagecache_bpf.kernel.control_device import Device
from pagecache_bpf.policy import loader
from tests.native.controller import Controller, serving
from tests.vm.kernel import make_file, read_all, wait_for
from tests.vm.test_kmod_prefetch import nodes_of

pytestmark = pytest.mark.vm

PAGES = 1021
LOADS = '[loads]\npolicies = ["sequential"]\n'


@pytest.fixture
def file(mount: Path) -> Path:
    return make_file(mount / "model.safetensors", PAGES)


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "run"


def load(client: PublicClient, path: Path) -> dict[str, Any]:
    fd = os.open(path, os.O_RDONLY)
    try:
        return client.open_load([fd], model="m")
    finally:
        os.close(fd)


def tags() -> list[tuple[str, str]]:
    with Device() as device:
        return [(tag.path, tag.policy) for tag in device.tags()]


def kill(controller: Controller) -> None:
    controller.process.send_signal(signal.SIGKILL)
    controller.process.wait(20)


def test_a_load_gets_the_better_engine(directory: Path, file: Path) -> None:
    with serving(directory, LOADS) as controller:
        with controller.client() as client:
            report = load(client, file)
            assert (report["engine"], report["policy"], report["why"]) == (
                "struct_ops",
                "sequential",
                "",
            )
            assert tags() == [(str(file), "sequential")]
            read_all(file)
            with Device() as device:
                (policy,) = device.policies()
                assert policy.counters["prefetch_bytes"] > PAGES * PAGE_SIZE // 4
            done = client.done(report["load"])
            assert done["dropped_bytes"] == PAGES * PAGE_SIZE and resident_pages(file) == 0
        assert tags() == [] and loader.pinned() == ["sequential"]
    # What it had attached for loads it has detached.
    wait_for(lambda: loader.pinned() == [], "the policy to be detached")


def test_what_a_killed_controller_leaves(directory: Path, file: Path) -> None:
    """Root's policies and tags go on; the next controller ends what was a load's."""
    other = make_file(file.with_name("other.safetensors"), 7)
    with serving(directory, LOADS) as controller:
        assert controller.run("attach", "noop", other).code == 0
        with controller.client() as client:
            load(client, file)
            kill(controller)
    assert sorted(tags()) == [(str(file), "sequential"), (str(other), "noop")]
    assert loader.pinned() == ["noop", "sequential"]
    read_all(file)  # still governed: nothing of it needs the controller
    with serving(directory, LOADS) as controller:
        assert controller.ready["policies"] == {"noop": "struct_ops", "sequential": "struct_ops"}
        assert tags() == [(str(other), "noop")]
        with controller.client() as client:
            assert load(client, file)["engine"] == "struct_ops"
    wait_for(lambda: loader.pinned() == ["noop"], "its own policy to be detached")
    assert tags() == [(str(other), "noop")]


def test_what_is_to_persist_stays_attached(directory: Path, file: Path) -> None:
    model = f'[[model]]\npath = "{file}"\npolicy = "sequential"\nbudget = "64MiB"\n'
    with serving(directory, LOADS + model, "--persist"):
        assert tags() == [(str(file), "sequential")]
        assert loader.knobs_of("sequential")["budget_mib"] == 64
    assert tags() == [(str(file), "sequential")] and loader.pinned() == ["sequential"]
    with serving(directory, LOADS + model):
        assert tags() == [(str(file), "sequential")]
    wait_for(lambda: loader.pinned() == [], "the policy to be detached")


@pytest.mark.parametrize("engine", ["struct_ops", "agent"])
def test_pages_land_on_the_node_of_the_device(
    slow_mount: Path, directory: Path, engine: str
) -> None:
    """The reader runs on node 0, its accelerator is near node 1: so are the pages.

    What the reader reads by itself until the agent is there lands on its own node.  So it reads as
    mmap does, in pieces of read_ahead_kb: of pieces of 1 MiB the kernel reads ten times as much.
    A few MiB, whatever the size, and more on a busy machine: so the file is not small.
    """
    if not Path("/sys/devices/system/node/node1").exists():
        pytest.skip("this guest has one NUMA node; boot it with --numa 2")
    file = make_file(slow_mount / "model.safetensors", 65521)
    before = os.sched_getaffinity(0)
    config = f'[loads]\npolicies = ["sequential"]\nengine = "{engine}"\n'
    with serving(directory, config) as controller, controller.client() as client:
        os.sched_setaffinity(0, {0})
        try:
            fd = os.open(file, os.O_RDONLY)
            devices = [{"name": "cuda:0", "pci": "0000:3b:00.0", "node": 1}]
            report = client.open_load([fd], model="m", devices=devices)
            os.close(fd)
            assert (report["engine"], report["node"]) == (engine, 1)
            read_all(file, 128 << 10)
            counts = nodes_of(file)
            print(engine, counts)
            assert counts[1] >= 0.95 * sum(counts.values()), counts
        finally:
            os.sched_setaffinity(0, before)
