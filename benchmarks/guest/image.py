# SPDX-License-Identifier: Apache-2.0
"""What Python reads in the guest, as files of a disk instead of the host's over 9p.

Each look-up over 9p is a question to the host, and starting Python asks thousands: with all of it
on a disk a command of ours starts in a third of the time.  Two images, mounted read-only over the
directories that they were made from: the interpreter with the packages of the venv, which is kept
until these change, and this tree's modules, made for each run.  Both hold compiled bytecode, since
an emulated CPU compiles slowly.  What is left out of them cannot be seen in the guest.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: The serial numbers of their disks.
PACKAGES, TREE = "packages", "tree"
#: The directories of this tree that have modules.
DIRECTORIES = tuple(ROOT / name for name in ("benchmarks", "pagecache_bpf", "tests", "tools"))
#: Packages that only the host uses, and parts of Python that nobody does: most of the bytes.
HOST_ONLY = (
    "clang_format",
    "fontTools",
    "kubernetes_validate",
    "matplotlib",
    "mypy",
    "mypyc",
    "*__mypyc.*",
    "pip",
    "ruff",
    "selenium",
)
UNUSED = ("config-*", "ensurepip", "idlelib", "site-packages", "test")
#: In the guest: where an image is mounted, by the serial number of its disk.
MOUNTS = Path("/run/pagecache-bpf-images")


def packages() -> dict[Path, Sequence[str]]:
    """The interpreter's directories and the venv's, each with patterns of what is left out."""
    venv = ROOT / "build" / "venv"
    interpreter = Path(os.path.realpath(venv / "bin" / "python"))
    found: dict[Path, Sequence[str]] = {venv: HOST_ONLY}
    found[Path(sysconfig.get_path("stdlib"))] = UNUSED
    # A system's own /usr/bin is not Python's alone.
    if interpreter.parent != Path("/usr/bin"):
        found[interpreter.parent] = ()
    return found


def packages_image(build: Path) -> Path:
    """Make the image of the interpreter and the venv, unless there is one of these packages.

    Args:
        build: the directory that it is kept in.

    Returns:
        The image.
    """
    image = build / "packages.img"
    build.mkdir(parents=True, exist_ok=True)
    # Two guests may start at once.
    with (build / "packages.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        sources = [Path(__file__), *_site_packages(), Path(sysconfig.get_path("stdlib"))]
        if not image.exists() or any(
            source.stat().st_mtime > image.stat().st_mtime for source in sources
        ):
            make(image, packages())
    return image


def _site_packages() -> Iterable[Path]:
    return (ROOT / "build" / "venv" / "lib").glob("python3*/site-packages")


def tree_image(run_dir: Path, command: Sequence[str]) -> Path:
    """Make the image of this tree's modules as they are now.

    Args:
        run_dir: the directory that gets it.
        command: what the guest will run; where that is pytest, the tests it names are compiled as
            pytest does it, with its assertions rewritten.

    Returns:
        The image.
    """
    _compile(DIRECTORIES)
    if "pytest" in command:
        named = [word for word in command if word.startswith("tests/")]
        subprocess.run(
            [sys.executable, "-m", "pytest", "--collect-only", "-q", *named],
            cwd=ROOT,
            env=_writing_bytecode(),
            capture_output=True,
            check=False,  # the guest's own run tells what is wrong with a test
        )
    image = run_dir / "tree.img"
    make(image, dict.fromkeys(DIRECTORIES, ()))
    return image


def make(image: Path, sources: dict[Path, Sequence[str]]) -> None:
    """Make an ext4 file system that has copies of directories, each at its own absolute path.

    Args:
        image: the file to write.
        sources: directories, with patterns of names below them that are left out.
    """
    stage = image.with_suffix(".stage")
    shutil.rmtree(stage, ignore_errors=True)
    for source, left_out in sources.items():
        copy = stage / source.relative_to("/")
        shutil.copytree(
            source,
            copy,
            symlinks=True,
            ignore=shutil.ignore_patterns(*left_out),
            copy_function=_link_or_copy,
        )
    # Tracebacks name the file as the guest sees it.
    _compile([stage / source.relative_to("/") for source in sources], "-s", str(stage), "-p", "/")
    size = sum(path.lstat().st_size + 4096 for path in stage.rglob("*"))
    new = image.with_suffix(".new")
    new.unlink(missing_ok=True)
    command = ["/sbin/mkfs.ext4", "-q", "-O", "^has_journal", "-i", "4096"]
    command += ["-d", str(stage), str(new), f"{(size >> 20) * 5 // 4 + 16}M"]
    subprocess.run(command, check=True, capture_output=True)
    shutil.rmtree(stage)
    new.rename(image)


def _link_or_copy(source: str, copy: str) -> None:
    """A second name is as good as a copy: mkfs only reads, and bytecode that is old is replaced."""
    try:
        os.link(source, copy, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, copy)


def _compile(directories: Iterable[Path], *options: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "compileall", "-q", "-j0", *options, *directories],
        env=_writing_bytecode(),
        capture_output=True,
        check=False,  # some packages carry templates that are no Python
    )


def _writing_bytecode() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}


def mount_script() -> str:
    """Return the shell commands that mount both images in the guest, a line each."""
    lines = []
    for serial, directories in {PACKAGES: packages(), TREE: DIRECTORIES}.items():
        at = MOUNTS / serial
        lines += [
            f"mkdir -p {at}",
            f"disk=$(basename $(dirname $(grep -lx {serial} /sys/block/vd*/serial)))",
            f"mount -t ext4 -o ro /dev/$disk {at}",
        ]
        lines += [f"mount --bind {at}{directory} {directory}" for directory in directories]
    return "\n".join(lines)
