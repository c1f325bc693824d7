# SPDX-License-Identifier: Apache-2.0
"""Accepts connections, takes lines and descriptors, and lets nobody hold up the others.

One thread does all input and output and never blocks.  A complete line goes to a handler in a
worker thread (user_queues); until it is answered, nothing more is read from that connection.  What
strangers send is bounded: length of a line, descriptors of a request and of a user, seconds from
the first byte of a line to its end, seconds to take an answer, seconds without a request,
connections of a user and of all.  Each listener has bounds of its own, so that many connections at
one of them take no place at the other.
"""

from __future__ import annotations

import errno
import logging
import os
import resource
import select
import selectors
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress

from pagecache_bpf.errors import PagecacheError
from pagecache_bpf.ipc import wire
from pagecache_bpf.ipc.connection import Connection, Handler, close_all
from pagecache_bpf.ipc.peer import Peer
from pagecache_bpf.ipc.user_queues import UserQueues

__all__ = ["Connection", "Handler", "Server", "close_all"]

#: Connections that a user has at hand also where a crowd has taken what it can.
FEW = 16
#: Descriptors of one user that have come and are not handled yet.
DESCRIPTORS_PER_USER = 4096
_BACKLOG = 4096  # the kernel cuts it to net.core.somaxconn
#: Connections taken at once, before those that are open are looked at again.
_ACCEPTED_AT_ONCE = 64
#: For what connections leave behind when they end; each user has one at a time.
CLEANUP_THREADS = 16
_EXPIRY_SECONDS = 0.2
_RESUMED_AT_ONCE = 8  # of a user's connections that were not read from
_NO_RESERVE_SECONDS = 0.01

_log = logging.getLogger(__name__)


