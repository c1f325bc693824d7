# SPDX-License-Identifier: Apache-2.0
"""Maps of policies that user space writes (hints) and reads (reports).

A policy marks a map with PAGECACHE_HINT("what for") or PAGECACHE_REPORT("what it says"); the
names and types of the keys' and values' members come from the object's type information.  Some
names stand for more than a number: `model` takes the name of a model, `cgroup_id` the path of a
control group, `*_ns` a duration or "+" and a duration, which counts from now; `file=PATH` fills
in `ino`, `dev_major`, `dev_minor` and `generation`.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pagecache_bpf.errors import UsageError
from pagecache_bpf.kernel import cgroups
from pagecache_bpf.kernel.btf import Btf, BtfError, BtfKind
from pagecache_bpf.kernel.elf import Elf
from pagecache_bpf.policy.catalog import PolicyInfo, knob_tags
from pagecache_bpf.units import parse_duration

MAPS, BSS = ".maps", ".bss"
FILE_FIELDS = ("ino", "dev_major", "dev_minor", "generation")
HASH, ARRAY, LRU_HASH = 1, 2, 9  # enum bpf_map_type
_KINDS = ("hint", "report")
CONSUMERS = "consumers"  # of every policy: bpf/include/affinity.bpf.h


@dataclass(frozen=True)
class MapField:
    """A member of a key or value.

    Attributes:
        name: the member's name.
        offset: bytes from the start of the key or value.
        size: bytes.
        signed: whether it is a signed number.
    """

    name: str
    offset: int
    size: int
    signed: bool


@dataclass(frozen=True)
class HintMap:
    """A map of a policy that is meant for user space.

    Attributes:
        name: the map's name.
        kind: "hint" (user space writes it) or "report" (user space reads it).
        help: what it is for, for people.
        type: a number of enum bpf_map_type.
        max_entries: elements that it has room for.
        key_size: bytes of a key.
        value_size: bytes of a value.
        key: members of a key.
        value: members of a value.
    """

    name: str
    kind: str
    help: str
    type: int
    max_entries: int
    key_size: int
    value_size: int
    key: tuple[MapField, ...]
    value: tuple[MapField, ...]

    def as_json(self) -> dict[str, Any]:
        """Return the map's description as the agent's socket tells it.

        Returns:
            Keys and values for JSON.
        """
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> HintMap:
        """Make a description of what as_json() returned.

        Args:
            data: keys and values from JSON.

        Returns:
            The description.
        """
        fields = {
            side: tuple(MapField(**field) for field in data[side]) for side in ("key", "value")
        }
        return cls(**{**data, **fields})

    def encode_key(self, numbers: Mapping[str, int]) -> bytes:
        """Return the bytes of a key.

        Args:
            numbers: the members by name; each has to be given, except `reserved`.

        Returns:
            The key, as the kernel takes it.

        Raises:
            UsageError: a member is missing or does not fit.
        """
        return self._encode(self.key, self.key_size, numbers, bytes(self.key_size))

    def encode_value(self, numbers: Mapping[str, int], old: bytes | None = None) -> bytes:
        """Return the bytes of a value.

        Args:
            numbers: the members by name; one that is not given is as it was, or 0.
            old: the value that is there now, None if there is none.

        Returns:
            The value, as the kernel takes it.

        Raises:
            UsageError: a member does not fit.
        """
        return self._encode(self.value, self.value_size, numbers, old or bytes(self.value_size))

    def decode(self, key: bytes, value: bytes) -> dict[str, Any]:
        """Return an element as numbers by name.

        Args:
            key: the bytes of its key.
            value: the bytes of its value.

        Returns:
            {"key": numbers, "value": numbers}.
        """
        return {"key": _decode(self.key, key), "value": _decode(self.value, value)}

    def split(self, words: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Tell which settings belong to the key, and which to the value.

        Args:
            words: settings by name, as a person writes them.

        Returns:
            Those of the key and those of the value.

        Raises:
            UsageError: one belongs to neither, or a member of the key is missing.
        """
        names = {field.name for field in self.key}
        if set(FILE_FIELDS) <= names:
            names.add("file")
        key = {name: value for name, value in words.items() if name in names}
        value = {name: value for name, value in words.items() if name not in names}
        known = {field.name for field in self.value}
        for name in value:
            if name not in known:
                raise UsageError(
                    f"the map {self.name} has no member {name}", f"it takes {self.usage()}"
                )
        missing = names - set(key) - {"reserved", "file"}
        if missing - (set(FILE_FIELDS) if "file" in key else set()):
            raise UsageError(f"the map {self.name} was not written", f"it takes {self.usage()}")
        return key, value

    def usage(self) -> str:
        """Return what to write on the command line.

        Returns:
            The members, those of the key first.
        """
        key = [field.name for field in self.key if field.name != "reserved"]
        if set(FILE_FIELDS) <= set(key):
            key = ["file", *(name for name in key if name not in FILE_FIELDS)]
        value = [field.name for field in self.value if field.name != "reserved"]
        return " ".join(f"{name}=..." for name in (*key, *value))

    def _encode(
        self,
        fields: tuple[MapField, ...],
        size: int,
        numbers: Mapping[str, int],
        start: bytes,
    ) -> bytes:
        """Write numbers into a copy of `start`.  Raises UsageError if one does not fit."""
        data = bytearray(start)
        for field in fields:
            if field.name not in numbers:
                continue
            try:
                raw = numbers[field.name].to_bytes(field.size, sys.byteorder, signed=field.signed)
            except OverflowError:
                raise UsageError(
                    f"{numbers[field.name]} does not fit {field.name}",
                    f"it has {field.size} bytes" + ("" if field.signed else " and no sign"),
                ) from None
            data[field.offset : field.offset + field.size] = raw
        return bytes(data[:size])


