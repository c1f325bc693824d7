# SPDX-License-Identifier: Apache-2.0
"""podman of a user without privileges: its overlay is one that this user has mounted."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.containers.boxes import Podman, program_missing
from tests.native.controller import NOBODY

#: Users that the containers' are, on this machine.
_IDS = "nobody:200000:65536\n"
#: In a mount namespace of its own: who may have which users, and Python where this user gets to.
_ENTER = """
mount --bind "$1/ids" /etc/subuid && mount --bind "$1/ids" /etc/subgid &&
mount --bind "$2" "$1/python" || exit 1
place=$1
shift 2
exec setpriv --reuid {user} --regid {user} --clear-groups env -i PATH="$PATH" \\
    HOME="$place/home" XDG_RUNTIME_DIR="$place/runtime" "$@"
"""


def why_not() -> str:
    """Return why no such container can be run here; empty where one can."""
    if missing := program_missing("newuidmap", "setpriv", "unshare"):
        return missing
    if not Path("/etc/subuid").exists():
        return "there is no /etc/subuid, which says whose users containers may have"
    return ""


class Rootless(Podman):
    """podman of the user nobody, with storage of its own below a directory.

    Args:
        place: the directory, which is made, in one that anybody gets to.
    """

    def __init__(self, place: Path) -> None:
        place.mkdir(mode=0o755)
        super().__init__(place / "home")
        self._runtime = place / "runtime"
        self.python_at = place / "python"
        self.python_at.mkdir()
        (place / "ids").write_text(_IDS)
        for own in (self.place, self._runtime):
            own.mkdir(mode=0o700)
            os.chown(own, NOBODY, NOBODY)
        self.place.chmod(0o755)
        enter = ["unshare", "--mount", "--propagation", "private", "sh", "-c"]
        enter += [_ENTER.format(user=NOBODY), "-", str(place), sys.base_prefix]
        self._command = [*enter, *self._command]

    def end(self) -> None:
        """End the process that keeps this user's namespaces."""
        with suppress(OSError, ValueError):
            pid = int((self._runtime / "libpod" / "tmp" / "pause.pid").read_text())
            os.kill(pid, signal.SIGKILL)


@contextmanager
def rootless(place: Path) -> Iterator[Rootless]:
    """podman of the user nobody, below a directory."""
    made = Rootless(place)
    try:
        yield made
    finally:
        made.end()
