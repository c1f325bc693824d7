# SPDX-License-Identifier: Apache-2.0
"""Kills each process at each step of a load through the controller; as root:

    python -m tests.controller_crashes

A load goes through STEPS; before each of them one of PROCESSES is killed with SIGKILL: the client,
the process that reads its headers (inspector), one that reads ahead (worker), or the controller,
which is the agent, too.  And the controller is killed in the middle of a request, at each call of
INSIDE.  Each time it is looked at whether something is left of the load, and whether a load of
another user, or of the next controller, is served and reads the right bytes.  Engine agent: the
module is not needed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pagecache_bpf.errors import PagecacheError
from pagecache_bpf.ipc import wire
from pagecache_bpf.ipc.public_client import PublicClient
from tests.native.controller import (
    NOBODY,
    OTHER,
    Controller,
    as_user,
    children_of,
    serving,
    tagged,
)
from tests.vm.kernel import wait_for

STEPS = (
    *("connect", "hello", "files", "ask", "answer"),
    *("first read", "middle", "done", "close"),
)
PROCESSES = ("client", "inspector", "worker", "controller")
#: What the controller is killed at the call of, in the order in which a load comes there.
INSIDE = (
    *("LoadLedger.admit", "LoadLedger.place", "EngineControl.ensure", "EngineControl.tag"),
    *("EngineControl.locate", "NodeHints.give", "LoadTemplates.prepare", "Inspectors.run"),
    *("LoadTemplates.give", "LoadLedger.report", "LoadLedger.end", "EngineControl.untag"),
    *("LoadTemplates.forget", "EngineControl.settle"),
)
_INSIDE_MODULES = tuple(
    f"pagecache_bpf.controller.{name}"
    for name in ("load_ledger", "engine_control", "node_hints", "load_templates", "inspectors")
)
_CHILDREN = "children.json"
CONFIG = '[loads]\nengine = "agent"\npolicies = ["maio"]\n'
#: Names that processes give themselves.
_NAMES = {"inspector": "pagecache-files", "worker": "pagecache-read"}
_CHUNK = 1 << 20
DEVICE = {"name": "cuda:0", "node": 0}
#: `serve`, which kills itself when it comes to the call that the first argument names.
_DYING = "import sys; from tests.controller_crashes import dying; sys.exit(dying(sys.argv.pop(1)))"


class Asked:
    """A request whose answer is taken later: meanwhile a process may be killed."""

    def __init__(self, client: PublicClient, operation: str, **arguments: Any) -> None:
        self._client = client
        client._send(wire.encode({"op": operation, **arguments}), ())

    def answer(self) -> dict[str, Any]:
        return wire.decode_answer(self._client._line())


@dataclass
class Steps:
    """A load, one step after the other."""

    path: Path
    file: Path
    client: PublicClient = field(init=False)
    asked: Asked = field(init=False)
    report: dict[str, Any] = field(init=False)
    fd: int = -1

    def take(self, step: str) -> None:
        """Take a step."""
        if step == "connect":
            self.fd = os.open(self.file, os.O_RDONLY)
            self.client = PublicClient(self.path)
        elif step == "hello":
            self.client.hello()
        elif step == "files":
            self.client.request("files", (self.fd,))
        elif step == "ask":
            self.asked = Asked(self.client, "open_load", model="m", devices=[DEVICE])
        elif step == "answer":
            self.report = self.asked.answer()
        elif step == "first read":
            os.pread(self.fd, 4096, 0)
        elif step == "middle":
            read(self.fd)
        elif step == "done":
            self.client.done(self.report["load"])
        else:
            self.client.disconnect()


def content(number: int) -> bytes:
    """Return what a chunk of the weights holds."""
    return number.to_bytes(4, "little") * (_CHUNK // 4)


def make_weights(path: Path, chunks: int = 8) -> None:
    """Write a safetensors file whose bytes can be told from others'."""
    header = json.dumps(
        {"w": {"dtype": "U8", "shape": [chunks * _CHUNK], "data_offsets": [0, chunks * _CHUNK]}}
    ).encode()
    header += b" " * (4096 - 8 - len(header))
    with path.open("wb") as out:
        out.write(len(header).to_bytes(8, "little") + header)
        for number in range(chunks):
            out.write(content(number))
        os.fsync(out.fileno())
    path.chmod(0o644)


