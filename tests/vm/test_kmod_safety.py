# SPDX-License-Identifier: Apache-2.0
"""What must not happen: memory used after it was freed, strangers who switch policies off, hooks
that are on in name only, readers who pay for others."""

from __future__ import annotations

import ctypes
import errno
import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from benchmarks.cachestat import PAGE_SIZE, drop
from benchmarks.guest.cgroups import group
from benchmarks.guest.workers import told_of_workers
from pagecache_bpf.errors import PolicyRejected
from pagecache_bpf.kernel import libbpf
from pagecache_bpf.policy import loader
from pagecache_bpf.policy.catalog import find
from tests.vm.kernel import (
    attached,
    make_file,
    read_all,
    read_pages,
    resident,
    test_policy,
    wait_for,
)

pytestmark = pytest.mark.vm

WINDOW = test_policy("window")
PAGES = 4099
FTRACE = Path("/proc/sys/kernel/ftrace_enabled")


@pytest.fixture
def file(mount: Path) -> Path:
    return make_file(mount / "weights", PAGES)


# --- ftrace ---


@contextmanager
def ftrace_off() -> Iterator[None]:
    try:
        FTRACE.write_text("0")
    except OSError as error:
        assert error.errno == errno.EOPNOTSUPP
        pytest.skip("this kernel cannot turn ftrace off")
    try:
        if FTRACE.read_text().strip() != "0":
            pytest.skip("on this kernel the sysctl has no effect")
        yield
    finally:
        FTRACE.write_text("1")


def test_nothing_is_attached_while_ftrace_is_off(file: Path) -> None:
    """Hooks would be registered and never called."""
    with ftrace_off():
        for name in ("minimal", "keep_all", "pressure_drop"):
            with pytest.raises(PolicyRejected, match=r"ftrace is off: sysctl kernel\.ftrace"):
                loader.attach(find(test_policy(name)))
    with attached(WINDOW, file, window_pages=211):
        read_pages(file, 0, 1)
        assert resident(file) == 211


@pytest.mark.parametrize("name", ["minimal", "keep_all", "pressure_drop"])
def test_ftrace_stays_on_while_a_policy_is_attached(name: str) -> None:
    """Else inodes would end unseen, and tags would point to freed memory."""
    with attached(test_policy(name)):
        try:
            FTRACE.write_text("0")
        except OSError as error:
            # Since 7.3 it cannot be turned off at all.
            assert error.errno in (errno.EBUSY, errno.EOPNOTSUPP)
            if error.errno == errno.EOPNOTSUPP:
                return
        assert FTRACE.read_text().strip() == "1"
    FTRACE.write_text("0")  # and afterwards it can be turned off
    FTRACE.write_text("1")


# --- who may ---

CAP_SYS_ADMIN, CAP_PERFMON, CAP_BPF = 21, 38, 39


def keep_capabilities(*kept: int) -> None:
    """Drop all capabilities of this process but these (capset(2))."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    low, high = (
        sum(1 << (number % 32) for number in kept if number // 32 == word) for word in (0, 1)
    )
    sets = (ctypes.c_uint32 * 6)(low, low, 0, high, high, 0)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.capset(header, sets):
        raise OSError(ctypes.get_errno(), "capset")


@pytest.mark.parametrize(
    ("kept", "expected"),
    [((CAP_BPF, CAP_PERFMON), errno.EPERM), ((CAP_BPF, CAP_PERFMON, CAP_SYS_ADMIN), 0)],
)
def test_attaching_takes_the_right_of_the_administrator(kept: tuple[int], expected: int) -> None:
    """What tracing tools have is not enough to decide for all readers of a file."""
    with libbpf.Object(Path(test_policy("minimal")), "minimal") as loaded:
        loaded.load()
        table = next(found for found in loaded.maps() if found.name == "minimal_ops")
        child = os.fork()
        if not child:
            code = 255
            try:
                keep_capabilities(*kept)
                table.attach_struct_ops().close()
                code = 0
            except OSError as error:
                code = error.errno or 254
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == expected


# --- unmount ---


#: Whoever may make namespaces of his own, and has rights in them only.
STRANGER = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "unshare", "-rm")
#: mount(2) with MS_BIND and umount(2), again and again; tells of the first and the eleventh time.
BIND = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
rounds = 0
while True:
    if libc.mount(sys.argv[1].encode(), b"/mnt", None, 4096, None) or libc.umount(b"/mnt"):
        sys.exit(os.strerror(ctypes.get_errno()))
    rounds += 1
    if rounds in (1, 11):
        print("begun" if rounds == 1 else "enough", flush=True)
"""


