# SPDX-License-Identifier: Apache-2.0
"""What a policy's programs tell the agent, read out of the maps that they share.

It only reads, and knows no file and no reader.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping

from pagecache_bpf.kernel import abi
from pagecache_bpf.kernel.bpf_maps import BpfMap


def read_state(maps: Mapping[str, BpfMap]) -> abi.pagecache_agent_state:
    """Read the totals that the programs keep.

    Args:
        maps: the maps of the policy, by name.

    Returns:
        Pages that were asked for, pages of governed files that came less those that left, requests
        that found the ring buffer full, and whether the policy has ended itself.

    Raises:
        OSError: the kernel refuses to read the map.
    """
    size = ctypes.sizeof(abi.pagecache_agent_state)
    return abi.pagecache_agent_state.from_buffer_copy(maps["state"].lookup(bytes(4)) or bytes(size))


def dropped_templates(maps: Mapping[str, BpfMap]) -> list[str]:
    """List the models whose I/O template the policy has given up, since it was wrong too often.

    Args:
        maps: the maps of the policy, by name.

    Returns:
        Names of models; none for a policy that takes no templates.

    Raises:
        OSError: the kernel refuses to read the map.
    """
    models = maps.get("template_models")
    found: list[str] = []
    if models is None:
        return found
    for index in range(models.entries):
        kind = abi.pagecache_template_model
        raw = models.lookup(index.to_bytes(4, sys.byteorder))
        model = kind.from_buffer_copy(raw or bytes(ctypes.sizeof(kind)))
        if not model.nr_consumers:
            break
        if model.failed:
            found.append(model.name.decode(errors="replace"))
    return found
