# SPDX-License-Identifier: Apache-2.0
"""The image in containers, as docs/install.md starts them."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

from tests.delivery.test_documents import typed
from tests.podman import limits
from tools import dist

IMAGE = f"localhost/pagecache-bpf:{dist.version()}"
RUN = "/run/pagecache-bpf"


def why_not() -> str:
    """Return why no container can be run here; empty where it can."""
    missing = [name for name in ("podman", "runc") if shutil.which(name) is None]
    if os.geteuid() != 0:
        return "needs root (containers with the right to load BPF programs)"
    return f"needs {' and '.join(missing)}" if missing else ""


class Podman:
    """podman with storage of its own, and with what this machine does not allow left out."""

    def __init__(self, place: Path) -> None:
        """Use a directory for all that it stores."""
        self.command = ["podman", "--storage-driver", "vfs", "--runtime", "runc"]
        self.command += ["--root", f"{place}/storage", "--runroot", f"{place}/run"]
        self.limits = limits()

    def __call__(self, verb: str, *words: str, check: bool = True) -> str:
        """Run one command of podman, and return what it printed."""
        more = [*self.limits, "--network", "host"] if verb == "run" else []
        command = [*self.command, verb, *more, *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0 or not check, f"{shlex.join(command)}\n{done.stderr}"
        return done.stdout

    def follow(self, name: str, wanted: str) -> None:
        """Read a container's output until a line begins so."""
        command = [*self.command, "logs", "-f", name]
        lines = []
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as log:
            assert log.stdout
            try:
                for line in log.stdout:
                    lines.append(line)
                    if line.startswith(wanted):
                        return
            finally:
                log.terminate()
        raise AssertionError(f"the container has ended: {''.join(lines)}")


def as_documented() -> list[str]:
    """The words after `podman` of what docs/install.md says to type, without name and image."""
    load, run = typed("docs/install.md", "One container")
    assert load == f"podman load -i pagecache-bpf-image-{dist.version()}.tar"
    words = shlex.split(run)
    assert words[:5] == ["podman", "run", "-d", "--name", "pagecache-bpf"]
    assert words[-1] == IMAGE
    return words[5:-1]
