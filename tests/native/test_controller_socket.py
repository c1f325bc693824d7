# SPDX-License-Identifier: Apache-2.0
"""The public socket under attack: other users, hostile bytes, many clients and slow ones."""

from __future__ import annotations

import array
import json
import os
import random
import resource
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cachestat import PAGE_SIZE, drop, resident_pages
from pagecache_bpf.errors import PagecacheError, PrivilegeError, UnsupportedError, UsageError
from pagecache_bpf.ipc import public_protocol
from pagecache_bpf.ipc.public_client import PublicClient
from pagecache_bpf.policy.agent_device import AgentDevice
from tests.native.controller import NOBODY, OTHER, Controller, as_user, serving
from tests.vm.kernel import make_file, wait_for

pytestmark = pytest.mark.native

ROOT = Path(__file__).resolve().parents[2]
PAGES = 211
AGENT = '[loads]\nengine = "agent"\npolicies = ["sequential"]\n'


@pytest.fixture
def controller(place: Path) -> Iterator[Controller]:
    with serving(place / "run", AGENT) as found:
        yield found
        with found.client() as client:  # whatever has happened: it lives, and knows no load
            assert client.hello()["pid"] == found.process.pid
            wait_for(lambda: client.status()["loads"] == [], "the loads to end")


@pytest.fixture
def file(place: Path) -> Path:
    """A file that only root may read."""
    path = make_file(place / "secret.safetensors", PAGES)
    path.chmod(0o600)
    return path


def ask(sock: socket.socket, fds: list[int] | None = None, **request: Any) -> dict[str, Any]:
    """A request by hand."""
    line = json.dumps({"v": 1, **request}).encode() + b"\n"
    socket.send_fds(sock, [line], fds or [])
    data = b""
    while not data.endswith(b"\n"):
        piece = sock.recv(1 << 16)
        assert piece, "it hung up"
        data += piece
    return dict(json.loads(data))


