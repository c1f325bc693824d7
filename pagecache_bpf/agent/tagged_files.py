# SPDX-License-Identifier: Apache-2.0
"""Files that the agent governs: how the programs know them, and how they are opened for work."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pagecache_bpf.agent.read_threads import Source
from pagecache_bpf.kernel import abi
from pagecache_bpf.kernel.cachestat import cached_pages
from pagecache_bpf.kernel.file_pages import PAGE_SIZE


@dataclass
class FileTag:
    """A governed file; model_id is its model's number, path is for people."""

    key: bytes
    dev_major: int
    dev_minor: int
    ino: int
    generation: int
    model: str
    model_id: int
    path: str
    source: Source
    held: int = -1  # a descriptor that was kept for the source to duplicate; -1: none
    next: FileTag | None = None  # what is read after it, if its model is read in order

    @classmethod
    def of(
        cls, key: bytes, model: str, model_id: int, path: str, source: Source, held: int
    ) -> FileTag:
        """Make the tag of a file from its key, the bytes of a struct pagecache_file_key."""
        identity = abi.pagecache_file_key.from_buffer_copy(key)
        return cls(
            key,
            identity.dev_major,
            identity.dev_minor,
            identity.ino,
            identity.generation,
            model,
            model_id,
            path,
            source,
            held,
        )

    def record(self) -> bytes:
        """What the programs are told of it."""
        record = abi.pagecache_agent_tag(model=self.model_id, done=self.source.done // PAGE_SIZE)
        if self.next is not None:
            record.next = abi.pagecache_file_key.from_buffer_copy(self.next.key)
            record.next_pages = self.next.pages
        return bytes(record)

    @cached_property
    def pages(self) -> int:
        """Its size when that was first asked for."""
        return -(-self.size_bytes() // PAGE_SIZE)

    @property
    def device(self) -> str:
        """The device, MAJOR:MINOR."""
        return f"{self.dev_major}:{self.dev_minor}"

    def resident_pages(self) -> int:
        """Pages of it in the cache now; 0 for a file that is gone."""
        try:
            fd = self.source.acquire()
        except OSError:
            return 0
        try:
            return cached_pages(fd)
        finally:
            self.source.release()

    def size_bytes(self) -> int:
        """Its size now; 0 for a file that is gone."""
        try:
            fd = self.source.acquire()
        except OSError:
            return 0
        try:
            return os.fstat(fd).st_size
        finally:
            self.source.release()

    def let_go(self) -> None:
        """Close the descriptor that was kept for it, if there is one."""
        held, self.held = self.held, -1
        if held >= 0:
            os.close(held)

    def as_json(self) -> dict[str, Any]:
        """As the agent's socket tells it."""
        names = ("dev_major", "dev_minor", "ino", "generation", "model", "model_id", "path")
        return {
            **{name: getattr(self, name) for name in names},
            "resident_pages": self.resident_pages(),
        }


class Sequence:
    """The files of each model in the order in which they were tagged.

    Whoever tags a model does it in the order of its description (weights.models.Model.files), which
    is that of its loader.  The real paths say nothing about it: in a Hugging Face cache they are
    named by their hashes.
    """

    def __init__(self) -> None:
        self._tags: dict[str, list[FileTag]] = {}

    def add(self, tag: FileTag) -> tuple[FileTag | None, FileTag | None]:
        """Put a tag at the end of its model's files; return what comes before and after it."""
        tags = self._tags.setdefault(tag.model, [])
        tags.append(tag)
        return _at(tags, len(tags) - 2), None

    def remove(self, tag: FileTag) -> tuple[FileTag | None, FileTag | None]:
        """Take a tag out; return the two that are neighbors now."""
        tags = self._tags[tag.model]
        at = next(number for number, known in enumerate(tags) if known is tag)
        del tags[at]
        if not tags:
            del self._tags[tag.model]
        return _at(tags, at - 1), _at(tags, at)


def _at(tags: list[FileTag], at: int) -> FileTag | None:
    return tags[at] if 0 <= at < len(tags) else None
