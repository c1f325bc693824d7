# SPDX-License-Identifier: Apache-2.0
"""Which parts of the tagged files are in the page cache: the residency maps of top and Grafana.

A strip is a file, or all files of a model one after the other, cut into equal parts.  Root only.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from pagecache_bpf.errors import PagecacheError
from pagecache_bpf.kernel.cachestat import cached_pages
from pagecache_bpf.kernel.file_key import identity_of, open_to_read
from pagecache_bpf.kernel.file_pages import PAGE_SIZE
from pagecache_bpf.weights.names import natural

if TYPE_CHECKING:
    from pagecache_bpf.kernel.control_device import Tag
    from pagecache_bpf.policy.engines import Engines

Key = tuple[str, str, str]


@dataclass(frozen=True)
class Strip:
    """Residency of a file by its parts.

    Attributes:
        key: model, policy, engine, as ModelStats.key.
        path: the file, as it was tagged.
        bytes: its size.
        resident: bytes of each part in the page cache; equal parts, in whole pages.
    """

    key: Key
    path: str
    bytes: int
    resident: tuple[int, ...]

    @property
    def resident_bytes(self) -> int:
        """Bytes of the file in the page cache."""
        return sum(self.resident)


def of_files(engines: Engines, parts: int, keys: Iterable[Key], files: int) -> list[Strip]:
    """Return a strip for each tagged file of some models.

    Args:
        engines: which to ask for tagged files.
        parts: into how many parts a file is cut; smaller ones have one for each page.
        keys: the models, the first ones first.
        files: no more files than these are looked at.

    Returns:
        Strips in the order of the models, and of the names of their files.

    Raises:
        PagecacheError: an engine does not answer.
    """
    tags = tagged(engines)
    found: list[Strip] = []
    for key in keys:
        for tag in tags.get(key, ()):
            if len(found) >= files:
                return found
            with _opened(tag) as fd:
                if fd is not None:
                    size = os.fstat(fd).st_size
                    bounds = list(_bounds(-(-size // PAGE_SIZE), parts))
                    found.append(Strip(key, tag.path, size, tuple(_resident(fd, bounds))))
    return found


def of_models(engines: Engines, parts: int) -> dict[Key, tuple[int, ...]]:
    """Return the residency of each tagged model by parts of it, in bytes.

    Args:
        engines: which to ask for tagged files.
        parts: how many parts a model has: its files one after the other, by their names.

    Returns:
        For each model, by (model, policy, engine), the resident bytes of each part in order.

    Raises:
        PagecacheError: an engine does not answer.
    """
    found: dict[Key, tuple[int, ...]] = {}
    for key, tags in tagged(engines).items():
        sums = [0] * parts
        sizes = [_pages(tag) for tag in tags]
        total = sum(sizes)
        base = 0
        for tag, size in zip(tags, sizes, strict=True):
            with _opened(tag) as fd:
                if fd is not None and size:
                    # the parts that this file lies in, and where they end in it
                    first, last = base * parts // total, (base + size - 1) * parts // total
                    ends = [-(-(part + 1) * total // parts) - base for part in range(first, last)]
                    bounds = [0, *ends, size]
                    for at, count in enumerate(_resident(fd, bounds)):
                        sums[first + at] += count
            base += size
        found[key] = tuple(sums)
    return found


def tagged(engines: Engines) -> dict[Key, list[Tag]]:
    """Find the files that policies govern now.

    Args:
        engines: which to ask for policies and tags.

    Returns:
        The tags by (model, policy, engine), in the order of the files' names: "2" before "10".

    Raises:
        PagecacheError: an engine does not answer.
    """
    found: dict[Key, list[Tag]] = {}
    running = {status.name: engine for engine, status in engines.policies()}
    for tag in engines.tags():
        if tag.active and tag.policy in running:
            found.setdefault((tag.model, tag.policy, running[tag.policy]), []).append(tag)
    for tags in found.values():
        tags.sort(key=lambda tag: natural(tag.path))
    return found


def _bounds(pages: int, parts: int) -> Iterator[int]:
    """Yield where equal parts of a file begin, and where the last one ends; in pages."""
    parts = min(parts, pages)
    yield from (part * pages // parts for part in range(parts))
    yield pages


def _resident(fd: int, bounds: list[int]) -> Iterator[int]:
    """Yield the bytes of a file between each two bounds that are in the page cache."""
    for start, end in pairwise(bounds):
        count = 0
        if end > start:
            with suppress(OSError):
                length = (end - start) * PAGE_SIZE
                count = min(cached_pages(fd, start * PAGE_SIZE, length), end - start)
        yield count * PAGE_SIZE


def _pages(tag: Tag) -> int:
    with suppress(OSError):
        return -(-os.stat(tag.path).st_size // PAGE_SIZE)
    return 0


@contextmanager
def _opened(tag: Tag) -> Iterator[int | None]:
    """Open a tagged file; None if another one has its name by now, or it cannot be opened."""
    fd: int | None = None
    try:
        with suppress(OSError, PagecacheError):
            fd = open_to_read(Path(tag.path))
            # By inode only, as control_device.size_on_disk() says.
            if os.fstat(fd).st_ino != tag.ino and identity_of(fd)[2:] != tag.identity[2:]:
                os.close(fd)
                fd = None
        yield fd
    finally:
        if fd is not None:
            os.close(fd)
