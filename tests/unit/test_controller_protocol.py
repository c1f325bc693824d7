# SPDX-License-Identifier: Apache-2.0
"""The public socket's protocol: what is refused, and that nothing else but refusal happens."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagecache_bpf.errors import PagecacheError, PrivilegeError, UnsupportedError, UsageError
from pagecache_bpf.ipc import public_protocol
from pagecache_bpf.ipc.public_client import PublicClient
from pagecache_bpf.ipc.public_protocol import check_request
from pagecache_bpf.ipc.server import Connection, Server, close_all
from pagecache_bpf.ipc.user_queues import UserQueues


def line(**members: Any) -> bytes:
    return json.dumps({"v": 1, **members}).encode()


GOOD = {
    "hello": (line(op="hello"), 0),
    "files": (line(op="files"), 3),
    "open_load": (line(op="open_load", model="m", devices=[{"name": "cuda:0"}], wait=1.5), 1),
    "load_report": (line(op="load_report", load="abc"), 0),
    "done": (line(op="done", load="abc", keep=True), 0),
    "close": (line(op="close", load="abc"), 0),
    "residency": (line(op="residency", offset=4096), 1),
    "drop": (line(op="drop", length=0), 1),
    "prefetch": (line(op="prefetch", extents=[[0, 1], [4096, 2]], node=0), 1),
    "topology": (line(op="topology"), 0),
    "status": (line(op="status"), 0),
}


def test_every_operation_is_taken() -> None:
    assert set(GOOD) == set(public_protocol.OPERATIONS)
    for name, (request, fds) in GOOD.items():
        assert check_request(request, fds)[0] == name


@pytest.mark.parametrize(
    ("request_", "fds", "why"),
    [
        (b"", 0, "not JSON"),
        (b"\xff\xfe", 0, "not JSON"),
        (b"[" * 60000, 0, "not JSON"),
        (b"[]", 0, "not an object"),
        (b"{}", 0, "version 1"),
        (b'{"v": 2, "op": "hello"}', 0, "version 1"),
        (line(op="__init__"), 0, "no such operation"),
        (line(op=["hello"]), 0, "no such operation"),
        (line(op="hello", more=1), 0, "has no member"),
        (line(op="done"), 0, "needs load"),
        (line(op="done", load=7), 0, "bad value"),
        (line(op="done", load="x" * 5000), 0, "bad value"),
        (line(op="done", load="a\ud800"), 0, "bad value"),
        (line(op="done", load="a\0b"), 0, "bad value"),
        (line(op="residency"), 0, "takes 1 descriptors"),
        (line(op="residency"), 2, "takes 1 descriptors"),
        (line(op="hello"), 1, "takes 0 descriptors"),
        (line(op="residency", offset=-1), 1, "bad value"),
        (line(op="residency", offset=1 << 63), 1, "bad value"),
        (line(op="residency", offset=True), 1, "bad value"),
        (line(op="residency", offset=1.5), 1, "bad value"),
        (line(op="prefetch", extents=[[0, 1, 2]]), 1, "bad value"),
        (line(op="prefetch", extents=[[(1 << 63) - 1, 1]]), 1, "bad value"),
        (line(op="prefetch", extents=[[0, 1]] * 1025), 1, "bad value"),
        (line(op="prefetch", extents=[], node=4096), 1, "bad value"),
        (line(op="open_load", model="m", wait=float("nan")), 0, "bad value"),
        (line(op="open_load", model="m", wait=1e9), 0, "bad value"),
        (line(op="open_load", model="m", devices=["cuda:0"]), 0, "bad value"),
        (line(op="open_load", model="m", devices=[{"name": "x", "fd": 1}]), 0, "bad value"),
    ],
)
def test_bad_requests_are_told_why(request_: bytes, fds: int, why: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_request(request_, fds)
    assert why in f"{caught.value.what} {caught.value.why}"
    assert len(str(caught.value)) < 1000


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)
_NAMES = sorted(
    {name for operation in public_protocol.OPERATIONS.values() for name in operation.arguments}
)


@given(
    st.sampled_from(sorted(public_protocol.OPERATIONS)),
    st.dictionaries(st.sampled_from(_NAMES), _JSON),
    st.integers(0, 70),
)
def test_any_value_is_taken_or_refused(name: str, members: dict[str, Any], fds: int) -> None:
    try:
        operation, arguments = check_request(line(op=name, **members), fds)
    except UsageError:
        return
    assert operation == name
    assert set(arguments) <= set(public_protocol.OPERATIONS[name].arguments)


@given(st.binary())
def test_any_bytes_are_taken_or_refused(data: bytes) -> None:
    with pytest.raises(UsageError):
        check_request(data, 0)


# --- the transport, with a handler that repeats what it hears ---


class Echo:
    """Answers with the line and the number of descriptors; `wait` waits to be let go."""

    line_bytes = 1000
    fds_per_message = 4
    connections_per_user: int | None = None
    connections: int | None = None
    idle_seconds: float | None = None

    def __init__(self) -> None:
        self.left: list[int] = []
        self.gate = threading.Event()
        self.kept: set[int] = set()  # connections that something would be lost with

    def queue(self, connection: Connection) -> object:
        return connection.uid

    def request(self, connection: Connection, line: bytes, fds: list[int]) -> bytes | None:
        close_all(fds)
        if line == b"wait":
            self.gate.wait(20)
        if line == b"fail":
            raise RuntimeError("on purpose")
        if line == b"big":
            return b"x" * (4 << 20) + b"\n"
        return line + b" %d\n" % len(fds)

    def may_end(self, connection: Connection) -> bool:
        return connection.number not in self.kept

    def gone(self, connection: Connection) -> None:
        self.left.append(connection.pid)


@pytest.fixture
def echo(tmp_path: Path) -> Iterator[tuple[Path, Echo]]:
    path = tmp_path / "sock"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    handler, server, stop = Echo(), Server(UserQueues()), threading.Event()
    server.listen(listener, handler)

    def run() -> None:
        while not stop.is_set():
            server.step(0.05)
        server.close()

    thread = threading.Thread(target=run)
    thread.start()
    yield path, handler
    handler.gate.set()
    stop.set()
    server.wake()
    thread.join(10)
    assert not thread.is_alive()


def connect(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(20)
    sock.connect(str(path))
    return sock


def receive(sock: socket.socket) -> bytes:
    """One line, or what came before the end."""
    data = b""
    while not data.endswith(b"\n") and (piece := sock.recv(1 << 16)):
        data += piece
    return data


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_lines_in_pieces_with_descriptors(echo: tuple[Path, Echo]) -> None:
    path, _ = echo
    with connect(path) as sock:
        for piece in (b"he", b"l"):
            sock.sendall(piece)
        socket.send_fds(sock, [b"lo"], [0, 0])
        socket.send_fds(sock, [b"\n"], [0])
        assert receive(sock) == b"hello 3\n"
        sock.sendall(b"again\n")
        assert receive(sock) == b"again 0\n"


@pytest.mark.parametrize(
    ("data", "fds", "why"),
    [
        (b"x" * 1000, 0, b"shorter than 1000"),
        (b"x" * 5000 + b"\n", 0, b"shorter than 1000"),
        (b"one\ntwo\n", 0, b"before the last one was answered"),
        (b"x\n", 5, b"too many descriptors"),
        (b"x\n", 250, b"too many descriptors"),
    ],
)
def test_too_much_is_refused(echo: tuple[Path, Echo], data: bytes, fds: int, why: bytes) -> None:
    path, _ = echo
    before = open_descriptors()
    with connect(path) as sock:
        socket.send_fds(sock, [data], [0] * fds)
        assert why in receive(sock)
        assert receive(sock) == b""
    with connect(path) as sock:  # the next one is served, and nothing is left open
        sock.sendall(b"x\n")
        assert receive(sock) == b"x 0\n"
    # They are closed in another thread, and so is this connection.
    until = time.monotonic() + 10
    while open_descriptors() > before and time.monotonic() < until:
        time.sleep(0.01)
    assert open_descriptors() <= before


def test_a_handler_that_fails_is_told_and_survived(echo: tuple[Path, Echo]) -> None:
    path, _ = echo
    with connect(path) as sock:
        sock.sendall(b"fail\n")
        assert b"on purpose" in receive(sock)
        sock.sendall(b"x\n")
        assert receive(sock) == b"x 0\n"


def test_nobody_waits_for_a_slow_one(
    echo: tuple[Path, Echo], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sends half a line, one waits in its handler, one does not take its answer."""
    monkeypatch.setattr("pagecache_bpf.ipc.connection.LINE_SECONDS", 0.5)
    path, _ = echo
    with connect(path) as half, connect(path) as busy, connect(path) as deaf:
        half.sendall(b"hal")
        busy.sendall(b"wait\n")
        deaf.sendall(b"big\n")
        with connect(path) as quick:
            quick.sendall(b"x\n")
            assert receive(quick) == b"x 0\n"
        assert b"did not end within" in receive(half)
        assert receive(half) == b""


