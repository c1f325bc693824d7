# SPDX-License-Identifier: Apache-2.0
"""What the name of a weight file says: its place among shards, its variant.

This module knows names only; it opens nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

_NUMBERS = re.compile(r"(\d+)")
_SPLIT = re.compile(r"(?P<base>.+?)[-_](?P<number>\d{1,6})-of-(?P<count>\d{1,6})(?P<rest>\..+)")
#: A variant stands before the suffix or before the number: model.fp16.safetensors,
#: model.fp16-00001-of-00002.safetensors (diffusers), model-00001-of-00002.fp16.safetensors.
_VARIANT = re.compile(
    r"(?:model|pytorch_model|diffusion_pytorch_model|flax_model|adapter_model)"
    r"(?:-\d+-of-\d+)?\.(?P<variant>[A-Za-z][\w-]*?)(?:-\d+-of-\d+)?\.(?:safetensors|bin)"
)
_INDEX_VARIANT = re.compile(r".*\.(?:safetensors|bin)\.index\.(?P<variant>.+)\.json")
_UNFINISHED = re.compile(
    r".*\.(?:incomplete|part|partial|aria2|crdownload|downloading|downloadInProgress|tmp)"
    r"|sha256-[0-9a-f]+-partial(?:-\d+)?"
)


@dataclass(frozen=True)
class Split:
    """One part of a model that is split: its number, how many there are, and their common name."""

    base: str
    number: int
    count: int
    rest: str

    def sibling(self, number: int, name: str) -> str:
        """Return the name of another part, with as many digits as `name`, which is one of them."""
        matched = _SPLIT.fullmatch(name)
        assert matched is not None
        digits = matched.end("number") - matched.start("number")
        return f"{name[: matched.start('number')]}{number:0{digits}}{name[matched.end('number') :]}"


def split_of(name: str) -> Split | None:
    """Return what a name like model-00002-of-00005.safetensors says; None for other names."""
    matched = _SPLIT.fullmatch(name)
    if matched is None:
        return None
    return Split(matched["base"], int(matched["number"]), int(matched["count"]), matched["rest"])


def variant_of(name: str) -> str | None:
    """Return the variant ("fp16") that a file's or an index's name gives; None without one."""
    matched = _VARIANT.fullmatch(name) or _INDEX_VARIANT.fullmatch(name)
    return matched["variant"] if matched else None


def is_unfinished(name: str) -> bool:
    """Return whether a name is one that downloaders give to a file that is not complete yet."""
    return _UNFINISHED.fullmatch(name) is not None


@lru_cache(maxsize=1 << 12)
def natural(name: str) -> tuple[tuple[int, int, str], ...]:
    """Return a sort key by which layer 10 comes after layer 9."""
    parts = (part for part in _NUMBERS.split(name) if part)
    # isdecimal: a number by any script's digits would not be what the pattern found.
    return tuple(
        (0, int(part), "")
        if part.isascii() and part.isdecimal() and len(part) < 20
        else (1, 0, part)
        for part in parts
    )
