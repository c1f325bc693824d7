# SPDX-License-Identifier: Apache-2.0
"""What readers say of themselves (NOWAIT, DONTCACHE, RANDOM), and other ways to read."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

import pytest

from benchmarks.cachestat import PAGE_SIZE
from tests.vm.kernel import attached, check, make_file, read_pages, resident, test_policy, wait_for

pytestmark = pytest.mark.vm

WINDOW = test_policy("window")
RANDOM, NOWAIT, DONTCACHE = 1 << 9, 1 << 10, 1 << 11
PAGES = 4099
#: Of preadv2(2), since Linux 6.14; Python has no name for it.
RWF_DONTCACHE = 0x80


@pytest.fixture
def file(mount: Path) -> Path:
    return make_file(mount / "weights", PAGES)


def test_a_read_that_must_not_wait(file: Path) -> None:
    """RWF_NOWAIT: at most what the kernel would is submitted in its place, the rest elsewhere."""
    with attached(WINDOW, file, window_pages=2003) as policy:
        fd = os.open(file, os.O_RDONLY)
        buffer = bytearray(PAGE_SIZE)
        with suppress(BlockingIOError):  # unless the device was faster
            os.preadv(fd, [buffer], 0, os.RWF_NOWAIT)
        policy.idle()
        wait_for(lambda: resident(file) == 2003, "the rest of the answer")
        assert policy.variable("flags")[0] & NOWAIT
        assert os.preadv(fd, [buffer], 0, os.RWF_NOWAIT) == PAGE_SIZE
        check(bytes(buffer), 0)
        os.close(fd)


def test_random_readers_are_told_apart(file: Path) -> None:
    with attached(WINDOW, file, window_pages=1009) as policy:
        read_pages(file, 0, 1)
        assert not policy.variable("flags")[0] & RANDOM
        fd = os.open(file, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        os.pread(fd, 1, 2000 * PAGE_SIZE)
        os.close(fd)
        assert policy.variable("flags")[0] & RANDOM
        assert policy.count("readahead_calls") == 1


@pytest.mark.parametrize("by", ["reader", "workers"])
def test_what_is_read_to_be_dropped_is_dropped(file: Path, by: str) -> None:
    """RWF_DONTCACHE: nothing of it stays, whoever has read it; what was cached before does."""
    read_pages(file, PAGES - 1, 1)
    cached = resident(file)
    window = {"window_pages": 1009} if by == "reader" else {"prefetch_pages": 1008}
    with attached(WINDOW, file, **{"window_pages": 1, **window}) as policy:
        fd = os.open(file, os.O_RDONLY)
        buffer = bytearray(PAGE_SIZE)
        try:
            os.preadv(fd, [buffer], 0, RWF_DONTCACHE)
        except OSError as error:
            assert error.errno == errno.EOPNOTSUPP
            pytest.skip("this kernel has no RWF_DONTCACHE")
        check(bytes(buffer), 0)
        assert policy.variable("flags")[0] & DONTCACHE
        policy.idle()
        # The page that was read has gone, with the folio that it lay in.
        wait_for(lambda: resident(file, 0, 1009) >= 1009 - 64, "the rest of the window")
        first = 1009 - resident(file, 0, 1009)
        # From there on nothing is absent: at a miss workers would be told to read all of it anew,
        # and one that is slow reads what the reader has dropped by then.
        calls = policy.count("readahead_calls")
        buffer = bytearray((1009 - first) * PAGE_SIZE)
        assert os.preadv(fd, [buffer], first * PAGE_SIZE, RWF_DONTCACHE) == len(buffer)
        check(bytes(buffer), first * PAGE_SIZE)
        assert policy.count("readahead_calls") == calls
        assert resident(file, 0, 1009) == 0
        assert resident(file) == cached
        # A reader that does not say so keeps what it reads.  The file stays open meanwhile: what is
        # queued for one that has been closed is cancelled.
        check(os.pread(fd, PAGE_SIZE, 2000 * PAGE_SIZE), 2000 * PAGE_SIZE)
        policy.idle()
        wait_for(lambda: resident(file, 2000, 1009) == 1009, "its window")
        read_pages(file, 2000, 1009)
        assert resident(file, 2000, 1009) == 1009
        os.close(fd)


@pytest.mark.parametrize("way", ["sendfile", "splice"])
def test_reads_into_a_pipe_are_told(file: Path, way: str) -> None:
    """sendfile(2) and splice(2): each page once, as read(2) would tell it."""
    with attached(WINDOW, file) as policy, open(os.devnull, "wb") as out:
        start, pages = 1000, 64
        with file.open("rb") as reader:
            if way == "sendfile":
                done = 0
                while done < pages * PAGE_SIZE:
                    offset = start * PAGE_SIZE + done
                    left = pages * PAGE_SIZE - done
                    done += os.sendfile(out.fileno(), reader.fileno(), offset, left)
            else:
                ours, theirs = os.pipe()
                offset, end = start * PAGE_SIZE, (start + pages) * PAGE_SIZE
                while offset < end:
                    got = os.splice(reader.fileno(), theirs, end - offset, offset_src=offset)
                    check(os.read(ours, got), offset)
                    offset += got
                os.close(ours)
                os.close(theirs)
        assert policy.variable("read_first") == [start + 1]
        assert policy.variable("read_pages") == [pages]
