# SPDX-License-Identifier: Apache-2.0
"""Sessions: files that are lent for prefetch on behalf of readers of others, and how that ends."""

from __future__ import annotations

import os
import platform
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from benchmarks.cachestat import PAGE_SIZE, drop
from benchmarks.guest.cgroups import group
from pagecache_bpf.errors import PagecacheError, UsageError
from pagecache_bpf.kernel import abi, kmod
from pagecache_bpf.kernel.control_device import Device
from tests.vm.conftest import Module
from tests.vm.kernel import (
    ROOT,
    TRACING,
    Policy,
    attached,
    lend,
    lending,
    make_file,
    read_all,
    read_pages,
    resident,
    test_policy,
    wait_for,
)
from tests.vm.test_kmod_prefetch import two_nodes

pytestmark = pytest.mark.vm

LENT = test_policy("lent")
PAGES = 1021
NONE = -18  # EXDEV: nobody lends the file
# More than the workers ask for until a reader of an emulated CPU has returned.
QUEUE_PAGES = 8191


@pytest.fixture
def shards(mount: Path) -> list[Path]:
    return make_shards(mount)


def make_shards(folder: Path, count: int = 3) -> list[Path]:
    """Files of a model, none of which is cached."""
    return [make_file(folder / f"shard-{number}", PAGES + number) for number in range(count)]


def make_page_and_queue(folder: Path) -> list[Path]:
    """Files of a model: one page that is read, and what is queued then for the workers."""
    return [make_file(folder / "first", 1), make_file(folder / "second", QUEUE_PAGES)]


def answers(policy: Policy, name: str) -> int:
    """What a function of the kernel has returned to the policy `lent`."""
    value = policy.variable(name)[0]
    return value - (1 << 64) if value >> 63 else value


def touch(path: Path) -> None:
    """Read a page that is absent: the policy is asked."""
    drop([path])
    read_pages(path, 0, 1)


def test_prefetch_into_the_file_lent_next(shards: list[Path]) -> None:
    with attached(LENT, *shards, first_page=7, prefetch_pages=600) as policy:
        with lending(*shards) as device:
            assert device.info().lent == 3
            assert [tag.lent for tag in device.tags()] == [1, 1, 1]
            touch(shards[0])
            policy.idle()
            assert answers(policy, "next") == PAGES + 1
            assert answers(policy, "prefetched") == 600
            assert policy.variable("flags")[0] & abi.F_LENT
            wait_for(lambda: resident(shards[1]) == 600, "600 pages of the next shard")
            assert [resident(path) for path in shards] == [1, 600, 0]
            assert resident(shards[1], 7, 600) == 600
            touch(shards[2])  # the last one
            assert (answers(policy, "next"), answers(policy, "prefetched")) == (0, NONE)
        counters = policy.status.counters
        assert counters["prefetch_lent_bytes"] == counters["prefetch_bytes"] == 600 * PAGE_SIZE
        assert counters["prefetch_issued_bytes"] == 600 * PAGE_SIZE
        read_pages(shards[1], 7, 600)


def test_without_a_session_nothing_else_can_be_read(shards: list[Path]) -> None:
    with attached(LENT, *shards, prefetch_pages=600, drop_pages=600) as policy:
        touch(shards[0])
        assert (answers(policy, "next"), answers(policy, "prefetched")) == (0, NONE)
        assert answers(policy, "dropped") == NONE
        assert not policy.variable("flags")[0] & abi.F_LENT
        with lending(*shards) as device:
            touch(shards[0])
            assert answers(policy, "prefetched") == 600
            policy.idle()
            with shards[1].open("rb") as file:
                device.take_back(file.fileno())
                with pytest.raises(UsageError, match="not lent from here"):
                    device.take_back(file.fileno())
            touch(shards[0])
            assert answers(policy, "next") == PAGES + 2  # what was lent after it
        with Device() as device:
            assert device.info().lent == 0
            assert not any(tag.lent for tag in device.tags())
        touch(shards[0])
        assert (answers(policy, "next"), answers(policy, "prefetched")) == (0, NONE)


def test_an_extent_is_cut_to_the_lent_file(shards: list[Path]) -> None:
    with (
        attached(LENT, *shards, first_page=1000, prefetch_pages=1048576, drop_pages=5) as policy,
        lending(*shards),
    ):
        touch(shards[0])
        assert answers(policy, "prefetched") == PAGES + 1 - 1000
        assert answers(policy, "dropped") == 5
        policy.idle()
    with (
        attached(LENT, *shards, first_page=PAGES + 1, prefetch_pages=1, drop_pages=1) as policy,
        lending(*shards),
    ):
        touch(shards[0])
        assert (answers(policy, "prefetched"), answers(policy, "dropped")) == (-22, -22)
        assert policy.count("refused_calls") == 2


