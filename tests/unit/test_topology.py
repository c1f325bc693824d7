# SPDX-License-Identifier: Apache-2.0
"""Accelerators and nodes of machines of known shapes, and what device names mean there."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pagecache_bpf import topology
from pagecache_bpf.cli.verbs import topology as verb
from pagecache_bpf.errors import UsageError
from pagecache_bpf.topology import Topology, place
from pagecache_bpf.topology.types import parse_cpulist, pci_address
from tests.unit.command import run, undocumented
from tests.unit.machines import SHAPES, build

H100 = [f"GPU-{0x8932F937 + n * 0x01010101:08x}-d72c-4106-c12f-20bd9faed9{n:02x}" for n in range(8)]


@pytest.fixture
def machine(request: pytest.FixtureRequest, tmp_path: Path) -> Topology:
    """The machine whose shape the test is parametrized with."""
    return topology.read(build(tmp_path, request.param))


def shape(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("machine", names, indirect=True)


def nodes_of(machine: Topology, prefix: str, **environ: str) -> list[int | None]:
    """The nodes of PREFIX:0, PREFIX:1, ... as a process with that environment sees them."""
    found: list[int | None] = []
    while True:
        try:
            found.append(place(f"{prefix}:{len(found)}", machine, environ).node)
        except UsageError:
            return found


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_is_read_and_printed(name: str, tmp_path: Path) -> None:
    machine = topology.read(build(tmp_path, name))
    data = json.loads(json.dumps({**machine.as_json(), "devices": []}))
    assert not undocumented(data, verb.JSON["topology"])
    assert [node.id for node in machine.nodes] == [int(key) for key in SHAPES[name]["nodes"]]
    for accelerator in machine.accelerators:
        assert place(accelerator.pci, machine, {}).accelerator == accelerator
        assert accelerator.node is None or machine.cpus_of(accelerator.node)


@shape("no-accelerator")
def test_no_accelerator(machine: Topology) -> None:
    """A processor's own graphics is none."""
    assert machine.accelerators == () and not machine.unified
    with pytest.raises(UsageError, match=r"there is no device cuda:0.*none"):
        place("cuda:0", machine, {})
    assert place("cpu", machine, {}).node is None


@shape("single-node")
def test_single_node(machine: Topology) -> None:
    (gpu,) = machine.accelerators  # not the GPU's sound device
    assert (gpu.node, gpu.index, gpu.model) == (0, 0, "NVIDIA GeForce RTX 4090")
    assert nodes_of(machine, "cuda") == [0]


@shape("two-socket-8-gpu")
def test_two_sockets_eight_gpus(machine: Topology) -> None:
    assert [accelerator.node for accelerator in machine.accelerators] == [0] * 4 + [1] * 4
    assert [accelerator.uuid for accelerator in machine.accelerators] == H100
    assert nodes_of(machine, "cuda") == [0] * 4 + [1] * 4
    assert machine.cpus_of(1)[:2] == (56, 57) and len(machine.cpus_of(1)) == 112
    assert not machine.unified
    assert topology.node_of(topology.place_all(["cuda:0", "cuda:3"], machine, {})) == 0
    assert topology.node_of(topology.place_all(["cuda:3", "cuda:4"], machine, {})) is None
    assert topology.place_all([], None) == ()


CUDA = {
    "2,7": [0, 1],
    "7": [1],
    "": [],
    "-1": [],
    "NoDevFiles": [],
    "0,2,-1,7": [0, 0],
    "0,8,7": [0],
    "0,0": [],
    "5,1,5": [],
    " 4 , 0": [1, 0],
    "1gpu,6ampere": [0, 1],
    H100[5]: [1],
    f"{H100[4]},{H100[0][:12]}": [1, 0],
    f"{H100[4]},{H100[4]}": [],
    f"{H100[4]},{H100[4][:14]}": [],
    f"{H100[4]},0": [1],
    "GPU-00000000": [],
    "GPU-": [],  # the beginning of all of them
}


