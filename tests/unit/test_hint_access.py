# SPDX-License-Identifier: Apache-2.0
"""Hint maps of a policy of engine agent: real type information of a policy, maps in memory."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest

from pagecache_bpf.agent.hint_access import Hints
from pagecache_bpf.errors import UsageError
from pagecache_bpf.kernel import libbpf
from pagecache_bpf.kernel.elf import Elf
from pagecache_bpf.policy.catalog import agent_object, find
from pagecache_bpf.policy.hint_maps import BSS, CONSUMERS


class Elements(dict[bytes, bytes]):
    """A map of the kernel's, in memory."""

    def __init__(self, room: int = 100) -> None:
        super().__init__()
        self.room = room

    def lookup(self, key: bytes) -> bytes | None:
        return self.get(key)

    def update(self, key: bytes, value: bytes) -> None:  # type: ignore[override]
        if len(self) == self.room:
            raise OSError(7, "Argument list too long")
        self[key] = value

    def delete(self, key: bytes) -> bool:
        return self.pop(key, None) is not None


@pytest.fixture
def maps() -> dict[str, Any]:
    return {"roles": Elements(), CONSUMERS: Elements(2), f"colocat{BSS}": Elements()}


@pytest.fixture
def hints(maps: dict[str, Any]) -> Iterator[Hints]:
    with Elf(agent_object(find("colocate"))) as elf:
        yield Hints(elf.btf(), maps)


def test_the_maps_for_user_space_are_told(hints: Hints) -> None:
    told = hints.as_json()
    assert {found["name"] for found in told["maps"]} == {"roles", CONSUMERS}
    assert (told["gauges"], told["values"]) == ([], {})  # colocate has none


def test_gauges_are_read_where_they_lie() -> None:
    data = Elements()
    with libbpf.Object(agent_object(find("pin")), "pin") as opened:  # it lays variables out
        hints = Hints(opened.btf(), {f"pin{BSS}": data})  # type: ignore[dict-item]
    gauges = hints.as_json()["gauges"]
    assert [gauge["name"] for gauge in gauges] == ["promised_pages", "pinned_pages"]
    memory = bytearray(max(gauge["offset"] + 8 for gauge in gauges))
    for number, gauge in enumerate(gauges):
        memory[gauge["offset"] : gauge["offset"] + 8] = (70 + number).to_bytes(8, sys.byteorder)
    data[bytes(4)] = bytes(memory)
    assert hints.as_json()["values"] == {"promised_pages": 70, "pinned_pages": 71}


def test_elements_are_written_read_and_removed(hints: Hints, maps: dict[str, Any]) -> None:
    key, value = (5).to_bytes(8, "little"), (2).to_bytes(4, "little")
    assert hints.write("roles", key, value)
    assert hints.elements("roles") == [(key, value)]
    assert hints.write("roles", key, b"")
    assert not hints.write("roles", key, b"")  # it is gone
    assert maps["roles"] == {}


@pytest.mark.parametrize(("key", "value"), [(7, 4), (9, 4), (8, 3), (8, 5), (0, 4)])
def test_other_sizes_are_refused(hints: Hints, maps: dict[str, Any], key: int, value: int) -> None:
    with pytest.raises(UsageError, match="sizes do not fit"):
        hints.write("roles", bytes(key), bytes(value))
    assert maps["roles"] == {}


def test_other_maps_are_no_ones_to_write(hints: Hints) -> None:
    for name in ("windows", "requests", ""):
        with pytest.raises(UsageError, match="roles"):
            hints.write(name, bytes(8), bytes(4))
        with pytest.raises(UsageError):
            hints.elements(name)


def test_the_node_of_a_process(hints: Hints, maps: dict[str, Any]) -> None:
    hints.set_node(10, 1)
    hints.set_node(11, -1)
    assert maps[CONSUMERS] == {
        (10).to_bytes(4, sys.byteorder): (1).to_bytes(4, sys.byteorder),
        (11).to_bytes(4, sys.byteorder): b"\xff" * 4,
    }
    hints.set_node(12, 0)  # the map is full: the kernel decides, and nothing is raised
    hints.set_node(10, None)
    hints.set_node(10, None)
    assert list(maps[CONSUMERS]) == [(11).to_bytes(4, sys.byteorder)]