class Server:
    """The loop: listeners, connections, and calls from other threads.

    Attributes:
        queues: the worker threads.
        cleanups: threads for what connections leave behind.
        connections: those that are open.
        accepted: how many were taken so far.
        refusals: what was refused at this level so far, by reason.
    """

    def __init__(self, queues: UserQueues | None = None, trust_containers: bool = False) -> None:
        """Make a server without listeners.

        Args:
            queues: the worker threads; by default new ones.
            trust_containers: take user 0 of a container for root of this machine.
        """
        self.queues = queues or UserQueues()
        self.cleanups = UserQueues(1, CLEANUP_THREADS)
        self.trust_containers = trust_containers
        self.connections: set[Connection] = set()
        self.accepted = 0
        self.refusals: Counter[str] = Counter()
        self._owners: Counter[tuple[int, tuple[int, bool]]] = Counter()
        self._listeners: Counter[int] = Counter()
        self._descriptors: Counter[tuple[int, bool]] = Counter()
        self._descriptors_lock = threading.Lock()
        self._most_descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 8
        self._selector = selectors.DefaultSelector()
        self._calls: deque[Callable[[], None]] = deque()
        self._woken, self._waker = socket.socketpair()
        for end in (self._woken, self._waker):
            end.setblocking(False)
        self._selector.register(self._woken, selectors.EVENT_READ, None)
        self._held: dict[Connection, socket.socket] = {}  # that are not read from for now
        self._ends = select.poll()  # of these
        self._reserve = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        self._expired = 0.0

    def listen(self, listener: socket.socket, handler: Handler) -> None:
        """Accept connections at a bound socket, and have a handler answer their requests.

        Args:
            listener: the socket, which the server closes.
            handler: what answers, with bounds of its own.

        Raises:
            OSError: the socket is not bound.
        """
        self._most_descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 8
        listener.setblocking(False)
        listener.listen(_BACKLOG)
        self._selector.register(listener, selectors.EVENT_READ, handler)

    def unlisten(self, listener: socket.socket) -> None:
        """Accept no more connections at a socket and close it; those that are open stay.

        Args:
            listener: a socket that listen() was given.
        """
        self._selector.unregister(listener)
        listener.close()

    def call(self, what: Callable[[], None]) -> None:
        """Have something done in the server's thread.  From any thread.

        Args:
            what: is called without arguments, and must not block.
        """
        self._calls.append(what)
        self.wake()

    def wake(self) -> None:
        """Make step() return.  From any thread, and from signal handlers."""
        with suppress(OSError):  # it is full, or this is over
            self._waker.send(b"\0")

    def step(self, seconds: float) -> None:
        """Wait for something to happen and deal with it.

        Args:
            seconds: how long to wait at most.
        """
        for key, events in self._selector.select(seconds):
            if key.fileobj is self._woken:
                with suppress(BlockingIOError):
                    while self._woken.recv(4096):
                        pass
            elif isinstance(key.data, Connection):
                if key.data.alive and events & selectors.EVENT_READ:
                    key.data.readable()
                if key.data.alive and events & selectors.EVENT_WRITE:
                    key.data.writable()
            else:
                assert isinstance(key.fileobj, socket.socket)
                for _ in range(_ACCEPTED_AT_ONCE):
                    if not self._accept(key.fileobj, key.data):
                        break
        while self._calls:
            self._calls.popleft()()
        now = time.monotonic()
        if now >= self._expired + _EXPIRY_SECONDS:
            self._expired = now
            self.queues.retry()
            self.cleanups.retry()
            for connection in list(self.connections):
                connection.expire(now)
            self._read_held()

    def hold(self, sock: socket.socket, connection: Connection) -> None:
        """Look no more at what a connection sends, until its user may send descriptors again.

        Args:
            sock: the connection's socket.
            connection: a connection whose user has too many descriptors on their way.
        """
        self._selector.unregister(sock)
        self._held[connection] = sock
        self._ends.register(sock, select.POLLRDHUP)

    def _release(self, connection: Connection) -> bool:
        """Take a connection off those that are held; False: it was not one of them."""
        sock = self._held.pop(connection, None)
        if sock is None:
            return False
        self._ends.unregister(sock)
        return True

    def _read_held(self) -> None:
        """Go on with some connections of each user who may send descriptors again; note ends."""
        ended = {fd for fd, _ in self._ends.poll(0)} if self._held else set()
        for connection, sock in list(self._held.items()):
            if sock.fileno() in ended:
                connection.close()
        resumed: Counter[object] = Counter()
        for connection, sock in list(self._held.items()):
            if resumed[connection.owner] < _RESUMED_AT_ONCE and connection.read_again():
                resumed[connection.owner] += 1
                self.watch(sock, connection, selectors.EVENT_READ)

    def watch(self, sock: socket.socket, connection: Connection, events: int) -> None:
        """Say what of a connection the server's thread waits for.

        Args:
            sock: the connection's socket.
            connection: the connection; nothing happens if it is closed.
            events: selectors.EVENT_READ or EVENT_WRITE.
        """
        if connection.alive:
            if self._release(connection):
                self._selector.register(sock, events, connection)
            else:
                self._selector.modify(sock, events, connection)

    def forget(self, connection: Connection, sock: socket.socket) -> None:
        """Wait no longer for a connection that is being closed.

        Args:
            connection: the connection that was closed.
            sock: its socket, which is still open.
        """
        self._release(connection)
        with suppress(KeyError):
            self._selector.unregister(sock)
        self.connections.discard(connection)

    def left(self, connection: Connection) -> None:
        """Take a closed connection off the count, so that another may take its place.

        Args:
            connection: the connection, which was closed and cleaned up after.
        """
        listener = id(connection.handler)
        self._listeners[listener] -= 1
        self._owners[listener, connection.owner] -= 1
        self._owners += Counter()  # without those that have none

    def count_descriptors(self, connection: Connection, more: int) -> None:
        """Count descriptors of strangers that have come and are not closed yet.  From any thread.

        Args:
            connection: where they came from.
            more: how many have come; negative: how many are closed.
        """
        with self._descriptors_lock:
            self._descriptors[connection.owner] += more
            if not self._descriptors[connection.owner]:
                del self._descriptors[connection.owner]

    def has_descriptors(self, connection: Connection) -> bool:
        """Tell whether the user of a connection may send more descriptors now.

        Args:
            connection: a client's connection.

        Returns:
            False when that user, or all users together, have too many that are not handled yet.
        """
        if connection.privileged:
            return True
        with self._descriptors_lock:
            mine = self._descriptors[connection.owner]
            # No more than what is free then, so that others find something, too.
            free = self._most_descriptors - sum(self._descriptors.values())
            return mine <= min(DESCRIPTORS_PER_USER, max(free, connection.handler.fds_per_message))

    def close(self) -> None:
        """Close all connections and listeners."""
        for connection in list(self.connections):
            connection.close()
        for key in list(self._selector.get_map().values()):
            if isinstance(key.fileobj, socket.socket):
                key.fileobj.close()
        self._waker.close()
        self._selector.close()
        if self._reserve >= 0:
            os.close(self._reserve)

    def _accept(self, listener: socket.socket, handler: Handler) -> bool:
        """Accept a connection; False: nobody else waits, or none can be accepted now."""
        try:
            sock, _ = listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self._turn_away(listener)
            return False
        sock.setblocking(False)
        try:
            peer = Peer(sock, self.trust_containers)
        except OSError:
            sock.close()
            return True
        connection = Connection(self, sock, handler, peer)
        if not self._has_room(handler, connection):
            user = self._owners[id(handler), connection.owner]
            self.refusals["too many connections"] += 1
            with suppress(OSError):
                sock.send(
                    wire.encode_error(
                        PagecacheError(
                            "the controller does not take more connections",
                            f"user {peer.uid} has {user} of {self._listeners[id(handler)]}",
                        )
                    )
                )
            sock.close()
            peer.close()
            return True
        self.accepted += 1
        connection.number = self.accepted
        self._listeners[id(handler)] += 1
        self._owners[id(handler), connection.owner] += 1
        self.connections.add(connection)
        self._selector.register(sock, selectors.EVENT_READ, connection)
        return True

    def _has_room(self, handler: Handler, newcomer: Connection) -> bool:
        """Tell whether one more connection is accepted.

        The last eighth of the places is for users who have few (FEW).  Where all are taken, a user
        with few of them gets the place of an idle connection of the user with the most, if that
        loses nothing by it.
        """
        listener = id(handler)
        mine = self._owners[listener, newcomer.owner]
        bound = handler.connections_per_user
        if bound is not None and mine >= bound and not newcomer.privileged:
            return False
        if handler.connections is None:
            return True
        kept = handler.connections // 8 if mine >= FEW else 0
        if self._listeners[listener] < handler.connections - kept:
            return True
        if handler.connections > FEW and mine >= FEW:
            return False
        others = {owner: count for (at, owner), count in self._owners.items() if at == listener}
        richest = max(others, key=lambda owner: others[owner])
        if others[richest] <= mine + 1:
            return False
        idle = [
            connection
            for connection in self.connections
            if connection.handler is handler
            and connection.owner == richest
            and connection.idle
            and handler.may_end(connection)
        ]
        if not idle:
            return False
        self.refusals["displaced"] += 1
        min(idle, key=lambda connection: connection.used).close()
        return True

    def _turn_away(self, listener: socket.socket) -> None:
        """Accept one connection and drop it; with no descriptor left, the loop would spin."""
        if not self.refusals["out of descriptors"]:
            _log.warning("out of file descriptors: connections are turned away")
        self.refusals["out of descriptors"] += 1
        if self._reserve >= 0:
            os.close(self._reserve)
            self._reserve = -1
        else:
            time.sleep(_NO_RESERVE_SECONDS)
        with suppress(OSError):
            listener.accept()[0].close()
        with suppress(OSError):  # another thread may have been faster: it is tried again
            self._reserve = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
