# SPDX-License-Identifier: Apache-2.0
"""Containers of podman, with storage of their own, in which a model is read.

Their image is made here: a static busybox, Python's files of this machine, and a layer with a
model.  No registry is asked, and nothing of it stays.  Others run containers of the same image:
containerd.py, rootless.py.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pagecache_bpf.kernel import cgroups
from tests.podman import limits
from tests.unit.command import ROOT
from tests.unit.weights import safetensors
from tests.vm.kernel import wait_for

IMAGE = "localhost/pagecache-bpf-reader"
#: Where a model lies in the image, and where a directory with one is mounted.
LAYER, MOUNTED = Path("/model"), Path("/mounted")
MODEL = "model.safetensors"
#: Rows of 1 KiB in each of four tensors of the model, 64 MiB.
_ROWS = 16 << 10
_PYTHON = "/opt/python/bin/python3"
#: What is charged to a control group now, by version of the hierarchy.
_USED = ("memory.current", "memory.usage_in_bytes")
_LINKS = ("bin", "lib", "lib64", "sbin")


def why_not() -> str:
    """Return why no container can be run here; empty where it can."""
    if os.geteuid() != 0:
        return "needs root (an agent, and containers with a memory limit)"
    return program_missing("podman", "runc", "busybox")


def program_missing(*names: str, path: str | None = None) -> str:
    """Return what to do where programs are not in a path; empty where all are."""
    missing = [name for name in names if shutil.which(name, path=path) is None]
    return f"needs {', '.join(missing)}: run `make test-containers`" if missing else ""


class Runner(Protocol):
    """What runs containers."""

    def execute(self, name: str, *words: str) -> str:
        """Run a command in one of its containers, and return what that printed."""


@dataclass(frozen=True)
class Box:
    """A running container.

    Attributes:
        runner: what runs it.
        name: of the container.
        pid: of its first process, as this machine numbers it.
    """

    runner: Runner
    name: str
    pid: int

    def execute(self, *words: str) -> str:
        """Run a command in it, and return what that printed."""
        return self.runner.execute(self.name, *words)

    def python(self, program: str, *words: str) -> str:
        """Run a program of Python in it, which finds this package."""
        return self.execute(_PYTHON, "-c", program, *words)

    def start(self, *words: str) -> None:
        """Start a command of this package in it, with all that this machine's Python has."""
        places = f"/src:/src/{Path(sysconfig.get_path('purelib')).relative_to(ROOT)}"
        command = (_PYTHON, "-m", "pagecache_bpf", *words)
        assert isinstance(self.runner, Podman)
        self.runner.run("exec", "--detach", "--env", f"PYTHONPATH={places}", self.name, *command)

    def read(self, path: Path) -> float:
        """Read a file from front to back, by a program that is not ours; return the seconds."""
        line = f"/busybox time -p /busybox dd if={shlex.quote(str(path))} of=/dev/null bs=128k 2>&1"
        told = self.execute("/busybox", "sh", "-c", line)
        seconds = re.search(r"^real ([\d.]+)$", told, re.M)
        assert seconds, told
        return float(seconds[1])

    def inside(self, path: Path) -> Path:
        """Return the path by which this machine's root reaches a file of the container."""
        return Path(f"/proc/{self.pid}/root{path}")

    def charged(self, most: bool = False) -> int:
        """Return the bytes that are charged to its memory control group; most: at any time."""
        group = cgroups.directory_of(self.pid)
        assert group, "the container is in no memory control group"
        names = ("memory.peak", "memory.max_usage_in_bytes") if most else _USED
        figure = next(group / name for name in names if (group / name).exists())
        return int(figure.read_text())


def make_model(directory: Path) -> Path:
    """Write a model of one file that anybody may read, and return the file."""
    path = directory / MODEL
    safetensors(path, {f"layers.{number}.weight": (_ROWS, 512) for number in range(4)})
    path.chmod(0o644)
    return path


