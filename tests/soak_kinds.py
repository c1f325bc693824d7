# SPDX-License-Identifier: Apache-2.0
"""Both kinds of places of the soak: one that is never ended, and one where all is killed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from pagecache_bpf.policy.agent_device import is_running
from tests import soak_figures
from tests.native.controller import AGENT, Controller, children_of, serving, start
from tests.soak_places import (
    KEPT,
    MODELS,
    POLICIES,
    SETTLE_SECONDS,
    Place,
    Surprise,
    await_true,
)
from tests.unit.command import COMMAND, NOBODY, ROOT


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