def test_drop_in_a_lent_file(shards: list[Path]) -> None:
    with attached(LENT, *shards, first_page=0, drop_pages=512) as policy, lending(*shards):
        read_all(shards[1])
        touch(shards[0])
        wait_for(lambda: resident(shards[1]) == PAGES + 1 - 512, "512 pages to go")
        assert policy.count("drop_bytes") >= 512 * PAGE_SIZE


def test_only_files_of_the_policy(shards: list[Path]) -> None:
    """A file that is tagged for another policy, for another model or not at all is out of reach."""
    with shards[1].open("rb") as file:
        stat = os.fstat(file.fileno())
    named = {"ino": stat.st_ino, "dev_major": os.major(stat.st_dev)}
    named["dev_minor"] = os.minor(stat.st_dev)
    with (
        attached(test_policy("minimal")) as other,
        attached(LENT, *shards, prefetch_pages=5, **named) as policy,
        lending(*shards) as device,
    ):
        tags = {tag.ino: tag for tag in device.tags()}
        generation = tags[stat.st_ino].generation
        touch(shards[0])  # the generation is not 0
        assert answers(policy, "prefetched") == (NONE if generation else 5)
    named["generation"] = generation
    with (
        attached(test_policy("minimal")) as other,
        attached(LENT, *shards, prefetch_pages=5, **named) as policy,
        lending(*shards) as device,
    ):
        touch(shards[0])
        assert answers(policy, "prefetched") == 5
        other.tag(shards[1], replace=True)
        touch(shards[0])
        assert answers(policy, "prefetched") == NONE
        assert answers(policy, "next") == 0
        policy.untag(shards[1])
        touch(shards[0])
        assert answers(policy, "prefetched") == NONE
        with shards[1].open("rb") as file:
            device.tag(file.fileno(), policy="lent", model="another", path=str(shards[1]))
        touch(shards[0])
        assert answers(policy, "next") == 0
        assert answers(policy, "prefetched") == 5  # by name it is the policy's own affair
        policy.idle()


def test_what_cannot_be_lent(shards: list[Path], mount: Path) -> None:
    untagged = make_file(mount / "untagged", 1)
    with attached(LENT, *shards), lending(shards[0]) as device:
        with pytest.raises(UsageError, match="lent from here already"):
            lend(device, shards[0])
        with pytest.raises(UsageError, match="not tagged"):
            lend(device, untagged)
        with pytest.raises(UsageError, match="not a regular file"):
            lend(device, mount)
        with pytest.raises(UsageError, match="not open for reading"):
            lend(device, shards[1], os.O_WRONLY)
        with pytest.raises(UsageError, match="not open for reading"):
            lend(device, shards[1], os.O_PATH)
        with pytest.raises(UsageError, match="not open for reading"):
            device.lend(987)
        with pytest.raises(OSError, match="Invalid argument"):
            device._ioctl(abi.IOC_TAKE_BACK, abi.pagecache_lend_request(fd=0, flags=1))
        assert device.info().lent == 1
        lend(device, shards[1], os.O_RDWR | os.O_APPEND)
        with lending(*shards) as second:  # another session may lend the same
            assert second.info().lent == 5
            assert [tag.lent for tag in device.tags()] == [2, 2, 1]
        assert device.info().lent == 2
        assert [tag.lent for tag in device.tags()] == [1, 1, 0]


def test_overlayfs_is_refused(mount: Path, tmp_path: Path) -> None:
    """The pages are those of the file underneath: it is tagged, and read, but not lent."""
    for name in ("lower", "upper", "work", "merged"):
        (mount / name).mkdir()
    shards = make_shards(mount / "lower", 2)
    options = ",".join(f"{name}dir={mount / name}" for name in ("lower", "upper", "work"))
    merged = mount / "merged"
    subprocess.run(["mount", "-t", "overlay", "none", "-o", options, merged], check=True)
    try:
        over = [merged / path.name for path in shards]
        with attached(LENT, *over) as policy, Device() as device:
            with pytest.raises(UsageError, match="overlayfs"):
                lend(device, over[1])
            touch(over[0])
            assert answers(policy, "next") == 0
    finally:
        subprocess.run(["umount", merged], check=True)


