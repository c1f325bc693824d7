# SPDX-License-Identifier: Apache-2.0
"""Hostile clients against the default policy: swapped files, hostile headers, crowds, lost helpers.

Each hole of the security review that needs a real controller has a test here, named after it;
the others are in tests/unit (test_file_key, test_controller_server, test_template_maps).
"""

from __future__ import annotations

import json
import os
import pty
import signal
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from pagecache_bpf.ipc.public_client import PublicClient
from tests.native.controller import NOBODY, OTHER, Controller, as_user, serving
from tests.unit.test_file_key import SWAPS
from tests.unit.weights import hole_of_strings
from tests.vm.kernel import wait_for

pytestmark = pytest.mark.native

ANSWER_SECONDS = 2.0  # root is answered within, whatever clients do


def safetensors(path: Path, tensors: int = 8, length: int = 65536) -> Path:
    """A real weight file with some tensors of zeros."""
    entries = {}
    for number in range(tensors):
        offsets = [number * length, (number + 1) * length]
        entries[f"layer.{number}"] = {"dtype": "U8", "shape": [length], "data_offsets": offsets}
    header = json.dumps(entries).encode()
    with path.open("wb") as out:
        out.write(struct.pack("<Q", len(header)) + header)
        out.write(bytes(tensors * length))
        out.flush()
        os.fsync(out.fileno())
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory that other users get to."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="pagecache-bpf-", dir="/var/tmp") as name:
        os.chmod(name, 0o755)
        yield Path(name)


@pytest.fixture(scope="module")
def controller(place: Path) -> Iterator[Controller]:
    """One that serves the default policies on engine agent, and a model of root's."""
    model = safetensors(place / "roots.safetensors")
    config = (
        f'[loads]\nengine = "agent"\n[[model]]\npath = "{model}"\nname = "roots"\npolicy = "maio"\n'
    )
    with serving(place / "run", config) as found:
        assert found.ready["failed"] == []
        yield found
        with found.client() as client:
            wait_for(lambda: client.status()["loads"] == [], "the loads to end")


