# SPDX-License-Identifier: Apache-2.0
"""containerd with storage and a socket of its own, and ctr, its own command; without a registry."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.containers.boxes import (
    IMAGE,
    LAYER,
    MODEL,
    Box,
    Podman,
    program_missing,
    variables,
)
from tests.unit.command import ROOT
from tests.vm.kernel import wait_for

#: tools/deps.sh unpacks it where it is not installed.
_PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin:{ROOT}/build/deps/containerd/usr/bin"
_CONFIG = """\
version = 2
root = "{place}/root"
state = "{place}/state"
disabled_plugins = [
    "io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt",
    "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs",
    "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs",
]
[grpc]
address = "{place}/c.sock"
"""


def why_not() -> str:
    """Return why containerd cannot be run here; empty where it can."""
    return program_missing("containerd", "ctr", "containerd-shim-runc-v2", "runc", path=_PATH)


def _program(name: str) -> str:
    found = shutil.which(name, path=_PATH)
    assert found, name
    return found


class Containerd:
    """A running containerd.

    Args:
        place: a directory whose path is short: sockets lie in it.
    """

    def __init__(self, place: Path) -> None:
        self.place = place
        self._names = iter(range(1000))

    def run(self, *words: str) -> str:
        """Run one command of ctr, and return what it printed."""
        command = [_program("ctr"), "--address", str(self.place / "c.sock"), *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}{done.stderr}"
        return done.stdout

    def execute(self, name: str, *words: str) -> str:
        """Run a command in a container, and return what that printed."""
        return self.run("task", "exec", "--exec-id", f"e{next(self._names)}", name, *words)

    def take_image(self, podman: Podman) -> None:
        """Take the image that podman has."""
        saved = self.place / "image.tar"
        podman.run("save", "--format", "oci-archive", "--output", str(saved), IMAGE)
        self.run("image", "import", "--base-name", IMAGE, str(saved))
        saved.unlink()

    def _image(self) -> str:
        (name,) = self.run("image", "list", "--quiet").split()
        return name

    def layer_file(self, box: Box) -> Path:
        """Return where the model of the image lies on this machine: in the lowest layer."""
        lines = Path(f"/proc/{box.pid}/mountinfo").read_text().splitlines()
        (options,) = (line.split()[-1] for line in lines if line.split()[4] == "/")
        (lower,) = re.findall(r"lowerdir=([^,]*)", options)
        return Path(lower.split(":")[-1]) / LAYER.name / MODEL

    @contextmanager
    def box(self, *options: str, mounts: Mapping[Path, Path] | None = None) -> Iterator[Box]:
        """Run a container that does nothing by itself.

        Args:
            options: of `ctr run`.
            mounts: directories of this machine, and where the container sees them.

        Yields:
            The container, which is ended afterwards.
        """
        words = [word for variable in variables() for word in ("--env", variable)]
        seen = {
            Path("/usr"): Path("/usr"),
            Path(sys.base_prefix): Path("/opt/python"),
            ROOT: Path("/src"),
            **(mounts or {}),
        }
        for source, target in seen.items():
            words += ["--mount", f"type=bind,src={source},dst={target},options=rbind:rw"]
        name = f"box{next(self._names)}"
        sleeping = ("/busybox", "sleep", "3600")
        self.run("run", "--detach", *words, *options, self._image(), name, *sleeping)
        try:
            (line,) = (
                line for line in self.run("task", "list").splitlines() if line.split()[0] == name
            )
            yield Box(self, name, int(line.split()[1]))
        finally:
            self.run("task", "kill", "--signal", "SIGKILL", name)
            wait_for(lambda: self._remove(name), "the container to go")

    def why_not(self, options: Sequence[str]) -> str:
        """Return why no container can be run with these options here; empty if one can."""
        name = f"box{next(self._names)}"
        try:
            self.run("run", "--rm", *options, self._image(), name, "/busybox", "true")
        except AssertionError as error:
            return str(error).strip().splitlines()[-1]
        return ""

    def _remove(self, name: str) -> bool:
        try:
            self.run("task", "delete", name)
        except AssertionError as error:
            if "not found" not in str(error):
                return False
        self.run("container", "delete", name)
        return True


@contextmanager
def containerd(place: Path) -> Iterator[Containerd]:
    """Run containerd with everything of its own below a directory."""
    config = place / "config.toml"
    config.write_text(_CONFIG.format(place=place))
    with (place / "log").open("w") as log:
        server = subprocess.Popen(
            [_program("containerd"), "--config", str(config)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PATH": _PATH},
        )
        try:
            wait_for(
                lambda: (place / "c.sock").exists() or server.poll() is not None,
                "containerd to answer",
                60,
            )
            assert server.poll() is None, (place / "log").read_text()[-2000:]
            yield Containerd(place)
        finally:
            server.terminate()
            server.wait(30)
