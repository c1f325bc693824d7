# SPDX-License-Identifier: Apache-2.0
"""A small reader of BTF, the type information of the kernel, its modules and BPF objects.

Made for two jobs: to compare layouts (struct sizes, member offsets) and to find out what a
policy declares (knobs with their decl tags, hooks).  A kernel has about 150,000 types, so only
the position of each type is indexed; everything else is decoded when it is asked for.

Every malformed input ends in BtfError, whatever is wrong with it: references are checked when
they are followed, and chains of references are cut at MAX_DEPTH, so that loops end too.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator
from pathlib import Path

from pagecache_bpf.kernel.btf_types import BtfError, BtfKind, Field, Member, Variable

__all__ = ["Btf", "BtfError", "BtfKind", "Field", "Member", "Variable"]

MAGIC = 0xEB9F
MAX_DEPTH = 64
MAX_FIELDS = 100_000
POINTER_SIZE = 8  # of the 64-bit kernels and of BPF

_HEADER = struct.Struct("=HBBIIIII")
_SIGN = 1 << 31


# Words (of 4 bytes) that follow the three of each type: fixed, and for each of its elements.
_FIXED = (0, 1, 0, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 1, 0, 0)
_EACH = (0, 0, 0, 0, 3, 3, 2, 0, 0, 0, 0, 0, 0, 2, 0, 3, 0, 0, 0, 3)

_AGGREGATES = (BtfKind.STRUCT, BtfKind.UNION)
_ENUMS = (BtfKind.ENUM, BtfKind.ENUM64)
_SIZED = (BtfKind.INT, BtfKind.FLOAT, BtfKind.DATASEC, *_AGGREGATES, *_ENUMS)
_ALIASES = (
    *(BtfKind.TYPEDEF, BtfKind.VOLATILE, BtfKind.CONST, BtfKind.RESTRICT),
    *(BtfKind.TYPE_TAG, BtfKind.VAR, BtfKind.DECL_TAG),
)


class Btf:
    """The types of one object, or of a module.

    What takes the number of a type raises BtfError if there is no such type, if it is of another
    kind than the method is for, and if what it refers to is damaged.

    Args:
        data: raw BTF.
        base: for the split BTF of a module, the types of the kernel it is for.

    Attributes:
        base: the same.
        first_id: the number of the first type that is not the base's.
        end_id: the number behind the last type.

    Raises:
        BtfError: the data is no BTF, or damaged.
    """

    def __init__(self, data: bytes, base: Btf | None = None) -> None:
        self.base = base
        self.first_id: int = base.end_id if base else 1
        self._first_string: int = base._end_string if base else 0
        self._strings, types = _sections(data, base is not None)
        self._end_string: int = self._first_string + len(self._strings)
        self._words = memoryview(types).cast("I")
        self._starts = _index(self._words)
        self.end_id: int = self.first_id + len(self._starts)
        self._tags: dict[int, list[str]] | None = None

    @classmethod
    def from_file(cls, path: str | Path, base: Btf | None = None) -> Btf:
        """Read raw BTF, such as /sys/kernel/btf/vmlinux.

        Args:
            path: the file.
            base: the kernel's own BTF, for the split BTF of a module.

        Returns:
            The type information.

        Raises:
            BtfError: the file is damaged, or a split one without its base.
            OSError: the file cannot be read.
        """
        return cls(Path(path).read_bytes(), base)

    # One type.

    def _locate(self, type_id: int) -> tuple[Btf, int]:
        """Return whose type it is, this object's or its base's, and where it starts, in words."""
        if self.base and type_id < self.first_id:
            return self.base._locate(type_id)
        if not self.first_id <= type_id < self.end_id:
            raise BtfError("broken BTF", f"there is no type {type_id}")
        return self, self._starts[type_id - self.first_id]

    def _words_of(self, type_id: int) -> memoryview[int]:
        """Return the words of a type and of all that follow it."""
        owner, start = self._locate(type_id)
        return owner._words[start:]

    def kind(self, type_id: int) -> BtfKind:
        """Return the kind of a type; type 0 is void.

        Args:
            type_id: the type's number.

        Returns:
            Its kind.
        """
        return BtfKind(self._words_of(type_id)[1] >> 24 & 31) if type_id else BtfKind.VOID

    def name(self, type_id: int) -> str:
        """Return the name of a type.

        Args:
            type_id: the type's number.

        Returns:
            The name, "" if it has none.
        """
        return self._string(self._words_of(type_id)[0]) if type_id else ""

    def target(self, type_id: int) -> int:
        """Return what a pointer, typedef, qualifier, variable, function or tag refers to.

        Args:
            type_id: the number of one of those.

        Returns:
            The number of the type it refers to.

        Raises:
            BtfError: there is no such type, or it refers to none.
        """
        return self._words_of(type_id)[2]

    def _string(self, offset: int) -> str:
        """Return the string at an offset of the string section, of the base or of this object."""
        if self.base and offset < self._first_string:
            return self.base._string(offset)
        start = offset - self._first_string
        end = self._strings.find(b"\0", start) if start < len(self._strings) else -1
        if end < 0:
            raise BtfError("broken BTF", f"there is no string at {offset}")
        return self._strings[start:end].decode("utf-8", "replace")

    def _elements(self, type_id: int, kinds: tuple[BtfKind, ...]) -> Iterator[tuple[int, ...]]:
        """Yield the words of each element (member, parameter, ...) of a type of these kinds."""
        kind = self.kind(type_id)
        if kind not in kinds:
            wanted = " or ".join(k.name for k in kinds)
            raise BtfError("broken BTF", f"type {type_id} is {kind.name}, not {wanted}")
        words, width = self._words_of(type_id), _EACH[kind]
        for i in range(words[1] & 0xFFFF):
            yield tuple(words[3 + i * width : 3 + (i + 1) * width])

    # Searching.

    def find(self, name: str, *kinds: BtfKind) -> int | None:
        """Find a type by its name.

        Args:
            name: the whole name.
            kinds: the kinds to consider; none given means any.

        Returns:
            The number of the first such type, None if there is none.
        """
        if self.base and (found := self.base.find(name, *kinds)) is not None:
            return found
        wanted = set(self._string_offsets(name.encode()))
        for type_id in self.ids() if wanted else ():
            start = self._starts[type_id - self.first_id]
            if self._words[start] in wanted and (not kinds or self.kind(type_id) in kinds):
                return type_id
        return None

    def require(self, name: str, *kinds: BtfKind) -> int:
        """Find a type by its name, and fail where there is none.

        Args:
            name: the whole name.
            kinds: the kinds to consider; none given means any.

        Returns:
            The number of the first such type.

        Raises:
            BtfError: there is none.
        """
        found = self.find(name, *kinds)
        if found is None:
            what = " or ".join(kind.name.lower() for kind in kinds) or "type"
            raise BtfError(f"no {what} {name}", "the type information does not have it")
        return found

    def _string_offsets(self, name: bytes) -> Iterator[int]:
        """Yield all offsets that mean a string: linkers let a string be the tail of another one."""
        if self.base:
            yield from self.base._string_offsets(name)
        at = self._strings.find(name + b"\0")
        while at >= 0:
            yield self._first_string + at
            at = self._strings.find(name + b"\0", at + 1)

    def ids(self, *kinds: BtfKind) -> Iterator[int]:
        """Yield the numbers of this object's own types, not those of its base.

        Args:
            kinds: only types of these kinds; none given means all.

        Yields:
            Numbers, ascending.
        """
        for type_id in range(self.first_id, self.end_id):
            if not kinds or self.kind(type_id) in kinds:
                yield type_id

    # Layout.

    def resolve(self, type_id: int) -> int:
        """Return the type behind typedefs, qualifiers and variables.

        Args:
            type_id: the number to start from.

        Returns:
            The number of the first type that is none of those.

        Raises:
            BtfError: they lead round in a circle, or to no type.
        """
        for _ in range(MAX_DEPTH):
            if self.kind(type_id) not in _ALIASES:
                return type_id
            type_id = self.target(type_id)
        raise BtfError("broken BTF", f"type {type_id} refers to itself")

    def size(self, type_id: int) -> int:
        """Return how much room a value of a type takes.

        Args:
            type_id: the type's number; typedefs and qualifiers are looked through.

        Returns:
            Bytes.

        Raises:
            BtfError: the type has no size (a function, void) or is damaged.
        """
        count = 1
        for _ in range(MAX_DEPTH):
            type_id = self.resolve(type_id)
            kind = self.kind(type_id)
            if kind in _SIZED:
                return count * self.target(type_id)
            if kind == BtfKind.PTR:
                return count * POINTER_SIZE
            if kind != BtfKind.ARRAY:
                raise BtfError("broken BTF", f"{kind.name} (type {type_id}) has no size")
            type_id, length = self.array(type_id)
            count *= length
        raise BtfError("broken BTF", f"array {type_id} contains itself")

    def array(self, type_id: int) -> tuple[int, int]:
        """Return what an array holds.

        Args:
            type_id: the array's number.

        Returns:
            The number of the element type, and how many elements there are.

        Raises:
            BtfError: the type is no array.
        """
        if self.kind(type_id) != BtfKind.ARRAY:
            raise BtfError("broken BTF", f"type {type_id} is not an array")
        words = self._words_of(type_id)
        return words[3], words[5]

    def int_signed(self, type_id: int) -> bool:
        """Tell whether an integer type is signed.

        Args:
            type_id: the type's number; typedefs and qualifiers are looked through.

        Returns:
            False for everything that is no signed integer, too.
        """
        type_id = self.resolve(type_id)
        words = self._words_of(type_id)
        if self.kind(type_id) in _ENUMS:
            return bool(words[1] & _SIGN)
        return self.kind(type_id) == BtfKind.INT and bool(words[3] >> 24 & 1)

    def members(self, type_id: int) -> list[Member]:
        """Return the members of a struct or union, as they are written.

        Args:
            type_id: the number of the struct or union.

        Returns:
            Its members, in order; an anonymous struct is one member with no name.
        """
        flagged = self._words_of(type_id)[1] & _SIGN
        return [
            Member(
                self._string(name),
                member_type,
                position & 0xFFFFFF if flagged else position,
                position >> 24 if flagged else 0,
            )
            for name, member_type, position in self._elements(type_id, _AGGREGATES)
        ]

    def fields(self, type_id: int) -> list[Field]:
        """Return the members of a struct or union with their offsets in bytes.

        Members of anonymous structs and unions inside it are included.  Bit fields are left out:
        they have no offset in bytes.

        Args:
            type_id: the number of the struct or union.

        Returns:
            The fields, in order of the declaration.

        Raises:
            BtfError: the type is neither, contains itself, or has more than MAX_FIELDS members.
        """
        found: list[Field] = []
        pending = [(0, member) for member in reversed(self.members(type_id))]
        seen = 0
        while pending:
            seen += 1
            if seen + len(pending) > MAX_FIELDS:
                raise BtfError("broken BTF", f"type {type_id} contains itself, or far too much")
            start, member = pending.pop()
            offset, inner = start + member.bit_offset // 8, self.resolve(member.type_id)
            if not member.name and self.kind(inner) in _AGGREGATES:
                pending += [
                    (offset, inner_member) for inner_member in reversed(self.members(inner))
                ]
            elif not member.bits:
                found.append(Field(member.name, offset, self.size(inner), member.type_id))
        return found

    def enum_values(self, type_id: int) -> dict[str, int]:
        """Return the names and values of an enum.

        Args:
            type_id: the number of the enum.

        Returns:
            Values by name, in order of the declaration.
        """
        signed = self._words_of(type_id)[1] & _SIGN
        values = {}
        for name, low, *high in self._elements(type_id, _ENUMS):
            bits = 64 if high else 32
            value = low | (high[0] << 32 if high else 0)
            if signed and value >> (bits - 1):
                value -= 1 << bits
            values[self._string(name)] = value
        return values

    # Variables, tags, functions.

    def variables(self, datasec: str) -> list[Variable]:
        """Return the variables of a data section.

        Args:
            datasec: the name of the section, such as ".rodata".

        Returns:
            The variables, in the section's order; none if there is no such section.
        """
        section = self.find(datasec, BtfKind.DATASEC)
        if section is None:
            return []
        return [
            Variable(self.name(var_id), self.target(var_id), offset, size, var_id)
            for var_id, offset, size in self._elements(section, (BtfKind.DATASEC,))
        ]

    def tags(self, type_id: int) -> list[str]:
        """Return the decl tags on a variable, type or function as a whole, not on its members.

        Args:
            type_id: the number of what is tagged.

        Returns:
            The texts of the tags, in the object's order.
        """
        if self._tags is None:
            self._tags = {}
            for tag_id in self.ids(BtfKind.DECL_TAG):
                _, _, target, component = self._words_of(tag_id)[:4]
                if component == 0xFFFFFFFF:
                    self._tags.setdefault(target, []).append(self.name(tag_id))
        return self._tags.get(type_id, [])

    def parameters(self, type_id: int) -> list[tuple[str, int]]:
        """Return the parameters of a function or of its prototype.

        Args:
            type_id: the number of the function or of the prototype.

        Returns:
            The name and the type's number of each, in order.
        """
        if self.kind(type_id) == BtfKind.FUNC:
            type_id = self.target(type_id)
        return [
            (self._string(name), parameter)
            for name, parameter in self._elements(type_id, (BtfKind.FUNC_PROTO,))
        ]


def _sections(data: bytes, split: bool) -> tuple[bytes, bytes]:
    """Check the header and return the string section and the type section."""
    if len(data) < _HEADER.size:
        raise BtfError("broken BTF", f"{len(data)} bytes are too few for a header")
    magic, version, _, header, type_at, type_len, string_at, string_len = _HEADER.unpack_from(data)
    if magic == int.from_bytes(MAGIC.to_bytes(2, "big"), "little"):
        raise BtfError("unreadable BTF", "it is for machines of the other byte order")
    if magic != MAGIC or version != 1:
        raise BtfError("broken BTF", f"magic {magic:#x}, version {version} are not BTF's")
    strings = data[header + string_at : header + string_at + string_len]
    types = data[header + type_at : header + type_at + type_len]
    if header < _HEADER.size or len(strings) != string_len or len(types) != type_len:
        raise BtfError("broken BTF", "it is shorter than its header says")
    # The empty name is string 0 (of the base, where there is one).
    named = strings[-1:] == b"\0" and (split or strings[0] == 0)
    if type_len % 4 or not (named or (split and not strings)):
        raise BtfError("broken BTF", "its sections are malformed")
    return strings, types


def _index(words: memoryview[int]) -> array[int]:
    """Return where each type starts, in words."""
    starts = array("I")
    at, end = 0, len(words)
    while at + 3 <= end:
        info = words[at + 1]
        kind = info >> 24 & 31
        if not 0 < kind < len(_EACH):
            raise BtfError("broken or newer BTF", f"type {len(starts) + 1} has kind {kind}")
        starts.append(at)
        at += 3 + _FIXED[kind] + (info & 0xFFFF) * _EACH[kind]
    if at != end:
        raise BtfError("broken BTF", "the last type is cut off")
    return starts
