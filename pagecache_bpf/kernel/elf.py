# SPDX-License-Identifier: Apache-2.0
"""Reads what we need from ELF files (BPF objects, kernel modules, vmlinux), over pyelftools.

It knows nothing of policies; whatever is wrong with a file ends in one error.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from elftools.common.exceptions import ELFError
from elftools.elf.constants import SH_FLAGS
from elftools.elf.elffile import ELFFile
from elftools.elf.relocation import RelocationSection
from elftools.elf.sections import Section, SymbolTableSection

from pagecache_bpf.errors import UsageError
from pagecache_bpf.kernel.btf import Btf

MAX_SECTIONS = 100_000
MAX_SYMBOLS = 10_000_000


@dataclass(frozen=True)
class Symbol:
    """A symbol of an ELF file.

    Attributes:
        name: the symbol's name.
        section: the name of the section that it lies in.
        value: its offset in that section, in bytes.
        size: bytes.
    """

    name: str
    section: str
    value: int
    size: int


@dataclass(frozen=True)
class Relocation:
    """A place in a section that will hold the address of a symbol.

    Attributes:
        offset: bytes from the start of the section.
        symbol: the symbol.
    """

    offset: int
    symbol: Symbol


class Elf:
    """An ELF file, open for reading.  A context manager.

    Args:
        path: the file.

    Attributes:
        path: the same, as a Path.

    Raises:
        UsageError: the file cannot be opened, is not ELF or is damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file: BinaryIO | None = None
        try:
            self._file = self.path.open("rb")
            self._length = self._file.seek(0, 2)
            self._elf = ELFFile(self._file)
            self._sections = self._index()
        except OSError as error:
            self.close()
            raise UsageError(f"cannot read {path}", error.strerror or str(error)) from error
        except UsageError:
            self.close()
            raise
        except Exception as error:
            self.close()
            raise self._damaged(error) from error

    def __enter__(self) -> Elf:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        if self._file:
            self._file.close()

    def _damaged(self, error: Exception | str) -> UsageError:
        # pyelftools raises its own errors and, on garbage, nearly any other: to the reader of
        # the message they are the same.
        """Make the error for whatever is wrong with the file."""
        text = str(error) or type(error).__name__
        if isinstance(error, ELFError) and "Magic" in text:
            return UsageError(f"{self.path} is not an object file", "it does not start as ELF does")
        return UsageError(f"{self.path} is damaged", text.rstrip("."), "Build it anew (make bpf)")

    def _index(self) -> dict[str, Section]:
        """Return the sections by name.  Raises UsageError if there are too many."""
        count = self._elf.num_sections()
        if count > MAX_SECTIONS:
            raise self._damaged(f"it claims to have {count} sections")
        return {section.name: section for section in self._elf.iter_sections()}

    @property
    def machine(self) -> str:
        """The machine it is for: EM_BPF, EM_X86_64, ..."""
        return str(self._elf["e_machine"])

    def section(self, name: str) -> bytes | None:
        """Return the bytes of a section.

        Args:
            name: the section's name, such as ".rodata".

        Returns:
            Its bytes, None if there is no such section.

        Raises:
            UsageError: the section lies outside of the file.
        """
        found = self._sections.get(name)
        if found is None:
            return None
        try:
            return self._data(found)
        except UsageError:
            raise
        except Exception as error:
            raise self._damaged(error) from error

    def _data(self, section: Section) -> bytes:
        """Return the bytes of a section.  Raises UsageError if the file does not have them."""
        start, size = int(section["sh_offset"]), int(section["sh_size"])
        if section["sh_type"] == "SHT_NOBITS":
            raise self._damaged(f"section {section.name} has no data")
        if section["sh_flags"] & SH_FLAGS.SHF_COMPRESSED:
            raise self._damaged(f"section {section.name} is compressed")
        if start + size > self._length:
            raise self._damaged(f"section {section.name} is cut off")
        return bytes(section.data())

    def symbols(self) -> dict[str, Symbol]:
        """Return the symbols that have a name and lie in a section.

        Returns:
            Symbols by name.

        Raises:
            UsageError: the symbol table is damaged.
        """
        table = self._sections.get(".symtab")
        if not isinstance(table, SymbolTableSection):
            return {}
        try:
            self._data(table)
            if table.num_symbols() > MAX_SYMBOLS:
                raise self._damaged("it has too many symbols")
            found = (self._symbol(table, i) for i in range(table.num_symbols()))
            return {symbol.name: symbol for symbol in found if symbol and symbol.name}
        except UsageError:
            raise
        except Exception as error:
            raise self._damaged(error) from error

    def _symbol(self, table: SymbolTableSection, index: int) -> Symbol | None:
        """Return a symbol by its index; None for one that lies in no section."""
        raw = table.get_symbol(index)
        section = raw["st_shndx"]
        if not isinstance(section, int):
            return None
        name = str(self._elf.get_section(section).name)
        return Symbol(str(raw.name), name, int(raw["st_value"]), int(raw["st_size"]))

    def relocations(self, section: str) -> list[Relocation]:
        """Return the relocations of a section.

        Args:
            section: the name of the section that is relocated.

        Returns:
            The relocations; those against nothing in this file are left out.

        Raises:
            UsageError: the table is damaged.
        """
        table = self._sections.get(f".rel{section}") or self._sections.get(f".rela{section}")
        if not isinstance(table, RelocationSection):
            return []
        try:
            self._data(table)
            symbols = self._elf.get_section(table["sh_link"])
            if not isinstance(symbols, SymbolTableSection):
                raise self._damaged(f"{table.name} has no symbols")
            found = []
            for relocation in table.iter_relocations():
                symbol = self._symbol(symbols, relocation["r_info_sym"])
                if symbol:
                    found.append(Relocation(int(relocation["r_offset"]), symbol))
            return found
        except UsageError:
            raise
        except Exception as error:
            raise self._damaged(error) from error

    def btf(self, base: Btf | None = None) -> Btf:
        """Return the type information in the file.

        A module that was built by a newer pahole brings the part of its base that it needs along;
        that is then taken instead of `base`.

        Args:
            base: the kernel's type information, for a module.

        Returns:
            The type information.

        Raises:
            UsageError: the file has none.
            BtfError: it is damaged.
        """
        data = self.section(".BTF")
        if data is None:
            raise UsageError(f"{self.path} has no type information", "no .BTF section")
        own_base = self.section(".BTF.base")
        return Btf(data, Btf(own_base) if own_base is not None else base)
