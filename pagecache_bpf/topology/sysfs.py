# SPDX-License-Identifier: Apache-2.0
"""Nodes and accelerators as the kernel tells them: sysfs, KFD's topology, /proc/driver/nvidia.

Sources: Documentation/ABI/stable/sysfs-devices-node, sysfs-bus-pci (numa_node),
drivers/gpu/drm/amd/amdkfd/kfd_topology.c, and the NVIDIA driver's nv-procfs.c.
"""

from __future__ import annotations

import re
from dataclasses import replace

from pagecache_bpf.kernel.kernelfs import KernelFS
from pagecache_bpf.topology.types import (
    AMD,
    ASCEND,
    INTEL,
    NVIDIA,
    Accelerator,
    Node,
    parse_cpulist,
    pci_address,
)

_VENDORS = {0x10DE: NVIDIA, 0x1002: AMD, 0x19E5: ASCEND, 0x8086: INTEL}
# Class and subclass: VGA, 3D, other display controller, processing accelerator.
_CLASSES = {
    NVIDIA: (0x0300, 0x0302),
    AMD: (0x0300, 0x0302, 0x0380, 0x1200),
    ASCEND: (0x1200,),
    INTEL: (0x0300, 0x0302, 0x0380),
}
# Chips whose memory is coherent with the CPU's over NVLink-C2C (the kernel's vfio driver
# nvgrace-gpu lists the first ones), and those that share one memory with it.
_COHERENT = {0x2342, 0x2345, 0x2348, 0x2941, 0x31C2}
_SHARED = {(NVIDIA, 0x2E12), (AMD, 0x74A0)}  # GB10; MI300A
_PCI = "/sys/bus/pci/devices"
_NODES = "/sys/devices/system/node"
_KFD = "/sys/class/kfd/kfd/topology/nodes"
_PROC_NVIDIA = "/proc/driver/nvidia/gpus"


def read_nodes(fs: KernelFS) -> tuple[Node, ...]:
    """Read the NUMA nodes of the machine.

    Args:
        fs: where the kernel's files are read.

    Returns:
        The nodes, by number; none on a kernel without NUMA.
    """
    numbers = sorted(int(name[4:]) for name in fs.entries(_NODES) if re.fullmatch(r"node\d+", name))
    return tuple(_node(fs, number) for number in numbers)


def _node(fs: KernelFS, number: int) -> Node:
    at = f"{_NODES}/node{number}"
    memory = re.search(r"MemTotal:\s+(\d+) kB", fs.read(f"{at}/meminfo") or "")
    words = (fs.read(f"{at}/distance") or "").split()
    return Node(
        id=number,
        cpus=parse_cpulist(fs.read(f"{at}/cpulist") or ""),
        memory_bytes=int(memory[1]) << 10 if memory else None,
        distances=tuple(int(word) for word in words if word.isdigit()),
    )


def read_pci(fs: KernelFS) -> list[Accelerator]:
    """Read the accelerators on the PCI bus.

    Args:
        fs: where the kernel's files are read.

    Returns:
        The accelerators by address, without numbers: those are the vendors' matter.
    """
    found = []
    for name in fs.entries(_PCI):
        vendor = _VENDORS.get(_hex(fs, f"{_PCI}/{name}/vendor") or 0)
        kind = (_hex(fs, f"{_PCI}/{name}/class") or 0) >> 8
        if vendor is None or kind not in _CLASSES[vendor]:
            continue
        device = _hex(fs, f"{_PCI}/{name}/device")
        if vendor == INTEL and name.startswith("0000:00:02."):
            continue  # the one in the processor: shows a picture, loads no model
        found.append(
            Accelerator(
                vendor,
                name.lower(),
                node=pci_node(fs, name),
                device_id=device,
                unified=(vendor, device) in _SHARED or (vendor == NVIDIA and device in _COHERENT),
            )
        )
    return found


def pci_node(fs: KernelFS, address: str) -> int | None:
    """Return the NUMA node of a PCI device.

    Args:
        fs: where the kernel's files are read.
        address: the device's, in the kernel's notation.

    Returns:
        The node's number; None where the firmware does not tell (-1).
    """
    text = fs.read(f"{_PCI}/{address}/numa_node") or ""
    return int(text) if text.strip().isdigit() else None


def _hex(fs: KernelFS, name: str) -> int | None:
    try:
        return int(fs.read(name) or "", 16)
    except ValueError:
        return None


# NVIDIA


def nvidia(fs: KernelFS, found: list[Accelerator]) -> tuple[list[Accelerator], bool]:
    """Add what NVIDIA's driver tells to the GPUs found.

    The driver numbers GPUs in the order of their PCI addresses; CUDA does so too unless
    CUDA_DEVICE_ORDER asks for the fastest first, which is a matter of the process (see visible.py).

    Args:
        fs: where the kernel's files are read.
        found: what read_pci() returned.

    Returns:
        The accelerators with those GPUs numbered, and whether a driver is there.
    """
    known = fs.entries(_PROC_NVIDIA)
    gpus = []
    for number, gpu in enumerate(sorted(found, key=lambda accelerator: accelerator.pci)):
        at = f"{_PROC_NVIDIA}/{gpu.pci}"
        fields = _fields(fs.read(f"{at}/information") or "")
        uuid = fields.get("GPU UUID")
        status = _fields(fs.read(f"{at}/numa_status") or "")
        node = status.get("Node", "")
        gpus.append(
            replace(
                gpu,
                index=number,
                model=fields.get("Model"),
                uuid=uuid if uuid and "?" not in uuid else None,
                memory_node=int(node) if node.isdigit() else None,
                unified=gpu.unified or node.isdigit(),
            )
        )
    return gpus, bool(known)