@dataclass(frozen=True)
class Gauge:
    """A number that a policy keeps in its memory, for `status` to show.

    Attributes:
        name: the name of the policy's variable.
        unit: what it counts.
        help: what it says, for people.
        at_least: the name of the gauge that it must not fall below; "" for none.
        offset: bytes from the start of the section that it is in.
        size: bytes.
    """

    name: str
    unit: str
    help: str
    at_least: str
    offset: int
    size: int


def _decode(fields: tuple[MapField, ...], data: bytes) -> dict[str, int]:
    """Read the members of a key or value, but for those called `reserved`."""
    return {
        field.name: int.from_bytes(
            data[field.offset : field.offset + field.size], sys.byteorder, signed=field.signed
        )
        for field in fields
        if field.name != "reserved"
    }


def maps_of(info: PolicyInfo) -> tuple[HintMap, ...]:
    """Return the maps of a policy that are for user space.

    Args:
        info: what catalog.find() returned.

    Returns:
        The maps, the policy's own first.

    Raises:
        UsageError: the object is damaged.
    """
    if info.object is None:
        return ()
    with Elf(info.object) as elf:
        try:
            return maps_in(elf.btf())
        except BtfError as error:
            raise UsageError(f"{info.object} is damaged", str(error), "Build it anew") from error


def maps_in(btf: Btf) -> tuple[HintMap, ...]:
    """Return the maps for user space that an object's type information declares.

    Args:
        btf: the type information.

    Returns:
        The maps, the policy's own first.
    """
    found = []
    for variable in btf.variables(MAPS):
        tags = knob_tags(btf, variable.var_id)
        kind = next((kind for kind in _KINDS if kind in tags), None)
        if kind is None:
            continue
        members = {
            member.name: member.type_id for member in btf.members(btf.resolve(variable.type_id))
        }

        def number(name: str, members: dict[str, int] = members) -> int:
            return btf.array(btf.resolve(btf.target(btf.resolve(members[name]))))[1]

        key, value = (btf.target(btf.resolve(members[name])) for name in ("key", "value"))
        found.append(
            HintMap(
                variable.name,
                kind,
                tags[kind],
                number("type"),
                number("max_entries"),
                btf.size(key),
                btf.size(value),
                _fields(btf, key, "key"),
                _fields(btf, value, "value"),
            )
        )
    # The policy's own first.
    return tuple(sorted(found, key=lambda hint_map: hint_map.name == CONSUMERS))


def _fields(btf: Btf, type_id: int, name: str) -> tuple[MapField, ...]:
    """Return the integer members of a struct, or one for a plain number, which gets `name`."""
    inner = btf.resolve(type_id)
    if btf.kind(inner) not in (BtfKind.STRUCT, BtfKind.UNION):
        return (MapField(name, 0, btf.size(inner), btf.int_signed(inner)),)
    return tuple(
        MapField(field.name, field.offset, field.size, btf.int_signed(field.type_id))
        for field in btf.fields(inner)
        if btf.kind(btf.resolve(field.type_id)) in (BtfKind.INT, BtfKind.ENUM)
    )


