# SPDX-License-Identifier: Apache-2.0
"""The ELF layer: sections, symbols, relocations, and files that are damaged."""

from __future__ import annotations

import random
import struct
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

from pagecache_bpf.errors import PagecacheError, UsageError
from pagecache_bpf.kernel.elf import Elf
from pagecache_bpf.policy.compiler import find_clang

SOURCE = r"""
#define SEC(name) __attribute__((section(name), used))
char terms[] SEC("license") = "GPL";
const volatile int first = 7;
const volatile int second = 8;
struct table { int (*one)(void); long number; int (*two)(void); };
int one(void) { return first; }
int two(void) { return second; }
SEC(".struct_ops.link") struct table table = { one, 5, two };
"""


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("elf") / "sample.o"
    subprocess.run(
        [find_clang(), "-target", "bpf", "-g", "-O2", "-x", "c", "-", "-c", "-o", str(out)],
        input=SOURCE,
        text=True,
        check=True,
    )
    return out


def test_sections(sample: Path) -> None:
    with Elf(sample) as elf:
        assert elf.machine == "EM_BPF"
        assert elf.section("license") == b"GPL\0"
        assert elf.section(".no_such_section") is None


def test_symbols_place_variables(sample: Path) -> None:
    with Elf(sample) as elf:
        symbol = elf.symbols()["second"]
        data = elf.section(symbol.section)
    assert (symbol.section, symbol.size) == (".rodata", 4)
    assert data is not None
    assert struct.unpack_from("<i", data, symbol.value) == (8,)


def test_relocations_are_the_hooks(sample: Path) -> None:
    with Elf(sample) as elf:
        found = {place.offset: place.symbol.name for place in elf.relocations(".struct_ops.link")}
    assert found == {0: "one", 16: "two"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not an object file"),
        (b"#!/bin/sh\n", "is not an object file"),
        (b"\x7fELF", "is damaged"),
        (b"\x7fELF\x02\x01\x01" + b"\xff" * 57, "is damaged"),
    ],
)
def test_what_is_not_elf_says_so(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.bpf.o"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message) as caught:
        Elf(path)
    assert str(path) in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        Elf(tmp_path / "absent.o")
    with pytest.raises(UsageError, match="Is a directory"):
        Elf(tmp_path)


def test_an_absurd_number_of_sections_is_refused(sample: Path, tmp_path: Path) -> None:
    # e_shnum 0 means "see sh_size of section 0", which has 64 bits.
    data = bytearray(sample.read_bytes())
    table = struct.unpack_from("<Q", data, 0x28)[0]
    struct.pack_into("<H", data, 0x3C, 0)
    struct.pack_into("<Q", data, table + 0x20, 1 << 60)
    path = tmp_path / "many.o"
    path.write_bytes(data)
    with pytest.raises(UsageError, match="sections"):
        Elf(path)


def test_an_object_without_types_says_so(tmp_path: Path) -> None:
    out = tmp_path / "plain.o"
    subprocess.run(
        [find_clang(), "-target", "bpf", "-O2", "-x", "c", "-", "-c", "-o", str(out)],
        input="int x;",
        text=True,
        check=True,
    )
    with Elf(out) as elf, pytest.raises(UsageError, match="no type information"):
        elf.btf()


def use(path: Path) -> None:
    """Ask everything that the package asks of an object."""
    with Elf(path) as elf:
        for name in (".BTF", ".rodata", ".struct_ops.link", "license"):
            elf.section(name)
        elf.symbols()
        elf.relocations(".struct_ops.link")
        elf.btf().variables(".rodata")


def test_truncated_anywhere_ends_in_our_error(sample: Path, tmp_path: Path) -> None:
    data, path = sample.read_bytes(), tmp_path / "cut.o"
    for length in range(0, len(data), 23):
        path.write_bytes(data[:length])
        with pytest.raises(PagecacheError):
            use(path)


def test_any_damage_ends_in_an_answer_or_our_error(sample: Path, tmp_path: Path) -> None:
    data, path, chance = sample.read_bytes(), tmp_path / "bad.o", random.Random(4711)
    for _ in range(400):
        bad = bytearray(data)
        for _ in range(chance.choice((1, 3, 20))):
            bad[chance.randrange(len(bad))] = chance.choice((0, 255, chance.randrange(256)))
        path.write_bytes(bad)
        with suppress(PagecacheError):
            use(path)