@pytest.mark.parametrize("who", [("unshare", "-m"), STRANGER], ids=["root", "stranger"])
def test_unmounting_elsewhere_cancels_nothing(slow_mount: Path, who: tuple[str, ...]) -> None:
    """A loop of bind mounts of the same file system, and of their unmounts, beside a load."""
    file = make_file(slow_mount / "weights", PAGES)
    python = shutil.which("python3", path="/usr/bin")  # that of the tests is root's alone
    command = [*who, python or sys.executable, "-c", BIND, str(slow_mount)]
    with (
        attached(WINDOW, file, window_pages=1, prefetch_pages=PAGES) as policy,
        subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=0) as loop,
    ):
        try:
            assert loop.stdout and loop.stdout.readline() == b"begun\n"
            loads = 0
            # An umount takes long where the kernel is slow to be quiet (-rt, a busy machine).
            while loads < 3 or not select.select([loop.stdout], [], [], 0)[0]:
                assert loads < 100
                drop([file])
                with file.open("rb") as reader:
                    os.pread(reader.fileno(), 1, 0)
                    policy.idle()
                    wait_for(lambda: resident(file) == PAGES, "the whole file")
                loads += 1
            assert loop.stdout.readline() == b"enough\n"
        finally:
            loop.terminate()
        assert policy.count("prefetch_cancelled_bytes") == 0


# --- counts ---


def test_pages_are_counted_that_came_while_nothing_was_attached(file: Path) -> None:
    """Tagged, detached, read, attached: the first access makes the count right."""
    with attached(WINDOW, file, window_pages=211) as policy:
        read_pages(file, 0, 1)
        assert policy.status.governed_pages == 211
        loader.detach("window")
        read_all(file)
        loader.attach(find(WINDOW), {"window_pages": 211})
        read_pages(file, 1000, 1)
        assert policy.status.governed_pages == resident(file) == PAGES
        loader.detach("window")
        drop([file])
        loader.attach(find(WINDOW), {"window_pages": 211})
        assert policy.status.governed_pages == 0
        read_pages(file, 0, 1)
        assert policy.status.governed_pages == resident(file) == 211


# --- file systems whose numbers are not unique ---


@contextmanager
def btrfs(directory: Path) -> Iterator[Path]:
    """A btrfs on a loop device."""
    image, mount = directory / "image", directory / "btrfs"
    with image.open("wb") as out:
        out.truncate(160 << 20)
    mount.mkdir()
    if subprocess.run(["modprobe", "-a", "btrfs", "loop"], capture_output=True).returncode:
        pytest.skip("this kernel has no btrfs")
    subprocess.run(["mkfs.btrfs", "-q", str(image)], check=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(mount)], check=True)
    try:
        yield mount
    finally:
        if os.path.ismount(mount):
            subprocess.run(["umount", str(mount)], check=True)
        image.unlink()
        mount.rmdir()


def test_snapshots_are_other_files(mount: Path) -> None:
    """A snapshot's inode has the number, generation and device of the original's."""
    with btrfs(mount) as top:
        subprocess.run(["btrfs", "-q", "subvolume", "create", str(top / "live")], check=True)
        file = make_file(top / "live" / "weights", 307)
        command = ["btrfs", "-q", "subvolume", "snapshot", str(top / "live"), str(top / "old")]
        subprocess.run(command, check=True)
        copy = top / "old" / "weights"
        assert copy.stat().st_ino == file.stat().st_ino
        with attached(WINDOW, file, window_pages=211) as policy:
            read_pages(copy, 0, 1)
            assert policy.count("readahead_calls") == 0
            assert policy.status.governed_pages == 0
            read_pages(file, 0, 1)
            assert policy.count("readahead_calls") == 1
            assert policy.status.governed_pages == resident(file) >= 211
            policy.tag(copy)
            assert policy.status.tags == 2
            subprocess.run(["umount", str(top)], check=True)
            # Its number is free for the next file system that has none of its own.
            assert policy.status.tags == 0
            assert not list(policy.device.tags())


