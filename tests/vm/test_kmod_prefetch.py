# SPDX-License-Identifier: Apache-2.0
"""Asynchronous prefetch and drop: what is read, who pays, what is held and for how long."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks.cachestat import PAGE_SIZE, drop
from tests.vm.kernel import (
    ROOT,
    Policy,
    attached,
    check,
    make_file,
    mapped,
    read_all,
    read_pages,
    resident,
    test_policy,
    wait_for,
)

pytestmark = pytest.mark.vm

WINDOW = test_policy("window")
PAGES = 8191
CHUNK = 512  # pages that a worker submits at once


@pytest.fixture
def file(mount: Path) -> Path:
    return make_file(mount / "weights", PAGES)


@pytest.fixture
def far(file: Path) -> Iterator[Policy]:
    """One page is read at once, 4001 more are prefetched."""
    with attached(WINDOW, file, window_pages=1, prefetch_pages=4001) as policy:
        yield policy


def test_prefetch_reads_the_extent(far: Policy, file: Path) -> None:
    with file.open("rb") as reader:
        check(os.pread(reader.fileno(), PAGE_SIZE, 10 * PAGE_SIZE), 10 * PAGE_SIZE)
        far.idle()
        wait_for(lambda: resident(file) == 4002, "4002 resident pages")
    assert resident(file, 10, 4002) == 4002
    assert far.count("prefetch_bytes") == far.count("prefetch_issued_bytes") == 4001 * PAGE_SIZE
    read_pages(file, 10, 4002)
    assert far.count("readahead_calls") == 1


def test_prefetch_is_cut_to_the_file(file: Path) -> None:
    with attached(WINDOW, file, window_pages=1, prefetch_pages=1048576) as policy:
        with file.open("rb") as reader:
            os.pread(reader.fileno(), 1, 0)
            policy.idle()
            wait_for(lambda: resident(file) == PAGES, "the whole file")
        # Behind the last page there is nothing to ask for.
        drop([file])
        read_pages(file, PAGES - 1, 1)
        assert policy.count("refused_calls") == 1


def test_closing_the_file_cancels(slow_mount: Path) -> None:
    """Nobody wants the rest once the reader has closed the file: the queue is forgotten."""
    file = make_file(slow_mount / "weights", PAGES)
    with attached(WINDOW, file, window_pages=1, prefetch_pages=PAGES) as policy:
        for _ in range(7):
            drop([file])
            read_pages(file, 0, 1)
            policy.idle()
        assert policy.count("prefetch_cancelled_bytes") > 0
        read_all(file)


def test_a_mapping_keeps_the_prefetch_alive(file: Path) -> None:
    with attached(WINDOW, file, window_pages=1, prefetch_pages=4001) as policy:
        with mapped(file) as mapping:
            check(mapping[:PAGE_SIZE], 0)
            policy.idle()
            wait_for(lambda: resident(file) >= 4002, "4002 resident pages")
        assert policy.count("prefetch_cancelled_bytes") == 0


def test_drop_behind(file: Path) -> None:
    with attached(WINDOW, file, window_pages=256, drop_pages=512) as policy:
        read_all(file)
        wait_for(lambda: policy.count("drop_bytes") > 0, "dropped pages")
        wait_for(lambda: resident(file) < PAGES // 2, "the file to shrink")
        read_all(file)


def test_unmount_right_after_a_load(scratch_fs: Path, remount: object) -> None:
    """The reference of a prefetch in flight must not make umount say EBUSY."""
    assert callable(remount)
    file = make_file(scratch_fs / "weights", PAGES)
    with attached(WINDOW, file, window_pages=1, prefetch_pages=PAGES) as policy:
        for _ in range(13):
            read_pages(file, 0, 1)
            remount()
            assert resident(file) == 0
        assert policy.count("prefetch_calls") == 13


def test_truncate_and_unlink_during_prefetch(mount: Path) -> None:
    for round_ in range(11):
        file = make_file(mount / "weights", PAGES)
        with attached(WINDOW, file, window_pages=1, prefetch_pages=PAGES) as policy:
            fd = os.open(file, os.O_RDWR)
            check(os.pread(fd, PAGE_SIZE, 0), 0)
            if round_ % 2:
                os.ftruncate(fd, 1001 * PAGE_SIZE)
                check(os.pread(fd, 2000 * PAGE_SIZE, 0), 0)
                assert os.fstat(fd).st_size == 1001 * PAGE_SIZE
                policy.idle()
                # What was being submitted may land behind the new end, as with the kernel's own
                # readahead (do_page_cache_ra() reads the size before it takes the lock).
                assert resident(file) <= 1001 + 2 * CHUNK
                os.ftruncate(fd, PAGES * PAGE_SIZE)
                assert not any(os.pread(fd, 512 * PAGE_SIZE, 1001 * PAGE_SIZE))
            else:
                file.unlink()
                check(os.pread(fd, 100 * PAGE_SIZE, 500 * PAGE_SIZE), 500 * PAGE_SIZE)
                policy.idle()
            os.close(fd)
        file.unlink(missing_ok=True)


def test_a_deleted_file_is_not_kept(mount: Path) -> None:
    def free() -> int:
        info = os.statvfs(mount)
        return info.f_bfree * info.f_frsize

    subprocess.run(["sync", "-f", str(mount)], check=True)
    before = free()
    file = make_file(mount / "deleted", PAGES)
    with attached(WINDOW, file, window_pages=1, prefetch_pages=PAGES):
        read_pages(file, 0, 1)
        file.unlink()
        wait_for(lambda: before - free() < PAGES * PAGE_SIZE // 2, "the blocks to be freed")


READER = """
import os, sys
open("/sys/fs/cgroup/pcbtest/cgroup.procs", "w").write(str(os.getpid()))
fd = os.open(sys.argv[1], os.O_RDONLY)
os.pread(fd, 1, 0)
print("read", flush=True)
sys.stdin.read()
"""


def test_the_reader_pays(file: Path) -> None:
    """Prefetched pages are charged to the reader's memory cgroup, not to root's."""
    group = Path("/sys/fs/cgroup/pcbtest")
    control = Path("/sys/fs/cgroup/cgroup.subtree_control")
    if "memory" not in control.read_text().split():
        control.write_text("+memory")
    group.mkdir(exist_ok=True)
    try:
        with (
            attached(WINDOW, file, window_pages=1, prefetch_pages=4001) as policy,
            subprocess.Popen(
                [sys.executable, "-c", READER, str(file)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=ROOT,
            ) as reader,
        ):
            assert reader.stdout and reader.stdout.readline() == "read\n"
            policy.idle()
            wait_for(lambda: resident(file) >= 4002, "4002 resident pages")
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            reader.communicate()
            assert int(stat["file"]) >= 4002 * PAGE_SIZE
    finally:
        wait_for(lambda: not (group / "cgroup.procs").read_text(), "an empty cgroup")
        group.rmdir()


def nodes_of(path: Path) -> dict[int, int]:
    """Pages per NUMA node, as the kernel says: through a mapping, from numa_maps."""
    with mapped(path) as mapping:
        sum(mapping[offset] for offset in range(0, len(mapping), PAGE_SIZE))
        counts: dict[int, int] = {}
        for line in Path("/proc/self/numa_maps").read_text().splitlines():
            if f"file={path}" in line:
                for word in line.split():
                    if word[0] == "N" and "=" in word:
                        node, pages = word[1:].split("=")
                        counts[int(node)] = counts.get(int(node), 0) + int(pages)
        return counts


@pytest.mark.parametrize("node", [0, 1])
def test_pages_land_on_the_node_asked_for(file: Path, node: int) -> None:
    two_nodes()
    with attached(WINDOW, file, window_pages=256, prefetch_pages=2048, node=node) as policy:
        with file.open("rb") as reader:
            for start in range(0, PAGES, 2304):
                os.pread(reader.fileno(), PAGE_SIZE, start * PAGE_SIZE)
                policy.idle()
            wait_for(lambda: resident(file) == PAGES, "the whole file")
        counts = nodes_of(file)
        assert counts[node] >= 0.95 * sum(counts.values()), counts


def two_nodes() -> None:
    """Skip where there is one."""
    if not Path("/sys/devices/system/node/node1").exists():
        pytest.skip("this guest has one NUMA node; boot it with --numa 2")


def test_demand_on_a_node_goes_first(slow_mount: Path) -> None:
    """What a reader waits for is not behind all that is queued for it."""
    two_nodes()
    file = make_file(slow_mount / "weights", PAGES)
    for node in (0, 1):
        drop([file])
        with (
            attached(WINDOW, file, window_pages=64, prefetch_pages=4000, node=node) as policy,
            file.open("rb") as reader,
        ):
            os.pread(reader.fileno(), 1, 0)
            os.pread(reader.fileno(), 1, (PAGES - 64) * PAGE_SIZE)
            assert resident(file, PAGES - 64, 64) == 64
            policy.idle()
            assert policy.count("refused_calls") == 1  # nothing lies behind the last window


@contextmanager
def has_read(script: str, *arguments: object) -> Iterator[None]:
    """A process that has read what its script says, and stays until the end of the block."""
    with subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as reader:
        assert reader.stdout and reader.stdout.readline() == "read\n"
        yield
        reader.communicate()


NODE_READER = """
import os, sys
open(sys.argv[1] + "/cgroup.procs", "w").write(str(os.getpid()))
fd = os.open(sys.argv[2], os.O_RDONLY)
os.pread(fd, 1, 0)
print("read", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("hint", [-1, 0, 1])
def test_a_cpuset_has_the_last_word_on_the_node(file: Path, hint: int) -> None:
    """No policy puts pages where the reader may not have memory (cpuset.mems)."""
    two_nodes()
    group = Path("/sys/fs/cgroup/pcbnode")
    control = Path("/sys/fs/cgroup/cgroup.subtree_control")
    control.write_text("+cpuset")
    group.mkdir(exist_ok=True)
    try:
        (group / "cpuset.mems").write_text("1")
        with (
            attached(WINDOW, file, window_pages=64, prefetch_pages=4000, node=hint) as policy,
            has_read(NODE_READER, group, file),
        ):
            policy.idle()
            wait_for(lambda: resident(file) == 4064, "what was asked for")
        assert nodes_of(file)[1] >= 4064
    finally:
        wait_for(lambda: not (group / "cgroup.procs").read_text(), "an empty cgroup")
        group.rmdir()


MEMORY_POLICY = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
nodes = ctypes.c_ulong(1 << int(sys.argv[2]))
# set_mempolicy(MPOL_BIND, ...) has no wrapper in the C library: 238 on x86-64, 237 on arm64.
number = {"x86_64": 238, "aarch64": 237}[os.uname().machine]
assert libc.syscall(number, 2, ctypes.byref(nodes), 64) == 0, ctypes.get_errno()
fd = os.open(sys.argv[1], os.O_RDONLY)
os.pread(fd, 1, 0)
print("read", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("node", [0, 1])
def test_workers_take_on_the_memory_policy_of_the_node(file: Path, node: int) -> None:
    """As with numactl --membind: prefetched pages lie where the reader's own would."""
    two_nodes()
    with (
        attached(WINDOW, file, window_pages=64, prefetch_pages=4000) as policy,
        has_read(MEMORY_POLICY, file, node),
    ):
        policy.idle()
        wait_for(lambda: resident(file) == 4064, "what was asked for")
    # Looking at them brings in the rest of the file, on whatever node.
    assert nodes_of(file)[node] >= 4064