def connected(sock: socket.socket) -> bool:
    """Whether the controller has not hung up; nothing is on its way."""
    sock.setblocking(False)
    try:
        return bool(sock.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return True
    except OSError:
        return False


def raw(controller: Controller) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(30)
    sock.connect(str(controller.socket))
    return sock


# --- who may ---


def test_a_user_who_may_not_connect(controller: Controller) -> None:
    controller.socket.chmod(0o660)

    def connect() -> None:
        PublicClient(controller.socket)

    with pytest.raises(PrivilegeError, match="may not talk"):
        as_user(NOBODY, connect)
    os.chown(controller.socket, 0, NOBODY)  # in the group it may
    as_user(NOBODY, connect)


def test_the_root_socket_is_roots(controller: Controller) -> None:
    path = controller.directory / "agent.sock"

    def attack() -> str:
        with AgentDevice(path) as agent:
            try:
                agent.detach("sequential")
            except PagecacheError as error:
                return f"{type(error).__name__}: {error}"
        return "done"

    with pytest.raises(PagecacheError, match="Permission denied"):
        as_user(NOBODY, attack)
    path.chmod(0o666)  # and if it were open, its user would still be seen
    assert as_user(NOBODY, attack).startswith("PrivilegeError: only root")


def test_without_a_descriptor_nothing_is_known(controller: Controller, file: Path) -> None:
    """No operation takes a path; nobody can open the file, so nobody can ask about it."""

    def attack() -> list[str]:
        answers = []
        with raw(controller) as sock:
            for operation in ("files", "residency", "drop", "prefetch"):
                answer = ask(sock, op=operation, path=str(file))
                answers.append(answer["error"]["class"])
            answers.append(ask(sock, op="residency")["error"]["class"])
            answers.append(ask(sock, op="open_load", model="m")["error"]["class"])
        return answers

    assert as_user(NOBODY, attack) == ["UsageError"] * 6


def unconnected(_: Path) -> int:
    return socket.socket(socket.AF_UNIX).detach()


OPENERS: dict[str, tuple[type[PagecacheError], Callable[[Path], int]]] = {
    "O_PATH": (PrivilegeError, lambda path: os.open(path, os.O_PATH)),
    "write-only": (PrivilegeError, lambda path: os.open(path, os.O_WRONLY)),
    "directory": (UsageError, lambda path: os.open(path.parent, os.O_RDONLY)),
    "device": (UsageError, lambda path: os.open("/dev/zero", os.O_RDONLY)),
    "pipe": (UsageError, lambda path: os.pipe()[0]),
    "socket": (UsageError, unconnected),
}


@pytest.mark.parametrize("what", OPENERS)
def test_a_descriptor_that_proves_nothing(controller: Controller, file: Path, what: str) -> None:
    kind, opener = OPENERS[what]
    fd = opener(file)
    with controller.client() as client:
        calls: list[Callable[[], object]] = [
            lambda: client.residency(fd),
            lambda: client.drop(fd),
            lambda: client.prefetch(fd, [(0, PAGE_SIZE)]),
            lambda: client.open_load([fd], model="m"),
        ]
        for call in calls:
            with pytest.raises(kind):
                call()
    os.close(fd)


def test_what_looks_like_a_file_and_is_none(controller: Controller) -> None:
    cases: tuple[tuple[int, type[PagecacheError], str], ...] = (
        # A regular file, as stat() says, which has no pages.
        (
            os.open("/proc/self/mem", os.O_RDONLY),
            UnsupportedError,
            "kept in the page cache",
        ),
        (os.pidfd_open(os.getpid()), UsageError, "not of a regular file"),
    )
    for fd, refusal, way_out in cases:
        with controller.client() as client, pytest.raises(refusal, match=way_out):
            client.open_load([fd], model="m")
        os.close(fd)


def test_an_o_path_descriptor_of_what_one_cannot_open(controller: Controller, file: Path) -> None:
    """Whoever may look into a directory gets O_PATH descriptors of everything in it."""

    def attack() -> str:
        fd = os.open(file, os.O_PATH)
        with PublicClient(controller.socket) as client:
            try:
                return str(client.residency(fd))
            except PagecacheError as error:
                return f"{type(error).__name__}: {error.why}"

    assert as_user(NOBODY, attack).startswith("PrivilegeError: it is an O_PATH one")


def test_the_load_of_somebody_else(controller: Controller, file: Path) -> None:
    """Its id helps nobody: not another user, not another connection of the same one."""
    file.read_bytes()
    with controller.client() as owner:
        fd = os.open(file, os.O_RDONLY)
        name = owner.open_load([fd], model="theirs")["load"]

        def attack() -> list[str]:
            found = []
            with PublicClient(controller.socket) as client:
                for call in (client.load_report, client.done, client.close):
                    try:
                        call(name)
                        found.append("done")
                    except PagecacheError as error:
                        found.append(type(error).__name__)
                found += [load["model"] for load in client.status()["loads"]]
            return found

        for uid in (NOBODY, OTHER, 0):
            expected = ["PrivilegeError"] * 3 + (["theirs"] if uid == 0 else [])
            assert as_user(uid, attack) == expected
        assert owner.load_report(name)["state"] == "open"
        assert resident_pages(file) == PAGES
        os.close(fd)


def test_a_readable_file_of_a_load_is_not_dropped_by_others(
    controller: Controller, file: Path
) -> None:
    file.chmod(0o644)
    file.read_bytes()
    with controller.client() as owner:
        fd = os.open(file, os.O_RDONLY)
        owner.open_load([fd], model="theirs")

        def other() -> Any:
            mine = os.open(file, os.O_RDONLY)
            with PublicClient(controller.socket) as client:
                return client.drop(mine), client.open_load([mine], model="theirs")["model"]

        dropped, model = as_user(NOBODY, other)
        assert dropped == {"dropped_bytes": 0, "in_use": True}
        assert model == f"theirs@{NOBODY}"  # counters of two users are not mixed
        os.close(fd)
    assert resident_pages(file) == PAGES


def test_a_template_tells_nothing_of_other_files(controller: Controller, file: Path) -> None:
    """One that names a file of root's is compared with the caller's own files only."""
    mine = make_file(file.with_name("mine.safetensors"), 7)
    mine.chmod(0o644)
    size = file.stat().st_size
    text = (
        "pagecache-bpf template 1\nsource: derived\nloader: x\ntp: 1\n"
        f'file: {size} 0 8 {"0" * 64} "{file}"\nconsumer: "rank 0"\nextents: 0\nend\n'
    )

    def attack() -> str:
        fd = os.open(mine, os.O_RDONLY)
        with PublicClient(controller.socket) as client:
            report = client.open_load([fd], model="m", template=text)
            return str(report["template_why"])

    why = as_user(NOBODY, attack)
    assert why and "Permission" not in why and "its header is another" not in why


def test_a_file_system_that_a_user_has_mounted(controller: Controller, place: Path) -> None:
    """It could be made to hang, and the controller's threads with it: refused unasked."""
    work = place / "mounts"
    work.mkdir()
    os.chown(work, NOBODY, NOBODY)
    script = (
        "mkdir lower upper work merged && echo x >lower/file && "
        "mount -t overlay -o lowerdir=lower,upperdir=upper,workdir=work none merged && "
        "echo ready && exec sleep 60"
    )
    command = [
        *("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"),
        *("unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script),
    ]
    with subprocess.Popen(command, cwd=work, stdout=subprocess.PIPE, text=True) as mounter:
        assert mounter.stdout is not None
        if mounter.stdout.readline() != "ready\n":
            pytest.skip("no overlay in a user namespace here")
        fd = os.open(f"/proc/{mounter.pid}/root{work}/merged/file", os.O_RDONLY)

        def attack() -> str:
            with PublicClient(controller.socket) as client:
                try:
                    return str(client.residency(fd))
                except PagecacheError as error:
                    return error.why

        told = as_user(NOBODY, attack)
        os.close(fd)
        mounter.kill()
    assert "that a user has mounted" in told


# --- hostile bytes and crowds ---


def hostile_lines(chooser: random.Random) -> Iterator[bytes]:
    """10,000 messages: noise, damaged requests, and requests with members of wrong kinds."""
    good = [
        {"v": 1, "op": name, **{key: "1" for key in operation.arguments}}
        for name, operation in public_protocol.OPERATIONS.items()
    ]
    values: list[Any] = [None, -1, 1 << 70, 1e308, "", "\0", [], {}, [[0, -1]], True, "x" * 9999]
    for number in range(10_000):
        kind = number % 4
        if kind == 0:
            yield chooser.randbytes(chooser.randrange(1, 300)).replace(b"\n", b"") + b"\n"
        elif kind == 1:
            line = bytearray(json.dumps(chooser.choice(good)).encode())
            for _ in range(chooser.randrange(1, 6)):
                line[chooser.randrange(len(line))] = chooser.randrange(256)
            yield bytes(line).replace(b"\n", b" ") + b"\n"
        elif kind == 2:
            request = dict(chooser.choice(good))
            for key in list(request):
                if chooser.random() < 0.3:
                    request[key] = chooser.choice(values)
            yield json.dumps(request).encode() + b"\n"
        else:
            yield b"[" * chooser.randrange(1, 2000) + b"\n"


def test_ten_thousand_random_messages(controller: Controller) -> None:
    before, lines = controller.descriptors(), 0
    chooser = random.Random(20)
    sock = raw(controller)
    for line in hostile_lines(chooser):
        fds = [0] * chooser.randrange(0, 4)
        try:
            socket.send_fds(sock, [line], fds)
            data = b""
            while not data.endswith(b"\n"):
                piece = sock.recv(1 << 16)
                if not piece:
                    raise OSError("it hung up")
                data += piece
            answer = json.loads(data)
            assert "error" in answer or "ok" in answer
            lines += 1
        except OSError:  # it may hang up on such a client; the next one is served
            sock.close()
            sock = raw(controller)
    sock.close()
    assert lines > 9_000
    wait_for(lambda: controller.descriptors() <= before + 2, "the descriptors to be closed")


def test_descriptors_do_not_pile_up(controller: Controller, file: Path) -> None:
    """Those of refused requests, of half lines and of clients that go in the middle."""
    before = controller.descriptors()
    fd = os.open(file, os.O_RDONLY)
    for number in range(50):
        with raw(controller) as sock:
            rights = array.array("i", [fd] * (64 if number % 2 else 200))
            level = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)]
            sock.sendmsg([b'{"v": 1, "op": "files"}' + b"\n" * (number % 3)], level)
    wait_for(lambda: controller.descriptors() <= before + 2, "the descriptors to be closed")
    with controller.client() as client, pytest.raises(PagecacheError, match="at most 4096 files"):
        for _ in range(public_protocol.FILES_PER_LOAD // 64 + 1):
            client.request("files", [fd] * 64)
    wait_for(lambda: controller.descriptors() <= before + 2, "the descriptors to be closed")
    os.close(fd)


def test_two_hundred_clients_at_once(controller: Controller, file: Path) -> None:
    barrier = threading.Barrier(200)
    found: list[Any] = []

    def one() -> None:
        fd = os.open(file, os.O_RDONLY)
        try:
            with controller.client() as client:
                barrier.wait(60)  # all are connected
                size = client.residency(fd)["bytes"]
                report = client.open_load([fd], model="m")
                barrier.wait(60)  # all have a load
                found.append((size, report["policy"], client.close(report["load"])["state"]))
        except BaseException as error:
            found.append(error)
            barrier.abort()
        finally:
            os.close(fd)

    threads = [threading.Thread(target=one) for _ in range(200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert found == [(PAGES * PAGE_SIZE, "sequential", "done")] * 200
    with controller.root() as root:
        assert list(root.tags()) == []


def test_a_user_cannot_take_all_connections(controller: Controller) -> None:
    def hoard() -> tuple[int, str]:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
        held: list[socket.socket] = []
        for _ in range(700):
            sock = raw(controller)
            try:
                if "error" in ask(sock, op="hello"):
                    break
            except (AssertionError, OSError):
                break
            held.append(sock)
            if len(held) > 600:
                break
        with socket.socket(socket.AF_UNIX) as last:
            last.settimeout(20)
            last.connect(str(controller.socket))
            told = last.recv(4096).decode()
        return sum(map(connected, held)), told

    held, told = as_user(NOBODY, hoard)
    # The bound is for those at a time: one that has been hung up on is nobody's any more.
    assert 256 < held <= 512 and "does not take more connections" in told
    with controller.client() as client:
        client.hello()


def test_slow_clients_hold_up_nobody(controller: Controller, file: Path) -> None:
    """Half lines, answers that nobody takes, and one byte at a time."""
    slow = [raw(controller) for _ in range(60)]
    for number, sock in enumerate(slow):
        sock.sendall(b'{"v": 1, "op": "he' if number % 2 else b'{"v": 1, "op": "hello"}\n')
    drip = raw(controller)
    fd = os.open(file, os.O_RDONLY)
    drop([file])
    with controller.client() as client:
        for byte in b'{"v": 1, "op": "hello"}\n':
            drip.sendall(bytes([byte]))
            begin = time.monotonic()
            assert client.residency(fd)["resident_bytes"] == 0
            assert time.monotonic() - begin < 5
    assert b'"ok"' in drip.recv(1 << 16)
    for sock in (*slow, drip):
        sock.close()
    os.close(fd)


def test_a_line_that_never_ends_is_ended(controller: Controller) -> None:
    with raw(controller) as sock:
        sock.settimeout(30)
        sock.sendall(b'{"v": 1,')
        begin = time.monotonic()
        data = b""
        while piece := sock.recv(4096):
            data += piece
        assert b"did not end within" in data and time.monotonic() - begin < 25
