# SPDX-License-Identifier: Apache-2.0
"""What the controller's tests share: one that runs, and things done as another user."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pagecache_bpf.ipc.public_client import PublicClient
from pagecache_bpf.policy.agent_device import AgentDevice
from tests.unit.command import COMMAND, ROOT, Result, environment, run
from tests.vm.kernel import wait_for

T = TypeVar("T")
NOBODY, OTHER = 65534, 65533
AGENT = '[loads]\nengine = "agent"\npolicies = ["sequential", "noop"]\n'


@dataclass
class Controller:
    """A `pagecache-bpf serve` with a run directory of its own."""

    process: subprocess.Popen[str]
    ready: dict[str, Any]
    directory: Path
    is_warm: bool = False

    @property
    def socket(self) -> Path:
        return Path(self.ready["listen"])

    def client(self) -> PublicClient:
        return PublicClient(self.socket)

    def root(self) -> AgentDevice:
        return AgentDevice(self.directory / "agent.sock")

    def run(self, *words: str | Path) -> Result:
        """A command that meets this controller and no other."""
        return run(*words, env={"PAGECACHE_BPF_RUN_DIR": str(self.directory)})

    def await_warm(self) -> None:
        """Wait until what the first load takes is loaded, which takes descriptors, too."""

        def idle() -> bool:
            with self.root() as root:
                health = root.request("clients")["health"]
            return int(health["requests_waiting"]) == 0 and int(health["requests_running"]) <= 1

        if not self.is_warm:
            wait_for(idle, "the controller to be warm", 60)
            self.is_warm = True

    def descriptors(self) -> int:
        """How many the controller has open."""
        self.await_warm()
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def stop(self) -> int:
        """End it cleanly; its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(20)


def start(
    directory: Path, config: str = "", *words: str, command: Sequence[str] = COMMAND, **env: str
) -> subprocess.Popen[str]:
    """Start `serve`; it may fail."""
    directory.mkdir(mode=0o755, parents=True, exist_ok=True)
    file = directory / "config.toml"
    text = config if "[socket]" in config else f'{config}\n[socket]\nmode = "0666"\n'
    if "listen" not in text:
        text = text.replace("[socket]", f'[socket]\nlisten = "{directory}/control.sock"')
    file.write_text(text)
    return subprocess.Popen(
        [*command, "serve", "--json", "--config", str(file), *words],
        stdout=subprocess.PIPE,
        stderr=(directory / "stderr").open("a"),
        text=True,
        cwd=ROOT,
        env=environment(PAGECACHE_BPF_RUN_DIR=str(directory), **env),
    )


@contextmanager
def serving(
    directory: Path, config: str = "", *words: str, command: Sequence[str] = COMMAND, **env: str
) -> Iterator[Controller]:
    """A controller that answers; it has to end cleanly unless the test has killed it."""
    process = start(directory, config, *words, command=command, **env)
    assert process.stdout is not None
    text = ""
    for line in process.stdout:  # its JSON, which ends with a brace at the margin
        text += line
        if line == "}\n":
            break
    assert text, (directory / "stderr").read_text()
    controller = Controller(process, json.loads(text), directory)
    try:
        yield controller
    finally:
        if process.poll() is None:
            code = controller.stop()
            assert code == 0, (directory / "stderr").read_text()
        process.stdout.close()
    said = (directory / "stderr").read_text()
    assert "Traceback" not in said, said


def as_user(uid: int, action: Callable[[], T]) -> T:
    """Do something in a process of another user's; what it returns or raises comes back."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(reader)
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            try:
                outcome: tuple[bool, Any] = (True, action())
            except BaseException as error:
                outcome = (False, error)
            try:
                data = pickle.dumps(outcome)
            except Exception:
                data = pickle.dumps((False, RuntimeError(repr(outcome[1]))))
            with os.fdopen(writer, "wb") as out:
                out.write(data)
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as back:
        data = back.read()
    os.waitpid(child, 0)
    good, value = pickle.loads(data)
    if not good:
        raise value
    result: T = value
    return result


def children_of(pid: int) -> list[int]:
    """Return the children of a process, which runs."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(OSError):
            found += map(int, (task / "children").read_text().split())
    return found


def opened(paths: list[Path]) -> list[int]:
    return [os.open(path, os.O_RDONLY) for path in paths]


def load(client: PublicClient, paths: list[Path], **arguments: Any) -> dict[str, Any]:
    """Open a load of these files."""
    fds = opened(paths)
    try:
        return client.open_load(fds, **{"model": "m", **arguments})
    finally:
        for fd in fds:
            os.close(fd)


def tagged(controller: Controller) -> list[tuple[str, str]]:
    with controller.root() as root:
        return sorted((tag.path, tag.policy) for tag in root.tags())
