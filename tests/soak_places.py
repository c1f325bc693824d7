# SPDX-License-Identifier: Apache-2.0
"""The places of the soak: a run directory, two models, and what is done there at random."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType

from pagecache_bpf.kernel import cgroups
from pagecache_bpf.policy.agent_device import AgentDevice
from tests import soak_figures, soak_files
from tests.unit.command import COMMAND, ROOT, environment

SHARDS = 4
SHARD_BYTES = 6 << 20
MODELS = ("one", "two")
#: Not sequential: the controller attaches that for loads.
POLICIES = ("fifo", "s3fifo", "mru", "pin", "cyclic", "colocate", "multiplex")
#: What keeps the agent from ending, and what the controller has attached for loads.
KEPT = ("noop", "sequential")
CGROUP_LIMIT = 32 << 20
COMMAND_SECONDS = 60
#: A cgroup that cannot be removed so long after its last reader has ended is told.
RMDIR_SECONDS = 10.0
#: Workers leave when they have been idle for a second; a new spare one is there a second later.
SETTLE_SECONDS = 3.0
RUN = Path("/run/soak")


class Surprise(Exception):
    """Something that should not be: its text says what."""


class Place(ABC):
    """A run directory with two models.  A context manager.

    Args:
        name: how it is called; also the name of its directories.
        directory: where its weights are.
        chance: which round comes next.

    Attributes:
        right_bytes: how many bytes were compared and were right.
        done: how often each kind of round was done.
        slowest_rmdir: the longest time from the end of a cgroup's last reader to its removal, in
            seconds.
        bags: how often every kind of round was begun anew.
    """

    def __init__(self, name: str, directory: Path, chance: random.Random) -> None:
        self.bags = 0
        self.name = name
        self.run_dir = RUN / name
        self.directory = directory / name
        self.chance = chance
        self.right_bytes = 0
        self.done: dict[str, int] = {}
        self.slowest_rmdir = 0.0
        self._seed = chance.randrange(1 << 40)
        self._stack = ExitStack()
        self._stack_of_round = ExitStack()
        self._bag: list[Callable[[], None]] = []
        home = cgroups.directory_of(os.getpid())
        self.cgroup_home = home / f"soak-{os.getpid()}-{name}" if home else None

    def __enter__(self) -> Place:
        self.run_dir.mkdir(parents=True, mode=0o755)
        if self.cgroup_home is not None:
            self.cgroup_home.mkdir()
            self._stack.callback(self.cgroup_home.rmdir)
        for model in MODELS:
            (self.directory / model).mkdir(parents=True)
            self.fresh_model(model)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    # --- weights ---

    def model(self, name: str) -> Path:
        """Return the directory of a model."""
        return self.directory / name

    def shards(self, model: str) -> list[Path]:
        """Return the files of a model that are there now."""
        return sorted(self.model(model).glob("model-*.safetensors"))

    def write(self, path: Path) -> None:
        """Write new content, by a rename."""
        self._seed += 1
        soak_files.write(path, self._seed, SHARD_BYTES + 4096 * self.chance.randrange(64))

    def fresh_model(self, model: str) -> None:
        """Have all shards of a model, and no other files."""
        names = [f"model-{n:05d}-of-{SHARDS:05d}.safetensors" for n in range(1, SHARDS + 1)]
        for path in self.model(model).iterdir():
            if path.name not in names:
                path.unlink()
        for name in names:
            path = self.model(model) / name
            if not path.exists() or path.stat().st_size < SHARD_BYTES:
                self.write(path)

    # --- commands ---

    def environment(self) -> dict[str, str]:
        """Return the environment that leads commands to the run directory."""
        return environment(PAGECACHE_BPF_RUN_DIR=str(self.run_dir))

    def command(self, *words: str | Path, codes: tuple[int, ...] = (0,)) -> str:
        """Run a command of pagecache-bpf; return its stdout.

        Raises:
            Surprise: it does not end, has another exit code, or shows a mistake of its own.
        """
        said = " ".join(map(str, words))
        try:
            done = subprocess.run(
                [*COMMAND, *map(str, words)],
                capture_output=True,
                text=True,
                env=self.environment(),
                cwd=ROOT,
                timeout=COMMAND_SECONDS,
            )
        except subprocess.TimeoutExpired:
            raise Surprise(f"{said} does not end") from None
        text = done.stdout + done.stderr
        if done.returncode not in codes or "Traceback" in text or "a bug of" in text:
            raise Surprise(f"{said}: exit code {done.returncode}: {text.strip()[-2000:]}")
        return done.stdout

    def reader(
        self,
        model: str,
        *more: str,
        how: str = "",
        before: tuple[str, ...] = (),
        group: Path | None = None,
    ) -> subprocess.Popen[str]:
        """Start a process that reads a model, in a cgroup if there is one, and compares it."""
        if group is not None:
            enter = ("sh", "-c", 'echo $$ >"$0" && exec "$@"', str(group / "cgroup.procs"))
            before = (*enter, *before)
        for path in self.shards(model):
            if self.chance.random() < 0.7:
                soak_files.drop(path)
        how = how or self.chance.choice(sorted(soak_files.HOW))
        words = [sys.executable, "-m", "tests.soak_files", how, *map(str, self.shards(model))]
        return subprocess.Popen(
            [*before, *words, *more],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self.environment(),
            cwd=ROOT,
        )

    def finish(self, process: subprocess.Popen[str], *allowed: int, kill: float = 0.0) -> str:
        """Wait for a reader, or kill it at a random moment with that probability.

        Returns:
            What it printed behind the number of bytes.

        Raises:
            Surprise: a byte was wrong, it does not end, or ends in another way.
        """
        if self.chance.random() < kill:
            with suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=self.chance.uniform(0.1, 0.8))
            process.kill()
            allowed = (*allowed, -signal.SIGKILL)
        try:
            out, error = process.communicate(timeout=COMMAND_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            raise Surprise(f"a reader of {self.name} does not end") from None
        if process.returncode == soak_files.WRONG:
            raise Surprise(f"wrong bytes: {error.strip()}")
        if process.returncode not in (0, *allowed):
            raise Surprise(f"a reader ended with {process.returncode}: {error.strip()[-1000:]}")
        number, _, rest = out.strip().partition(" ")
        self.right_bytes += int(number or 0)
        return rest

    # --- rounds that every place has ---

    def rounds(self) -> list[Callable[[], None]]:
        """Return what may be done here."""
        return [self.read, self.read_in_cgroup, self.load, self.change_files]

    def one_round(self) -> None:
        """Do one of the rounds; all have been done before one is done again."""
        if not self._bag:
            self.bags += 1
            self._bag = self.rounds()
            self.chance.shuffle(self._bag)
        chosen = self._bag.pop()
        name = chosen.__name__.replace("_", " ")
        self.done[name] = self.done.get(name, 0) + 1
        with self._stack_of_round:
            chosen()

    def read(self) -> None:
        """Read a model twice at once; one of the readers may be killed."""
        model = self.chance.choice(MODELS)
        first, second = self.reader(model), self.reader(model)
        self.finish(first, kill=0.4)
        self.finish(second)

    def read_in_cgroup(self) -> None:
        """Read in a new memory cgroup with less room than the model, and remove it afterwards."""
        if self.cgroup_home is None:
            return
        group = self.cgroup_home / f"reader-{time.monotonic_ns()}"
        group.mkdir()
        limit = "memory.max" if (group / "memory.max").exists() else "memory.limit_in_bytes"
        (group / limit).write_text(str(CGROUP_LIMIT))
        try:
            process = self.governed_reader(group)
            self.finish(process, kill=0.4)
        finally:
            self.remove(group)

    @abstractmethod
    def governed_reader(self, group: Path) -> subprocess.Popen[str]:
        """Start a reader for which workers of the agent read ahead, in its cgroup."""

    def remove(self, group: Path) -> None:
        """Remove a cgroup whose readers have ended; a worker of ours may stay for a second."""
        begin = time.monotonic()
        told = ""
        while True:
            try:
                group.rmdir()
                break
            except OSError as error:
                waited = time.monotonic() - begin
                if waited > 2.0:
                    told = f"{error.strerror}: {inside(group)}"
                if waited > COMMAND_SECONDS:
                    raise Surprise(f"a cgroup stays for {waited:.0f} s: {told}") from None
                time.sleep(0.05)
        seconds = time.monotonic() - begin
        self.slowest_rmdir = max(self.slowest_rmdir, seconds)
        if seconds > RMDIR_SECONDS:
            raise Surprise(f"a cgroup could be removed after {seconds:.1f} s only: {told}")

    def load(self) -> None:
        """Load a model by load(), which is killed half-way now and then."""
        self.load_as(())

    def load_as(self, before: tuple[str, ...], *allowed: int) -> str:
        """Load as root or, with a command before it, as somebody else; return by what means."""
        model = self.chance.choice(MODELS)
        process = self.reader(model, "--load", str(self.model(model)), before=before)
        return self.finish(process, *allowed, kill=0.3)

    def change_files(self) -> None:
        """Replace, cut, delete or add weight files while somebody reads them."""
        model = self.chance.choice(MODELS)
        process = self.reader(model)
        time.sleep(self.chance.uniform(0.2, 0.6))
        path = self.chance.choice(self.shards(model))
        what = self.chance.choice(["replace", "cut", "delete", "add"])
        if what == "replace":
            self.write(path)
        elif what == "cut":
            os.truncate(path, self.chance.randrange(soak_files.HEADER_BYTES, SHARD_BYTES))
        elif what == "delete":
            path.unlink()
        else:
            self.write(path.with_name("model-added.safetensors"))
        self.finish(process, -signal.SIGBUS)  # what was mapped behind the new end
        self.command("status")
        self.fresh_model(model)

    # --- the look from outside ---

    def start_over(self) -> None:
        """Bring about a state that rounds can begin from, after a surprise."""
        for model in MODELS:
            self.fresh_model(model)

    def settle(self) -> None:
        """Take back what lasts for a round only.

        Raises:
            Surprise: it cannot be.
        """
        for model in MODELS:
            for path in self.shards(model):
                soak_files.drop(path)

    def lasting(self) -> list[int]:
        """Return the processes that are to be there, with those below them."""
        return []

    def figures(self) -> dict[str, float]:
        """Count what is left of this place's rounds."""
        mark = f"PAGECACHE_BPF_RUN_DIR={self.run_dir}".encode()
        left = set()
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with suppress(OSError):
                    if mark in (entry / "environ").read_bytes().split(b"\0"):
                        left.add(int(entry.name))
        groups = list(self.cgroup_home.glob("*/")) if self.cgroup_home else []
        return {
            f"{self.name} leftover processes": len(left - set(self.lasting())),
            f"{self.name} leftover cgroups": len(groups),
            **soak_figures.of_directory(self.name, self.run_dir),
        }

    def agent_pid(self) -> int:
        """Return the process of the agent.  Raises Surprise if there is none."""
        try:
            with AgentDevice(self.run_dir / "agent.sock") as agent:
                return int(agent.pid)
        except Exception as error:
            raise Surprise(f"no agent answers: {error}") from None

    def attached(self) -> list[str]:
        """Return the names of the policies that are attached."""
        status = json.loads(self.command("status", "--json"))
        return [policy["name"] for policy in status["policies"]]


def inside(group: Path) -> str:
    """Describe the processes of a cgroup, for a message."""
    told = []
    tasks = group / "tasks" if (group / "tasks").exists() else group / "cgroup.threads"
    for number in tasks.read_text().split():
        with suppress(OSError):
            task = Path(f"/proc/{number}")
            state = next(
                line for line in (task / "status").read_text().splitlines() if "State" in line
            )
            stack = (task / "stack").read_text().split("\n")[:6]
            told.append(f"{number} {(task / 'comm').read_text().strip()} {state} {stack}")
    usage = group / "memory.usage_in_bytes"
    used = usage.read_text().strip() if usage.exists() else "?"
    return f"{told or 'no task'}, {used} bytes charged"


def await_true(condition: Callable[[], bool], what: str, seconds: float = 10.0) -> None:
    """Wait until something is so.  Raises Surprise with `what`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise Surprise(what)
        time.sleep(0.02)
