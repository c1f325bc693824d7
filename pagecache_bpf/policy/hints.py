# SPDX-License-Identifier: Apache-2.0
"""Hints, reports and gauges of policies that are attached, on either engine.  Root only.

    pagecache_bpf.policy.hint("multiplex", "plans", model="llama-3-8b", due_ns="+5s")
    pagecache_bpf.policy.read_map("multiplex", "scores")
    pagecache_bpf.policy.gauges("pin")

What maps and gauges a policy has is read from the type information that the kernel keeps with it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from pagecache_bpf.errors import PagecacheError, PrivilegeError, UsageError
from pagecache_bpf.kernel import libbpf
from pagecache_bpf.kernel.bpf_maps import BpfMap
from pagecache_bpf.kernel.btf import Btf
from pagecache_bpf.policy.engines import AGENT, Engines
from pagecache_bpf.policy.hint_maps import (
    ARRAY,
    Gauge,
    HintMap,
    broken_promises,
    cgroup_id_of,
    find_map,
    gauges_in,
    maps_in,
    resolve,
)
from pagecache_bpf.policy.loader import PIN_ROOT

_P = ctypes.c_void_p


def hint(policy: str, map: str, /, **settings: Any) -> None:
    """Write an element of a policy's map; members that are not given stay as they are.

    Args:
        policy: the name of an attached policy.
        map: the map's name.
        settings: members of the key and of the value by name: numbers, or what
            pagecache_bpf.policy.hint_maps says that names stand for.

    Raises:
        UsageError: there is no such policy, map or member.
        PrivilegeError: the caller is not root.
        PagecacheError: the map is full.
    """
    with Engines() as engines:
        live = _live(engines, policy)
        found = find_map(policy, live.maps, map)
        if found.kind != "hint":
            raise UsageError(f"the map {found.name} is not for hints", "only the policy writes it")
        key, value = found.split(settings)
        encoded = found.encode_key(_numbers(engines, key))
        numbers = _numbers(engines, value)
        try:
            live.write(found, encoded, found.encode_value(numbers, live.read(found, encoded)))
        except OSError as error:
            why = "it is full" if error.errno == errno.E2BIG else error.strerror or str(error)
            raise PagecacheError(f"the map {found.name} was not written", why) from error


def forget(policy: str, map: str, /, **key: Any) -> bool:
    """Remove an element of a policy's map.

    Args:
        policy: the name of an attached policy.
        map: the map's name.
        key: members of the key by name, as hint() takes them.

    Returns:
        False if the element is not there.

    Raises:
        UsageError: there is no such policy, map or member.
        PrivilegeError: the caller is not root.
    """
    with Engines() as engines:
        live = _live(engines, policy)
        found = find_map(policy, live.maps, map)
        wanted, _ = found.split(key)
        encoded = found.encode_key(_numbers(engines, wanted))
        if found.type == ARRAY:
            raise UsageError(f"{found.name} is an array", "its elements cannot be removed")
        return live.remove(found, encoded)


def read_map(policy: str, map: str, /) -> list[dict[str, Any]]:
    """Return the elements of a policy's map; those of an array that are all zeros are left out.

    Args:
        policy: the name of an attached policy.
        map: the map's name.

    Returns:
        [{"key": {name: number}, "value": {name: number}}].

    Raises:
        UsageError: there is no such policy or map.
        PrivilegeError: the caller is not root.
    """
    with Engines() as engines:
        live = _live(engines, policy)
        found = find_map(policy, live.maps, map)
        rows = [found.decode(key, value) for key, value in live.elements(found)]
    return [row for row in rows if found.type != ARRAY or any(row["value"].values())]


def maps(policy: str) -> tuple[HintMap, ...]:
    """Return the maps of an attached policy that are for user space.

    Args:
        policy: its name.

    Returns:
        The maps.

    Raises:
        UsageError: it is not attached.
    """
    with Engines() as engines:
        return _live(engines, policy).maps


def gauges(policy: str) -> tuple[dict[str, int], list[str]]:
    """Return what an attached policy counts, and which of its promises it does not keep.

    Args:
        policy: its name.

    Returns:
        Numbers by the gauges' names, and a sentence for each promise that is not kept.

    Raises:
        UsageError: it is not attached.
    """
    with Engines() as engines:
        live = _live(engines, policy)
        known, values = live.gauges()
        return values, broken_promises(known, values)


def _numbers(engines: Engines, words: Mapping[str, Any]) -> dict[str, int]:
    def model_id(name: str) -> int:
        tags = list(engines.tags())
        for tag in tags:
            if tag.model == name:
                return tag.model_id
        known = ", ".join(sorted({tag.model for tag in tags}))
        raise UsageError(
            f"there is no model {name}", f"tagged are {known}" if known else "nothing is tagged"
        )

    def file_fields(path: str) -> dict[str, int]:
        from pagecache_bpf.kernel import abi
        from pagecache_bpf.kernel.file_key import key_of, open_to_read

        fd = open_to_read(Path(path))
        try:
            identity = abi.pagecache_file_key.from_buffer_copy(key_of(fd))
        finally:
            os.close(fd)
        names = ("ino", "dev_major", "dev_minor", "generation")
        return {name: getattr(identity, name) for name in names}

    return resolve(words, model_id, cgroup_id_of, file_fields)


class _Pinned:
    """The maps of a policy of engine struct_ops, through their names in bpffs."""

    def __init__(self, policy: str) -> None:
        self._at = PIN_ROOT / policy / "maps"
        self._btf: Btf | None = None
        section = next(
            (self._at / name for name in ("bss", "rodata", "data") if self._has(name)), None
        )
        if section is not None:
            _, self._btf = libbpf.read_pinned(section)

    def _has(self, name: str) -> bool:
        """Tell whether a map of that name is pinned."""
        return (self._at / name).exists()

    @property
    def maps(self) -> tuple[HintMap, ...]:
        return maps_in(self._btf) if self._btf else ()

    def gauges(self) -> tuple[tuple[Gauge, ...], dict[str, int]]:
        known = gauges_in(self._btf) if self._btf else ()
        if not known:
            return (), {}
        return known, gauge_values(known, libbpf.read_pinned(self._at / "bss")[0])

    def read(self, map: HintMap, key: bytes) -> bytes | None:
        with self._open(map) as opened:
            return opened.lookup(key)

    def write(self, map: HintMap, key: bytes, value: bytes) -> None:
        with self._open(map) as opened:
            opened.update(key, value)

    def remove(self, map: HintMap, key: bytes) -> bool:
        with self._open(map) as opened:
            return opened.delete(key)

    def elements(self, map: HintMap) -> list[tuple[bytes, bytes]]:
        with self._open(map) as opened:
            return list(elements(opened, map.max_entries))

    def _open(self, map: HintMap) -> BpfMap:
        """Open a pinned map.  Raises PagecacheError."""
        path = self._at / map.name
        try:
            return BpfMap.pinned(path)
        except OSError as error:
            why = error.strerror or str(error)
            raise PagecacheError(f"{path} cannot be opened", why) from error


class _Remote:
    """The maps of a policy of engine agent, which its process holds."""

    def __init__(self, engines: Engines, policy: str) -> None:
        assert engines.agent is not None
        self._request, self._policy = engines.agent.request, policy
        self._told = self._request("hints", policy=policy)

    @property
    def maps(self) -> tuple[HintMap, ...]:
        return tuple(HintMap.from_json(hint_map) for hint_map in self._told["maps"])

    def gauges(self) -> tuple[tuple[Gauge, ...], dict[str, int]]:
        return tuple(Gauge(**gauge) for gauge in self._told["gauges"]), dict(self._told["values"])

    def read(self, map: HintMap, key: bytes) -> bytes | None:
        wanted = [value for found, value in self.elements(map) if found == key]
        return wanted[0] if wanted else None

    def write(self, map: HintMap, key: bytes, value: bytes) -> None:
        self._request(
            "hint_write", policy=self._policy, map=map.name, key=key.hex(), value=value.hex()
        )

    def remove(self, map: HintMap, key: bytes) -> bool:
        reply = self._request(
            "hint_write", policy=self._policy, map=map.name, key=key.hex(), value=""
        )
        return bool(reply["found"])

    def elements(self, map: HintMap) -> list[tuple[bytes, bytes]]:
        reply = self._request("hint_read", policy=self._policy, map=map.name)
        return [(bytes.fromhex(key), bytes.fromhex(value)) for key, value in reply["elements"]]


def _live(engines: Engines, policy: str) -> _Pinned | _Remote:
    """Return the maps of an attached policy, on whichever engine it runs.

    Raises UsageError and PrivilegeError.
    """
    if os.geteuid() != 0:
        raise PrivilegeError("only root can read or write a policy's maps", "", "Use sudo")
    engine = engines.engine_of(policy)
    if engine is None:
        attached = ", ".join(policy.name for _, policy in engines.policies())
        raise UsageError(
            f"the policy {policy} is not attached",
            f"attached are {attached}" if attached else "no policy is",
            f"Run `pagecache-bpf attach {policy} PATH`",
        )
    return _Remote(engines, policy) if engine == AGENT else _Pinned(policy)


def gauge_values(known: tuple[Gauge, ...], data: bytes) -> dict[str, int]:
    """Read gauges from the contents of the section that they are in.

    Args:
        known: the gauges.
        data: the section's bytes.

    Returns:
        Numbers by the gauges' names.
    """
    return {
        variable.name: int.from_bytes(
            data[variable.offset : variable.offset + variable.size], sys.byteorder
        )
        for variable in known
    }


def elements(opened: BpfMap, most: int) -> Iterator[tuple[bytes, bytes]]:
    """Yield keys and values of a map; one that changes meanwhile may show some twice.

    Args:
        opened: the map.
        most: elements to yield at most.

    Yields:
        The bytes of a key and of its value.

    Raises:
        OSError: the kernel refuses.
    """
    for key in islice(opened.keys(), most):
        if (value := opened.lookup(key)) is not None:
            yield key, value
