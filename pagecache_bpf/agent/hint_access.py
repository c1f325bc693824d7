# SPDX-License-Identifier: Apache-2.0
"""Reads and writes the hint maps of policies of engine agent, for those who ask its socket.

It knows the maps of one loaded policy by their descriptors; policy.hints is the side that asks.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from pagecache_bpf.errors import UsageError
from pagecache_bpf.kernel.bpf_maps import BpfMap
from pagecache_bpf.kernel.btf import Btf
from pagecache_bpf.policy.hint_maps import BSS, CONSUMERS, HintMap, find_map, gauges_in, maps_in
from pagecache_bpf.policy.hints import elements, gauge_values


class Hints:
    """The maps of one loaded policy that are meant for user space: its hints, reports and gauges.

    Args:
        btf: the type information of the loaded object, which tells which maps and gauges there are.
        maps: the open maps of the object, by name; the caller closes them.
    """

    def __init__(self, btf: Btf, maps: Mapping[str, BpfMap]) -> None:
        self.maps, self._gauges = maps_in(btf), gauges_in(btf)
        self._loaded = maps
        self._bss = next((bpf_map for name, bpf_map in maps.items() if name.endswith(BSS)), None)

    def as_json(self) -> dict[str, Any]:
        """Describe the maps and gauges, and read the gauges.

        Returns:
            "maps": a HintMap each, as JSON; "gauges": a Gauge each, as JSON; "values": numbers by
            the gauges' names, empty if the policy has none.

        Raises:
            OSError: the kernel refuses to read the gauges.
        """
        values: dict[str, int] = {}
        if self._bss is not None and self._gauges:
            data = self._bss.lookup(bytes(4)) or b""
            values = gauge_values(self._gauges, data)
        return {
            "maps": [hint_map.as_json() for hint_map in self.maps],
            "gauges": [asdict(gauge) for gauge in self._gauges],
            "values": values,
        }

    def elements(self, name: str) -> list[tuple[bytes, bytes]]:
        """Read all elements of a map.

        Args:
            name: the map's name.

        Returns:
            The bytes of each key and of its value, in the kernel's order.

        Raises:
            UsageError: the policy marks no map of that name for user space.
            OSError: the kernel refuses.
        """
        found = self._find(name)
        return list(elements(self._loaded[found.name], found.max_entries))

    def write(self, name: str, key: bytes, value: bytes) -> bool:
        """Set an element of a map, or remove it.

        Args:
            name: the map's name.
            key: as many bytes as its keys have.
            value: as many bytes as its values have; empty: remove the element.

        Returns:
            False if the element was to be removed and was not there.

        Raises:
            UsageError: the policy marks no map of that name for user space, or the sizes differ.
            OSError: the map is full, or the kernel refuses.
        """
        found = self._find(name)
        if len(key) != found.key_size or len(value) not in (0, found.value_size):
            raise UsageError(f"the map {name} was not written", "sizes do not fit")
        if not value:
            return self._loaded[found.name].delete(key)
        self._loaded[found.name].update(key, value)
        return True

    def set_node(self, tgid: int, node: int | None) -> None:
        """Tell the policy on which NUMA node a process wants its pages, if the policy can be told.

        Args:
            tgid: the process.
            node: the node; None: it is not known, or the process wants it no more.
        """
        key = tgid.to_bytes(4, sys.byteorder)
        with suppress(OSError):
            if node is None:
                self._loaded[CONSUMERS].delete(key)
            else:
                self._loaded[CONSUMERS].update(key, node.to_bytes(4, sys.byteorder, signed=True))

    def _find(self, name: str) -> HintMap:
        """Find a map by its name.  Raises UsageError with the names that there are."""
        return find_map("of the agent", self.maps, name)