@shape("two-socket-8-gpu")
@pytest.mark.parametrize("value", CUDA)
def test_cuda_visible_devices(machine: Topology, value: str) -> None:
    assert nodes_of(machine, "cuda", CUDA_VISIBLE_DEVICES=value) == CUDA[value]


@shape("two-socket-8-gpu")
def test_names(machine: Topology) -> None:
    for name in ("0000:9d:00.0", "9d:00.0", "00000000:9D:00.0", "0000:9d:00", H100[4], "CUDA:4"):
        assert place(name, machine, {}).node == 1, name
    assert place("cuda", machine, {"CUDA_VISIBLE_DEVICES": "7"}).node == 1
    # An address names a device of the machine, seen or not.
    assert place("9d:00.0", machine, {"CUDA_VISIBLE_DEVICES": "0"}).node == 1
    for name in (
        "",
        "cuda:",
        "cuda:-1",
        "cuda:x",
        "gpu:0",
        "cuda:0:1",
        "GPU-",
        "9d:00.9",
        "9d:40.0",
    ):
        with pytest.raises(UsageError, match="is not a device"):
            place(name, machine, {})
    for name in ("cuda:8", "rocm:0", "npu:0", "9e:00.0", "GPU-12345678"):
        with pytest.raises(UsageError, match="there is no device"):
            place(name, machine, {})
    with pytest.raises(UsageError, match="CUDA_VISIBLE_DEVICES is set"):
        place("cuda:1", machine, {"CUDA_VISIBLE_DEVICES": "3"})


def fake_nvml(gpus: dict[str, list[tuple[str, int, int]]]) -> Any:
    """NVML with MIG instances (UUID, GPU instance, compute instance) on GPUs by address."""
    addresses = list(gpus)
    error = RuntimeError("nvml says no")

    def handle_of(mig: tuple[int, int], number: int) -> tuple[str, int, int]:
        found = gpus[addresses[mig[0]]]
        if number >= len(found):
            raise error
        return found[number]

    return SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: len(addresses),
        nvmlDeviceGetHandleByIndex=lambda number: (number, -1),
        nvmlDeviceGetPciInfo=lambda gpu: SimpleNamespace(busId=f"0000{addresses[gpu[0]]}".encode()),
        nvmlDeviceGetUUID=lambda handle: (
            handle[0] if isinstance(handle[0], str) else H100[handle[0]]
        ),
        nvmlDeviceGetName=lambda gpu: "NVIDIA H100 80GB HBM3",
        nvmlDeviceGetMigMode=lambda gpu: [int(bool(gpus[addresses[gpu[0]]])), 0],
        nvmlDeviceGetMaxMigDeviceCount=lambda gpu: 7,
        nvmlDeviceGetMigDeviceHandleByIndex=handle_of,
        nvmlDeviceGetGpuInstanceId=lambda mig: mig[1],
        nvmlDeviceGetComputeInstanceId=lambda mig: mig[2],
    )


def test_mig(tmp_path: Path) -> None:
    tree = build(tmp_path, "two-socket-8-gpu")
    migs = ["MIG-1f2a0000-aaaa-5bbb-8ccc-000000000001", "MIG-1f2b0000-aaaa-5bbb-8ccc-000000000002"]
    gpus: dict[str, list[tuple[str, int, int]]] = {
        accelerator.pci: [] for accelerator in topology.read(tree).accelerators
    }
    gpus["0000:c3:00.0"] = [(migs[0], 1, 0), (migs[1], 2, 0)]
    machine = topology.read(tree, fake_nvml(gpus))
    assert "NVML" in machine.sources
    assert [mig.uuid for mig in machine.accelerators[5].migs] == migs
    assert place(migs[1], machine, {}).node == 1
    seen = {"CUDA_VISIBLE_DEVICES": f"{migs[1]},{migs[0]}"}
    assert nodes_of(machine, "cuda", **seen) == [1, 1]
    assert nodes_of(machine, "cuda", CUDA_VISIBLE_DEVICES=f"{migs[0]},{migs[0]}") == []
    assert nodes_of(machine, "cuda", CUDA_VISIBLE_DEVICES=f"{migs[0]},{H100[0]}") == [1]
    # As drivers before R470 wrote it: the GPU is in the name.
    old = f"MIG-{H100[6]}/1/0"
    assert place(old, machine, {}).node == 1
    assert nodes_of(machine, "cuda", CUDA_VISIBLE_DEVICES=old) == [1]
    # Without NVML it could be any of them.
    blind = topology.read(tree)
    placed = place("cuda:0", blind, {"CUDA_VISIBLE_DEVICES": migs[0]})
    assert placed.node is None and placed.accelerator is None and "NVML" in placed.why
    assert place(migs[0], blind, {}).node is None


