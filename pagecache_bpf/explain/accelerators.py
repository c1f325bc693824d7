# SPDX-License-Identifier: Apache-2.0
"""What is different where an accelerator shares memory with the host, or registers its mappings."""

from __future__ import annotations

from pagecache_bpf import topology
from pagecache_bpf.explain.features import Feature
from pagecache_bpf.topology import AMD, Accelerator

NAME = "accelerators"
_LOST = "where their models are loaded; `pagecache-bpf topology` has the rest"
#: NVIDIA's GB10 and GH200, AMD's MI300A and such: one memory, or one address space in hardware.
UNIFIED = (
    "shares memory with the host: what is cached takes of its memory, and copies from a mapped "
    "file go page by page, at less than 1 GB/s: read() into pinned memory"
)
#: The driver of ROCm is told of each page of a mapping that comes or goes.
REGISTERED = (
    "ROCm registers mapped pages: reclaim, readahead and munmap() of them stall its queues, so "
    "load by read() or unmap before the model runs"
)
#: True of both engines: what is mapped is left out by the kernel (invalidate_mapping_pages()).
KEPT = "no policy drops a page that is mapped"


def probe(machine: topology.Topology | None = None) -> Feature:
    """Tell what is different with the accelerators of a machine.

    Args:
        machine: what was read of it; by default this machine.

    Returns:
        A row for `doctor`, which no engine depends on.
    """
    machine = machine or topology.read()
    if not machine.accelerators:
        return Feature(NAME, True, "none", _LOST)
    found = [
        f"{_name(accelerator)}{_difference(accelerator)}" for accelerator in machine.accelerators
    ]
    if any(_difference(accelerator) for accelerator in machine.accelerators):
        found.append(KEPT)
    return Feature(NAME, True, "; ".join(dict.fromkeys(found)), _LOST)


def _name(accelerator: Accelerator) -> str:
    return accelerator.model or f"{accelerator.vendor} {accelerator.pci}"


def _difference(accelerator: Accelerator) -> str:
    notes = [UNIFIED] if accelerator.unified else []
    notes += [REGISTERED] if accelerator.vendor == AMD else []
    return f" {'; '.join(notes)}" if notes else ""
