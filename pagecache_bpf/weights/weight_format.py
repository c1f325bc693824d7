# SPDX-License-Identifier: Apache-2.0
"""What a format of weight files is, and which ones there are: one module each in formats/.

It finds those modules and knows no format itself.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from pagecache_bpf.weights.contents import Contents


def _never(start: bytes) -> bool:
    """Recognize no file by its first bytes."""
    return False


@dataclass(frozen=True)
class WeightFormat:
    """A format of weight files.

    Attributes:
        name: what Model.format and Contents.kind say.
        suffixes: what such files end with, without the dot and in lower case; where a directory
            has files with several of them, loaders take those with the first one.
        preference: where a directory has several formats, the one with the smallest number is
            the model, as transformers and vLLM choose: safetensors 0, PyTorch 10, GGUF 20.
        title: what people call the format, for messages.
        magic: bytes with which every such file begins; b"" where it has none.
        resembles: whether the first 16 bytes look like it, which is asked, in the order of
            `preference`, when no format's magic fits.
        parse: reads a header: parse(path, descriptor, size).  The path is for messages only, and
            nothing in the file is believed.  None: headers of this format are not read.
    """

    name: str
    suffixes: tuple[str, ...]
    preference: int
    title: str = ""
    magic: bytes = b""
    resembles: Callable[[bytes], bool] = _never
    parse: Callable[[Path, int, int], Contents] | None = None


@lru_cache(maxsize=1)
def known_formats() -> dict[str, WeightFormat]:
    """Import the modules of formats/ and collect what they declare.

    Returns:
        All formats by their names, the preferred ones first.
    """
    package = importlib.import_module("pagecache_bpf.weights.formats")
    found = [
        declared
        for module in pkgutil.iter_modules(package.__path__)
        for declared in importlib.import_module(f"{package.__name__}.{module.name}").FORMATS
    ]
    ordered = sorted(found, key=lambda declared: (declared.preference, declared.name))
    return {declared.name: declared for declared in ordered}


@lru_cache(maxsize=1)
def _by_suffix() -> dict[str, str]:
    """Return the format's name for each suffix."""
    formats = known_formats().values()
    return {suffix: declared.name for declared in formats for suffix in declared.suffixes}


def suffixes() -> frozenset[str]:
    """Collect the suffixes of weight files of all formats.

    Returns:
        Suffixes in lower case, without the dot.
    """
    return frozenset(_by_suffix())


def format_of(name: str) -> str | None:
    """Tell the format that a file's suffix stands for.

    Args:
        name: the file's name or path.

    Returns:
        The format's name; None for files that are no weights.
    """
    return _by_suffix().get(name.rpartition(".")[2].lower()) if "." in name else None


def forget() -> None:
    """Have the formats looked for again, after a module was added."""
    known_formats.cache_clear()
    _by_suffix.cache_clear()


def recognized(name: str, start: bytes) -> WeightFormat | None:
    """Tell which format a file has whose header can be read, by its first bytes and its name.

    Args:
        name: the file's name.
        start: its first 16 bytes, or as many as it has.

    Returns:
        The format; None where no format with a parser fits.
    """
    readable = [declared for declared in known_formats().values() if declared.parse]
    for declared in readable:
        if declared.magic and start.startswith(declared.magic):
            return declared
    for declared in readable:
        named = not declared.magic and format_of(name) == declared.name
        if named or declared.resembles(start):
            return declared
    return None
