# SPDX-License-Identifier: Apache-2.0
"""The client's side of both sockets: a connection, one request at a time, an answer or an error.

It knows no operation: a subclass says what is asked.
"""

from __future__ import annotations

import array
import os
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from pagecache_bpf.errors import PagecacheError
from pagecache_bpf.ipc import wire
from pagecache_bpf.ipc.peer import credentials
from pagecache_bpf.kernel.kernelfs import LIVE

#: Names how many times as long as usual an answer is waited for: emulated machines and kernels with
#: all their checks on take minutes to look at a policy's programs.
PATIENCE = "PAGECACHE_BPF_PATIENCE"


def _patience() -> float:
    """Return what the environment says, at least 1; 1 where it says no number."""
    try:
        return max(1.0, float(os.environ.get(PATIENCE) or 1))
    except ValueError:
        return 1.0


#: For an answer to come, in seconds.
SECONDS = 60.0 * _patience()
_PIECE_BYTES = 1 << 16
_CROWDED_SECONDS = 0.005
_LOOK_SECONDS = 2.0  # without an answer for so long, look whether the other side is stopped

Self = TypeVar("Self", bound="LineClient")


class HungUp(PagecacheError):
    """The other side has closed the connection instead of answering: its process has ended."""


class LineClient:
    """A connection to the controller.  A context manager.

    Threads may share one: requests take turns.  A subclass says what is asked.
    """

    #: How messages name the other side.
    server = "the controller"
    #: Where a person finds out more when it does not answer.
    log_hint = ""
    #: Bytes that an answer may have.
    answer_bytes = 4 << 20

    def __init__(self, path: Path, seconds: float = SECONDS) -> None:
        """Connect.

        Args:
            path: the socket.
            seconds: how long an answer is waited for.

        Raises:
            PagecacheError: nobody answers there, or this user may not talk to it; see
                connect_error().
        """
        self.seconds = seconds
        self._lock = threading.Lock()
        self._buffer = bytearray()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._socket.settimeout(seconds)
        try:
            _connect(self._socket, path, seconds)
        except OSError as error:
            self._socket.close()
            raise self.connect_error(path, error) from error

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.disconnect()

    @classmethod
    def connect_error(cls, path: Path, error: OSError) -> PagecacheError:
        """Make the error for a socket that cannot be connected to.

        Args:
            path: the socket.
            error: what connect(2) failed with.

        Returns:
            The error, to be raised.
        """
        return PagecacheError(f"{cls.server} does not answer", f"{path}: {error.strerror or error}")

    @property
    def pid(self) -> int:
        """The number of the process at the other end."""
        return credentials(self._socket)[0]

    def disconnect(self) -> None:
        """Close the connection."""
        self._socket.close()

    def interrupt(self) -> None:
        """Make a request that is waiting for its answer fail.  From any thread.

        Raises:
            OSError: the connection is over already.
        """
        self._socket.shutdown(socket.SHUT_RDWR)

    def request(
        self, operation: str, fds: Sequence[int] = (), /, **arguments: Any
    ) -> dict[str, Any]:
        """Ask for an operation.

        Args:
            operation: its name.
            fds: open files that go along; they stay the caller's.
            **arguments: members of the request.

        Returns:
            The answer.

        Raises:
            PagecacheError: what the other side tells, or that it does not answer.
        """
        return self.request_line(operation, fds, self.seconds, arguments)

    def batch(
        self, requests: Sequence[Mapping[str, Any]], fds: Sequence[int] = ()
    ) -> list[dict[str, Any]]:
        """Ask for operations that are carried out one after the other, up to one that fails.

        They go in messages of wire.BATCH_REQUESTS.

        Args:
            requests: members of each, with the name of its operation as "op".
            fds: an open file for each request if they take files; they stay the caller's.

        Returns:
            The answer to each request.

        Raises:
            PagecacheError: one failed, and those before it were carried out; or the other side
                refuses batches, or does not answer.
        """
        found: list[dict[str, Any]] = []
        for begin in range(0, len(requests), wire.BATCH_REQUESTS):
            some = slice(begin, begin + wire.BATCH_REQUESTS)
            told = self.request("batch", fds[some], requests=list(map(dict, requests[some])))
            found += map(wire.result_of, told["answers"])
        return found

    def request_line(
        self, operation: str, fds: Sequence[int], seconds: float, arguments: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Ask for an operation whose answer may take longer than others.

        Args:
            operation: its name.
            fds: open files that go along; they stay the caller's.
            seconds: how long the answer is waited for.
            arguments: members of the request.

        Returns:
            The answer.

        Raises:
            PagecacheError: what the other side tells, or that it does not answer.
            HungUp: it has ended.
        """
        line = wire.encode({"op": operation, **arguments})
        with self._lock:
            try:
                self._socket.settimeout(seconds)
                # One that hangs up before the end of a request has said why.
                with suppress(BrokenPipeError, ConnectionResetError):
                    self._send(line, fds)
                answer = self._line(seconds)
                return wire.decode_answer(answer)
            except (OSError, ValueError, RecursionError) as error:
                self._socket.close()  # what comes next would answer something else
                kind = HungUp if isinstance(error, ConnectionError) else PagecacheError
                raise kind(
                    f"{self.server} does not answer",
                    str(error) or "it hung up",
                    self.log_hint,
                    "docs/troubleshooting.md#the-agent-does-not-answer",
                ) from error

    def _send(self, line: bytes, fds: Sequence[int]) -> None:
        """Send a request; the descriptors go with its first byte.  Raises OSError."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        sent = self._socket.sendmsg([line], rights)
        if sent < len(line):
            self._socket.sendall(line[sent:])

    def _line(self, seconds: float = SECONDS) -> bytes:
        """Receive one line, without its newline.  Raises OSError, also for a stopped server."""
        at = -1
        deadline = time.monotonic() + seconds
        self._socket.settimeout(min(seconds, _LOOK_SECONDS))
        while at < 0:
            before = len(self._buffer)
            try:
                data = self._socket.recv(_PIECE_BYTES)
            except TimeoutError:
                if is_stopped(self.pid):
                    raise OSError(
                        f"process {self.pid} is stopped; `kill -CONT {self.pid}` lets it go on, "
                        f"`kill -KILL {self.pid}` ends it with its policies"
                    ) from None
                if time.monotonic() < deadline:
                    continue
                raise TimeoutError(
                    f"process {self.pid} gave no answer for {seconds:.0f} s"
                ) from None
            if not data:
                raise ConnectionResetError("it hung up")
            self._buffer += data
            at = self._buffer.find(b"\n", before)
            if len(self._buffer) > self.answer_bytes:
                raise OSError("its answer is too long")
        line = bytes(memoryview(self._buffer)[:at])
        del self._buffer[: at + 1]
        return line


def answers(path: Path) -> bool:
    """Tell whether somebody listens on a socket and lets this process connect.

    Args:
        path: the socket.

    Returns:
        False also where connecting takes longer than SECONDS.
    """
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(SECONDS)
            _connect(probe, path, SECONDS)
    except OSError:
        return False
    return True


def _connect(sock: socket.socket, path: Path, seconds: float) -> None:
    """Connect, and wait where too many others wait to be accepted.  Raises OSError.

    A socket with a timeout does not block, so the kernel answers EAGAIN instead of waiting.

    Source: unix_stream_connect() in net/unix/af_unix.c.
    """
    until = time.monotonic() + seconds
    while True:
        try:
            return sock.connect(str(path))
        except BlockingIOError:
            if time.monotonic() > until:
                raise
            time.sleep(_CROWDED_SECONDS)


def is_stopped(pid: int) -> bool:
    """Tell whether a process is stopped, by SIGSTOP, Ctrl-Z or a debugger.

    Args:
        pid: the process.

    Returns:
        False also for a process that has ended.

    Source: proc(5), state T or t in /proc/PID/stat.
    """
    status = LIVE.read_bytes(f"/proc/{pid}/stat") or b""
    return status.rpartition(b")")[2].split()[:1] in ([b"T"], [b"t"])