def gauges_of(info: PolicyInfo) -> tuple[Gauge, ...]:
    """Return the gauges of a policy.

    Args:
        info: what catalog.find() returned.

    Returns:
        The gauges, in order of their declaration.

    Raises:
        UsageError: the object is damaged.
    """
    if info.object is None:
        return ()
    with Elf(info.object) as elf:
        try:
            return gauges_in(elf.btf())
        except BtfError as error:
            raise UsageError(f"{info.object} is damaged", str(error), "Build it anew") from error


def gauges_in(btf: Btf) -> tuple[Gauge, ...]:
    """Return the gauges that an object's type information declares.

    Their offsets mean something once the object is loaded.

    Args:
        btf: the type information.

    Returns:
        The gauges, in order of their declaration.
    """
    found = []
    for variable in btf.variables(BSS):
        tags = knob_tags(btf, variable.var_id)
        if "gauge" in tags:
            found.append(
                Gauge(
                    variable.name,
                    tags.get("unit", ""),
                    tags["gauge"],
                    tags.get("at_least", ""),
                    variable.offset,
                    btf.size(variable.type_id),
                )
            )
    return tuple(found)


def broken_promises(gauges: tuple[Gauge, ...], values: Mapping[str, int]) -> list[str]:
    """Say which gauges are below what the policy has promised.

    Args:
        gauges: the policy's gauges.
        values: what they show, by name.

    Returns:
        A sentence for each of those.
    """
    return [
        f"{gauge.name} is {values[gauge.name]:,} {gauge.unit}, {gauge.at_least} "
        f"{values[gauge.at_least]:,}"
        for gauge in gauges
        if gauge.at_least and values[gauge.name] < values[gauge.at_least]
    ]


def find_map(policy: str, known: tuple[HintMap, ...], name: str) -> HintMap:
    """Find a map by its name.

    Args:
        policy: the policy's name, for the error.
        known: the policy's maps.
        name: the map's name; hyphens stand for underscores.

    Returns:
        The map.

    Raises:
        UsageError: there is none.
    """
    for hint_map in known:
        if hint_map.name == name.replace("-", "_"):
            return hint_map
    names = ", ".join(hint_map.name for hint_map in known)
    raise UsageError(
        f"the policy {policy} has no map {name} for hints",
        f"it has {names}" if names else "it has none",
    )


def resolve(
    words: Mapping[str, Any],
    model_id: Callable[[str], int],
    cgroup_id: Callable[[str], int],
    file_fields: Callable[[str], Mapping[str, int]],
    now_ns: Callable[[], int] = time.monotonic_ns,
) -> dict[str, int]:
    """Return numbers for settings as a person writes them.

    Args:
        words: texts or numbers by the members' names.
        model_id: returns the number that stands for a model's name.
        cgroup_id: returns the number of a cgroup from its path.
        file_fields: returns the members of a file's identity from its path.
        now_ns: the clock that durations are added to, in nanoseconds.

    Returns:
        Numbers by the members' names.

    Raises:
        UsageError: a text stands for no number.
    """
    numbers: dict[str, int] = {}
    for name, word in words.items():
        text = str(word)
        if name == "file":
            numbers.update(file_fields(text))
            continue
        try:
            numbers[name] = int(text, 0)
            continue
        except ValueError:
            pass
        if name == "model":
            numbers[name] = model_id(text)
        elif name == "cgroup_id":
            numbers[name] = cgroup_id(text)
        elif name.endswith("_ns"):
            later = text.startswith("+")
            numbers[name] = parse_duration(text.lstrip("+")) + (now_ns() if later else 0)
        else:
            raise UsageError(f"{text!r} is not a value for {name}", "it takes a whole number")
    return numbers


def cgroup_id_of(path: str) -> int:
    """Return the number of a cgroup v2 directory, which is its inode's.

    Args:
        path: the directory.

    Returns:
        The number, as bpf_get_current_cgroup_id() returns it.

    Raises:
        UsageError: the path is no such directory.
    """
    place, mount = Path(path), cgroups.version_2_mount()
    place = place if place.is_absolute() and place.exists() else mount / path.lstrip("/")
    try:
        return os.stat(place).st_ino
    except OSError as error:
        raise UsageError(
            f"there is no control group {path}",
            error.strerror or str(error),
            f"Give its path below {mount}",
        ) from error