def read(fd: int) -> None:
    """Read the weights and check every byte.  Raises AssertionError."""
    at = 4096
    while data := os.pread(fd, _CHUNK, at):
        assert data == content((at - 4096) // _CHUNK), f"wrong bytes at {at}"
        at += _CHUNK


def whole_load(path: Path, file: Path) -> dict[str, Any]:
    """Load the file through the controller, check every byte, and return what was told."""
    steps = Steps(path, file)
    for step in STEPS:
        steps.take(step)
    os.close(steps.fd)
    return steps.report


@contextmanager
def client_before(step: str, path: Path, file: Path) -> Iterator[tuple[int, Callable[[], int]]]:
    """A client that has come up to a step, and goes on when it is told.

    Yields:
        Its process, and what has it go on and returns its exit code.
    """
    told, ready = os.pipe()
    wait, go = os.pipe()
    child = os.fork()
    if not child:
        code = 2
        with suppress(BaseException):
            os.close(go)
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            steps = Steps(path, file)
            code = 0
            for taken in STEPS:
                if taken == step:
                    os.write(ready, b".")
                    os.read(wait, 1)
                try:
                    steps.take(taken)
                except (PagecacheError, OSError, AttributeError):
                    code = 1  # a clear end: the controller is gone
                    break
                except BaseException:
                    code = 2
                    break
        os._exit(code)
    os.close(ready)
    os.close(wait)
    over = False

    def finish() -> int:
        nonlocal over
        os.close(go)
        _, status = os.waitpid(child, 0)
        over = True
        return os.waitstatus_to_exitcode(status)

    try:
        assert os.read(told, 1), "the client did not come so far"
        yield child, finish
    finally:
        os.close(told)
        if not over:
            with suppress(OSError):
                os.kill(child, signal.SIGKILL)
            finish()


def children_named(pid: int, name: str) -> list[int]:
    """Return the children of a process that have that name."""
    found = []
    for child in children_of(pid):
        with suppress(OSError):
            if Path(f"/proc/{child}/comm").read_text().strip() == name:
                found.append(child)
    return found


def dying(call: str) -> int:
    """Run the command line of this process, and end it with SIGKILL at a call.

    Args:
        call: one of INSIDE.  Its children are written down before, in a file of the run directory.

    Returns:
        The exit code of the command.
    """
    from pagecache_bpf.__main__ import main as run

    owner, name = call.split(".")
    method: object = None
    for module in _INSIDE_MODULES:
        kind = getattr(importlib.import_module(module), owner, None)
        if kind is not None:
            method = getattr(kind, name)
            break
    assert callable(method), f"there is no {call}"

    def die(*_: Any, **__: Any) -> None:
        children = Path(os.environ["PAGECACHE_BPF_RUN_DIR"]) / _CHILDREN
        children.write_text(json.dumps(children_of(os.getpid())))
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(kind, name, die)
    return run()


def kill(controller: Controller, process: str, client: int) -> None:
    """Kill one of the processes."""
    if process in _NAMES:
        for pid in children_named(controller.process.pid, _NAMES[process]):
            os.kill(pid, signal.SIGKILL)
    else:
        os.kill(client if process == "client" else controller.process.pid, signal.SIGKILL)


def nothing_left(controller: Controller) -> bool:
    """Return whether neither a load nor a tag nor a connection of a client is left."""
    with controller.root() as root:
        clients = root.request("clients")["clients"]
    with controller.client() as client:
        loads = client.status()["loads"]
    public = [found for found in clients if found["socket"] == "public"]
    return not loads and not public and not tagged(controller)


def crash(directory: Path, controller: Controller, process: str, step: str) -> None:
    """Kill a process before a step of a load.  Raises AssertionError for what is left or wrong.

    Args:
        directory: holds the weights, which anybody may read.
        controller: is ended if that is the process.
        process: one of PROCESSES.
        step: one of STEPS.
    """
    file = directory / "w.safetensors"
    with client_before(step, controller.socket, file) as (client, finish):
        helpers = children_of(controller.process.pid)
        kill(controller, process, client)
        if process == "controller":
            controller.process.wait(60)
        # Somebody else meanwhile.
        if process != "controller":
            report = as_user(OTHER, lambda: whole_load(controller.socket, file))
            assert report["policy"] == "maio", report
        code = finish()
    expected = {"client": (-signal.SIGKILL,), "controller": (0, 1)}.get(process, (0,))
    assert code in expected, f"the client has ended with {code}"
    if process == "controller":
        after_controller(controller.directory, file, helpers)
    else:
        wait_for(lambda: nothing_left(controller), f"what {process} has left to go", 60)


def crash_inside(directory: Path, run_directory: Path, call: str) -> None:
    """Have the controller killed in the middle of a request.

    Args:
        directory: holds the weights, which anybody may read.
        run_directory: for the controller.
        call: one of INSIDE.

    Raises:
        AssertionError: something is left or wrong, or the load did not come to the call.
    """
    file = directory / "w.safetensors"
    command = (sys.executable, "-c", _DYING, call)
    with serving(run_directory, CONFIG, command=command) as controller:
        with client_before("connect", controller.socket, file) as (_, finish):
            code = finish()
        assert controller.process.wait(60) == -signal.SIGKILL, f"no load has come to {call}"
    assert code in (0, 1), f"the client has ended with {code}"
    helpers = json.loads((run_directory / _CHILDREN).read_text())
    assert helpers
    after_controller(run_directory, file, helpers)


def after_controller(run_directory: Path, file: Path, helpers: Sequence[int]) -> None:
    """Look at what a controller has left that was killed.  Raises AssertionError.

    Args:
        run_directory: was its.
        file: the weights.
        helpers: its children.
    """
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in helpers), "its helpers", 60)
    before = {path.name for path in run_directory.iterdir()}
    with serving(run_directory, CONFIG) as fresh:
        assert nothing_left(fresh), before
        report = as_user(OTHER, lambda: whole_load(fresh.socket, file))
        assert report["policy"] == "maio", report


