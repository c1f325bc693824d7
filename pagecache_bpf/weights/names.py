# SPDX-License-Identifier: Apache-2.0
"""What the name of a weight file says: its place among shards, its variant.

This module knows names only; it opens nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

#: Longer numbers are none that a layer has.
_MAX_DIGITS = 19
_NUMBERS = re.compile(rf"([0-9]{{1,{_MAX_DIGITS}}})")
_DIGITS = str.maketrans("123456789", "0" * 9)
_SPLIT = re.compile(r"(?P<base>.+?)[-_](?P<number>\d{1,6})-of-(?P<count>\d{1,6})(?P<rest>\..+)")
#: A variant stands before the suffix or before the number: model.fp16.safetensors,
#: model.fp16-00001-of-00002.safetensors (diffusers), model-00001-of-00002.fp16.safetensors.
_VARIANT = re.compile(
    r"(?:model|pytorch_model|diffusion_pytorch_model|flax_model|adapter_model)"
    r"(?:-\d+-of-\d+)?\.(?P<variant>[A-Za-z][\w-]*?)(?:-\d+-of-\d+)?\.(?:safetensors|bin)"
)
_INDEX_VARIANT = re.compile(r".*\.(?:safetensors|bin)\.index\.(?P<variant>.+)\.json")
_UNFINISHED = (
    *(".incomplete", ".part", ".partial", ".aria2", ".crdownload", ".downloading"),
    *(".downloadInProgress", ".tmp"),
)
_UNFINISHED_BLOB = re.compile(r"sha256-[0-9a-f]+-partial(?:-\d+)?")


@dataclass(frozen=True)
class Split:
    """What the name of one part of a split model says.

    Attributes:
        base: what stands in front of the numbers.
        number: which part it is.
        count: how many parts there are.
        rest: what stands behind the numbers, with the dot.
    """

    base: str
    number: int
    count: int
    rest: str

    def sibling(self, number: int, name: str) -> str:
        """Return the name of another part of the same model.

        Args:
            number: which part.
            name: the name of a part, which tells with how many digits numbers are written.

        Returns:
            The other part's name.
        """
        matched = _SPLIT.fullmatch(name)
        assert matched is not None
        digits = matched.end("number") - matched.start("number")
        return f"{name[: matched.start('number')]}{number:0{digits}}{name[matched.end('number') :]}"


def split_of(name: str) -> Split | None:
    """Read the numbers in a name like model-00002-of-00005.safetensors.

    Args:
        name: the file's name, without its directory.

    Returns:
        What it says; None for a name without such numbers.
    """
    matched = _SPLIT.fullmatch(name)
    if matched is None:
        return None
    return Split(matched["base"], int(matched["number"]), int(matched["count"]), matched["rest"])


def variant_of(name: str) -> str | None:
    """Read the variant ("fp16") from the name of a weight file or an index.

    Args:
        name: the file's name, without its directory.

    Returns:
        The variant; None for a name without one.
    """
    matched = _VARIANT.fullmatch(name) or _INDEX_VARIANT.fullmatch(name)
    return matched["variant"] if matched else None


def is_unfinished(name: str) -> bool:
    """Tell whether downloaders give a name to files that are not complete yet.

    Args:
        name: the file's name, without its directory.

    Returns:
        True for names such as model.safetensors.incomplete.
    """
    return name.endswith(_UNFINISHED) or _UNFINISHED_BLOB.fullmatch(name) is not None


def in_natural_order(names: Iterable[str]) -> list[str]:
    """Sort names so that layer 10 comes after layer 9.

    Args:
        names: what is to be sorted.

    Returns:
        The names in the order of natural().
    """
    found = sorted(names)
    # Numbers of as many digits at the same places are in the order of their text: most shards.
    if len({name.translate(_DIGITS) for name in found}) > 1:
        found.sort(key=natural)
    return found


def dotted(name: str) -> list[tuple[int, int] | tuple[int, str] | tuple[int, str, int]]:
    """Make the sort key by which transformers 5 reads tensors: part by part between the dots.

    Args:
        name: a tensor's name.

    Returns:
        The key, to be compared with other keys only: numbers come before texts, and a number at the
        end of a text counts as one ("norm" before "norm2" before "norm10").

    Source: transformers 5.19, `core_model_loading.py`, dot_natural_key().
    """
    found: list[tuple[int, int] | tuple[int, str] | tuple[int, str, int]] = []
    for part in name.split("."):
        text = part.rstrip("0123456789")
        number = part[len(text) :][:_MAX_DIGITS]
        if not number:
            found.append((1, text))
        elif text:
            found.append((1, text, int(number)))
        else:
            found.append((0, int(number)))
    return found


@lru_cache(maxsize=1 << 12)
def natural(name: str) -> tuple[Any, ...]:
    """Make a sort key by which layer 10 comes after layer 9.

    Args:
        name: what is to be sorted.

    Returns:
        The key, to be compared with other keys only: texts and numbers in turns.
    """
    parts: list[Any] = _NUMBERS.split(name)
    parts[1::2] = map(int, parts[1::2])
    return tuple(parts)
