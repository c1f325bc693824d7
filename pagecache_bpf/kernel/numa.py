# SPDX-License-Identifier: Apache-2.0
"""The NUMA nodes of this machine and their CPUs, as sysfs tells them.

It knows numbers only; pagecache_bpf.topology knows accelerators and distances.
"""

from __future__ import annotations

import os

from pagecache_bpf.kernel.kernelfs import LIVE


def nodes() -> list[int]:
    """Return the NUMA nodes with memory.

    Returns:
        Their numbers; one or none where there is nothing to choose.
    """
    names = (name.removeprefix("node") for name in LIVE.entries("/sys/devices/system/node"))
    return sorted(int(name) for name in names if name.isdigit())


def cpus_of(node: int) -> str:
    """Return the CPUs of a NUMA node that this process may use.

    Args:
        node: the node's number; -1 means all of them.

    Returns:
        The CPUs' numbers, separated by spaces.
    """
    allowed = os.sched_getaffinity(0)
    cpus = {cpu for cpu in allowed if LIVE.exists(f"/sys/devices/system/cpu/cpu{cpu}/node{node}")}
    return " ".join(map(str, sorted(cpus or allowed)))
