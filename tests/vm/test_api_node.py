# SPDX-License-Identifier: Apache-2.0
"""Affinity in the guest: nodes as its kernel tells them, and pages that land where they should."""

from __future__ import annotations

from pathlib import Path

import pytest

import pagecache_bpf as pc
from pagecache_bpf import topology
from pagecache_bpf.loads.residency_snapshot import Snapshot
from pagecache_bpf.loads.unprivileged_window import ReadaheadWindow
from pagecache_bpf.topology import NVIDIA, Accelerator, Topology
from tests.vm.kernel import make_file, resident, wait_for
from tests.vm.test_kmod_prefetch import nodes_of

pytestmark = pytest.mark.vm

PAGES = 8191
SHARE = 0.95


@pytest.fixture
def two_nodes() -> Topology:
    machine = topology.read()
    if len(machine.nodes) < 2:
        pytest.skip("this guest has one NUMA node; boot it with --numa 2")
    return machine


def test_nodes_are_read(two_nodes: Topology) -> None:
    assert [node.id for node in two_nodes.nodes] == [0, 1]
    assert [set(node.cpus) for node in two_nodes.nodes] == [{0}, {1}]
    assert all(node.memory_bytes and len(node.distances) == 2 for node in two_nodes.nodes)


@pytest.mark.parametrize("node", [0, 1])
def test_the_unprivileged_window_reads_on_the_node(
    mount: Path, two_nodes: Topology, node: int
) -> None:
    file = make_file(mount / "weights.safetensors", PAGES)
    window = ReadaheadWindow([file], Snapshot([file]), cpus=two_nodes.cpus_of(node))
    try:
        wait_for(lambda: resident(file) == PAGES, "the whole file", 60)
    finally:
        window.stop()
    counts = nodes_of(file)
    assert counts[node] >= SHARE * sum(counts.values()), counts


@pytest.mark.parametrize("node", [0, 1])
def test_a_device_s_node_is_where_its_load_lands(
    mount: Path, two_nodes: Topology, node: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the name of a device to the pages.  The guest has no accelerator: one is put there."""
    gpu = Accelerator(NVIDIA, "0000:65:00.0", index=0, node=node)
    machine = Topology(two_nodes.nodes, (gpu,))
    monkeypatch.setattr(topology, "read", lambda: machine)
    monkeypatch.setenv("PAGECACHE_BPF_API", "alone")
    file = make_file(mount / "weights.safetensors", PAGES)
    with pc.load(file, devices="cuda:0", keep=True) as load:
        wait_for(lambda: resident(file) == PAGES, "the whole file", 60)
        assert load.report().node == node
    counts = nodes_of(file)
    assert counts[node] >= SHARE * sum(counts.values()), counts


@pytest.mark.parametrize("node", [0, 1])
def test_prefetch_reads_on_the_node(
    mount: Path, two_nodes: Topology, node: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = Accelerator(NVIDIA, "0000:65:00.0", index=0, node=node)
    monkeypatch.setattr(topology, "read", lambda: Topology(two_nodes.nodes, (gpu,)))
    file = make_file(mount / "weights.safetensors", PAGES)
    assert pc.prefetch(file, devices="65:00.0") == file.stat().st_size
    counts = nodes_of(file)
    assert counts[node] >= SHARE * sum(counts.values()), counts
