# SPDX-License-Identifier: Apache-2.0
"""What one hostile client does to the controller's socket: half lines, swapped files, crowds.

benchmarks/hostile_clients.py starts many of them and measures what honest clients notice.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from pagecache_bpf.errors import PagecacheError
from pagecache_bpf.ipc.public_client import PublicClient

FIRST_HOSTILE = 60000


@dataclass
class Attacker:
    """What the clients of one hostile user work with."""

    path: Path
    root: Path
    chooser: random.Random = field(default_factory=random.Random)

    def socket(self) -> socket.socket:
        """Connect, without any of the client's manners."""
        found = socket.socket(socket.AF_UNIX)
        found.settimeout(30)
        found.connect(str(self.path))
        return found

    def open(self, name: str = "w.safetensors") -> int:
        """Open a file of this user's."""
        return os.open(self.root / name, os.O_RDONLY)


def idle(attacker: Attacker) -> None:
    """Connect and say nothing."""
    with attacker.socket():
        time.sleep(attacker.chooser.uniform(0, 5))


def half_a_line(attacker: Attacker) -> None:
    """Begin a request and do not end it."""
    with attacker.socket() as sock:
        sock.sendall(b'{"v": 1, "op"')
        time.sleep(attacker.chooser.uniform(0, 5))


def noise(attacker: Attacker) -> None:
    """Send what is no request: bytes, depth, length."""
    lines = (os.urandom(900) + b"\n", b"[" * 50_000 + b"\n", b"x" * 100_000)
    with attacker.socket() as sock:
        sock.sendall(attacker.chooser.choice(lines))
        sock.recv(4096)


def no_patience(attacker: Attacker) -> None:
    """Ask again before the answer, and hang up in the middle."""
    with attacker.socket() as sock:
        sock.sendall(b'{"v": 1, "op": "topology"}\n')
        sock.sendall(b'{"v": 1, "op": "status"}\n')


def crowd_of_descriptors(attacker: Attacker) -> None:
    """Pass as many files as go and never load them."""
    fd = attacker.open()
    try:
        with PublicClient(attacker.path) as client:
            for _ in range(attacker.chooser.randrange(1, 20)):
                client.request("files", [fd] * 64)
    finally:
        os.close(fd)


def hostile_header(attacker: Attacker) -> None:
    """Have a header read that is an array in a hole, and hang up soon."""
    fd = attacker.open("hole.gguf")
    try:
        with PublicClient(attacker.path) as client:
            client.request("files", [fd] * 8)
            client._socket.sendall(b'{"v": 1, "op": "open_load", "model": "honest"}\n')
            time.sleep(attacker.chooser.uniform(0, 3))
    finally:
        os.close(fd)


def swapped(attacker: Attacker) -> None:
    """Put a FIFO in the place of a file whose load is open, and load root's name."""
    name = f"swap-{attacker.chooser.randrange(10**9)}"
    path = attacker.root / name
    os.link(attacker.root / "w.safetensors", path)
    fd = os.open(path, os.O_RDONLY)
    try:
        with PublicClient(attacker.path) as client:
            report = client.open_load([fd], model="honest")
            path.unlink()
            os.mkfifo(path)
            client.load_report(report["load"])
            client.done(report["load"])
    finally:
        os.close(fd)
        path.unlink()


def load_and_vanish(attacker: Attacker) -> None:
    """Open a load with a template of nonsense, begin to read, and hang up."""
    fd = attacker.open()
    try:
        with PublicClient(attacker.path) as client:
            client.open_load([fd], model="m", template=os.urandom(2000), wait=1)
            os.pread(fd, 4096, 0)
    finally:
        os.close(fd)


def prefetch(attacker: Attacker) -> None:
    """Have far more read than there is time for, and hang up."""
    fd = attacker.open("large")
    try:
        with PublicClient(attacker.path) as client:
            client.prefetch(fd, [(0, 1 << 40)] * attacker.chooser.randrange(1, 50))
            client.drop(fd)
    finally:
        os.close(fd)


def questions(attacker: Attacker) -> None:
    """Ask what costs the controller most, as fast as it answers."""
    fd = attacker.open()
    try:
        with PublicClient(attacker.path) as client:
            for _ in range(20):
                client.topology()
                client.status()
                client.residency(fd)
    finally:
        os.close(fd)


