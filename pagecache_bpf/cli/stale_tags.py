# SPDX-License-Identifier: Apache-2.0
"""Tags that do not say any more what a model is: files were replaced, are gone, or were added."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pagecache_bpf.errors import PagecacheError
from pagecache_bpf.kernel.control_device import Tag
from pagecache_bpf.kernel.file_key import identity_at
from pagecache_bpf.kernel.kernelfs import asks_server
from pagecache_bpf.units import plural
from pagecache_bpf.weights import directory

#: Generations of tagged files by inode number.
Tagged = Mapping[int, set[int]]
#: A model whose files lie in more directories is not searched for new ones.
_MOST_DIRECTORIES = 8
_SHOWN = 3


@dataclass
class StaleFiles:
    """What of a model the tags do not cover; paths.

    Attributes:
        replaced: tagged files whose names lead to other files now, which nothing governs.
        gone: tagged files whose names lead nowhere.
        untagged: files that are of the model by the rules of its directory, and have no tag.
    """

    replaced: list[str] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    untagged: list[str] = field(default_factory=list)

    def sentences(self, policy: str, model: str) -> list[str]:
        """Tell people what is stale, and what to do.

        Args:
            policy: the policy that governs the model.
            model: its name.

        Returns:
            Sentences; none where nothing is stale.
        """
        found = []
        again = self.replaced or self.untagged
        if self.replaced:
            found.append(f"replaced, and no longer governed: {_some(self.replaced)}")
        if self.untagged:
            found.append(f"not tagged, in the same directory: {_some(self.untagged)}")
        if again:
            where = os.path.dirname(again[0])
            found.append(f"tag again: pagecache-bpf tag --policy {policy} --model {model} {where}")
        if self.gone:
            found.append(f"gone: {_some(self.gone)}; pagecache-bpf untag PATH forgets it")
        return found


def _some(paths: list[str]) -> str:
    names = ", ".join(os.path.basename(path) for path in paths[:_SHOWN])
    more = f" and {len(paths) - _SHOWN:,} more" if len(paths) > _SHOWN else ""
    return f"{plural(len(paths), 'file')} ({names}{more})"


def identities(tags: Iterable[Tag]) -> dict[int, set[int]]:
    """Return the generations of tagged files by inode number, as of_model() takes them.

    Args:
        tags: every tag.

    Returns:
        Generations by inode number.
    """
    found: dict[int, set[int]] = {}
    for tag in tags:
        found.setdefault(tag.ino, set()).add(tag.generation)
    return found


def of_model(tags: Iterable[Tag], tagged: Tagged) -> StaleFiles:
    """Look for what of a model its tags do not cover; nothing is read.

    What lies on a file system that asks a server is not looked at, as that may not answer.
    Numbers and generations of inodes alone are compared: the module has other devices on btrfs.

    Args:
        tags: those of one model.
        tagged: identities of every tagged file.

    Returns:
        The files that were replaced, are gone, or were added since.
    """
    found = StaleFiles()
    live: dict[str, set[str]] = {}
    for tag in tags:
        if not tag.path.startswith("/"):
            continue  # the module keeps the end of a long path only
        if asks_server(tag.path):
            continue
        if not os.path.exists(tag.path):
            found.gone.append(tag.path)
            continue
        here = _inode(tag.path)
        if here is None or here == (tag.ino, tag.generation):
            parent, _, name = tag.path.rpartition("/")
            live.setdefault(parent, set()).add(name)
        elif not _is_tagged(here, tagged):
            found.replaced.append(tag.path)
    if len(live) <= _MOST_DIRECTORIES:
        for parent, names in live.items():
            found.untagged += _untagged(Path(parent), names, {*found.replaced}, tagged)
    return found


def _inode(path: str) -> tuple[int, int] | None:
    """Return inode number and generation of the file at a path; None: it cannot be looked at.

    A generation tells a file from others that get its number.
    """
    try:
        _, _, number, generation = identity_at(path)
    except (PagecacheError, OSError):
        return None
    return number, generation


def _is_tagged(here: tuple[int, int] | None, tagged: Tagged) -> bool:
    """Tell whether a tag is for the file that is at its path now."""
    return here is not None and here[1] in tagged.get(here[0], ())


def _untagged(parent: Path, names: set[str], replaced: set[str], tagged: Tagged) -> list[str]:
    """Return a directory's files without a tag, if the tagged files are those of its model."""
    try:
        chosen = directory.select(parent).names
    except PagecacheError:  # several models, or a download under way
        return []
    if not names.issubset(chosen):
        return []
    found = []
    for name in chosen:
        path = f"{parent}/{name}"
        if name in names or path in replaced:
            continue
        try:
            status = os.stat(path)
        except OSError:
            continue
        if status.st_size and not _is_tagged(_inode(path), tagged):
            found.append(path)
    return found
