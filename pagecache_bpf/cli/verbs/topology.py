# SPDX-License-Identifier: Apache-2.0
"""pagecache-bpf topology: accelerators and NUMA nodes."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from pagecache_bpf.cli.output import Output, table
from pagecache_bpf.cli.parser import Group
from pagecache_bpf.units import format_size

if TYPE_CHECKING:
    from rich.console import Console

    from pagecache_bpf.topology import Topology

GROUP = Group.LOOK
HELP = "show accelerators and the NUMA nodes they hang on"
DESCRIPTION = """\
Shows the accelerators of this machine, the NUMA node of the host memory next to each, and which
of them this environment sees (CUDA_VISIBLE_DEVICES, ROCR_VISIBLE_DEVICES, HIP_VISIBLE_DEVICES,
ASCEND_RT_VISIBLE_DEVICES). With DEVICE, says what that name means here. What the kernel does not
tell is unknown, never guessed. Needs no root."""
EXAMPLES = (
    ("pagecache-bpf topology", "the whole machine"),
    ("pagecache-bpf topology cuda:0", "what a process with this environment calls cuda:0"),
)
JSON = {
    "topology": {
        "nodes[].id": "number of the NUMA node",
        "nodes[].cpus[]": "its CPUs; none: memory that no CPU is next to",
        "nodes[].memory_bytes": "its memory; null if unknown",
        "nodes[].distances[]": "distance to each node, in the order of the nodes",
        "nodes[].accelerator": "PCI address of the accelerator whose own memory this is, or null",
        "accelerators[].vendor": "nvidia, amd, ascend or intel",
        "accelerators[].pci": "its PCI address",
        "accelerators[].index": "its number before any *_VISIBLE_DEVICES; null if unknown",
        "accelerators[].uuid": "its UUID; null if unknown",
        "accelerators[].model": "its name; null if unknown",
        "accelerators[].node": "NUMA node of the host memory next to it; null if unknown",
        "accelerators[].memory_node": "NUMA node that its own memory is, or null",
        "accelerators[].unified": "whether it and the host share one memory or address space",
        "accelerators[].migs[].uuid": "UUID of a MIG instance",
        "accelerators[].migs[].gpu_instance": "its GPU instance",
        "accelerators[].migs[].compute_instance": "its compute instance",
        "unified": "whether any accelerator shares memory with the host",
        "sources[]": "where this was learned",
        "notes[]": "what is worth knowing, for people",
        "devices[].name": "a device that was asked for, or that this environment sees",
        "devices[].pci": "the PCI address it means; null if that cannot be told",
        "devices[].node": "the NUMA node its pages should be on; null if unknown",
        "devices[].unified": "whether it shares memory with the host",
        "devices[].why": "what is not known; empty if all is",
    }
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of topology."""
    parser.add_argument(
        "devices",
        metavar="DEVICE",
        nargs="*",
        help="cuda:N, rocm:N, hip:N, npu:N, xpu:N, a PCI address or a UUID "
        "(default: all that this environment sees)",
    )


def run(args: argparse.Namespace, out: Output) -> int:
    """Show; a machine without accelerators is an answer and no error."""
    from pagecache_bpf import topology

    machine = topology.read()
    placed = topology.place_all(args.devices, machine) if args.devices else _seen(machine)
    data = {**machine.as_json(), "devices": [device.as_json() for device in placed]}
    out.emit(data, lambda console: _human(console, data))
    return 0


def _seen(machine: Topology) -> list[Any]:
    """Everything this environment sees, by the names its vendor gives it."""
    from pagecache_bpf import topology
    from pagecache_bpf.errors import UsageError

    found = []
    prefixes = ((topology.NVIDIA, "cuda"), (topology.AMD, "rocm"), (topology.ASCEND, "npu"))
    for vendor, prefix in (*prefixes, (topology.INTEL, "xpu")):
        for number in range(len(machine.of_vendor(vendor))):
            try:
                found.append(topology.place(f"{prefix}:{number}", machine))
            except UsageError:
                break
    return found


def _human(console: Console, data: dict[str, Any]) -> None:
    nodes = [
        [
            str(node["id"]),
            _ranges(node["cpus"]) or "none",
            "unknown" if node["memory_bytes"] is None else format_size(node["memory_bytes"]),
            f"memory of {node['accelerator']}" if node["accelerator"] else "",
        ]
        for node in data["nodes"]
    ]
    if nodes:
        columns = [("node", "number"), ("CPUs", "text"), ("memory", "number"), ("", "text")]
        console.print(table(columns, nodes))
    else:
        console.print("this kernel tells of no NUMA nodes")
    console.print()
    if not data["accelerators"]:
        console.print("no accelerator")
    else:
        lines = [
            [
                accelerator["pci"],
                accelerator["model"] or accelerator["vendor"],
                _known(accelerator["node"]),
                "yes" if accelerator["unified"] else "no",
                ", ".join(
                    dev["name"] for dev in data["devices"] if dev["pci"] == accelerator["pci"]
                ),
            ]
            for accelerator in data["accelerators"]
        ]
        columns = [
            ("accelerator", "text"),
            ("model", "text"),
            ("node", "number"),
            ("unified", "text"),
            ("seen as", "text"),
        ]
        console.print(table(columns, lines))
    for device in data["devices"]:
        if device["why"]:
            console.print(f"{device['name']}: node {_known(device['node'])}: {device['why']}")
    for note in data["notes"]:
        console.print(note)


def _known(node: int | None) -> str:
    return "unknown" if node is None else str(node)


def _ranges(cpus: list[int] | tuple[int, ...]) -> str:
    """CPUs as the kernel lists them: 0-3,8."""
    parts: list[list[int]] = []
    for cpu in cpus:
        if parts and cpu == parts[-1][1] + 1:
            parts[-1][1] = cpu
        else:
            parts.append([cpu, cpu])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