def test_tags_of_such_file_systems_end_without_a_policy_too(mount: Path) -> None:
    with btrfs(mount) as top:
        file = make_file(top / "weights", 11)
        with attached(WINDOW, file) as policy:
            loader.detach("window")
            assert len(list(policy.device.tags())) == 1
            subprocess.run(["umount", str(top)], check=True)
            assert not list(policy.device.tags())


@contextmanager
def served(directory: Path, image: Path) -> Iterator[tuple[Path, subprocess.Popen[bytes]]]:
    """What is in the image, on FUSE, and the process that serves it."""
    for name in ("squashfuse", "mksquashfs"):
        if shutil.which(name) is None:
            pytest.skip(f"{name} is not installed")
    if not image.exists():
        source = directory / "source"
        source.mkdir()
        make_file(source / "weights", PAGES)
        command = ["mksquashfs", str(source), str(image), "-quiet", "-no-progress", "-noD"]
        subprocess.run(command, check=True)
    mount = directory / "served"
    mount.mkdir(exist_ok=True)
    with subprocess.Popen(["squashfuse", "-f", image, mount]) as server:
        try:
            wait_for((mount / "weights").exists, "the server to answer")
            yield mount / "weights", server
        finally:
            server.send_signal(signal.SIGCONT)
            subprocess.run(["umount", mount], check=True)


def test_a_number_that_is_given_again_is_another_file_system(mount: Path) -> None:
    """FUSE has a device number that is free once it is unmounted, and inode numbers at will."""
    with attached(WINDOW, window_pages=211) as policy:
        with served(mount, mount / "image") as (file, _):
            policy.tag(file)
            read_pages(file, 0, 1)
            assert policy.count("readahead_calls") == 1
            first = file.stat()
        with served(mount, mount / "image") as (file, _):
            again = file.stat()
            assert (again.st_dev, again.st_ino) == (first.st_dev, first.st_ino)
            read_pages(file, 0, 1)
            assert policy.count("readahead_calls") == 1
            assert policy.status.tags == policy.status.governed_pages == 0


# --- one reader's prefetch is not another's ---

ASK = """
import os, sys
os.pread(int(sys.argv[1]), 1, int(sys.argv[2]) * 4096)
print("read", flush=True)
sys.stdin.read()
"""


