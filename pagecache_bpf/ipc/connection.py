# SPDX-License-Identifier: Apache-2.0
"""One connection of the server: what it has sent so far, and what it has not taken yet.

It knows lines and descriptors, and no operation: a Handler answers.  What runs here runs in the
server's thread and never blocks, but for later() and answer().  Descriptors of strangers are closed
in worker threads: closing one may wait for a file system that does not answer.
"""

from __future__ import annotations

import array
import logging
import os
import selectors
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Protocol

from pagecache_bpf.errors import PagecacheError, UsageError
from pagecache_bpf.ipc import wire
from pagecache_bpf.ipc.peer import Peer

if TYPE_CHECKING:
    from pagecache_bpf.ipc.server import Server

LINE_SECONDS = 10.0  # from the first byte of a request to its newline
HELD_SECONDS = 30.0  # that a request waits while its user has too many descriptors on their way
ANSWER_SECONDS = 30.0  # for the other side to take an answer
_PIECE_BYTES = 1 << 16

_log = logging.getLogger(__name__)


class Handler(Protocol):
    """What is done with the requests of one socket; all of it is called in worker threads."""

    @property
    def line_bytes(self) -> int:
        """Bytes of a request, its newline included."""

    @property
    def fds_per_message(self) -> int:
        """Descriptors that may come with a request."""

    @property
    def connections_per_user(self) -> int | None:
        """Connections that one user may have at a time; None: no bound."""

    @property
    def connections(self) -> int | None:
        """Connections that all users together may have at a time; None: no bound."""

    @property
    def idle_seconds(self) -> float | None:
        """Without a request for so long, a connection that may_end() is closed; None: never."""

    def queue(self, connection: Connection) -> object:
        """Tell which queue the work of a connection goes to.

        Args:
            connection: the client's connection.

        Returns:
            The key of the queue in UserQueues.
        """

    def request(self, connection: Connection, line: bytes, fds: list[int]) -> bytes | None:
        """Answer one request.

        Args:
            connection: where it came from.
            line: the request, without its newline.
            fds: descriptors that came along; they are the handler's, also when it raises.

        Returns:
            The line that answers it; None: connection.answer() comes later.

        Raises:
            PagecacheError: the error that the other side is told.
        """

    def may_end(self, connection: Connection) -> bool:
        """Tell whether nothing is lost with a connection; called in the server's thread.

        Args:
            connection: a connection that has been idle.

        Returns:
            True if it may be closed when it is idle, or to make room for others.
        """

    def gone(self, connection: Connection) -> None:
        """Take note that a connection has ended.

        Args:
            connection: the connection that was closed.
        """