def _fields(text: str) -> dict[str, str]:
    """Read the lines "name: value" of a procfs file into a dictionary."""
    pairs = (line.partition(":") for line in text.splitlines())
    return {name.strip(): value.strip() for name, colon, value in pairs if colon}


# AMD


def amd(fs: KernelFS, found: list[Accelerator]) -> tuple[list[Accelerator], bool]:
    """Number AMD's GPUs as ROCr does: in the order of KFD's nodes.

    A GPU in partition mode is several nodes with one PCI address, and several accelerators.
    Without KFD nothing can compute on them and they stay unnumbered.

    Args:
        fs: where the kernel's files are read.
        found: what read_pci() returned.

    Returns:
        The accelerators with those GPUs numbered, and whether KFD is there.
    """
    by_pci = {accelerator.pci: accelerator for accelerator in found}
    gpus: list[Accelerator] = []
    numbers = sorted(int(name) for name in fs.entries(_KFD) if name.isdigit())
    for number in numbers:
        values = _properties(fs.read(f"{_KFD}/{number}/properties") or "")
        if not values.get("simd_count"):
            continue
        location, domain = values.get("location_id", 0), values.get("domain", 0)
        pci = f"{domain:04x}:{location >> 8 & 0xFF:02x}:{location >> 3 & 0x1F:02x}.0"
        # In partition mode the low bits number the partition; the function is still 0.
        exact = pci[:-1] + f"{location & 7:x}"
        gpu = by_pci.get(exact) or by_pci.get(pci) or Accelerator(AMD, pci, node=pci_node(fs, pci))
        unique = values.get("unique_id", 0)
        gpus.append(
            replace(
                gpu,
                index=len(gpus),
                uuid=f"GPU-{unique:016x}" if unique else None,
                model=fs.read(f"{_KFD}/{number}/name") or None,
                unified=gpu.unified or bool(values.get("cpu_cores_count")),
            )
        )
    used = {accelerator.pci for accelerator in gpus}
    gpus += [accelerator for accelerator in found if accelerator.pci not in used]
    return gpus, bool(numbers)


def _properties(text: str) -> dict[str, int]:
    pairs = (line.split() for line in text.splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}


# Ascend, Intel


def ascend(fs: KernelFS, found: list[Accelerator]) -> list[Accelerator]:
    """Number Ascend NPUs where there is just one.

    Their driver numbers them by the board's wiring, not by PCI address (a server's NPU 0 may sit at
    c1:00.0 and NPU 1 at 01:00.0), and sysfs does not tell it.

    Args:
        fs: where the kernel's files are read.
        found: what read_pci() returned.

    Returns:
        The accelerators, the NPU numbered if it is the only one.
    """
    devices = [name for name in fs.entries("/dev") if re.fullmatch(r"davinci\d+", name)]
    if len(found) == 1 and len(devices) <= 1:
        return [replace(found[0], index=0)]
    return found


def intel(fs: KernelFS, found: list[Accelerator]) -> list[Accelerator]:
    """Number Intel's GPUs by address, as Level Zero numbers cards by default.

    Args:
        fs: where the kernel's files are read.
        found: what read_pci() returned.

    Returns:
        The accelerators with those GPUs numbered.
    """
    return [replace(gpu, index=number) for number, gpu in enumerate(found)]


def memory_of_accelerators(
    nodes: tuple[Node, ...], accelerators: list[Accelerator]
) -> tuple[tuple[Node, ...], list[Accelerator]]:
    """Tie nodes without CPUs to the coherent accelerators whose memory they are.

    The NVIDIA driver says which (numa_status); without it the nodes in question are those without
    CPUs that are nearest to the accelerator's own node, if they are unambiguous.

    Args:
        nodes: what read_nodes() returned.
        accelerators: all accelerators found.

    Returns:
        Both again, the ones that belong together naming each other.
    """
    bare = [node for node in nodes if not node.cpus and node.memory_bytes]
    coherent = [accelerator for accelerator in accelerators if accelerator.device_id in _COHERENT]
    told = {
        accelerator.memory_node
        for accelerator in accelerators
        if accelerator.memory_node is not None
    }
    if not told and len(bare) == len(coherent) > 0:
        ordered = sorted(coherent, key=lambda accelerator: accelerator.pci)
        pairs = {gpu.pci: node.id for gpu, node in zip(ordered, bare, strict=True)}
        accelerators = [
            replace(accelerator, memory_node=pairs.get(accelerator.pci, accelerator.memory_node))
            for accelerator in accelerators
        ]
    owner = {
        accelerator.memory_node: accelerator.pci
        for accelerator in accelerators
        if accelerator.memory_node is not None
    }
    nodes = tuple(replace(node, accelerator=owner.get(node.id)) for node in nodes)
    return nodes, accelerators


__all__ = ["amd", "ascend", "intel", "nvidia", "pci_address", "read_nodes", "read_pci"]
