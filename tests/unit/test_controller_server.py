# SPDX-License-Identifier: Apache-2.0
"""The bounds of the server: who is turned away when, and that root's place is never taken."""

from __future__ import annotations

import errno
import os
import resource
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pagecache_bpf.errors import PagecacheError, UsageError
from pagecache_bpf.ipc import peer as peers
from pagecache_bpf.ipc import wire
from pagecache_bpf.ipc.client import LineClient, answers
from pagecache_bpf.ipc.connection import Connection, close_all
from pagecache_bpf.ipc.peer import Peer
from pagecache_bpf.ipc.server import Server
from pagecache_bpf.ipc.user_queues import UserQueues
from tests.vm.kernel import wait_for


@dataclass(eq=False)
class Handler:
    """Answers with the number of the connection; `wait` waits to be let go."""

    line_bytes: int = 1000
    fds_per_message: int = 8
    connections_per_user: int | None = None
    connections: int | None = None
    idle_seconds: float | None = None
    kept: set[int] = field(default_factory=set)  # something would be lost with these
    gate: threading.Event = field(default_factory=threading.Event)
    left: list[int] = field(default_factory=list)

    def queue(self, connection: Connection) -> object:
        return connection.owner

    def request(self, connection: Connection, line: bytes, fds: list[int]) -> bytes | None:
        close_all(fds)
        if line == b"wait":
            self.gate.wait(20)
        return wire.encode_answer({"number": connection.number, "fds": len(fds)})

    def may_end(self, connection: Connection) -> bool:
        return connection.number not in self.kept

    def gone(self, connection: Connection) -> None:
        self.left.append(connection.number)


class Running:
    """A server in a thread, with any number of listeners."""

    def __init__(self, directory: Path) -> None:
        self.server = Server(UserQueues())
        self._directory, self._stop = directory, threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            self.server.step(0.05)
        self.server.close()

    def listen(self, handler: Handler) -> Callable[[], LineClient]:
        """What connects to the handler."""
        path = self._directory / f"{id(handler)}.sock"
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        listening = threading.Event()

        def begin() -> None:
            self.server.listen(listener, handler)
            listening.set()

        self.server.call(begin)
        assert listening.wait(20)
        return lambda: LineClient(path, 20)

    def stop(self) -> None:
        self._stop.set()
        self.server.wake()
        self._thread.join(20)
        assert not self._thread.is_alive()


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    found = Running(tmp_path)
    yield found
    found.stop()


def test_s5_a_crowd_at_one_listener_takes_no_place_at_the_other(
    running: Running, become: Callable[[int], None]
) -> None:
    public = running.listen(Handler(connections=6, connections_per_user=3))
    root = running.listen(Handler())
    with ExitStack() as crowd:
        for uid in (1001, 1001, 1001, 1002, 1002, 1002):
            become(uid)
            crowd.enter_context(public()).request("x")
        become(1001)
        with public() as late, pytest.raises(PagecacheError, match="does not take more"):
            late.request("x")
        become(0)
        with root() as client:
            assert client.request("x")["fds"] == 0
    assert running.server.refusals["too many connections"] == 1


def test_s5_a_crowd_that_waits_to_be_taken_does_not_turn_a_client_away(tmp_path: Path) -> None:
    """The kernel refuses to let more wait (EAGAIN): that is not "no controller runs"."""
    path = tmp_path / "sock"
    with socket.socket(socket.AF_UNIX) as listener, ExitStack() as crowd:
        listener.bind(str(path))
        listener.listen(0)
        waiting = []
        while True:
            waiting.append(crowd.enter_context(socket.socket(socket.AF_UNIX)))
            waiting[-1].setblocking(False)
            try:
                waiting[-1].connect(str(path))
            except BlockingIOError:
                break
        threading.Timer(0.2, lambda: [listener.accept() for _ in waiting]).start()
        with LineClient(path, 60):
            assert answers(path)
        with pytest.raises(PagecacheError, match="does not answer"):
            LineClient(tmp_path / "none", 60)


def test_s5_a_newcomer_takes_the_place_of_an_idle_connection(
    running: Running, become: Callable[[int], None]
) -> None:
    """Of the user with the most of them, and never one that something is lost with."""
    handler = Handler(connections=4)
    public = running.listen(handler)
    with ExitStack() as crowd:
        become(1001)
        clients = [crowd.enter_context(public()) for _ in range(4)]
        numbers = [client.request("x")["number"] for client in clients]
        handler.kept.add(numbers[0])
        become(1002)
        newcomer = crowd.enter_context(public())
        assert newcomer.request("x")["number"] == numbers[-1] + 1
        wait_for(lambda: handler.left == [numbers[1]], "the longest idle one to be gone")
        assert clients[0].request("x")["number"] == numbers[0]
        handler.kept.update(numbers)
        with public() as second, pytest.raises(PagecacheError, match="does not take more"):
            second.request("x")