ACTS: tuple[Callable[[Attacker], None], ...] = (
    *(idle, half_a_line, noise, no_patience, crowd_of_descriptors),
    *(hostile_header, swapped, load_and_vanish, prefetch, questions),
)


def hostile_files(root: Path) -> None:
    """Make what the attackers of one user pass: they have 320 MiB of cache to lose together."""
    entries = {
        f"w{number}": {
            "dtype": "U8",
            "shape": [65536],
            "data_offsets": [number << 16, number + 1 << 16],
        }
        for number in range(64)
    }
    header = json.dumps(entries).encode()
    (root / "w.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(64 << 16))
    count = 1 << 24
    with (root / "hole.gguf").open("wb") as out:
        out.write(b"GGUF" + struct.pack("<IQQ", 3, 1, 1))
        out.write(struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, 8, count))
        out.truncate(out.tell() + 8 * count + (1 << 20))
    with (root / "large").open("wb") as out:
        out.truncate(64 << 20)


def attack(path: Path, root: Path, clients: int, pause: float) -> None:
    """Be that many clients of this process's user, until killed.

    Args:
        path: the controller's socket.
        root: a directory of the user's.
        clients: how many there are at a time.
        pause: seconds between two acts of one, on average.
    """
    parent = os.getppid()
    hostile_files(root)

    def act(number: int) -> None:
        attacker = Attacker(path, root, random.Random(number))
        time.sleep(attacker.chooser.uniform(0, pause))
        while True:
            with suppress(OSError, PagecacheError):
                attacker.chooser.choice(ACTS)(attacker)
            time.sleep(attacker.chooser.expovariate(1 / pause))

    for number in range(clients):
        threading.Thread(target=act, args=(number,), daemon=True).start()
    while os.getppid() == parent:  # whoever started it may be killed
        time.sleep(0.5)


@contextmanager
def confined(wanted: bool) -> Iterator[Path | None]:
    """Make a cgroup whose processes run only where a CPU has nothing else to do.

    Args:
        wanted: False: there is none.

    Returns:
        As a context manager: the file that takes its processes; None: there is none.

    Raises:
        PagecacheError: the kernel has no such cgroups, or none may be made.
    """
    if not wanted:
        yield None
        return
    for parent in (Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup")):  # version 1, version 2
        group = parent / "hostile-clients"
        with suppress(OSError):
            group.mkdir(exist_ok=True)
            (group / "cpu.idle").write_text("1")
            break
        with suppress(OSError):
            group.rmdir()
    else:
        raise PagecacheError("the clients cannot be confined", "no cgroup has the file cpu.idle")
    try:
        yield group / "cgroup.procs"
    finally:
        with suppress(OSError):
            group.rmdir()


@contextmanager
def attacked(
    path: Path, root: Path, clients: int, users: int, pause: float, group: Path | None = None
) -> Iterator[list[int]]:
    """Have hostile clients in the block; all of them are killed at its end.

    Args:
        path: the controller's socket.
        root: a directory for theirs.
        clients: how many there are.
        users: that they belong to.
        pause: seconds between two acts of one, on average.
        group: takes their processes (confined); None: they stay where this one is.

    Returns:
        As a context manager: their processes.
    """
    children = []
    for number in range(users):
        uid = FIRST_HOSTILE + number
        home = root / str(uid)
        home.mkdir(exist_ok=True)
        os.chown(home, uid, uid)
        child = os.fork()
        if not child:
            try:
                os.nice(19)  # the machine's CPUs are not the controller's to defend
                if group is not None:
                    group.write_text(str(os.getpid()))
                os.setgroups([])
                os.setresgid(uid, uid, uid)
                os.setresuid(uid, uid, uid)
                attack(path, home, clients // users, pause)
            finally:
                os._exit(1)
        children.append(child)
    try:
        yield children
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
        for child in children:
            os.waitpid(child, 0)


@contextmanager
def idle_loops(count: int) -> Iterator[None]:
    """Have processes that do nothing but take what nobody else wants of the CPUs in the block.

    Args:
        count: how many.
    """
    children = []
    for _ in range(count):
        child = os.fork()
        if not child:
            parent = os.getppid()
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
            while os.getppid() == parent:
                pass
            os._exit(0)
        children.append(child)
    try:
        yield
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
