# SPDX-License-Identifier: Apache-2.0
"""Policies of engine agent keep within the stack that old kernels give a program.

The verifier of 5.15 and 6.1 adds up the frames of a program and of all functions below it, each
rounded up to 32 bytes, and refuses more than 512; newer ones count less of it.  No old kernel runs
in `make test`, so the frames are counted here as check_max_stack_depth() does.

Source: kernel/bpf/verifier.c, check_max_stack_depth(), Linux 6.1.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile
from elftools.elf.relocation import RelocationSection
from elftools.elf.sections import SymbolTableSection

from pagecache_bpf.policy.catalog import agent_object, find, names

MOST, ROUNDED = 512, 32
_CALL, _MOVE, _ADD, _LOAD_ADDRESS = 0x85, 0xBF, 0x07, 0x18
_PSEUDO_CALL, _FRAME = 1, 10


@dataclass
class Function:
    """A function of an object: bytes of its frame, and what it calls or has called back."""

    frame: int = 0
    below: set[str] = field(default_factory=set)


def functions(path: Path) -> dict[str, Function]:
    """Read the functions of an object file, by name."""
    with path.open("rb") as file:
        elf = ELFFile(file)
        symbols = elf.get_section_by_name(".symtab")
        assert isinstance(symbols, SymbolTableSection)
        starts: dict[tuple[int, int], str] = {}
        sizes: dict[str, int] = {}
        for symbol in symbols.iter_symbols():
            if symbol["st_info"]["type"] == "STT_FUNC":
                starts[symbol["st_shndx"], symbol["st_value"]] = symbol.name
                sizes[symbol.name] = symbol["st_size"]
        relocated: dict[tuple[int, int], tuple[int, int]] = {}
        for table in elf.iter_sections("SHT_REL"):
            assert isinstance(table, RelocationSection)
            for relocation in table.iter_relocations():
                symbol = symbols.get_symbol(relocation["r_info_sym"])
                if isinstance(symbol["st_shndx"], int):
                    place = table["sh_info"], relocation["r_offset"]
                    relocated[place] = symbol["st_shndx"], symbol["st_value"]
        found = {}
        for (section, start), name in starts.items():
            code = elf.get_section(section).data()[start : start + sizes[name]]
            found[name] = _function(code, section, start, starts, relocated)
        return found


def _function(
    code: bytes,
    section: int,
    start: int,
    starts: dict[tuple[int, int], str],
    relocated: dict[tuple[int, int], tuple[int, int]],
) -> Function:
    """Look through the instructions of a function."""
    made = Function()
    copies: set[int] = set()  # registers that hold the frame's address
    for at in range(0, len(code), 8):
        operation, registers, offset, value = struct.unpack_from("<BBhi", code, at)
        target, source = registers & 15, registers >> 4
        kind = operation & 7
        if (kind == 1 and source == _FRAME) or (kind in (2, 3) and target == _FRAME):
            made.frame = max(made.frame, -offset)
        if operation == _ADD and target in copies:
            made.frame = max(made.frame, -value)
        if kind in (0, 1, 4, 7):
            copies.discard(target)
        if operation == _MOVE and source == _FRAME:
            copies.add(target)
        called = operation == _CALL and source == _PSEUDO_CALL
        base = relocated.get((section, start + at))
        if called and base is None:
            base = section, start + at
        if base is not None and (called or operation == _LOAD_ADDRESS):
            place = base[0], base[1] + (8 * (value + 1) if called else value)
            if place in starts:
                made.below.add(starts[place])
    return made


def deepest(found: dict[str, Function], name: str) -> tuple[int, list[str]]:
    """Return the bytes of a function and of those below it, and the way that takes most."""
    below = [deepest(found, other) for other in found[name].below]
    most, way = max(below, default=(0, []))
    frame = max(ROUNDED, -(-found[name].frame // ROUNDED) * ROUNDED)
    return frame + most, [name, *way]


@pytest.mark.parametrize("name", names())
def test_every_policy_fits_into_the_stack(name: str) -> None:
    path = agent_object(find(name))
    if not path.exists():
        pytest.skip(f"{path.name} has not been compiled")
    found = functions(path)
    size, way = max(deepest(found, function) for function in found)
    assert size <= MOST, " > ".join(way)


def test_what_a_loop_calls_back_counts() -> None:
    """The deepest way known: five frames, of which a loop calls the fourth."""
    path = agent_object(find("maio"))
    if not path.exists():
        pytest.skip(f"{path.name} has not been compiled")
    found = functions(path)
    size, way = deepest(found, "agent_get_pages_fexit")
    assert size > MOST - 64 and len(way) == 5