@contextmanager
def archive(place: Path) -> Iterator[Path]:
    """Make the archive of what the image has, with a model in it, below a directory."""
    with tempfile.TemporaryDirectory(dir=place) as scratch:
        tree = Path(scratch) / "tree"
        for name in ("usr", "etc", "opt", "src", "run", "tmp", "proc", "sys", "dev", "mounted"):
            (tree / name).mkdir(parents=True)
        for name in _LINKS:
            (tree / name).symlink_to(f"usr/{name}")
        busybox = shutil.which("busybox")
        assert busybox
        shutil.copy(busybox, tree / "busybox")
        (tree / LAYER.name).mkdir()
        make_model(tree / LAYER.name)
        made = Path(scratch) / "image.tar"
        with tarfile.open(made, "w") as out:
            out.add(tree, ".")
        Path(scratch).chmod(0o755)
        yield made


def variables() -> list[str]:
    """Return what Python in a container is told by its environment."""
    return ["PYTHONHOME=/opt/python", "PYTHONPATH=/src", "PYTHONDONTWRITEBYTECODE=1"]


class Podman:
    """podman with storage of its own below a directory."""

    #: Where Python's own files are, as this podman finds them.
    python_at = Path(sys.base_prefix)

    def __init__(self, place: Path) -> None:
        self.place = place
        self._command = ["podman", "--storage-driver", "overlay", "--runtime", "runc"]
        self._command += ["--root", f"{place}/storage", "--runroot", f"{place}/run"]
        self._command += ["--cgroup-manager", "cgroupfs"]
        self._common = [*limits(), "--network", "none"]

    def unmount(self) -> None:
        """Take away the mount that podman leaves on its storage, which could not be deleted."""
        at = self.place / "storage" / "overlay"
        if f" {at} " in Path("/proc/self/mountinfo").read_text():  # is_mount() sees no bind mount
            subprocess.run(["umount", str(at)], check=True)

    def run(self, *words: str) -> str:
        """Run one command of podman, and return what it printed."""
        command = [*self._command, *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}{done.stderr}"
        return done.stdout

    def execute(self, name: str, *words: str) -> str:
        """Run a command in a container, and return what that printed."""
        return self.run("exec", name, *words)

    def make_image(self) -> None:
        """Make the image, with a model in it."""
        with archive(self.place) as tree:
            self.run("import", str(tree), IMAGE)

    def layer_file(self, box: Box) -> Path:
        """Return where the model of the image lies on this machine."""
        (found,) = json.loads(self.run("inspect", box.name))
        lower = found["GraphDriver"]["Data"]["LowerDir"].split(":")[-1]
        return Path(lower) / LAYER.name / MODEL

    @contextmanager
    def box(self, *options: str, mounts: Mapping[Path, Path] | None = None) -> Iterator[Box]:
        """Run a container that does nothing by itself.

        Args:
            options: of `podman run`.
            mounts: directories of this machine, and where the container sees them.

        Yields:
            The container, which is ended afterwards.
        """
        words = [word for variable in variables() for word in ("--env", variable)]
        seen = {Path("/usr"): Path("/usr"), self.python_at: Path("/opt/python")}
        for source, target in {**seen, ROOT: Path("/src")}.items():
            words += ["--volume", f"{source}:{target}:ro"]
        for source, target in (mounts or {}).items():
            words += ["--volume", f"{source}:{target}"]
        sleeping = ("/busybox", "sleep", "3600")
        name = self.run("run", "--detach", *self._common, *words, *options, IMAGE, *sleeping)
        name = name.strip()
        try:
            pid = int(self.run("inspect", "--format", "{{.State.Pid}}", name))
            yield Box(self, name, pid)
        finally:
            wait_for(lambda: self._remove(name), "the container to go")

    def _remove(self, name: str) -> bool:
        """End a container; its mounts may be busy for a moment."""
        try:
            self.run("rm", "--force", "--time", "0", name)
        except AssertionError:
            return False
        return True

    def why_not(self, options: Sequence[str]) -> str:
        """Return why no container can be run with these options here; empty if one can."""
        try:
            self.run("run", "--rm", *self._common, *options, IMAGE, "/busybox", "true")
        except AssertionError as error:
            return str(error).strip().splitlines()[-1]
        return ""