def test_two_cgroups_share_an_open_file(slow_mount: Path) -> None:
    """Each pays for what it asked for."""
    file = make_file(slow_mount / "weights", PAGES)
    with (
        group("pcbfirst", max=1 << 30) as first,
        group("pcbsecond", max=1 << 30) as second,
        attached(WINDOW, file, window_pages=1, prefetch_pages=1500) as policy,
        ExitStack() as stack,
    ):
        fd = os.open(file, os.O_RDONLY)
        os.set_inheritable(fd, True)
        stack.callback(os.close, fd)
        for where, memory in ((0, first), (2000, second)):
            script = f'echo $$ >"{memory.path}"/cgroup.procs && exec "$@"'
            command = [sys.executable, "-c", ASK, str(fd), str(where)]
            reader = subprocess.Popen(
                ["sh", "-c", script, "sh", *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                pass_fds=[fd],
            )
            stack.callback(reader.communicate)
            assert reader.stdout and reader.stdout.readline() == "read\n"
        policy.idle()
        wait_for(lambda: resident(file) >= 3002, "what both asked for")
        for memory in (first, second):
            assert memory.stat("file") >= 1500 * PAGE_SIZE, memory.path


def test_a_throttled_cgroup_holds_up_nobody_else(slow_mount: Path) -> None:
    """Far above memory.high a task sleeps for what it reads; a worker would sleep for it."""
    mine, theirs = (make_file(slow_mount / name, PAGES) for name in ("mine", "theirs"))
    hog = "import sys\nhold = bytearray(64 << 20)\nprint('full', flush=True)\nsys.stdin.read()"
    with (
        group("pcbthrottled", max=1 << 30) as memory,
        attached(WINDOW, mine, theirs, window_pages=1, prefetch_pages=PAGES) as policy,
        ExitStack() as stack,
    ):
        holder = memory.start(sys.executable, "-c", hog)
        stack.callback(holder.communicate)
        assert holder.stdout and holder.stdout.readline() == "full\n"
        fd = os.open(theirs, os.O_RDONLY)
        stack.callback(os.close, fd)
        script = f'echo $$ >"{memory.path}"/cgroup.procs && exec "$@"'
        memory.path.joinpath("memory.high").write_text(str(8 << 20))
        reader = subprocess.Popen(
            ["sh", "-c", script, "sh", sys.executable, "-c", ASK, str(fd), "0"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=[fd],
        )
        stack.callback(reader.communicate)
        with mine.open("rb") as own:
            os.pread(own.fileno(), 1, 0)
            wait_for(lambda: resident(mine) == PAGES, "my own prefetch", 60)
        memory.path.joinpath("memory.high").write_text("max")
        assert reader.stdout and reader.stdout.readline() == "read\n"
        policy.idle()
        assert policy.status.inflight_pages == 0


def waiting_workers() -> int:
    """The module's threads that wait where no signal wakes them (state D)."""
    return [stat.rpartition(")")[2].split()[0] for stat in told_of_workers("stat")].count("D")


#: A fault asks the server for nothing but pages; read() and fstat() ask for attributes first.
TOUCH = """
import mmap, sys
with open(sys.argv[1], "rb") as file:
    mapping = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
print("mapped", flush=True)
sys.stdin.readline()
mapping[0]
print("read", flush=True)
sys.stdin.read()
"""


def test_a_server_that_hangs_holds_up_nobody_else(slow_mount: Path) -> None:
    """Workers that wait for it for ever are not those that others need."""
    mine = make_file(slow_mount / "mine", PAGES)
    with (
        attached(WINDOW, mine, window_pages=1, prefetch_pages=PAGES) as policy,
        served(slow_mount, slow_mount / "image") as (theirs, server),
        ExitStack() as stack,
    ):
        policy.tag(theirs)
        drop([mine, theirs])
        reader = subprocess.Popen(
            [sys.executable, "-c", TOUCH, str(theirs)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        stack.callback(reader.communicate)
        assert reader.stdin and reader.stdout and reader.stdout.readline() == "mapped\n"
        server.send_signal(signal.SIGSTOP)
        stack.callback(server.send_signal, signal.SIGCONT)
        reader.stdin.write("\n")
        reader.stdin.flush()
        wait_for(lambda: waiting_workers() == 2, "the workers that one file system gets to wait")
        with mine.open("rb") as own:
            os.pread(own.fileno(), 1, 0)
            wait_for(lambda: resident(mine) == PAGES, "my own prefetch", 60)
        assert waiting_workers() == 2
        assert policy.status.inflight_pages > 0
        server.send_signal(signal.SIGCONT)
        assert reader.stdout.readline() == "read\n"
        policy.idle()
        assert policy.count("prefetch_cancelled_bytes") == 0


def test_a_neighbor_of_ten_is_no_concern(mount: Path) -> None:
    """However many cgroups have read a file: one that holds none of it does not get it dropped."""
    file = make_file(mount / "weights", PAGES)
    stream = make_file(mount / "stream", 3 * PAGES)
    with (
        attached(test_policy("pressure_drop"), file) as policy,
        group("pcbother", max=16 << 20) as other,
    ):
        for number in range(10):
            drop([file])
            with group(f"pcbreader{number}", max=1 << 30) as memory:
                memory.read(file)
        other.read(stream)
        assert policy.count("pressure_calls") == 0
        assert resident(file) == PAGES


# --- slow hooks ---


@pytest.mark.parametrize(("hook", "number"), [("readahead", 2), ("access", 3), ("added", 4)])
def test_a_slow_hook_is_ended(file: Path, hook: str, number: int) -> None:
    """And from then on the kernel decides by itself."""
    with attached(test_policy("slow"), file, loops=4_000_000, hook=number) as policy:
        for _ in range(40):
            drop([file])
            with file.open("rb", buffering=0) as reader:
                for start in range(0, 64, 32):
                    os.pread(reader.fileno(), 1, start * PAGE_SIZE)
            if not policy.alive:
                break
        wait_for(lambda: not policy.alive, "the policy to be ended")
        record = wait_for(lambda: list(policy.device.exits())[-1:], "the exit record")[0]
        assert (record.policy, record.kind, record.hook) == ("slow", "slow", hook)
        read_all(file)