def main(argv: Sequence[str] | None = None) -> int:
    """Run the matrix and print it; 1 if something was left."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.controller_crashes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.parse_args(argv)
    wrong = 0
    print(f"| killed | {' | '.join(STEPS)} |\n|{' --- |' * (len(STEPS) + 1)}")
    with tempfile.TemporaryDirectory(prefix="controller-crashes-", dir="/var/tmp") as name:
        directory = Path(name)
        directory.chmod(0o755)
        make_weights(directory / "w.safetensors")
        for process in PROCESSES:
            cells = []
            for number, step in enumerate(STEPS):
                begun = time.monotonic()
                try:
                    with serving(directory / f"{process}-{number}", CONFIG) as controller:
                        crash(directory, controller, process, step)
                    cells.append(f"right ({time.monotonic() - begun:.1f} s)")
                except (AssertionError, OSError, PagecacheError) as error:
                    wrong += 1
                    cells.append(f"WRONG: {error}")
            print(f"| {process} | {' | '.join(cells)} |", flush=True)
        print("\n| the controller is killed at | |\n| --- | --- |")
        for call in INSIDE:
            begun = time.monotonic()
            try:
                crash_inside(directory, directory / call, call)
                cell = f"right ({time.monotonic() - begun:.1f} s)"
            except (AssertionError, OSError, PagecacheError) as error:
                wrong += 1
                cell = f"WRONG: {error}"
            print(f"| {call} | {cell} |", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