class Connection:
    """One client: who it is, what it has sent so far, and what it has not taken yet.

    Args:
        server: the server that accepted it.
        sock: the connected socket, which does not block.
        handler: what answers its requests.
        peer: the process at the other end.

    Attributes:
        number: which of the server's connections it is, counted from 1.
        alive: whether it is open.
        opened: when it was accepted, in seconds of the monotonic clock.
        used: when its last answer was made, by the same clock.
    """

    def __init__(self, server: Server, sock: socket.socket, handler: Handler, peer: Peer) -> None:
        self.number = 0  # which of the server's connections it is
        self.peer = peer
        self.handler = handler
        self.alive = True
        self.opened = self.used = time.monotonic()
        self._server = server
        self._socket = sock
        self._in = bytearray()
        self._fds: list[int] = []
        self._out = bytearray()
        self._busy = False
        self._hang_up = False
        self._deadline = 0.0  # 0: none
        self._held = False  # it is not read from for now

    @property
    def pid(self) -> int:
        """The process that connected; see Peer.checked() before it is used."""
        return self.peer.pid

    @property
    def uid(self) -> int:
        """The user of that process."""
        return self.peer.uid

    @property
    def privileged(self) -> bool:
        """Whether the process is root of this machine."""
        return self.peer.privileged

    @property
    def owner(self) -> tuple[int, bool]:
        """Whom bounds count it for: root of a container is another than root of the machine."""
        return self.uid, self.privileged

    @property
    def idle(self) -> bool:
        """Whether it has asked nothing that is not answered, and is sending nothing."""
        return not (self._busy or self._held or self._in or self._out or self._fds)

    def answer(self, line: bytes) -> None:
        """Send the answer to the pending request.  From any thread.

        Args:
            line: the answer, its newline included.
        """
        self._server.call(lambda: self._answered(line))

    def later(self, call: Callable[[], bytes | None]) -> None:
        """Answer the pending request by what a call returns, in a thread of the user's queue.

        Args:
            call: returns the line; None: answer() comes later.

        Raises:
            PagecacheError: no thread can be started; the call is not made.
        """
        self._server.queues.submit(self.handler.queue(self), lambda: self._run(call))

    def readable(self) -> None:
        """Take what the other side has sent, without blocking."""
        if not self._server.has_descriptors(self):
            if self._busy:  # it is the end, or a second request before the answer
                self.close()
                return
            # What it sends is not looked at: descriptors stay in the socket, and it has to wait.
            self._held = True
            self._server.hold(self._socket, self)
            self._deadline = self._deadline or time.monotonic() + HELD_SECONDS
            return
        room = socket.CMSG_LEN(4 * (self.handler.fds_per_message + 1))
        try:
            data, ancillary, flags, _ = self._socket.recvmsg(
                _PIECE_BYTES, room, socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT
            )
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self.close()
            return
        self._hold(ancillary)
        if self._busy or not data:  # a second request before the answer, or the end
            self.close()
        elif flags & socket.MSG_CTRUNC or len(self._fds) > self.handler.fds_per_message:
            self._refuse("too many descriptors came along")
        else:
            self._take(data)

    def _hold(self, ancillary: list[tuple[int, int, bytes]]) -> None:
        """Take over the descriptors that came along."""
        for level, kind, raw in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                whole = array.array("i")
                whole.frombytes(raw[: len(raw) - len(raw) % whole.itemsize])
                self._fds += whole
                self._server.count_descriptors(self, len(whole))

    def _take(self, data: bytes) -> None:
        """Add what has come to the line, bound its length, and handle it when it is complete."""
        if not self._in:
            self._deadline = time.monotonic() + LINE_SECONDS
        before = len(self._in)
        self._in += data
        # Only what is new is searched: a long line comes in many pieces.
        newline = self._in.find(b"\n", before)
        length = len(self._in) if newline < 0 else newline
        if length >= self.handler.line_bytes:
            self._refuse(f"a line has to be shorter than {self.handler.line_bytes} bytes")
        elif 0 <= newline < len(self._in) - 1:
            self._refuse("a request came before the last one was answered")
        elif newline >= 0:
            self._deadline = 0.0
            line = bytes(memoryview(self._in)[:newline])
            self._in, fds, self._fds = bytearray(), self._fds, []
            self._busy = True
            self._submit(line, fds)

    def _submit(self, line: bytes, fds: list[int]) -> None:
        """Have the handler answer; a thread that cannot be started is an answer, too."""

        def call() -> bytes | None:
            try:
                return self.handler.request(self, line, fds)
            finally:
                self._server.count_descriptors(self, -len(fds))

        try:
            self.later(call)
        except PagecacheError as error:
            self._server.refusals["no thread"] += 1
            self._close_later(fds)
            self._answered(wire.encode_error(error))

    def _run(self, call: Callable[[], bytes | None]) -> None:
        """Make the call, in a worker thread; whatever it raises becomes an answer."""
        try:
            answer = call()
        except PagecacheError as error:
            answer = wire.encode_error(error)
        except Exception as error:
            _log.exception("a request failed")
            answer = wire.encode_error(
                PagecacheError("the controller failed", f"{type(error).__name__}: {error}")
            )
        if answer is not None:
            self.answer(answer)

    def _answered(self, line: bytes) -> None:
        """Queue an answer to be sent, in the server's thread."""
        if not self.alive:
            return
        self._busy = False
        self._out += line
        self.used = time.monotonic()
        self._deadline = self.used + ANSWER_SECONDS
        self.writable()

    def _refuse(self, why: str) -> None:
        """Tell why a request is refused and hang up: nothing that follows can be told apart."""
        self._hang_up = True
        self._server.refusals["bad framing"] += 1
        self._answered(wire.encode_error(UsageError("the request was refused", why)))

    def writable(self) -> None:
        """Send what the other side takes, without blocking."""
        try:
            while self._out:
                sent = self._socket.send(self._out[:_PIECE_BYTES], socket.MSG_DONTWAIT)
                del self._out[:sent]
        except (BlockingIOError, InterruptedError):
            self._server.watch(self._socket, self, selectors.EVENT_WRITE)
            return
        except OSError:
            self.close()
            return
        self._deadline = 0.0
        if self._hang_up:
            self.close()
        else:
            self._server.watch(self._socket, self, selectors.EVENT_READ)

    def expire(self, now: float) -> None:
        """Close the connection if the other side has been too slow, or idle for too long.

        Args:
            now: seconds of the monotonic clock.
        """
        if self._deadline and now > self._deadline:
            if self._out:
                self.close()
            elif self._held:
                self._refuse("too many descriptors of this user, or of all, are on their way")
            else:
                self._refuse(f"its line did not end within {LINE_SECONDS:.0f} s")
            return
        bound = self.handler.idle_seconds
        if bound is not None and now > self.used + bound and self.idle:
            if self.handler.may_end(self):
                self._server.refusals["idle"] += 1
                self.close()
            else:
                self.used = now  # looked at again only then

    def read_again(self) -> bool:
        """Go on reading what the other side sends, if its user may send descriptors again.

        Returns:
            False: it may not yet.
        """
        if self.alive and not self._server.has_descriptors(self):
            return False
        self._held = False
        if self.alive and not self._in:
            self._deadline = 0.0
        return True

    def close(self) -> None:
        """Close the connection, and tell the handler in a worker thread."""
        if not self.alive:
            return
        self.alive = False
        self._server.forget(self, self._socket)
        with suppress(OSError):  # the other side was faster
            self._socket.shutdown(socket.SHUT_RDWR)
        fds, self._fds = self._fds, []
        if fds:
            self._close_later(fds)

        def leave() -> None:
            try:
                self._socket.close()
                self.handler.gone(self)
            finally:
                self.peer.close()
                # Only now its place is free: what it has left does not pile up.
                self._server.call(partial(self._server.left, self))

        self._clean_up(leave)

    def _close_later(self, fds: list[int]) -> None:
        """Close descriptors of a stranger's in a worker thread, where closing may wait."""

        def leave() -> None:
            close_all(fds)
            self._server.count_descriptors(self, -len(fds))

        self._clean_up(leave)

    def _clean_up(self, work: Callable[[], None]) -> None:
        """Do something that may wait, and that no request of the user's is to hold up."""
        key = self.handler.queue(self)
        if self.privileged:
            self._server.queues.submit(key, work, must_run=True)
        else:
            self._server.cleanups.submit(key, work, must_run=True)


def close_all(fds: list[int]) -> None:
    """Close descriptors; an error of one does not keep the others open.

    Args:
        fds: the descriptors.
    """
    for fd in fds:
        with suppress(OSError):
            os.close(fd)
