# SPDX-License-Identifier: Apache-2.0
"""What the agent's process tells of the maps and gauges of its policies, and writes for others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from pagecache_bpf.errors import UsageError
from pagecache_bpf.kernel.bpf_maps import BpfMap
from pagecache_bpf.kernel.btf import Btf
from pagecache_bpf.policy.hint_maps import BSS, HintMap, find_map, gauges_in, maps_in
from pagecache_bpf.policy.hints import elements, gauge_values


class Hints:
    """The maps for user space of one loaded policy."""

    def __init__(self, btf: Btf, maps: Mapping[str, BpfMap]) -> None:
        self.maps, self._gauges = maps_in(btf), gauges_in(btf)
        self._loaded = maps
        self._bss = next((bpf_map for name, bpf_map in maps.items() if name.endswith(BSS)), None)

    def as_json(self) -> dict[str, Any]:
        """Maps, gauges and their values."""
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
        """Keys and values.  Raises UsageError, OSError."""
        found = self._find(name)
        return list(elements(self._loaded[found.name], found.max_entries))

    def write(self, name: str, key: bytes, value: bytes) -> bool:
        """Set an element, or remove it if the value is empty; False: it was not there."""
        found = self._find(name)
        if len(key) != found.key_size or len(value) not in (0, found.value_size):
            raise UsageError(f"the map {name} was not written", "sizes do not fit")
        if not value:
            return self._loaded[found.name].delete(key)
        self._loaded[found.name].update(key, value)
        return True

    def _find(self, name: str) -> HintMap:
        return find_map("of the agent", self.maps, name)
