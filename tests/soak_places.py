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
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType

from pagecache_bpf.kernel import cgroups
from pagecache_bpf.policy.agent_device import AgentDevice, is_running
from tests import soak_figures, soak_files
from tests.native.controller import AGENT, Controller, children_of, serving, start
from tests.unit.command import COMMAND, NOBODY, ROOT, environment

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


class Place:
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

    def governed_reader(self, group: Path) -> subprocess.Popen[str]:
        """Start a reader for which workers of the agent read ahead, in its cgroup."""
        raise NotImplementedError

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


class Steady(Place):
    """A place whose agent or controller is never ended, so that its growth can be seen.

    Args:
        serve: a controller, not an agent.
    """

    def __init__(self, name: str, directory: Path, chance: random.Random, *, serve: bool) -> None:
        super().__init__(name, directory, chance)
        self.serve = serve
        self.pid = 0

    def __enter__(self) -> Place:
        super().__enter__()
        if self.serve:
            self.controller: Controller = self._stack.enter_context(serving(self.run_dir, AGENT))
            self.pid = self.controller.process.pid
        else:
            keeper = self.directory / "keeper.safetensors"
            self.write(keeper)
            # As long as a policy is attached the agent stays.
            self.command("attach", "noop", "--engine", "agent", keeper)
            self.pid = self.agent_pid()
            self._stack.callback(self.command, "detach", "--all")
        return self

    def rounds(self) -> list[Callable[[], None]]:
        """Return what may be done here."""
        commands = [self.attach_and_detach, self.tag_and_untag, self.look, self.run_command]
        return [*super().rounds(), *commands, *([self.load_as_nobody] if self.serve else [])]

    def attach_and_detach(self) -> None:
        """Attach a policy, read under it, in the middle of which it may be detached."""
        policy, model = self.chance.choice(POLICIES), self.chance.choice(MODELS)
        self.command("attach", policy, "--engine", "agent", "--replace", self.model(model))
        process = self.reader(model)
        if self.chance.random() < 0.5:
            self.command("detach", policy)
            self.finish(process, kill=0.3)
        else:
            self.finish(process, kill=0.3)
            self.command("stats")
            self.command("detach", policy)

    def tag_and_untag(self) -> None:
        """Tag a model, change one of its files, tag it again and take the tags off."""
        policy = self.chance.choice(POLICIES)
        self.command("attach", policy, "--engine", "agent")
        model = self.chance.choice(MODELS)
        self.command("tag", "--policy", policy, "--replace", self.model(model))
        self.write(self.chance.choice(self.shards(model)))
        self.command("tag", "--policy", policy, "--replace", self.model(model))
        self.finish(self.reader(model), kill=0.3)
        self.command("untag", self.model(model))
        self.command("detach", policy)

    def governed_reader(self, group: Path) -> subprocess.Popen[str]:
        """Start a reader of a load of nobody's, or of a policy that goes with the round."""
        model = self.chance.choice(MODELS)
        if self.serve:
            load = ("--load", str(self.model(model)))
            return self.reader(model, *load, before=tuple(NOBODY), group=group)
        self.command("attach", "sequential", "--engine", "agent", "--replace", self.model(model))
        self._stack_of_round.callback(self.command, "detach", "sequential")
        return self.reader(model, group=group)

    def look(self) -> None:
        """Ask for everything that can be asked for."""
        for words in (("stats", "--json"), ("tags", "--json"), ("status",), ("doctor", "--json")):
            self.command(*words, codes=(0, 3))

    def run_command(self) -> None:
        """Read below `run`, which attaches for as long as its command takes."""
        model = self.chance.choice(MODELS)
        said = self.command(
            *("run", "--weights", self.model(model), "--"),
            *(sys.executable, "-m", "tests.soak_files", "read", *map(str, self.shards(model))),
        )
        self.right_bytes += int(said.split()[0])

    def load_as_nobody(self) -> None:
        """Load as a user, through the controller."""
        via = self.load_as(tuple(NOBODY))
        if via and via != "controller":
            raise Surprise(f"a load of nobody was served by {via}")

    def start_over(self) -> None:
        """Detach everything but the keeper, and have all files."""
        super().start_over()
        self.detach_rounds()

    def detach_rounds(self) -> None:
        """Detach what rounds have attached."""
        for policy in self.attached():
            if policy not in KEPT:
                self.command("detach", policy, codes=(0, 1))

    def settle(self) -> None:
        """Wait until loads have ended and workers have left."""
        super().settle()
        self.detach_rounds()
        time.sleep(SETTLE_SECONDS)
        if self.serve and self.controller.process.poll() is not None:
            raise Surprise("the controller has ended")
        if not self.serve and self.agent_pid() != self.pid:
            raise Surprise("another agent runs")

    def lasting(self) -> list[int]:
        """Return the agent or controller with what is below it."""
        return soak_figures.tree(self.pid)

    def figures(self) -> dict[str, float]:
        """Count what the process holds, too."""
        return {**soak_figures.of_processes(self.name, self.pid), **super().figures()}


