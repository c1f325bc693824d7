# SPDX-License-Identifier: Apache-2.0
"""Takes connections, lines and descriptors, and lets nobody hold up the others.

One thread does all input and output and never blocks.  A complete line goes to a handler in a
worker thread (queues.py); until it is answered, nothing more is read from that connection.  What
strangers send is bounded: length of a line, descriptors of a request, seconds from the first byte
of a line to its end, seconds to take an answer, connections of a user and of all.

Descriptors of strangers are closed in worker threads, never here: closing one may wait for a file
system that does not answer.
"""

from __future__ import annotations

import array
import errno
import logging
import os
import selectors
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from pagecache_bpf.errors import PagecacheError, UsageError
from pagecache_bpf.ipc import public_protocol
from pagecache_bpf.ipc.user_queues import UserQueues

LINE_SECONDS = 10.0  # from the first byte of a request to its newline
ANSWER_SECONDS = 30.0  # for the other side to take an answer
CONNECTIONS = 2048
CONNECTIONS_PER_USER = 512
_BACKLOG = 512
_PIECE = 1 << 16

_log = logging.getLogger(__name__)


class Handler(Protocol):
    """What is done with the requests of one socket; all of it is called in worker threads."""

    line_bytes: int
    fds_per_message: int

    def queue(self, connection: Connection) -> object:
        """Whose threads the connection's work takes."""

    def request(self, connection: Connection, line: bytes, fds: list[int]) -> bytes | None:
        """Answer one request; None: connection.answer() comes later.

        The descriptors are the handler's, also when it raises.
        """

    def gone(self, connection: Connection) -> None:
        """The other side has hung up."""


class Connection:
    """One client: who it is, what it has sent so far, what it has not taken yet."""

    def __init__(self, server: Server, sock: socket.socket, handler: Handler) -> None:
        self.pid, self.uid, self.gid = public_protocol.peer_of(sock)
        self.handler = handler
        self.alive = True
        self.opened = time.monotonic()
        self._server = server
        self._socket = sock
        self._in = bytearray()
        self._fds: list[int] = []
        self._out = bytearray()
        self._busy = False
        self._hang_up = False
        self._deadline = 0.0  # 0: none

    def answer(self, line: bytes) -> None:
        """Send the answer to the pending request.  From any thread."""
        self._server.call(lambda: self._answered(line))

    # What follows runs in the server's thread.

    @property
    def queue(self) -> object:
        return self.handler.queue(self)

    def readable(self) -> None:
        room = socket.CMSG_LEN(4 * (self.handler.fds_per_message + 1))
        try:
            data, ancillary, flags, _ = self._socket.recvmsg(
                _PIECE, room, socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT
            )
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self.close()
            return
        for level, kind, raw in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                whole = array.array("i")
                whole.frombytes(raw[: len(raw) - len(raw) % whole.itemsize])
                self._fds += whole
        if self._busy or not data:  # a second request before the answer, or the end
            self.close()
        elif flags & socket.MSG_CTRUNC or len(self._fds) > self.handler.fds_per_message:
            self._refuse("too many descriptors came along")
        else:
            self._take(data)

    def _take(self, data: bytes) -> None:
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
            self.later(lambda: self.handler.request(self, line, fds))

    def later(self, call: Callable[[], bytes | None]) -> None:
        """Answer the pending request by what the call returns, in one of the queue's threads."""
        self._server.queues.submit(self.queue, lambda: self._run(call))

    def _run(self, call: Callable[[], bytes | None]) -> None:
        try:
            answer = call()
        except PagecacheError as error:
            answer = public_protocol.encode_error(error)
        except Exception as error:
            _log.exception("a request failed")
            answer = public_protocol.encode_error(
                PagecacheError("the controller failed", f"{type(error).__name__}: {error}")
            )
        if answer is not None:
            self.answer(answer)

    def _answered(self, line: bytes) -> None:
        if not self.alive:
            return
        self._busy = False
        self._out += line
        self._deadline = time.monotonic() + ANSWER_SECONDS
        self.writable()

    def _refuse(self, why: str) -> None:
        """Say why and hang up: what follows in the stream cannot be told apart."""
        self._hang_up = True
        self._answered(public_protocol.encode_error(UsageError("the request was refused", why)))

    def writable(self) -> None:
        try:
            while self._out:
                sent = self._socket.send(self._out[:_PIECE], socket.MSG_DONTWAIT)
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

    def overdue(self, now: float) -> bool:
        return bool(self._deadline) and now > self._deadline

    def expire(self) -> None:
        if self._out:
            self.close()
        else:
            self._refuse(f"its line did not end within {LINE_SECONDS:.0f} s")

    def close(self) -> None:
        """Hang up; the handler hears of it."""
        if not self.alive:
            return
        self.alive = False
        self._server.forget(self, self._socket)
        self._socket.close()
        fds, self._fds = self._fds, []

        def leave() -> None:
            close_all(fds)
            self.handler.gone(self)

        self._server.queues.submit(self.queue, leave)


