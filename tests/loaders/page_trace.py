# SPDX-License-Identifier: Apache-2.0
"""Which pages of which files a loader touches, in the order of its first touches.

The kernel tells it: its tracepoint `filemap:mm_filemap_add_to_page_cache` fires for each page that
comes into the page cache.  The files lie on a loop device of their own without readahead and are
cold, so that a page comes in when a loader reads it, by read(2) or through a mapping, and never
before.  Nothing of this project takes part in it.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

_EVENT = "events/filemap/mm_filemap_add_to_page_cache"
_LINE = re.compile(
    r"-(\d+) +\[\d+\].* mm_filemap_add_to_page_cache: dev \d+:\d+ ino ([0-9a-f]+) "
    r".*ofs=(\d+) order=(\d+)"
)
_BUFFER_KB = 64 << 10

Touch = tuple[int, int]  # inode number, number of a page of 4096 bytes


@contextmanager
def cold_disk(scratch: Path, size: int) -> Iterator[Path]:
    """Mount an ext4 file system on a loop device that reads nothing ahead.

    Args:
        scratch: a directory for its image and its mount point.
        size: its bytes.

    Yields:
        The mount point.
    """
    image, mount = scratch / "disk", scratch / "mount"
    with image.open("wb") as file:
        file.truncate(size)
    _run("mkfs.ext4", "-q", "-F", "-O", "^has_journal", str(image))
    mount.mkdir()
    device = _run("losetup", "--find", "--show", str(image)).strip()
    try:
        read_ahead = Path("/sys/block") / Path(device).name / "queue/read_ahead_kb"
        read_ahead.write_text("0")
        _run("mount", device, str(mount))
        try:
            yield mount
        finally:
            _run("umount", str(mount))
    finally:
        _run("losetup", "--detach", device)
        image.unlink()


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout


class PageTrace:
    """Records the pages of one file system that come into the page cache.

    Use as a context manager: it has an instance of tracefs of its own, which nobody else's tracing
    disturbs.
    """

    def __init__(self, mount: Path, scratch: Path) -> None:
        self._device = os.stat(mount).st_dev
        self._tracefs = scratch / "tracefs"
        #: Of each page of the last record() the thread that brought it in.
        self.threads: list[int] = []
        self._stack = ExitStack()

    def __enter__(self) -> PageTrace:
        self._tracefs.mkdir()
        _run("mount", "-t", "tracefs", "nodev", str(self._tracefs))
        self._stack.callback(_run, "umount", str(self._tracefs))
        self._instance = self._tracefs / "instances" / f"loaders-{os.getpid()}"
        self._instance.mkdir()
        self._stack.callback(self._instance.rmdir)
        (self._instance / "buffer_size_kb").write_text(str(_BUFFER_KB))
        number = os.major(self._device) << 20 | os.minor(self._device)
        (self._instance / _EVENT / "filter").write_text(f"s_dev == {number}")
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            (self._instance / _EVENT / "enable").write_text("0")
        self._stack.close()

    @contextmanager
    def record(self) -> Iterator[list[Touch]]:
        """Record while the block runs; the list is filled when it ends."""
        touches: list[Touch] = []
        self.threads = []
        (self._instance / "trace").write_text("")
        (self._instance / _EVENT / "enable").write_text("1")
        try:
            yield touches
        finally:
            (self._instance / _EVENT / "enable").write_text("0")
        lost = [
            int(found[1])
            for stats in self._instance.glob("per_cpu/cpu*/stats")
            if (found := re.search(r"^overrun: (\d+)", stats.read_text(), re.M))
        ]
        assert lost and not any(lost), "the kernel's trace buffer was too small"
        with (self._instance / "trace").open() as file:
            for line in file:
                if found := _LINE.search(line):
                    first, count = int(found[3]) // 4096, 1 << int(found[4])
                    inode = int(found[2], 16)
                    touches += [(inode, first + at) for at in range(count)]
                    self.threads += [int(found[1])] * count
