# SPDX-License-Identifier: Apache-2.0
"""The client of the public socket: what a process without privilege asks of the controller.

public_protocol says what each operation takes and answers.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pagecache_bpf._run_dir import socket_path
from pagecache_bpf.errors import PagecacheError, PrivilegeError, UnsupportedError
from pagecache_bpf.ipc.client import SECONDS, LineClient, answers
from pagecache_bpf.ipc.public_protocol import EXTENTS_PER_REQUEST, FDS_PER_MESSAGE


def is_running(path: Path | None = None) -> bool:
    """Tell whether a controller answers and lets this process talk to it.

    Args:
        path: its socket; by default as socket_path() says.

    Returns:
        True if it accepts a connection.
    """
    return answers(path or socket_path())


class PublicClient(LineClient):
    """A connection to the controller.  A context manager; its loads end with it.

    Answers are dicts, as public_protocol.OPERATIONS describes them.  Every method raises
    PagecacheError, in the class that the controller gave.
    """

    def __init__(self, path: Path | None = None, seconds: float = SECONDS) -> None:
        """Connect.

        Args:
            path: the controller's socket; by default as socket_path() says.
            seconds: how long an answer is waited for.

        Raises:
            PrivilegeError: this user may not talk to it.
            UnsupportedError: no controller runs.
        """
        super().__init__(path or socket_path(), seconds)

    @classmethod
    def connect_error(cls, path: Path, error: OSError) -> PagecacheError:
        """Make the error for a socket that cannot be connected to.

        Args:
            path: the socket.
            error: what connect(2) failed with.

        Returns:
            A PrivilegeError where this user may not connect; otherwise an UnsupportedError, as no
            controller runs.
        """
        if isinstance(error, PermissionError) and not os.access(path.parent, os.X_OK):
            # A controller opens the directory of its socket; an agent alone keeps it closed.
            return UnsupportedError(
                "no controller runs",
                f"only root can look into {path.parent}, which a controller opens to all",
                "Have it started: pagecache-bpf serve (or: systemctl start pagecache-bpf)",
            )
        if isinstance(error, PermissionError):
            return PrivilegeError(
                "this user may not talk to the controller",
                f"{path}: {error.strerror}",
                "Join the group that the socket belongs to, or ask for another `socket.mode`",
            )
        return UnsupportedError(
            "no controller runs",
            f"{path}: {error.strerror or error}",
            "Start it: pagecache-bpf serve (or: systemctl start pagecache-bpf)",
        )

    def hello(self) -> dict[str, Any]:
        """Ask who answers: version, engines and policies.

        Returns:
            The answer of the operation `hello`.
        """
        return self.request("hello")

    def open_load(
        self,
        fds: Sequence[int],
        *,
        model: str,
        policy: str | None = None,
        budget: int | None = None,
        devices: Iterable[Mapping[str, Any]] = (),
        template: str | bytes | None = None,
        keep: bool = False,
        wait: float = 0.0,
    ) -> dict[str, Any]:
        """Begin a load.

        Args:
            fds: regular files, open for reading; they may be closed afterwards.
            model: name of the model.
            policy: which is to serve it; by default the controller's.
            budget: bytes of it that may be in the page cache at a time.
            devices: accelerators that it is for: name, PCI address, NUMA node.
            template: the text of an I/O template.
            keep: leave the pages in the cache when the load is done.
            wait: seconds to queue when the budget is taken.

        Returns:
            The load's first report; `load` is its id.
        """
        for first in range(0, len(fds), FDS_PER_MESSAGE):
            self.request("files", fds[first : first + FDS_PER_MESSAGE])
        arguments: dict[str, Any] = {"model": model, "keep": keep}
        if policy is not None:
            arguments["policy"] = policy
        if budget is not None:
            arguments["budget"] = budget
        if wait:
            arguments["wait"] = wait
        if listed := [dict(device) for device in devices]:
            arguments["devices"] = listed
        # The answer comes a moment after the wait is over.
        if template is None:
            return self._open(wait, (), arguments)
        memory = os.memfd_create("template", os.MFD_CLOEXEC)
        with os.fdopen(memory, "wb") as out:
            out.write(template.encode() if isinstance(template, str) else template)
            out.flush()
            return self._open(wait, (memory,), arguments)

    def _open(self, wait: float, fds: Sequence[int], arguments: dict[str, Any]) -> dict[str, Any]:
        """Send open_load; `wait` is both an argument of it and of the connection."""
        return self.request_line("open_load", fds, self.seconds + wait, arguments)

    def load_report(self, load: str) -> dict[str, Any]:
        """Ask how a load goes.

        Args:
            load: its id, of this connection.

        Returns:
            The load's report, as `load_report` answers.
        """
        return self.request("load_report", load=load)

    def done(self, load: str, *, keep: bool = False) -> dict[str, Any]:
        """End a load, and drop its pages unless they are to be kept or another load uses them.

        Args:
            load: its id, of this connection.
            keep: leave its pages in the page cache.

        Returns:
            The last report.
        """
        return self.request("done", load=load, keep=keep)

    def close(self, load: str) -> dict[str, Any]:
        """End a load and leave the page cache as it is.

        Args:
            load: its id, of this connection.

        Returns:
            The last report.
        """
        return self.request("close", load=load)

    def residency(self, fd: int, offset: int = 0, length: int = 0) -> dict[str, Any]:
        """Ask how much of an open file is in the page cache.

        Args:
            fd: the file, open for reading; it stays the caller's.
            offset: where the range begins, in bytes from a page boundary.
            length: bytes of the range; 0: up to the end of the file.

        Returns:
            Bytes of the range, bytes of it in the page cache, and whether a policy governs the
            file.
        """
        return self.request("residency", (fd,), offset=offset, length=length)

    def drop(self, fd: int, offset: int = 0, length: int = 0) -> dict[str, Any]:
        """Drop clean, unmapped pages of an open file, unless a load of somebody else reads it.

        Args:
            fd: the file, open for reading; it stays the caller's.
            offset: where the range begins, in bytes from a page boundary.
            length: bytes of the range; 0: up to the end of the file.

        Returns:
            Bytes that went, and whether the file was left alone since a load reads it.
        """
        return self.request("drop", (fd,), offset=offset, length=length)

    def prefetch(
        self, fd: int, extents: Sequence[tuple[int, int]], node: int = -1
    ) -> dict[str, Any]:
        """Have ranges of an open file read into the page cache.

        Args:
            fd: the file.
            extents: (offset, length) in bytes.
            node: the NUMA node to place them on; -1: any.

        Returns:
            Bytes that will be read and bytes that were refused.
        """
        total = {"queued_bytes": 0, "refused_bytes": 0}
        for first in range(0, len(extents), EXTENTS_PER_REQUEST):
            part = [list(extent) for extent in extents[first : first + EXTENTS_PER_REQUEST]]
            answer = self.request("prefetch", (fd,), extents=part, node=node)
            total = {key: total[key] + int(answer[key]) for key in total}
        return total

    def topology(self) -> dict[str, Any]:
        """Ask for the accelerators and NUMA nodes of this machine.

        Returns:
            What `pagecache-bpf topology --json` prints.
        """
        return dict(self.request("topology")["topology"])

    def status(self) -> dict[str, Any]:
        """Ask for the loads and budgets that the caller may know of: its user's, or for root all.

        Returns:
            The answer of the operation `status`.
        """
        return self.request("status")