class Server:
    """The loop: listeners, connections, and calls from other threads."""

    def __init__(self, queues: UserQueues | None = None) -> None:
        self.queues = queues or UserQueues()
        self.connections: set[Connection] = set()
        self._users: Counter[int] = Counter()
        self._selector = selectors.DefaultSelector()
        self._calls: deque[Callable[[], None]] = deque()
        self._woken, self._waker = socket.socketpair()
        for end in (self._woken, self._waker):
            end.setblocking(False)
        self._selector.register(self._woken, selectors.EVENT_READ, None)
        self._reserve = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        self._thread = threading.get_ident()

    def listen(self, listener: socket.socket, handler: Handler) -> None:
        """Take connections there."""
        listener.setblocking(False)
        listener.listen(_BACKLOG)
        self._selector.register(listener, selectors.EVENT_READ, handler)

    def unlisten(self, listener: socket.socket) -> None:
        """Take no more there; connections stay."""
        self._selector.unregister(listener)
        listener.close()

    def call(self, what: Callable[[], None]) -> None:
        """Have something done in the server's thread."""
        self._calls.append(what)
        self.wake()

    def wake(self) -> None:
        """Make step() return.  From any thread, and from signal handlers."""
        with suppress(OSError):  # it is full, or this is over
            self._waker.send(b"\0")

    def step(self, seconds: float) -> None:
        """Wait for something, for so long at most, and do it."""
        for key, events in self._selector.select(seconds):
            if key.fileobj is self._woken:
                with suppress(BlockingIOError):
                    while self._woken.recv(4096):
                        pass
            elif isinstance(key.data, Connection):
                if not key.data.alive:
                    continue
                if events & selectors.EVENT_READ:
                    key.data.readable()
                if key.data.alive and events & selectors.EVENT_WRITE:
                    key.data.writable()
            else:
                assert isinstance(key.fileobj, socket.socket)
                self._accept(key.fileobj, key.data)
        while self._calls:
            self._calls.popleft()()
        now = time.monotonic()
        for connection in [each for each in self.connections if each.overdue(now)]:
            connection.expire()

    def watch(self, sock: socket.socket, connection: Connection, events: int) -> None:
        """What of a connection wakes the loop."""
        if connection.alive:
            self._selector.modify(sock, events, connection)

    def forget(self, connection: Connection, sock: socket.socket) -> None:
        """A connection is over."""
        with suppress(KeyError):
            self._selector.unregister(sock)
        self.connections.discard(connection)
        self._users[connection.uid] -= 1

    def close(self) -> None:
        """Hang up on everybody."""
        for connection in list(self.connections):
            connection.close()
        for key in list(self._selector.get_map().values()):
            if isinstance(key.fileobj, socket.socket):
                key.fileobj.close()
        self._waker.close()
        self._selector.close()
        os.close(self._reserve)

    def _accept(self, listener: socket.socket, handler: Handler) -> None:
        try:
            sock, _ = listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self._turn_away(listener)
            return
        sock.setblocking(False)
        try:
            connection = Connection(self, sock, handler)
        except OSError:
            sock.close()
            return
        user = self._users[connection.uid]
        if len(self.connections) >= CONNECTIONS or (
            connection.uid and user >= CONNECTIONS_PER_USER
        ):
            with suppress(OSError):
                sock.send(
                    public_protocol.encode_error(
                        PagecacheError(
                            "the controller does not take more connections",
                            f"user {connection.uid} has {user} of {len(self.connections)}",
                        )
                    )
                )
            sock.close()
            return
        self._users[connection.uid] += 1
        self.connections.add(connection)
        self._selector.register(sock, selectors.EVENT_READ, connection)

    def _turn_away(self, listener: socket.socket) -> None:
        """Out of descriptors: take one connection and drop it, or the loop would spin."""
        _log.warning("out of file descriptors: a connection was turned away")
        os.close(self._reserve)
        with suppress(OSError):
            listener.accept()[0].close()
        self._reserve = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)


def close_all(fds: list[int]) -> None:
    """Close descriptors; an error of one does not keep the others open."""
    for fd in fds:
        with suppress(OSError):
            os.close(fd)
