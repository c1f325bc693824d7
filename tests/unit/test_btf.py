# SPDX-License-Identifier: Apache-2.0
"""The BTF reader: against a compiler's output, the running kernel, and garbage."""

from __future__ import annotations

import struct
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagecache_bpf.kernel.btf import Btf, BtfError, BtfKind
from pagecache_bpf.kernel.elf import Elf
from pagecache_bpf.policy.compiler import find_clang

VMLINUX = Path("/sys/kernel/btf/vmlinux")

SOURCE = r"""
typedef unsigned int u32;
typedef long long s64;
enum color { RED = 3, GREEN, BLUE = 70 };
struct inner { u32 a; char text[12]; };
struct outer {
	unsigned char first;
	s64 second;
	struct inner grid[3][2];
	union { u32 number; char bytes[4]; };
	enum color color;
	u32 low : 3, high : 29;
	struct outer *next;
};
struct outer an_outer;
const volatile u32 knob __attribute__((btf_decl_tag("pagecache:unit=MiB")))
	__attribute__((btf_decl_tag("pagecache:min=1"))) = 64;
const volatile s64 other = -1;
int add(int left, struct outer *right) { return left + right->grid[1][1].a + knob + other; }
"""


@pytest.fixture(scope="module")
def btf(tmp_path_factory: pytest.TempPathFactory) -> Btf:
    out = tmp_path_factory.mktemp("btf") / "sample.o"
    subprocess.run(
        [find_clang(), "-target", "bpf", "-g", "-O2", "-x", "c", "-", "-c", "-o", str(out)],
        input=SOURCE,
        text=True,
        check=True,
    )
    with Elf(out) as elf:
        return elf.btf()


def test_layout_is_the_compilers(btf: Btf) -> None:
    outer = btf.require("outer", BtfKind.STRUCT)
    fields = {field.name: (field.offset, field.size) for field in btf.fields(outer)}
    assert btf.size(outer) == 136
    assert fields == {
        "first": (0, 1),
        "second": (8, 8),
        "grid": (16, 96),
        "number": (112, 4),
        "bytes": (112, 4),
        "color": (116, 4),
        "next": (128, 8),
    }


def test_bit_fields_have_their_bits(btf: Btf) -> None:
    members = {member.name: member for member in btf.members(btf.require("outer", BtfKind.STRUCT))}
    assert (members["low"].bit_offset, members["low"].bits) == (960, 3)
    assert (members["high"].bit_offset, members["high"].bits) == (963, 29)
    assert members["second"].bits == 0


def test_enum_values(btf: Btf) -> None:
    assert btf.enum_values(btf.require("color", BtfKind.ENUM)) == {
        "RED": 3,
        "GREEN": 4,
        "BLUE": 70,
    }


def test_variables_and_their_tags(btf: Btf) -> None:
    variables = {variable.name: variable for variable in btf.variables(".rodata")}
    assert set(variables) == {"knob", "other"}
    assert sorted(btf.tags(variables["knob"].var_id)) == ["pagecache:min=1", "pagecache:unit=MiB"]
    assert btf.tags(variables["other"].var_id) == []
    assert btf.size(variables["other"].type_id) == 8
    assert btf.int_signed(variables["other"].type_id)
    assert not btf.int_signed(variables["knob"].type_id)
    assert btf.variables(".no_such_section") == []


def test_function_parameters(btf: Btf) -> None:
    names = [name for name, _ in btf.parameters(btf.require("add", BtfKind.FUNC))]
    assert names == ["left", "right"]


def test_what_is_not_there_is_named(btf: Btf) -> None:
    assert btf.find("no_such_type") is None
    with pytest.raises(BtfError, match="no struct no_such_type"):
        btf.require("no_such_type", BtfKind.STRUCT)


@pytest.mark.skipif(not VMLINUX.exists(), reason="this kernel has no BTF")
def test_the_running_kernel() -> None:
    started = time.monotonic()
    kernel = Btf.from_file(VMLINUX)
    page = kernel.require("page", BtfKind.STRUCT)
    assert time.monotonic() - started < 2, "vmlinux has to be read lazily"
    assert kernel.size(page) == 64
    # These come from the kernel's ABI, so they hold for every kernel.
    stat = kernel.require("sockaddr_in", BtfKind.STRUCT)
    assert [(f.name, f.offset, f.size) for f in kernel.fields(stat)][:3] == [
        ("sin_family", 0, 2),
        ("sin_port", 2, 2),
        ("sin_addr", 4, 4),
    ]
    types = kernel.enum_values(kernel.require("bpf_prog_type", BtfKind.ENUM))
    assert types["BPF_PROG_TYPE_STRUCT_OPS"] == 27


# Hand-made BTF.

INT = (BtfKind.INT, 0, 4, (0x20,))


