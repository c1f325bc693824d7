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
from pagecache_bpf.kernel.file_pages import PAGE_SIZE, known_status


@dataclass
class FileTag:
    """A file that a policy of engine agent governs.

    Attributes:
        key: the bytes of its struct pagecache_file_key.
        dev_major: major number of its file system's device, part of the key as the next three.
        dev_minor: the device's minor number.
        ino: the inode's number.
        generation: the inode's generation.
        model: the name of the model that the file belongs to.
        model_id: the number that programs know the model by.
        path: where the file was when it was tagged; for people.
        source: opens the file when there is work for it.
        held: a descriptor that is kept for the source to duplicate; -1: none.
        next: the file of the same model that is read after this one; None: it is the last.
        device_mib_s: how many MiB a second its device can do; 0: not known.
    """

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
    device_mib_s: int = 0

    @classmethod
    def of(
        cls, key: bytes, model: str, model_id: int, path: str, source: Source, held: int
    ) -> FileTag:
        """Make the tag of a file.

        Args:
            key: the bytes of its struct pagecache_file_key.
            model: the name of its model.
            model_id: the model's number.
            path: where the file is; for people.
            source: opens the file.
            held: a descriptor that is kept for the source to duplicate; -1: none.

        Returns:
            The tag, with no file after it.
        """
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
        """Pack what the programs are told of the file, its device and the file that follows it.

        Returns:
            The bytes of a struct pagecache_agent_tag.
        """
        record = abi.pagecache_agent_tag(
            model=self.model_id,
            device_mib_s=self.device_mib_s,
            done=self.source.done // PAGE_SIZE,
        )
        if self.next is not None:
            record.next = abi.pagecache_file_key.from_buffer_copy(self.next.key)
            record.next_pages = self.next.pages
        return bytes(record)

    @cached_property
    def pages(self) -> int:
        """The size in pages that the file had when it was first asked for."""
        return -(-self.size_bytes() // PAGE_SIZE)

    @property
    def device(self) -> str:
        """The device of the file's file system, MAJOR:MINOR."""
        return f"{self.dev_major}:{self.dev_minor}"

    def resident_pages(self) -> int:
        """Count the pages of the file that are in the page cache now.

        Returns:
            Pages; 0 for a file that cannot be opened any more.

        Raises:
            OSError: the kernel refuses to count.
        """
        try:
            fd = self.source.acquire()
        except OSError:
            return 0
        try:
            return cached_pages(fd)
        finally:
            self.source.release()

    def size_bytes(self) -> int:
        """Return the size that the file has now, as far as the kernel knows.

        Returns:
            Bytes; 0 for a file that cannot be opened any more.
        """
        try:
            fd = self.source.acquire()
        except OSError:
            return 0
        try:
            return known_status(fd).size
        finally:
            self.source.release()

    def let_go(self) -> None:
        """Close the descriptor that is kept for the file, if there is one."""
        held, self.held = self.held, -1
        if held >= 0:
            os.close(held)

    def as_json(self) -> dict[str, Any]:
        """Describe the file as the agent's socket tells it.

        Returns:
            Its identity, model, path and the pages of it that are in the page cache, as
            `resident_pages`.

        Raises:
            OSError: the kernel refuses to count the pages.
        """
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
        # A model may have 100,000 files, and each may go at any time.
        self._around: dict[int, tuple[FileTag | None, FileTag | None]] = {}  # by id()
        self._last: dict[str, FileTag] = {}

    def add(self, tag: FileTag) -> tuple[FileTag | None, FileTag | None]:
        """Put a tag at the end of its model's files.

        Args:
            tag: the tag, which is not among them.

        Returns:
            The tag that comes before it, None for the first; and None, as nothing comes after it.
        """
        before = self._last.get(tag.model)
        self._around[id(tag)] = before, None
        self._join(before, tag)
        self._last[tag.model] = tag
        return before, None

    def remove(self, tag: FileTag) -> tuple[FileTag | None, FileTag | None]:
        """Take a tag out of its model's files.

        Args:
            tag: a tag that was added.

        Returns:
            The tags that came before and after it and are neighbors now; None: there is none.
        """
        before, after = self._around.pop(id(tag))
        self._join(before, after)
        if after is None and before is None:
            del self._last[tag.model]
        elif after is None and before is not None:
            self._last[tag.model] = before
        return before, after

    def _join(self, before: FileTag | None, after: FileTag | None) -> None:
        """Link two tags as neighbors in the list; None: the other one is the first or the last."""
        if before is not None:
            self._around[id(before)] = self._around[id(before)][0], after
        if after is not None:
            self._around[id(after)] = before, self._around[id(after)][1]