def test_a_user_has_its_own_threads() -> None:
    """One user whose work hangs leaves the others alone, however much it has to do."""
    queues, gate, done = UserQueues(per_user=2, total=8), threading.Event(), threading.Event()

    def hang() -> None:
        gate.wait(20)

    for _ in range(20):
        queues.submit("hanging", hang)
    queues.submit("other", done.set)
    assert done.wait(5)
    gate.set()
    assert queues.wait_idle(10)


def test_hanging_up_is_noticed_in_the_middle(echo: tuple[Path, Echo]) -> None:
    path, handler = echo
    sock = connect(path)
    sock.sendall(b"wait\n")
    sock.close()
    handler.gate.set()
    deadline = threading.Event()
    for _ in range(200):
        if handler.left:
            break
        deadline.wait(0.05)
    assert handler.left == [os.getpid()]


# --- the client ---


def test_no_controller(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="no controller runs"):
        PublicClient(tmp_path / "none.sock")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may connect anywhere")
def test_a_socket_of_others(tmp_path: Path) -> None:
    path = tmp_path / "sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        path.chmod(0)
        with pytest.raises(PrivilegeError, match="may not talk"):
            PublicClient(path)


def test_a_controller_that_hangs_up(tmp_path: Path) -> None:
    path = tmp_path / "sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            for answer in (b"", b"not json\n"):
                connection, _ = listener.accept()
                connection.recv(100)
                connection.sendall(answer)
                connection.close()

        thread = threading.Thread(target=serve)
        thread.start()
        for _ in range(2):
            with (
                PublicClient(path) as client,
                pytest.raises(PagecacheError, match="does not answer"),
            ):
                client.hello()
        thread.join()
