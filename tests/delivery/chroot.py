# SPDX-License-Identifier: Apache-2.0
"""Clean Debian systems to install into: a debootstrap below, what a test changes above.

The system below is made once and kept in build/chroots; each test gets an overlay of its own on a
tmpfs.  /proc and /sys are of this machine; the run directory and the BPF file system are not, so
that nothing that runs here is met: the removal of a package detaches all policies.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tools.image import root_file_system

#: Those of a clean system; root's own PATH may name this machine's tools.
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
SHARED = ("/proc", "/sys", "/dev", "/dev/pts")
ENVIRONMENT = {"HOME": "/root", "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"}
CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
SECONDS = 900


class Chroot:
    """A clean system that commands are run in."""

    def __init__(self, root: Path) -> None:
        """Remember where it lies."""
        self.root = root

    def run(self, command: str, code: int = 0) -> str:
        """Run a shell command as root in it and return what it printed.

        Args:
            command: what a person would type.
            code: the exit code that it has to have.
        """
        done = subprocess.run(
            ["chroot", str(self.root), "/bin/sh", "-c", command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=SECONDS,
            env={**ENVIRONMENT, "PATH": PATH},
        )
        assert done.returncode == code, f"{command}: exit code {done.returncode}\n{done.stdout}"
        return done.stdout

    def copy(self, *files: Path) -> None:
        """Put files into its /srv."""
        for file in files:
            shutil.copy(file, self.root / "srv" / file.name)

    def give_pip_what_this_machine_has(self) -> None:
        """Certificates, and what pip is told of where packages are."""
        self.run("apt-get install -y -qq --no-install-recommends ca-certificates")
        listed = subprocess.run(["pip", "config", "list"], capture_output=True, text=True).stdout
        lines = ["[global]"]
        for line in listed.splitlines():
            name, _, value = line.partition("=")
            option = name.rpartition(".")[2]
            if option in ("index-url", "timeout", "default-timeout", "proxy"):
                lines.append(f"{option} = {value.strip(chr(39))}")
        (self.root / "etc" / "pip.conf").write_text("\n".join(lines) + "\n")
        shutil.copy(CERTIFICATES, self.root / CERTIFICATES.lstrip("/"))

    def files(self) -> set[str]:
        """Return the paths of all that is on its own file system."""
        listed = subprocess.run(
            ["find", str(self.root), "-xdev", "-printf", "/%P\n"],
            capture_output=True,
            text=True,
            check=True,
        )
        return set(listed.stdout.splitlines())


@contextmanager
def clean_system(suite: str, scratch: Path) -> Iterator[Chroot]:
    """Yield a clean system of one suite of Debian; what was changed in it is gone afterwards."""
    below = root_file_system(suite)
    with ExitStack() as undo:
        _mount(undo, scratch, "-t", "tmpfs", "-o", "mode=755,size=6g", "tmpfs")
        layers = {name: scratch / name for name in ("upper", "work", "root")}
        for layer in layers.values():
            layer.mkdir()
        root = layers["root"]
        options = f"lowerdir={below},upperdir={layers['upper']},workdir={layers['work']}"
        _mount(undo, root, "-t", "overlay", "-o", options, "overlay")
        for shared in SHARED:
            place = root / shared.lstrip("/")
            place.mkdir(parents=True, exist_ok=True)
            _mount(undo, place, "--bind", shared)
        for name in ("resolv.conf", "hosts"):
            shutil.copy(f"/etc/{name}", root / "etc" / name)
        # A mirror may lag behind, and the lists of testing are for a few days.
        (root / "etc/apt/apt.conf.d/99mirror").write_text('Acquire::Check-Valid-Until "false";\n')
        yield Chroot(root)


def _mount(undo: ExitStack, place: Path, *words: str) -> None:
    subprocess.run(["mount", *words, str(place)], check=True)
    undo.callback(subprocess.run, ["umount", "-l", str(place)], check=True)


def can_be_made() -> str:
    """Return why no clean system can be made here; empty where it can."""
    if os.geteuid() != 0:
        return "needs root (chroot, mounts)"
    if shutil.which("debootstrap") is None:
        return "needs debootstrap"
    return ""
