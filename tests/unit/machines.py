# SPDX-License-Identifier: Apache-2.0
"""Trees of sysfs and procfs as machines of known shapes have them, from machines.json.

Each machine there is written down in rows: NUMA nodes (CPUs, memory in KiB, distances), PCI
devices (address, vendor, device, class, numa_node), KFD nodes (properties that matter) and any
further files.  Addresses and nodes are those of the machine type that the row names.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = json.loads(
    Path(__file__).with_suffix(".json").read_text(encoding="utf-8")
)


def build(root: Path, name: str) -> Path:
    """Write the tree of a machine below ROOT."""
    shape = SHAPES[name]
    for number, (cpus, kib, distances) in shape["nodes"].items():
        at = f"sys/devices/system/node/node{number}"
        put(root, f"{at}/cpulist", f"{cpus}\n")
        put(root, f"{at}/meminfo", f"Node {number} MemTotal:       {kib} kB\n")
        put(root, f"{at}/distance", f"{distances}\n")
    for address, vendor, device, kind, node in shape.get("pci", ()):
        at = f"sys/bus/pci/devices/{address}"
        put(root, f"{at}/vendor", f"{vendor}\n")
        put(root, f"{at}/device", f"{device}\n")
        put(root, f"{at}/class", f"{kind}\n")
        put(root, f"{at}/numa_node", f"{node}\n")
    for number, properties in shape.get("kfd", {}).items():
        at = f"sys/class/kfd/kfd/topology/nodes/{number}"
        put(root, f"{at}/name", properties.get("name", "") + "\n")
        rows = (f"{key} {value}\n" for key, value in properties.items() if key != "name")
        put(root, f"{at}/properties", "".join(rows))
    for address, (model, uuid) in shape.get("nvidia", {}).items():
        lines = (f"Model: \t\t {model}\n", "IRQ:   \t\t 90\n", f"GPU UUID: \t {uuid}\n")
        put(root, f"proc/driver/nvidia/gpus/{address}/information", "".join(lines))
    for path, text in shape.get("files", {}).items():
        put(root, path, text)
    return root


def put(root: Path, name: str, text: str) -> None:
    """Write one file of a tree."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
