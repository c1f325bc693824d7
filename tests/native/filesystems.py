# SPDX-License-Identifier: Apache-2.0
"""Small file systems of every kind that this kernel has, with one model each, in loop images.

Each place is made by a function that is registered by its name; what a machine cannot make is
skipped with the reason.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from pagecache_bpf.kernel.file_pages import PAGE_SIZE, resident_vector
from tests.vm.kernel import ROOT, make_file, wait_for

#: A prime number of pages, 16 MiB.
PAGES = 4093
MODEL = "model.safetensors"
#: Where tools/deps.sh unpacks the server of NFS: its package would start one.
_NFS = ROOT / "build" / "deps" / "nfs-kernel-server" / "usr" / "sbin"
_NFSD = Path("/proc/fs/nfsd")
#: KiB that the kernel reads ahead by itself, as on most machines.
_AHEAD = 128


def cached(path: Path) -> int:
    """Pages of a file in the page cache, by mincore(2)."""
    fd = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(fd).st_size
        return sum(page & 1 for page in resident_vector(fd, 0, size))
    finally:
        os.close(fd)


def make_cold(path: Path) -> None:
    """Put every page of a file out of the page cache, and see that they are gone."""
    fd = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):  # nothing is ever written there
            os.fsync(fd)

        def gone() -> bool:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            return cached(path) == 0

        wait_for(gone, f"{path} to be cold")
    finally:
        os.close(fd)


def program(name: str) -> str:
    """Return where a program is, of this machine or of build/deps; skip the test if nowhere."""
    places = (os.environ["PATH"], "/usr/sbin", "/sbin", str(_NFS))
    found = shutil.which(name, path=os.pathsep.join(places))
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


class Places:
    """Mounts below a directory, which are all taken down in the end.

    Args:
        directory: where images and mount points are made.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._undo = ExitStack()
        self._made: dict[str, Path] = {}

    def close(self) -> None:
        self._undo.close()

    def get(self, name: str) -> Path:
        """The model on a file system, which is made at the first call."""
        if name not in self._made:
            self._made[name] = MAKERS[name](self)
        return self._made[name]

    def directory(self, name: str) -> Path:
        path = self._directory / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def run(self, *words: str | Path) -> None:
        command = [program(str(words[0])), *map(str, words[1:])]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, (words, done.stderr)

    def mount(self, source: Path | str, at: Path, kind: str, options: str) -> Path:
        done = subprocess.run(
            ["mount", "-i", "-t", kind, "-o", options, str(source), str(at)],
            capture_output=True,
            text=True,
        )
        if "unknown filesystem type" in done.stderr:
            pytest.skip(f"this kernel has no {kind}")
        assert done.returncode == 0, done.stderr
        self._undo.callback(subprocess.run, ["umount", "--lazy", str(at)], check=True)
        return at

    def image(self, name: str, megabytes: int, *make: str, kind: str = "") -> Path:
        """A file system in an image, mounted; the device below reads ahead as usual.

        Args:
            name: of the image and the mount point.
            megabytes: its size.
            make: the command that makes the file system in it.
            kind: of file system; by default the name.
        """
        image = self._directory / f"{name}.img"
        if not image.exists():
            with image.open("wb") as file:
                file.truncate(megabytes << 20)
        self.run(*make, image)
        return self.mount_image(image, name, kind or name, "rw")

    def mount_image(self, image: Path, name: str, kind: str, options: str) -> Path:
        loop = subprocess.run(
            ["losetup", "--find", "--show", str(image)], capture_output=True, text=True, check=True
        ).stdout.strip()
        self._undo.callback(subprocess.run, ["losetup", "--detach", loop], check=True)
        window = Path("/sys/block") / Path(loop).name / "queue" / "read_ahead_kb"
        window.write_text(str(_AHEAD))
        known = set(Path("/sys/class/bdi").iterdir())
        at = self.mount(loop, self.directory(f"on/{name}"), kind, options)
        for own in set(Path("/sys/class/bdi").iterdir()) - known:  # btrfs, FUSE
            (own / "read_ahead_kb").write_text(str(_AHEAD))
        return at

    def root(self, name: str) -> Path:
        """The directory where a file system in an image is mounted."""
        at = self._made.get(f"{name}/")
        if at is None:
            at = self._made[f"{name}/"] = _ROOTS[name](self)
        return at

    def overlay(self, name: str, *lower: Path, upper: bool = False, options: str = "") -> Path:
        """An overlay of layers, mounted."""
        words = [f"lowerdir={':'.join(map(str, lower))}"]
        if upper:
            base = self.root("ext4") / f"{name}-upper"
            for part in ("data", "work"):
                (base / part).mkdir(parents=True, exist_ok=True)
            words += [f"upperdir={base / 'data'}", f"workdir={base / 'work'}"]
        words += [options] if options else []
        return self.mount("overlay", self.directory(f"on/{name}"), "overlay", ",".join(words))


