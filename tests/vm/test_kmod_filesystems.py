# SPDX-License-Identifier: Apache-2.0
"""Each family of hooks on each file system: docs/kernels.md has the table of what passed."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.cachestat import PAGE_SIZE, drop, resident_pages
from benchmarks.guest.cgroups import fill, group
from tests.native import filesystems
from tests.vm.conftest import device
from tests.vm.kernel import attached, make_file, read_all, read_pages, test_policy, wait_for

pytestmark = pytest.mark.vm

PAGES = 4099
MIB = 1 << 20


@dataclass(frozen=True)
class Place:
    """A file on the file system under test.

    Attributes:
        path: where it is opened.
        cached: the file whose pages are in the cache: on a stacked file system another one.
        beside: a directory of a file system that can be written, for other files.
        pages: how many it has.
    """

    path: Path
    cached: Path
    beside: Path
    pages: int = PAGES

    def resident(self) -> int:
        """Its pages in the cache."""
        return resident_pages(self.cached)


def run(*command: str | Path) -> None:
    subprocess.run([str(word) for word in command], check=True, capture_output=True)


def modprobe(name: str) -> None:
    """Skip where the kernel does not have it."""
    known = Path("/proc/filesystems").read_text().split()
    if name not in known and subprocess.run(["modprobe", name], capture_output=True).returncode:
        pytest.skip(f"this kernel has no {name}")


@contextmanager
def mounted(beside: Path, *words: str | Path) -> Iterator[Path]:
    """`mount WORDS... DIRECTORY` for the block."""
    directory = beside / "mounted"
    directory.mkdir()
    run("mount", *words, directory)
    try:
        yield directory
    finally:
        run("umount", directory)
        directory.rmdir()


@contextmanager
def on_ext4(beside: Path) -> Iterator[Place]:
    file = make_file(beside / "weights", PAGES)
    yield Place(file, file, beside)


@contextmanager
def on_xfs(beside: Path) -> Iterator[Place]:
    file = make_file(device(1, "xfs").mount / "weights", PAGES)
    yield Place(file, file, beside)


@contextmanager
def on_btrfs(beside: Path) -> Iterator[Place]:
    modprobe("btrfs")
    image = beside / "image"
    with image.open("wb") as out:
        out.truncate(160 * MIB)
    run("mkfs.btrfs", "-q", image)
    with mounted(beside, "-o", "loop", image) as top:
        file = make_file(top / "weights", PAGES)
        yield Place(file, file, beside)


@contextmanager
def on_erofs(beside: Path) -> Iterator[Place]:
    modprobe("erofs")
    (beside / "source").mkdir()
    make_file(beside / "source" / "weights", PAGES)
    run("mkfs.erofs", beside / "image", beside / "source")
    with mounted(beside, "-t", "erofs", "-o", "loop", beside / "image") as top:
        drop([top / "weights"])
        yield Place(top / "weights", top / "weights", beside)


@contextmanager
def on_overlayfs(beside: Path) -> Iterator[Place]:
    modprobe("overlay")
    for name in ("lower", "upper", "work"):
        (beside / name).mkdir()
    file = make_file(beside / "lower" / "weights", PAGES)
    layers = f"lowerdir={beside}/lower,upperdir={beside}/upper,workdir={beside}/work"
    with mounted(beside, "-t", "overlay", "overlay", "-o", layers) as top:
        yield Place(top / "weights", file, beside)


@contextmanager
def on_fuse(beside: Path) -> Iterator[Place]:
    modprobe("fuse")
    (beside / "source").mkdir()
    make_file(beside / "source" / "weights", PAGES)
    run("mksquashfs", beside / "source", beside / "image", "-quiet", "-no-progress", "-noD")
    directory = beside / "mounted"
    directory.mkdir()
    run("squashfuse", beside / "image", directory)
    try:
        yield Place(directory / "weights", directory / "weights", beside)
    finally:
        run("umount", directory)
        directory.rmdir()


FILE_SYSTEMS = {
    "ext4": on_ext4,
    "xfs": on_xfs,
    "btrfs": on_btrfs,
    "erofs": on_erofs,
    "overlayfs": on_overlayfs,
    "fuse": on_fuse,
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file on NFS 4.2, which the guest serves to itself: once, since that takes long."""
    with filesystems.made_in(tmp_path_factory.mktemp("places")) as places:
        yield places.get("nfs")


@pytest.fixture(params=[*FILE_SYSTEMS, "nfs"])
def place(request: pytest.FixtureRequest, mount: Path) -> Iterator[Place]:
    if request.param == "nfs":
        file = request.getfixturevalue("served")
        filesystems.make_cold(file)
        yield Place(file, file, mount, filesystems.PAGES)
        return
    with FILE_SYSTEMS[request.param](mount) as found:
        yield found


def readahead(place: Place) -> None:
    """A miss is answered by the policy: its window is there, and not the kernel's."""
    with attached(test_policy("window"), place.path, window_pages=211) as policy:
        read_pages(place.path, 0, 1)
        assert policy.count("readahead_override") > 0
        assert 211 <= place.resident() < 211 + 512


def access(place: Place) -> None:
    """Reads of what is cached are told, too."""
    with attached(test_policy("every_access"), place.path) as policy:
        read_pages(place.path, 0, 64)
        before = policy.count("access_calls")
        read_pages(place.path, 0, 64)
        assert policy.count("access_calls") > before > 0


def added_removed(place: Place) -> None:
    """What comes into the cache and leaves it is counted."""
    with attached(test_policy("window"), place.path, window_pages=211) as policy:
        read_all(place.path)
        assert policy.status.governed_pages == place.resident() == place.pages
        drop([place.cached])
        assert policy.status.governed_pages == 0
        assert (
            policy.count("removed_bytes") == policy.count("added_bytes") >= place.pages * PAGE_SIZE
        )


def evict(place: Place) -> None:
    """What the policy keeps outlives a stream that is larger than the cgroup."""
    stream = fill(place.beside / "stream", 48)
    with (
        group("pcbfs", max=32 * MIB) as memory,
        attached(test_policy("keep_all"), place.path) as policy,
    ):
        memory.read(place.path, stream)
        assert policy.status.kept_pages > 0
        assert place.resident() > place.pages // 2


def pressure(place: Place) -> None:
    """A cgroup that is short is given what the policy names."""
    stream = fill(place.beside / "stream", 48)
    with (
        group("pcbfs", max=32 * MIB) as memory,
        attached(test_policy("pressure_drop"), place.path) as policy,
    ):
        memory.read(place.path, stream)
        wait_for(lambda: policy.count("pressure_dropped_bytes"), "something to be dropped")


def prefetch(place: Place) -> None:
    """A stream is read ahead of by the module's workers."""
    with attached("sequential", place.path) as policy:
        read_all(place.path)
        assert policy.count("prefetch_issued_bytes") > place.pages * PAGE_SIZE // 2
        policy.idle()
        assert place.resident() == place.pages


@pytest.mark.parametrize(
    "family",
    [readahead, access, added_removed, evict, pressure, prefetch],
    ids=lambda f: f.__name__,
)
def test_hooks(place: Place, family: Callable[[Place], None]) -> None:
    """The family's hooks are called and do what they are for."""
    family(place)
