# SPDX-License-Identifier: Apache-2.0
"""Accelerators and NUMA nodes, and which of them a device name means.

    machine = topology.read()
    topology.place("cuda:0", machine).node      # None: unknown

Everything comes from the kernel's own files and the vendors' libraries; what they do not tell
stays unknown.  Needs no root.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pagecache_bpf.errors import UsageError
from pagecache_bpf.kernel.kernelfs import KernelFS
from pagecache_bpf.topology import runtime, sysfs
from pagecache_bpf.topology.types import (
    AMD,
    ASCEND,
    INTEL,
    NVIDIA,
    Accelerator,
    Mig,
    Node,
    Placement,
    Topology,
    pci_address,
)
from pagecache_bpf.topology.visible import VARIABLES, Unknown, by_uuid, visible

__all__ = [
    "AMD",
    "ASCEND",
    "INTEL",
    "NVIDIA",
    "Accelerator",
    "Mig",
    "Node",
    "Placement",
    "Topology",
    "node_of",
    "place",
    "place_all",
    "place_or_unknown",
    "read",
    "visible",
]

_PREFIXES = {"cuda": NVIDIA, "rocm": AMD, "hip": AMD, "npu": ASCEND, "xpu": INTEL}
_NUMBERED = re.compile(r"([a-z]+)(?::(\d+))?")
_UUID = re.compile(r"(?:GPU|MIG)-[0-9A-Za-z/-]+", re.I)
_DOCS = "docs/troubleshooting.md"
_LIVE = Path("/")


def read(root: Path | str = _LIVE, nvml: Any = None) -> Topology:
    """Read NUMA nodes and accelerators of a machine.

    Args:
        root: where its /sys and /proc are; "/" except in tests.
        nvml: the module pynvml, or what stands in for it; by default it is imported where an NVIDIA
            driver is loaded on the live system.

    Returns:
        The machine.
    """
    fs = KernelFS(Path(root))
    nodes = sysfs.read_nodes(fs)
    found = sysfs.read_pci(fs)
    sources = ["sysfs"]

    def of(vendor: str) -> list[Accelerator]:
        return [accelerator for accelerator in found if accelerator.vendor == vendor]

    nvidia, driver = sysfs.nvidia(fs, of(NVIDIA))
    if driver:
        sources.append("/proc/driver/nvidia")
    if nvidia and nvml is None and driver and Path(root) == _LIVE:
        nvml = runtime.load_nvml()
    told = runtime.ask_nvml(nvml, nvidia) if nvidia and nvml is not None else None
    if told is not None:
        nvidia = told
        sources.append("NVML")
    amd, kfd = sysfs.amd(fs, of(AMD))
    if kfd:
        sources.append("KFD")
    accelerators = [
        *(*nvidia, *amd),
        *sysfs.ascend(fs, of(ASCEND)),
        *sysfs.intel(fs, of(INTEL)),
    ]
    nodes, accelerators = sysfs.memory_of_accelerators(nodes, accelerators)
    return Topology(nodes, tuple(accelerators), tuple(sources), tuple(_notes(nodes, accelerators)))


def _notes(nodes: Sequence[Node], accelerators: Sequence[Accelerator]) -> list[str]:
    notes = []
    for accelerator in accelerators:
        if accelerator.memory_node is not None:
            notes.append(
                f"{accelerator.pci}: its memory is NUMA node {accelerator.memory_node}; weights "
                "that are read go to the host's memory next to it"
                + (f", node {accelerator.node}" if accelerator.node is not None else "")
            )
        elif accelerator.unified:
            notes.append(
                f"{accelerator.pci}: shares the host's memory: what is in the page cache need not "
                "be copied to be used"
            )
    unknown = [accelerator.pci for accelerator in accelerators if accelerator.node is None]
    if unknown and len(nodes) > 1:
        notes.append(
            f"the firmware does not tell the NUMA node of {', '.join(unknown)}: their pages are "
            "placed by the kernel"
        )
    return notes


def place(
    name: str, machine: Topology | None = None, environ: Mapping[str, str] | None = None
) -> Placement:
    """Find where a device is, as a process with some environment names it.

    "cuda" on a machine whose GPUs are AMD's means those, as in PyTorch.  PCI addresses and UUIDs
    name a device of the machine, visible to the process or not.  That the node is unknown is an
    answer.

    Args:
        name: "cuda:1", "cuda" (the first), "rocm:0", "hip:0", "npu:0", "xpu:0", "cpu", a PCI
            address, or a UUID (GPU-..., MIG-...; the beginning is enough).
        machine: what read() returned; by default it is read now.
        environ: the environment of the process, which may narrow what it sees (CUDA_VISIBLE_DEVICES
            and the like); by default this one's.

    Returns:
        The device and its NUMA node.

    Raises:
        UsageError: the name is none, or the device is not there.
    """
    machine = read() if machine is None else machine
    environ = os.environ if environ is None else environ
    text = name.strip()
    if text.lower() == "cpu":
        return Placement(name, None, None, "the CPU has no node of its own")
    if (address := pci_address(text)) is not None:
        found = machine.by_pci(address)
        if found is None:
            raise _absent(name, f"no accelerator has the PCI address {address}", machine)
        return _placed(name, found)
    if _UUID.fullmatch(text):
        return _by_uuid(name, text, machine)
    match = _NUMBERED.fullmatch(text.lower())
    if match is None or match[1] not in _PREFIXES:
        raise UsageError(
            f"{name!r} is not a device",
            "known are cuda:N, rocm:N, hip:N, npu:N, xpu:N, cpu, PCI addresses and UUIDs",
            "Run `pagecache-bpf topology` to see what there is",
            f"{_DOCS}#is-not-a-device",
        )
    vendor = _PREFIXES[match[1]]
    if match[1] == "cuda" and not machine.of_vendor(NVIDIA) and machine.of_vendor(AMD):
        vendor = AMD
    return _numbered(name, vendor, int(match[2] or 0), machine, environ)


def place_or_unknown(
    name: str, machine: Topology, environ: Mapping[str, str] | None = None
) -> Placement:
    """Find where a device is; one of a vendor whose devices are hidden is unknown, not absent.

    Some devices cannot be seen in sysfs (on boards without PCI, in some sandboxes).

    Args:
        name: as place() takes it.
        machine: what read() returned.
        environ: as place() takes it.

    Returns:
        The device and its NUMA node.

    Raises:
        UsageError: the name is none, or the device is missing among its like.
    """
    try:
        return place(name, machine, environ)
    except UsageError as error:
        match = _NUMBERED.fullmatch(name.strip().lower())
        vendors = {_PREFIXES[match[1]]} if match and match[1] in _PREFIXES else set()
        vendors |= {AMD} if NVIDIA in vendors else set()
        if not vendors or any(
            accelerator.vendor in vendors for accelerator in machine.accelerators
        ):
            raise
        return Placement(name, None, None, f"the kernel shows no such device: {error.why}")


def place_all(
    names: Sequence[str],
    machine: Topology | None = None,
    environ: Mapping[str, str] | None = None,
) -> tuple[Placement, ...]:
    """Find where several devices are.

    Args:
        names: as place() takes them; for none the machine is not read.
        machine: what read() returned; by default it is read once, now.
        environ: as place() takes it.

    Returns:
        A placement for each name, in their order.

    Raises:
        UsageError: as place().
    """
    if not names:
        return ()
    machine = read() if machine is None else machine
    return tuple(place(name, machine, environ) for name in names)


def node_of(placements: Sequence[Placement]) -> int | None:
    """Return the one NUMA node that all devices are next to.

    Args:
        placements: what place() returned for them.

    Returns:
        The node's number; None if there are several or one is unknown.
    """
    nodes = {placement.node for placement in placements}
    return nodes.pop() if len(nodes) == 1 else None


def _placed(name: str, found: Accelerator) -> Placement:
    why = "" if found.node is not None else "the firmware does not tell its NUMA node"
    return Placement(name, found, found.node, why)


def _by_uuid(name: str, text: str, machine: Topology) -> Placement:
    kinds = (NVIDIA,) if text.upper().startswith("MIG-") else (NVIDIA, AMD)
    devices = [device for device in machine.accelerators if device.vendor in kinds]
    if not devices:
        raise _absent(name, "there is no such accelerator", machine)
    try:
        found = by_uuid(devices, text)
    except Unknown as error:
        return _undecided(name, devices, str(error))
    if found is None:
        raise _absent(name, "no accelerator, or more than one, has that UUID", machine)
    return _placed(name, found)


def _numbered(
    name: str, vendor: str, number: int, machine: Topology, environ: Mapping[str, str]
) -> Placement:
    devices = machine.of_vendor(vendor)
    if vendor in (NVIDIA, AMD) and (addresses := runtime.torch_addresses()) is not None:
        found = machine.by_pci(addresses[number]) if number < len(addresses) else None
        if found is not None:
            return _placed(name, found)
    usable = [device for device in devices if device.index is not None] or list(devices)
    try:
        seen = visible(vendor, usable, environ)
    except Unknown as error:
        return _undecided(name, usable, str(error))
    if number >= len(seen):
        narrowed = [variable for variable in VARIABLES[vendor] if variable in environ]
        raise _absent(
            name,
            f"this process sees {len(seen)} of the {len(usable)} {vendor} accelerators here"
            + (f" ({', '.join(narrowed)} is set)" if narrowed else ""),
            machine,
        )
    if any(device.index is None for device in usable):
        return _undecided(name, usable, f"the kernel does not tell how {vendor} numbers them")
    if vendor == NVIDIA and _order_is_unknown(usable, environ):
        return _undecided(
            name,
            usable,
            "CUDA numbers GPUs of several models with the fastest first "
            "(CUDA_DEVICE_ORDER=PCI_BUS_ID makes it plain)",
        )
    return _placed(name, seen[number])


def _order_is_unknown(devices: Sequence[Accelerator], environ: Mapping[str, str]) -> bool:
    """Tell whether CUDA's order of devices may differ from that of the PCI addresses."""
    value = environ.get("CUDA_VISIBLE_DEVICES", "")
    if environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID" or value.startswith(("GPU-", "MIG-")):
        return False
    return len({device.device_id for device in devices}) > 1


def _undecided(name: str, devices: Sequence[Accelerator], why: str) -> Placement:
    """Place a load whose device is one of several: on their node, if all share one."""
    nodes = {device.node for device in devices}
    node = nodes.pop() if len(nodes) == 1 else None
    return Placement(name, devices[0] if len(devices) == 1 else None, node, why)


def _absent(name: str, why: str, machine: Topology) -> UsageError:
    there = ", ".join(accelerator.pci for accelerator in machine.accelerators)
    return UsageError(
        f"there is no device {name}",
        why,
        f"Run `pagecache-bpf topology`; there are {there}" if there else "This machine has none",
        f"{_DOCS}#there-is-no-device",
    )