def test_too_many(shards: list[Path], module: Module) -> None:
    module.unload()
    found = kmod.find(platform.release())
    subprocess.run(["insmod", str(found), "max_lent=2"], check=True)
    try:
        with attached(LENT, *shards), lending(*shards[:2]) as device:
            with pytest.raises(PagecacheError, match="as many files are lent as the module allows"):
                lend(device, shards[2])
            with shards[0].open("rb") as file:
                device.take_back(file.fileno())
            lend(device, shards[2])
    finally:
        module.unload()
        module.load()


HOLDER = """
import sys
from pathlib import Path
from pagecache_bpf.kernel.control_device import Device
device = Device()
for name in sys.argv[1:]:
    with open(name, "rb") as file:
        device.lend(file.fileno())
print("lent", flush=True)
sys.stdin.read()
"""


def test_a_killed_lender_lets_go(scratch_fs: Path, remount: object, module: Module) -> None:
    """The kernel takes its files back, in the middle of a prefetch; nothing stays in use."""
    assert callable(remount)
    shards = make_shards(scratch_fs)
    with attached(LENT, *shards, prefetch_pages=PAGES) as policy:
        with subprocess.Popen(
            [sys.executable, "-c", HOLDER, *map(str, shards)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        ) as holder:
            assert holder.stdout and holder.stdout.readline() == "lent\n"
            with Device() as device:
                assert device.info().lent == 3
            busy = subprocess.run(["umount", scratch_fs], capture_output=True, text=True)
            assert "busy" in busy.stderr  # as of every open file
            # rmmod says so, too: the device is open.
            assert subprocess.run(["rmmod", "pagecache_bpf"], capture_output=True).returncode
            touch(shards[0])
            assert answers(policy, "prefetched") == PAGES
            holder.send_signal(signal.SIGKILL)
            holder.wait()
        remount()
        with Device() as device:
            assert device.info().lent == 0
        assert policy.status.inflight_pages == 0


def test_unmount_right_after_a_session(scratch_fs: Path, remount: object) -> None:
    """Closing the device cancels what is queued and waits for what is being read."""
    assert callable(remount)
    shards = make_page_and_queue(scratch_fs)
    with attached(LENT, *shards, prefetch_pages=QUEUE_PAGES) as policy:
        for _ in range(13):
            with lending(*shards):
                touch(shards[0])
            remount()
            assert resident(shards[1]) == 0
        assert policy.count("prefetch_lent_bytes") == 13 * QUEUE_PAGES * PAGE_SIZE
        assert policy.count("prefetch_cancelled_bytes") > 0


def test_taking_a_file_back_cancels(slow_mount: Path) -> None:
    """Nothing of a long queue is left when the loan has ended, nor held for it."""
    shards = make_page_and_queue(slow_mount)
    with attached(LENT, *shards, prefetch_pages=QUEUE_PAGES) as policy, Device() as device:
        for _ in range(7):
            drop(shards)
            for path in shards:
                lend(device, path)
            touch(shards[0])
            for path in shards:
                with path.open("rb") as file:
                    device.take_back(file.fileno())
            assert policy.status.inflight_pages == 0
        counters = policy.status.counters
        assert counters["prefetch_lent_bytes"] == 7 * QUEUE_PAGES * PAGE_SIZE
        assert (
            counters["prefetch_cancelled_bytes"] + counters["prefetch_issued_bytes"]
            == counters["prefetch_bytes"]
        )
        assert counters["prefetch_cancelled_bytes"] > 0


def test_the_policy_is_detached_while_files_are_lent(shards: list[Path]) -> None:
    with Device() as device:
        with attached(LENT, *shards, prefetch_pages=PAGES):
            for path in shards:
                lend(device, path)
            touch(shards[0])
        assert device.info().lent == 3  # its tags are gone as well
        read_all(shards[0])
        with attached(LENT, *shards, prefetch_pages=PAGES) as policy:
            assert [tag.lent for tag in device.tags()] == [1, 1, 1]
            touch(shards[0])
            assert answers(policy, "prefetched") == PAGES
            policy.idle()
    with attached(LENT, *shards, prefetch_pages=PAGES) as policy:
        touch(shards[0])
        assert answers(policy, "prefetched") == NONE


def test_a_deleted_file_is_not_read_any_more(mount: Path) -> None:
    def free() -> int:
        info = os.statvfs(mount)
        return info.f_bfree * info.f_frsize

    subprocess.run(["sync", "-f", str(mount)], check=True)
    before = free()
    shards = make_shards(mount, 2)
    with attached(LENT, *shards, prefetch_pages=PAGES) as policy:
        with lending(*shards):
            touch(shards[0])
            shards[1].unlink()
            policy.idle()
            touch(shards[0])
            assert (answers(policy, "next"), answers(policy, "prefetched")) == (0, NONE)
        shards[0].unlink()
        wait_for(lambda: before - free() < PAGES * PAGE_SIZE // 2, "the blocks to be freed")


READER = """
import os, sys
open(sys.argv[1] + "/cgroup.procs", "w").write(str(os.getpid()))
fd = os.open(sys.argv[2], os.O_RDONLY)
os.pread(fd, 1, 0)
print("read", flush=True)
sys.stdin.read()
"""


def test_the_reader_pays_for_the_lent_file(shards: list[Path]) -> None:
    """Not the lender: pages are charged to the memory cgroup of whoever reads the model."""
    with (
        group("pcbsession") as cgroup,
        attached(LENT, *shards, prefetch_pages=PAGES) as policy,
        lending(*shards),
        subprocess.Popen(
            [sys.executable, "-c", READER, str(cgroup.path), str(shards[0])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as reader,
    ):
        assert reader.stdout and reader.stdout.readline() == "read\n"
        policy.idle()
        wait_for(lambda: resident(shards[1]) == PAGES, "the pages asked for")
        stat = dict(line.split() for line in (cgroup.path / "memory.stat").read_text().splitlines())
        assert int(stat["file"]) >= PAGES * PAGE_SIZE
        reader.communicate()


EVENT = re.compile(
    r"add_to_page_cache: dev \S+ ino (?P<ino>[0-9a-f]+) .*ofs=(?P<at>\d+) order=(?P<order>\d+)"
)


def added_before(lines: list[str], ino: int, offset: int) -> tuple[int, int]:
    """Pages of other files that came from the marker to that page, and those that came after it."""
    before = after = 0
    there = False
    for line in lines[next(n for n, line in enumerate(lines) if "demand" in line) :]:
        found = EVENT.search(line)
        if found is None:
            continue
        if int(found["ino"], 16) == ino:
            there |= int(found["at"]) == offset
        elif there:
            after += 1 << int(found["order"])
        else:
            before += 1 << int(found["order"])
    return before, after


@pytest.mark.parametrize("node", [0, 1])
def test_demand_on_a_node_goes_before_all_that_is_lent(mount: Path, node: int) -> None:
    """What a reader waits for is not behind what is queued for it in other files."""
    two_nodes()
    pages, many, piece = 2048, 9, 512
    shards = [make_file(mount / f"shard-{number}", pages) for number in range(many)]
    event = TRACING / "events" / "filemap" / "mm_filemap_add_to_page_cache" / "enable"
    cpus = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {1 - node})  # this guest's nodes have one CPU each
    fds = [os.open(path, os.O_RDONLY) for path in shards]
    ino = os.fstat(fds[0]).st_ino
    event.write_text("1")
    try:
        with (
            attached(LENT, *shards, prefetch_pages=pages, node=node) as policy,
            lending(*shards),
            ThreadPoolExecutor(many - 1) as readers,
        ):
            for _ in range(9):  # until there is enough behind it
                drop(shards)
                (TRACING / "trace").write_text("")
                list(readers.map(lambda fd: os.pread(fd, 1, 0), fds[:-1]))
                (TRACING / "trace_marker").write_text("demand")
                os.pread(fds[0], 1, (pages - 1) * PAGE_SIZE)
                policy.idle()
                lines = (TRACING / "trace").read_text().splitlines()
                before, after = added_before(lines, ino, (pages - 1) * PAGE_SIZE)
                if after > many * piece:
                    break
            assert after > many * piece, (before, after)
            # What two workers were at, and one piece more for each at most.
            assert before <= 4 * piece, (before, after)
    finally:
        event.write_text("0")
        os.sched_setaffinity(0, cpus)
        for fd in fds:
            os.close(fd)


def test_sessions_come_and_go_beside_readers(shards: list[Path]) -> None:
    """What one session takes back another still lends; each reader finds its own pages."""
    readers = []
    with attached(LENT, *shards, prefetch_pages=PAGES) as policy:
        for path in shards:
            readers.append(
                subprocess.Popen(["sh", "-c", f"while cat {path}; do :; done >/dev/null"])
            )
        try:
            for number in range(60):
                drop(shards)
                with lending(*shards[number % 2 :]), lending(*shards[: 2 + number % 2]):
                    touch(shards[0])
        finally:
            for reader in readers:
                reader.kill()
                reader.wait()
        policy.idle()
        assert policy.alive
    for path in shards:
        read_all(path)