class Wild(Place):
    """A place where whatever runs is killed."""

    def rounds(self) -> list[Callable[[], None]]:
        """Return what may be done here."""
        return [
            *super().rounds(),
            self.kill_agent,
            self.kill_worker,
            self.kill_command,
            self.kill_controller,
        ]

    def attach(self, policy: str = "sequential") -> None:
        """Attach a policy to a model unless it is."""
        if policy not in self.attached():
            self.command("attach", policy, "--engine", "agent", "--replace", self.model("one"))

    def governed_reader(self, group: Path) -> subprocess.Popen[str]:
        """Start a reader of the model that is governed."""
        self.attach()
        return self.reader("one", group=group)

    def kill_agent(self) -> None:
        """Kill the agent while a governed model is read; the next command tells it."""
        self.attach()
        process = self.reader("one")
        time.sleep(self.chance.uniform(0, 0.5))
        pid = self.agent_pid()
        os.kill(pid, signal.SIGKILL)
        self.finish(process)
        await_true(lambda: not Path(f"/proc/{pid}").exists(), "the killed agent stays")
        said = self.command("status")
        if "killed" not in said:
            raise Surprise(f"a killed agent is not told: {said}")

    def kill_worker(self) -> None:
        """Kill a worker while a governed model is read."""
        self.attach()
        process = self.reader("one")
        time.sleep(self.chance.uniform(0, 0.5))
        for pid in children_of(self.agent_pid())[:1]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.finish(process)
        self.command("status")

    def kill_command(self) -> None:
        """Kill a command at a random moment; the next one settles what is left."""
        words = self.chance.choice(
            [
                ("attach", "fifo", "--engine", "agent", "--replace", str(self.model("two"))),
                ("detach", "--all"),
                ("untag", "--all"),
                ("run", "--weights", str(self.model("two")), "--", "true"),
            ]
        )
        process = subprocess.Popen(
            [*COMMAND, *words],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=self.environment(),
            cwd=ROOT,
        )
        time.sleep(self.chance.uniform(0.1, 1.2))
        process.kill()
        process.wait()
        self.command("status")
        self.clear()

    def kill_controller(self) -> None:
        """Serve clients and kill the controller, or end it as it should."""
        self.clear()
        self.end_agent()
        process = start(self.run_dir, AGENT)
        try:
            await_true(lambda: is_running(self.run_dir / "agent.sock"), "serve does not start", 30)
            client = self.reader("two", "--load", str(self.model("two")), before=tuple(NOBODY))
            time.sleep(self.chance.uniform(0.2, 1.0))
            process.send_signal(self.chance.choice([signal.SIGKILL, signal.SIGTERM]))
            self.finish(client)
            process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            raise Surprise("serve does not end") from None
        finally:
            process.kill()
            process.communicate()
        self.command("status")

    def clear(self) -> None:
        """Detach everything."""
        self.command("detach", "--all", codes=(0, 1))

    def end_agent(self) -> None:
        """End the agent, if one runs."""
        if is_running(self.run_dir / "agent.sock"):
            pid = self.agent_pid()
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
            await_true(lambda: not Path(f"/proc/{pid}").exists(), "the agent does not end", 20)

    def settle(self) -> None:
        """End everything."""
        super().settle()
        self.clear()
        self.end_agent()

    def start_over(self) -> None:
        """End everything, and have all files."""
        super().start_over()
        self.end_agent()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end_agent()
        super().__exit__(kind, error, trace)


def await_true(condition: Callable[[], bool], what: str, seconds: float = 10.0) -> None:
    """Wait until something is so.  Raises Surprise with `what`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise Surprise(what)
        time.sleep(0.02)