@pytest.fixture
def mine(place: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A directory of the hostile user's."""
    path = place / f"of-nobody-{abs(hash(request.node.name)) % 10**8}"
    path.mkdir()
    os.chown(path, NOBODY, NOBODY)
    yield path


def root_is_answered(controller: Controller) -> None:
    """Root's socket tells of policies, tags and clients, within the time that it may take."""
    done = threading.Event()

    def ask() -> None:
        with controller.root() as root:
            assert [policy.name for policy in root.policies()]
            list(root.tags())
            root.request("clients")
        done.set()

    begin = time.monotonic()
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    # The machine may be busy: what counts is that the answer does not wait for a client.
    assert done.wait(ANSWER_SECONDS * 10), f"no answer within {time.monotonic() - begin:.0f} s"


def templates(controller: Controller) -> list[str]:
    (policy,) = [
        policy
        for policy in controller.run("status", "--json").data["policies"]
        if policy["name"] == "maio"
    ]
    return sorted(template["model"] for template in policy["templates"])


def terminal_of(pid: int) -> int:
    """The controlling terminal of a process; 0: it has none."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[4])


@pytest.mark.parametrize("swap", [name for name in SWAPS if name != "nothing"])
def test_s1_s2_s3_a_file_is_swapped_under_the_controller(
    controller: Controller, mine: Path, swap: str
) -> None:
    """Between the requests of a load; its own bytes are served, and nobody else is held up."""
    path = safetensors(mine / "w.safetensors")
    path.chmod(0o644)
    side = mine / "config.json"
    os.mkfifo(side)  # S4: what lies beside the file is not opened at all

    def attack() -> dict[str, Any]:
        fd = os.open(path, os.O_RDONLY)
        with PublicClient(controller.socket) as client:
            client.request("files", (fd,))
            path.rename(mine / "kept")
            keep = SWAPS[swap](path)
            report = client.request("open_load", model="m")
            asked = client.load_report(report["load"])
            over = client.done(report["load"])
            del keep
            return {"open": report, "report": asked, "done": over}

    os.chown(path, NOBODY, NOBODY)
    told = as_user(NOBODY, attack)
    assert told["open"]["policy"] == "maio", told
    assert (told["open"]["template"], told["open"]["template_why"]) == ("derived", "")
    assert told["report"]["bytes"] == (mine / "kept").stat().st_size
    assert told["done"]["state"] == "done"
    root_is_answered(controller)
    assert terminal_of(controller.process.pid) == 0
    assert templates(controller) == ["roots"]


def test_s2_a_terminal_cannot_interrupt_the_controller(controller: Controller, mine: Path) -> None:
    """The other end of a terminal that took a file's place sends ^C: nobody hears it."""
    path = safetensors(mine / "w.safetensors")
    os.chown(path, NOBODY, NOBODY)
    ours, theirs = pty.openpty()

    def attack() -> str:
        fd = os.open(path, os.O_RDONLY)
        with PublicClient(controller.socket) as client:
            report = client.open_load([fd], model="m")
            path.unlink()
            path.symlink_to(os.ttyname(theirs))
            client.load_report(report["load"])
            return str(client.done(report["load"])["state"])

    assert as_user(NOBODY, attack) == "done"
    os.write(ours, b"\x03")
    root_is_answered(controller)
    assert controller.process.poll() is None and terminal_of(controller.process.pid) == 0
    os.close(ours)
    os.close(theirs)


def test_s6_hostile_headers_cost_root_nothing(controller: Controller, mine: Path) -> None:
    """They are read in a process of the client's user, which ends with the client."""
    path = hole_of_strings(mine / "hole.gguf", 1 << 24)
    os.chown(path, NOBODY, NOBODY)
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        with suppress(BaseException):
            os.close(writer)
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            fds = [os.open(path, os.O_RDONLY) for _ in range(8)]
            client = PublicClient(controller.socket)
            client.request("files", fds)
            line = b'{"v": 1, "op": "open_load", "model": "m"}\n'
            client._socket.sendall(line)
            os.read(reader, 1)
        os._exit(0)
    os.close(reader)

    def inspectors() -> list[int]:
        """The processes that read files of the hostile user."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if (entry / "comm").read_text() != "pagecache-files\n":
                    continue
                status = (entry / "status").read_text()
                if f"Uid:\t{NOBODY}\t{NOBODY}\t{NOBODY}\t{NOBODY}" in status:
                    assert "CapEff:\t0000000000000000" in status
                    assert "NoNewPrivs:\t1" in status
                    found.append(int(entry.name))
        return found

    wait_for(inspectors, "a process of the client's user", 30)
    root_is_answered(controller)
    os.close(writer)  # the client goes in the middle
    os.waitpid(child, 0)
    wait_for(lambda: not inspectors(), "its process to be ended", 60)
    root_is_answered(controller)
    # Another user is served, with a template of the headers.
    other = safetensors(mine / "honest.safetensors")
    other.chmod(0o644)

    def honest() -> dict[str, Any]:
        fd = os.open(other, os.O_RDONLY)
        with PublicClient(controller.socket) as client:
            return client.open_load([fd], model="m")

    report = as_user(OTHER, honest)
    assert (report["policy"], report["template"]) == ("maio", "derived"), report


def test_s6_a_helper_that_is_lost_costs_only_the_template(
    controller: Controller, mine: Path
) -> None:
    """kill -9 in the middle, by the client itself: its load goes on without a template."""
    path = hole_of_strings(mine / "hole.gguf", 1 << 24)
    path.chmod(0o644)

    def attack() -> dict[str, Any]:
        killed = threading.Event()

        def kill() -> None:
            while not killed.is_set():
                for entry in Path("/proc").glob("[0-9]*"):
                    with suppress(OSError):
                        if (entry / "comm").read_text() == "pagecache-files\n":
                            os.kill(int(entry.name), signal.SIGKILL)
                            killed.set()
                time.sleep(0.01)

        fd = os.open(path, os.O_RDONLY)
        with PublicClient(controller.socket) as client:
            client.request("files", (fd,))
            thread = threading.Thread(target=kill)
            thread.start()
            report = client.request("open_load", model="m")
            killed.set()
            thread.join()
            return report

    report = as_user(OTHER, attack)  # who has not been refused for what an earlier test has cost
    assert report["policy"] == "maio" and report["template"] is None
    assert report["template_why"] and "too much time" not in report["template_why"]
    root_is_answered(controller)