_ROOTS: dict[str, Callable[[Places], Path]] = {
    "ext4": lambda places: places.image("ext4", 320, "mkfs.ext4", "-q"),
    "xfs": lambda places: places.image("xfs", 320, "mkfs.xfs", "-q"),
    "btrfs": lambda places: places.image("btrfs", 320, "mkfs.btrfs", "-q"),
}
MAKERS: dict[str, Callable[[Places], Path]] = {}


def _place(maker: Callable[[Places], Path]) -> Callable[[Places], Path]:
    MAKERS[maker.__name__.strip("_")] = maker
    return maker


def _ext4_with(places: Places, name: str, feature: str) -> Path:
    """A file system with a feature of ext4 that not every kernel is built with."""
    if not Path("/sys/fs/ext4/features", name).exists():
        pytest.skip(f"this kernel's ext4 has no {name}")
    # Of a small image ext4 has blocks of 1 KiB by itself, which are no pages.
    return places.image(name, 320, "mkfs.ext4", "-q", "-b", "4096", "-O", feature, kind="ext4")


def _ioctl(path: Path, number: int, argument: bytearray) -> None:
    """Ask for something of a file or directory."""
    fd = os.open(path, os.O_RDONLY)
    try:
        fcntl.ioctl(fd, number, argument)
    finally:
        os.close(fd)


