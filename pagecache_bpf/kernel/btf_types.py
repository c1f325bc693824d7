# SPDX-License-Identifier: Apache-2.0
"""What BTF is made of: kinds of types, members, variables, and the error for damaged BTF.

Source: Documentation/bpf/btf.rst and include/uapi/linux/btf.h.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from pagecache_bpf.errors import PagecacheError


class BtfError(PagecacheError):
    """Type information that cannot be read."""


class BtfKind(IntEnum):
    """Kinds of types, numbered as in include/uapi/linux/btf.h."""

    VOID = 0
    INT = 1
    PTR = 2
    ARRAY = 3
    STRUCT = 4
    UNION = 5
    ENUM = 6
    FWD = 7
    TYPEDEF = 8
    VOLATILE = 9
    CONST = 10
    RESTRICT = 11
    FUNC = 12
    FUNC_PROTO = 13
    VAR = 14
    DATASEC = 15
    FLOAT = 16
    DECL_TAG = 17
    TYPE_TAG = 18
    ENUM64 = 19


@dataclass(frozen=True)
class Member:
    """A member of a struct or union as it is written.

    Attributes:
        name: "" for an anonymous struct or union.
        type_id: the number of its type.
        bit_offset: bits from the start of the struct.
        bits: its width if it is a bit field, otherwise 0.
    """

    name: str
    type_id: int
    bit_offset: int
    bits: int


@dataclass(frozen=True)
class Field:
    """A member of a struct or union as it is laid out.

    Attributes:
        name: the member's name.
        offset: bytes from the start of the struct.
        size: bytes.
        type_id: the number of its type.
    """

    name: str
    offset: int
    size: int
    type_id: int


@dataclass(frozen=True)
class Variable:
    """A variable of a data section.

    Attributes:
        name: the variable's name.
        type_id: the number of its type.
        offset: bytes from the start of the section; 0 in an object that is not linked yet.
        size: bytes.
        var_id: the number of the variable itself, which decl tags refer to.
    """

    name: str
    type_id: int
    offset: int
    size: int
    var_id: int