def test_nvml_that_fails_takes_nothing_away(tmp_path: Path) -> None:
    tree = build(tmp_path, "two-socket-8-gpu")
    broken = fake_nvml({"0000:1b:00.0": []})
    broken.nvmlDeviceGetUUID = lambda handle: 1 / 0
    assert topology.read(tree, broken).accelerators == topology.read(tree).accelerators
    broken.nvmlInit = lambda: 1 / 0
    assert "NVML" not in topology.read(tree, broken).sources


@shape("gh200")
def test_gh200_memory_of_the_gpu_is_a_node(machine: Topology) -> None:
    (gpu,) = machine.accelerators
    assert (gpu.node, gpu.memory_node, gpu.unified) == (0, 1, True)
    assert machine.node(1) and machine.node(1).accelerator == "0009:01:00.0"  # type: ignore[union-attr]
    assert machine.node(2) and machine.node(2).accelerator is None  # type: ignore[union-attr]
    # Pages go to the host's memory; a worker for the GPU's own node would run next to it.
    assert place("cuda:0", machine, {}).node == 0
    assert machine.cpus_of(1) == tuple(range(72))
    assert "NUMA node 1" in machine.notes[0]


@shape("gb200")
def test_gb200_without_numa_status(machine: Topology) -> None:
    assert [
        (accelerator.node, accelerator.memory_node) for accelerator in machine.accelerators
    ] == [(0, 2), (1, 3)]
    assert machine.unified
    assert machine.cpus_of(3) == tuple(range(72, 144))


@shape("gb10")
def test_gb10_shares_memory(machine: Topology) -> None:
    (gpu,) = machine.accelerators
    assert (gpu.node, gpu.memory_node, gpu.unified) == (None, None, True)
    assert "need not be copied" in machine.notes[0]


@shape("mi300x-8-gpu")
def test_mi300x(machine: Topology) -> None:
    assert [accelerator.index for accelerator in machine.accelerators] == list(range(8))
    for prefix in ("rocm", "hip", "cuda"):  # PyTorch calls AMD's GPUs cuda, too
        assert nodes_of(machine, prefix) == [0] * 4 + [1] * 4
    assert not machine.unified
    uuids = [accelerator.uuid for accelerator in machine.accelerators]
    assert uuids[1] == "GPU-8a3c1f0000001111"

    def seen(**environ: str) -> list[int | None]:
        return nodes_of(machine, "rocm", **environ)

    assert seen(ROCR_VISIBLE_DEVICES="4,0") == [1, 0]
    assert seen(ROCR_VISIBLE_DEVICES="") == seen(ROCR_VISIBLE_DEVICES="-1") == []
    assert seen(ROCR_VISIBLE_DEVICES=f"{uuids[7]},1") == [1, 0]
    assert seen(ROCR_VISIBLE_DEVICES="3,x,4") == seen(ROCR_VISIBLE_DEVICES="3,9") == [0]
    assert seen(ROCR_VISIBLE_DEVICES="4,4,0") == [1]
    # HIP's numbers are those that ROCr has left over.
    assert seen(ROCR_VISIBLE_DEVICES="3,4", HIP_VISIBLE_DEVICES="1") == [1]
    assert seen(HIP_VISIBLE_DEVICES="7,0,-1,1") == [1, 0]
    assert seen(CUDA_VISIBLE_DEVICES="6") == [1]
    assert seen(CUDA_VISIBLE_DEVICES="6", HIP_VISIBLE_DEVICES="0") == [0]