def encode(*types: tuple[int, int, int, tuple[int, ...]], strings: bytes = b"\0name\0") -> bytes:
    """BTF of types (kind, vlen, size or type, words behind)."""
    words: list[int] = []
    for kind, count, value, extra in types:
        words += [1, kind << 24 | count, value, *extra]
    body = struct.pack(f"={len(words)}I", *words)
    head = struct.pack("=HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(body), len(body), len(strings))
    return head + body + strings


def test_split_btf_goes_on_where_its_base_ends() -> None:
    base = Btf(encode(INT))
    # Its only type is number 2, and string 6 is the first of its own.
    own = struct.pack("=3I", 6, BtfKind.TYPEDEF << 24, 1)
    head = struct.pack("=HBBIIIII", 0xEB9F, 1, 0, 24, 0, 12, 12, 4)
    split = Btf(head + own + b"our\0", base)
    assert (split.first_id, split.end_id) == (2, 3)
    assert split.find("our", BtfKind.TYPEDEF) == 2
    assert split.find("name", BtfKind.INT) == 1
    assert (split.name(2), split.name(1), split.size(2)) == ("our", "name", 4)


def test_enum_values_keep_their_sign_and_width() -> None:
    # Bit 31 says that the enum is signed; kernels since 6.0 and clang 15 write it.
    signed = Btf(encode((BtfKind.ENUM | 0x80, 1, 4, (1, 0xFFFFFFFD))))
    assert signed.enum_values(1) == {"name": -3}
    wide = Btf(
        encode((BtfKind.ENUM64, 1, 8, (1, 5, 1)), (BtfKind.ENUM64 | 0x80, 1, 8, (1, 5, 1 << 31)))
    )
    assert wide.enum_values(1) == {"name": 5 + (1 << 32)}
    assert wide.enum_values(2) == {"name": 5 - (1 << 63)}


def test_loops_end() -> None:
    looping = Btf(encode((BtfKind.TYPEDEF, 0, 2, ()), (BtfKind.CONST, 0, 1, ())))
    with pytest.raises(BtfError, match="refers to itself"):
        looping.size(1)
    array = Btf(encode((BtfKind.ARRAY, 0, 0, (1, 1, 2))))
    with pytest.raises(BtfError, match="contains itself"):
        array.size(1)


def test_struct_that_contains_itself_ends() -> None:
    # Two anonymous members of its own type: followed naively, that is 2**depth members.
    own = Btf(encode((BtfKind.STRUCT, 2, 4, (0, 1, 0, 0, 1, 0))))
    with pytest.raises(BtfError, match="contains itself"):
        own.fields(1)


def test_deep_nesting_ends() -> None:
    nested = [(BtfKind.STRUCT, 2, 4, (0, i + 2, 0, 0, i + 2, 0)) for i in range(60)]
    deep = Btf(encode(*nested, (BtfKind.STRUCT, 0, 4, ())))
    with pytest.raises(BtfError, match="far too much"):
        deep.fields(1)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "too few"),
        (b"\x9f\xeb", "too few"),
        (b"\0" * 24, "not BTF"),
        (b"\xeb\x9f" + b"\0" * 22, "byte order"),
        (encode(INT)[:-1], "shorter than its header"),
        (encode((BtfKind.STRUCT, 9, 4, ())), "cut off"),
        (encode((31, 0, 4, ())), "kind 31"),
        (encode(INT, strings=b"name"), "malformed"),
    ],
)
def test_malformed_data_says_so(data: bytes, message: str) -> None:
    with pytest.raises(BtfError, match=message):
        Btf(data)


def test_dangling_references_say_so() -> None:
    dangling = Btf(encode((BtfKind.TYPEDEF, 0, 77, ())))
    with pytest.raises(BtfError, match="no type 77"):
        dangling.size(1)
    unnamed = Btf(encode((BtfKind.TYPEDEF, 0, 1, ()), strings=b"\0"))
    with pytest.raises(BtfError, match="no string"):
        unnamed.name(1)


def walk(btf: Btf) -> None:
    """Ask everything there is to ask; only BtfError may come of it."""
    for type_id in btf.ids():
        for ask in (btf.name, btf.size, btf.fields, btf.enum_values, btf.parameters, btf.tags):
            try:
                ask(type_id)
            except BtfError:
                continue
    btf.find("name", BtfKind.STRUCT)


words = st.integers(0, 2**32 - 1) | st.integers(0, 40)
kinds = st.integers(0, 20)


@settings(max_examples=300, deadline=5000)
@given(
    st.lists(st.tuples(kinds, st.integers(0, 3), words, st.lists(words, max_size=9)), max_size=9)
)
def test_any_types_end_in_an_answer_or_btferror(
    types: list[tuple[int, int, int, list[int]]],
) -> None:
    with suppress(BtfError):
        walk(Btf(encode(*((kind, n, value, tuple(more)) for kind, n, value, more in types))))


@settings(max_examples=100, deadline=5000)
@given(st.binary(max_size=200))
def test_any_bytes_end_in_an_answer_or_btferror(data: bytes) -> None:
    for candidate in (data, encode(INT)[:24] + data):
        try:
            walk(Btf(candidate))
        except BtfError:
            continue
