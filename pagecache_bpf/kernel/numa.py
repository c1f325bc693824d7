# SPDX-License-Identifier: Apache-2.0
"""The NUMA nodes of this machine and their CPUs, as sysfs tells them.

It knows numbers only; pagecache_bpf.topology knows accelerators and distances.
"""

from __future__ import annotations

import os
from pathlib import Path


def nodes() -> list[int]:
    """Return the NUMA nodes with memory.

    Returns:
        Their numbers; one or none where there is nothing to choose.
    """
    found = []
    for path in Path("/sys/devices/system/node").glob("node[0-9]*"):
        found.append(int(path.name.removeprefix("node")))
    return sorted(found)


def cpus_of(node: int) -> str:
    """Return the CPUs of a NUMA node that this process may use.

    Args:
        node: the node's number; -1 means all of them.

    Returns:
        The CPUs' numbers, separated by spaces.
    """
    allowed = os.sched_getaffinity(0)
    cpus = {cpu for cpu in allowed if Path(f"/sys/devices/system/cpu/cpu{cpu}/node{node}").exists()}
    return " ".join(map(str, sorted(cpus or allowed)))