@shape("mi300a", "ryzen-apu")
def test_apus_are_unified(machine: Topology) -> None:
    assert machine.unified and all(accelerator.unified for accelerator in machine.accelerators)


@shape("mi300a")
def test_domains_of_kfd(machine: Topology) -> None:
    assert [accelerator.pci for accelerator in machine.accelerators] == [
        "0000:01:00.0",
        "0001:01:00.0",
    ]
    assert nodes_of(machine, "rocm") == [0, 1]


@shape("ascend-910b-8")
def test_ascend_numbers_are_not_guessed(machine: Topology) -> None:
    """On such a server NPU 0 is at c1:00.0: the order of addresses would be wrong."""
    placed = place("npu:0", machine, {})
    assert placed.node is None and "numbers" in placed.why
    assert place("c1:00.0", machine, {}).node == 3

    def count(value: str) -> int:
        return len(nodes_of(machine, "npu", ASCEND_RT_VISIBLE_DEVICES=value))

    assert count("1,2,3") == 3
    assert count("1, 2,3") == 1  # a blank ends the list
    assert count("1,3,8") == 2  # and so does a number that is none
    assert count("1,2,-1,3") == 2
    assert count("3,2,1") == 1  # rising order only
    assert count("1,1") == 1
    assert count("") == count("x") == 0


@shape("numa-node-unknown")
def test_unknown_stays_unknown(machine: Topology) -> None:
    assert [accelerator.node for accelerator in machine.accelerators] == [None, None]
    assert machine.accelerators[1].uuid is None  # the driver has not asked it yet
    placed = place("cuda:0", machine, {})
    assert placed.node is None and placed.accelerator is not None and "firmware" in placed.why
    assert machine.cpus_of(placed.node) == ()
    assert "0000:3b:00.0" in machine.notes[0]


@shape("two-models")
def test_cudas_order_of_unlike_gpus_is_not_guessed(machine: Topology) -> None:
    """By default it puts the fastest first, which here is at the second address."""
    placed = place("cuda:0", machine, {})
    assert placed.node is None and "PCI_BUS_ID" in placed.why
    assert nodes_of(machine, "cuda", CUDA_DEVICE_ORDER="PCI_BUS_ID") == [0, 1]
    assert nodes_of(machine, "cuda", CUDA_VISIBLE_DEVICES=H100[1]) == [1]


@shape("two-models")
def test_torch_knows_if_it_is_running(machine: Topology, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = [
        SimpleNamespace(pci_domain_id=0, pci_bus_id=0xAF, pci_device_id=0),
        SimpleNamespace(pci_domain_id=0, pci_bus_id=0x3B, pci_device_id=0),
    ]
    cuda = SimpleNamespace(
        is_initialized=lambda: False,
        device_count=lambda: len(gpus),
        get_device_properties=lambda number: gpus[number],
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    assert place("cuda:0", machine, {}).node is None  # and CUDA is not initialized for us
    cuda.is_initialized = lambda: True
    assert nodes_of(machine, "cuda") == [1, 0]
    del gpus[0].pci_domain_id  # an older torch
    assert place("cuda:0", machine, {}).node is None


def test_addresses_and_cpu_lists() -> None:
    assert pci_address("00000009:01:00.0") == "0009:01:00.0"
    assert pci_address("10000:e1:00.0") == "10000:e1:00.0"  # domains behind VMD
    assert pci_address("1:2:3") is None and pci_address("zz:00.0") is None
    assert parse_cpulist("0-2,8,x\n") == (0, 1, 2, 8)
    assert parse_cpulist("\n") == ()


def test_the_command() -> None:
    done = run("topology", "--json")
    assert done.code == 0, done.err
    assert not undocumented(done.data, verb.JSON["topology"])
    assert done.data["nodes"] == [] or done.data["nodes"][0]["cpus"]
    assert run("topology").code == 0
    failed = run("topology", "gpu:0", "--json")
    assert failed.code == 2 and failed.out == "" and "is not a device" in failed.error["what"]