def _model(directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    return make_file(directory / MODEL, PAGES)


@_place
def _ext4(places: Places) -> Path:
    return _model(places.root("ext4") / "m")


@_place
def _encrypted(places: Places) -> Path:
    """On ext4: the page cache has the plain text (include/uapi/linux/fscrypt.h)."""
    at = _ext4_with(places, "encryption", "encrypt")
    (at / "m").mkdir(exist_ok=True)
    key = struct.pack("=II32x", 2, 0) + struct.pack("=II32x", 64, 0) + bytes(range(64))
    told = bytearray(key)
    _ioctl(at, 0xC0506617, told)  # FS_IOC_ADD_ENCRYPTION_KEY
    identifier = bytes(told[8:24])
    policy = struct.pack("=BBBB4x", 2, 1, 4, 0) + identifier  # AES-256-XTS, AES-256-CTS
    _ioctl(at / "m", 0x800C6613, bytearray(policy))  # FS_IOC_SET_ENCRYPTION_POLICY
    return _model(at / "m")


@_place
def _verity(places: Places) -> Path:
    """On ext4; pages of the hash tree are cached behind the file's end (fsverity.h)."""
    at = _ext4_with(places, "verity", "verity")
    path = _model(at / "m")
    asked = struct.pack("=III116x", 1, 1, 4096)  # SHA-256 of blocks of 4 KiB
    _ioctl(path, 0x40806685, bytearray(asked))  # FS_IOC_ENABLE_VERITY
    return path


@_place
def _bind(places: Places) -> Path:
    _model(places.root("ext4") / "bound")
    at = places.directory("on/bind")
    return places.mount(places.root("ext4") / "bound", at, "none", "bind,ro") / MODEL


@_place
def _xfs(places: Places) -> Path:
    return _model(places.root("xfs") / "m")


@_place
def _btrfs(places: Places) -> Path:
    return _model(places.root("btrfs"))


@_place
def _btrfs_subvolume(places: Places) -> Path:
    places.run("btrfs", "subvolume", "create", places.root("btrfs") / "subvolume")
    return _model(places.root("btrfs") / "subvolume")


@_place
def _btrfs_snapshot(places: Places) -> Path:
    """Of the subvolume, whose file has the same superblock, number and generation."""
    source = places.get("btrfs_subvolume").parent
    snapshot = places.root("btrfs") / "snapshot"
    places.run("btrfs", "subvolume", "snapshot", "-r", source, snapshot)
    return snapshot / MODEL


@_place
def _overlay_layer(places: Places) -> Path:
    """As a container's image: a layer, with an upper directory that has nothing of it."""
    layer = places.root("ext4") / "layer"
    _model(layer)
    return places.overlay("overlay_layer", layer, upper=True) / MODEL


@_place
def _overlay_second_layer(places: Places) -> Path:
    """Another device than the upper directory's, and another than the first layer's."""
    _model(places.root("xfs") / "layer")
    first = places.root("ext4") / "first"
    first.mkdir()
    (first / "other").write_text("x")
    return places.overlay("overlay_second", first, places.root("xfs") / "layer", upper=True) / MODEL


@_place
def _overlay_upper(places: Places) -> Path:
    layer = places.root("ext4") / "nothing"
    layer.mkdir()
    return _model(places.overlay("overlay_upper", layer, upper=True))


@_place
def _overlay_copied_up(places: Places) -> Path:
    """stat() goes on telling the number that it had in the layer."""
    layer = places.root("ext4") / "copied"
    _model(layer)
    path = places.overlay("overlay_copied", layer, upper=True) / MODEL
    before = path.stat().st_ino
    with path.open("r+b") as file:
        os.utime(file.fileno())
    assert path.stat().st_ino == before
    return path


@_place
def _overlay_metacopy(places: Places) -> Path:
    """The inode is in the upper directory, the data are in the layer."""
    layer = places.root("ext4") / "metacopy"
    _model(layer)
    path = places.overlay("overlay_metacopy", layer, upper=True, options="metacopy=on") / MODEL
    path.chmod(0o600)
    upper = places.root("ext4") / "overlay_metacopy-upper" / "data" / MODEL
    assert upper.stat().st_blocks < PAGES
    return path


@_place
def _overlay_on_btrfs(places: Places) -> Path:
    """Layers as snapshots of each other: what Docker does not do, and others may."""
    layer = places.get("btrfs_snapshot").parent
    return places.overlay("overlay_on_btrfs", layer, places.root("ext4")) / MODEL


@_place
def _erofs(places: Places) -> Path:
    image = places.directory("images") / "erofs.img"
    source = places.directory("images/erofs")
    _model(source)
    places.run("mkfs.erofs", image, source)
    return places.mount_image(image, "erofs", "erofs", "ro") / MODEL


def _squashed(places: Places) -> Path:
    image = places.directory("images") / "squashfs.img"
    if not image.exists():
        source = places.directory("images/squashfs")
        _model(source)
        places.run("mksquashfs", source, image, "-quiet", "-no-progress", "-noappend", "-noD")
    return image


@_place
def _squashfs(places: Places) -> Path:
    return places.mount_image(_squashed(places), "squashfs", "squashfs", "ro") / MODEL


@_place
def _fuse(places: Places) -> Path:
    image, at = _squashed(places), places.directory("on/fuse")
    places.run("squashfuse", image, at)
    places._undo.callback(subprocess.run, ["umount", "--lazy", str(at)], check=True)
    return at / MODEL


@_place
def _nfs(places: Places) -> Path:
    """NFS 4.2, from this machine to itself."""
    for module in ("nfsd", "nfsv4"):
        subprocess.run(["modprobe", module], capture_output=True)
    if not {"nfsd", "nfs4"} <= set(Path("/proc/filesystems").read_text().split()):
        pytest.skip("this kernel has no NFS")
    exported = places.root("ext4") / "exported"
    _model(exported)
    if not (_NFSD / "threads").exists():
        places.mount("nfsd", _NFSD, "nfsd", "rw")
    if (_NFSD / "threads").read_text().strip() != "0":
        pytest.skip("this machine serves NFS to others")
    state = Path("/var/lib/nfs")
    state.mkdir(exist_ok=True)
    places.mount("tmpfs", state, "tmpfs", "size=4m")
    for name in ("etab", "rmtab"):
        (state / name).touch()
    (state / "v4recovery").mkdir()
    for name in ("lease", "grace"):  # what a client waits for after the server was gone
        (_NFSD / f"nfsv4{name}time").write_text("10")
    places.run("ip", "link", "set", "lo", "up")
    options = "ro,fsid=0,no_root_squash,insecure,no_subtree_check"
    places.run("exportfs", "-i", "-o", options, f"127.0.0.1:{exported}")
    answers = subprocess.Popen([program("rpc.mountd"), "-F", "-N", "3"])
    places._undo.callback(answers.terminate)
    serve_nfs(places, 2)
    places._undo.callback(serve_nfs, places, 0)
    known = set(Path("/sys/class/bdi").iterdir())
    # By the kernel alone: the command that mount(8) would ask is a package of its own.
    at = places.mount(
        "127.0.0.1:/", places.directory("on/nfs"), "nfs4", "vers=4.2,ro,addr=127.0.0.1"
    )
    for own in set(Path("/sys/class/bdi").iterdir()) - known:
        (own / "read_ahead_kb").write_text(str(_AHEAD))
    return at / MODEL


def serve_nfs(places: Places, threads: int) -> None:
    """Have the kernel serve what is exported, by so many threads; 0: no longer."""
    places.run("rpc.nfsd", "-N", "3", str(threads))


@contextmanager
def made_in(directory: Path) -> Iterator[Places]:
    """Places below a directory."""
    places = Places(directory)
    try:
        yield places
    finally:
        places.close()


__all__ = [
    "MAKERS",
    "MODEL",
    "PAGES",
    "PAGE_SIZE",
    "Places",
    "cached",
    "made_in",
    "make_cold",
    "program",
    "serve_nfs",
]