def test_s5_idle_connections_are_closed_and_loads_are_not(running: Running) -> None:
    handler = Handler(idle_seconds=0.3)
    public = running.listen(handler)
    with public() as idle, public() as loading:
        number = idle.request("x")["number"]
        handler.kept.add(loading.request("x")["number"])
        wait_for(lambda: handler.left == [number], "the idle connection to be closed")
        assert loading.request("x")["number"] in handler.kept
        with pytest.raises(PagecacheError, match="does not answer"):
            idle.request("x")


def test_s4_root_has_a_thread_of_its_own() -> None:
    """However many users hang in how many threads, reserved work is begun at once."""
    queues, gate, done = UserQueues(per_user=2, total=4), threading.Event(), threading.Event()
    queues.reserve("root")

    def hang() -> None:
        gate.wait(20)

    for user in range(10):
        queues.submit(user, hang)
    wait_for(lambda: queues.running() == 4, "every thread to hang")
    queues.submit("root", done.set)
    assert done.wait(10)
    gate.set()
    assert queues.wait_idle(20)


def test_s12_a_thread_that_cannot_be_started_is_an_answer(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    handler = Handler()
    public = running.listen(handler)
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "queue":
            raise RuntimeError("can't start new thread")
        start(thread)

    with public() as client:
        monkeypatch.setattr(threading.Thread, "start", refuse)
        reader, writer = os.pipe()
        with pytest.raises(PagecacheError, match="no thread can be started"):
            client.request("x", (writer,))
        os.close(writer)
        with pytest.raises(PagecacheError, match="no thread can be started"):
            client.request("x")
        monkeypatch.undo()
        assert client.request("x")["fds"] == 0  # and the server lives
        assert os.read(reader, 1) == b""  # what came along was closed
        os.close(reader)
    wait_for(lambda: len(handler.left) == 1, "the connection to be gone")
    assert running.server.queues.start_failures >= 2


def test_descriptors_of_one_user_on_their_way_are_bounded(
    running: Running, become: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half requests hold descriptors, too: of all connections of a user, only so many."""
    monkeypatch.setattr("pagecache_bpf.ipc.server.DESCRIPTORS_PER_USER", 20)
    handler = Handler()
    public = running.listen(handler)
    become(1001)
    with ExitStack() as crowd:
        half = [crowd.enter_context(public()) for _ in range(4)]
        for client in half:
            client._send(b'{"v": 1,', [0] * 8)
        # What the one beyond has sent is not taken.
        wait_for(lambda: len(running.server._held) == 1, "the last one to be held", 60)
        assert sum(running.server._descriptors.values()) == 24
        become(1002)
        with public() as client:
            assert client.request("x", [0] * 8)["fds"] == 8
    wait_for(lambda: not running.server._descriptors, "all of them to be closed")


# --- who is who ---


def pair(path: Path) -> tuple[socket.socket, socket.socket]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        client = socket.socket(socket.AF_UNIX)
        client.connect(str(path))
        return client, listener.accept()[0]


@pytest.mark.parametrize("how", ["SO_PEERPIDFD", "pidfd_open"])
def test_s9_a_process_that_has_ended_is_told_from_its_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    if how == "pidfd_open":
        monkeypatch.setattr(peers, "_SO_PEERPIDFD", 9999)
    path = tmp_path / "sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            with suppress(BaseException):
                os.close(writer)
                sock = socket.socket(socket.AF_UNIX)
                sock.connect(str(path))
                os.read(reader, 1)
            os._exit(0)
        os.close(reader)
        accepted, _ = listener.accept()
        with accepted:
            found = Peer(accepted)
            assert (found.pid, found.uid, found.alive) == (child, os.geteuid(), True)
            assert found.checked(lambda pid: pid) == child
            os.close(writer)
            os.waitpid(child, 0)
            assert not found.alive
            called: list[int] = []
            with pytest.raises(UsageError, match="has ended"):
                found.checked(called.append)
            assert called == []
            found.close()


def test_s9_a_number_that_ends_while_it_is_used(tmp_path: Path) -> None:
    """What was read of it may be another process's, so it is not believed."""
    client, accepted = pair(tmp_path / "sock")
    with client, accepted:
        found = Peer(accepted)
        os.close(found._pidfd)
        child = os.fork()
        if not child:
            threading.Event().wait(60)
            os._exit(0)
        found._pidfd = os.pidfd_open(child)

        def read(pid: int) -> int:
            os.kill(child, 9)
            os.waitpid(child, 0)
            return pid

        with pytest.raises(UsageError, match="has ended"):
            found.checked(read)
        found.close()


def test_s9_without_so_peerpidfd_a_number_of_another_user_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "_SO_PEERPIDFD", 9999)
    monkeypatch.setattr(peers, "credentials", lambda sock: (os.getpid(), 54321, 54321))
    client, accepted = pair(tmp_path / "sock")
    with client, accepted:
        assert not Peer(accepted).alive


@pytest.mark.skipif(os.geteuid() != 0, reason="user namespaces of root's")
@pytest.mark.parametrize("kind", ["user", "pid"])
def test_s13_root_of_a_container_is_not_root(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        program = (
            f"import socket; s = socket.socket(socket.AF_UNIX); s.connect({str(path)!r}); s.recv(1)"
        )
        flags = ["--user", "--map-root-user"] if kind == "user" else ["--pid", "--fork"]
        import subprocess
        import sys

        command = ["unshare", *flags, sys.executable, "-c", program]
        with subprocess.Popen(command) as process:
            listener.settimeout(30)
            accepted, _ = listener.accept()
            with accepted:
                contained, trusted = Peer(accepted), Peer(accepted, trust_containers=True)
                assert (contained.uid, contained.privileged) == (0, False)
                assert trusted.privileged
                contained.close()
                trusted.close()
            process.wait(30)
    client, accepted = pair(tmp_path / "own")
    with client, accepted:
        assert Peer(accepted).privileged


# --- the codec ---


def test_out_of_descriptors_is_survived(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """accept(2) fails with EMFILE: one connection is turned away, and the loop goes on."""
    handler = Handler()
    public = running.listen(handler)
    accept, failed = socket.socket.accept, threading.Event()

    def refuse(listener: socket.socket) -> tuple[socket.socket, Any]:
        if not failed.is_set():
            failed.set()
            raise OSError(errno.EMFILE, "Too many open files")
        return accept(listener)

    monkeypatch.setattr(socket.socket, "accept", refuse)
    with public() as turned_away, pytest.raises(PagecacheError, match="does not answer"):
        turned_away.request("x")
    with public() as client:
        assert client.request("x")["fds"] == 0
    assert running.server.refusals["out of descriptors"] == 1


def test_s5_who_has_too_many_descriptors_on_their_way_waits(
    running: Running, become: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What more it sends is not looked at, and answered later; become are served."""
    monkeypatch.setattr("pagecache_bpf.ipc.server.DESCRIPTORS_PER_USER", 3)
    handler = Handler()
    public = running.listen(handler)
    become(1001)
    with public() as first, public() as second, public() as third, public() as gone:
        first._send(b"wait\n", [0] * 4)
        wait_for(lambda: running.server.queues.running() == 1, "the first to be handled", 60)
        for client in (second, third, gone):
            client._send(b"x\n", [0] * 4)
        wait_for(lambda: len(running.server._held) == 3, "the become to be held", 60)
        gone.disconnect()  # that is noticed all the same
        # Before the first one is let go of, which the handler does after 20 s.
        wait_for(lambda: len(running.server.connections) == 3, "its end to be noticed", 15)
        become(1002)
        with public() as other:
            assert other.request("x")["fds"] == 0
        handler.gate.set()
        answered = [wire.decode_answer(client._line())["fds"] for client in (first, second, third)]
        assert answered == [4, 4, 4]
        assert first.request("x")["fds"] == 0  # and so on
    wait_for(lambda: not running.server._descriptors, "all to be closed", 60)
    assert not running.server._held


def test_s5_who_waits_too_long_with_too_many_descriptors_is_refused(
    running: Running, become: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pagecache_bpf.ipc.server.DESCRIPTORS_PER_USER", 3)
    monkeypatch.setattr("pagecache_bpf.ipc.connection.HELD_SECONDS", 0.1)
    handler = Handler()
    public = running.listen(handler)
    become(1001)
    with public() as first, public() as second:
        first._send(b"wait\n", [0] * 4)
        wait_for(lambda: running.server.queues.running() == 1, "the first to be handled", 60)
        second._send(b"x\n", [])
        with pytest.raises(UsageError, match="too many descriptors of this user"):
            wire.decode_answer(second._line())
        handler.gate.set()
    wait_for(lambda: not running.server.connections, "both to be gone", 60)
    assert not running.server._held


def test_s5_out_of_descriptors_is_survived_when_the_reserve_is_gone(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Really out of them, and another thread takes the one that was kept: later all is well."""
    public = running.listen(Handler())
    open_, before = os.open, resource.getrlimit(resource.RLIMIT_NOFILE)
    refused = threading.Event()

    def gone(path: Any, *arguments: Any, **named: Any) -> int:
        if path == os.devnull and not refused.is_set():
            refused.set()
            raise OSError(errno.EMFILE, "Too many open files")
        return open_(path, *arguments, **named)

    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(3)]
        path = next(running._directory.glob("*.sock"))
        monkeypatch.setattr("pagecache_bpf.ipc.server.os.open", gone)
        taken = []
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
        try:
            with suppress(OSError):
                while True:
                    taken.append(os.dup(0))
            for sock in sockets:
                sock.connect(str(path))
            wait_for(lambda: running.server.refusals["out of descriptors"] >= 3, "refusals", 60)
        finally:
            for fd in taken:
                os.close(fd)
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert refused.is_set()
    with public() as client:
        assert client.request("x")["fds"] == 0
