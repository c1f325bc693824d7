# SPDX-License-Identifier: Apache-2.0
"""What is left when a process ends at a bad moment: `python -m tests.crash_matrix`, as root.

Each verb that changes something is started and sent INT, TERM, KILL or STOP at ten moments of its
run; each process beside the command (agent, worker, controller, reader) is sent the same while a
governed file is read.  Then the next command runs.  A cell of the table is what that command finds:

    undone    everything is as before
    done      the verb had done all it was asked
    cleared   the next command said what was left, and settled it
    LEFT      something else: a mistake

For a process beside the command it is what people are told:

    told      the next command says what happened
    goes on   it has no effect on what is attached, and there is nothing to tell

Engine agent only, with a run directory of its own.  All of it takes half an hour: with --results,
cells are kept in a file, and those that are there are not run again, so that it can be done in
pieces (--seconds).
"""

from __future__ import annotations

import argparse
import collections
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SIGNALS = ("INT", "TERM", "KILL", "STOP")
MOMENTS = 10
FILE_BYTES = 8 << 20
SHARDS = 4
ANSWER_SECONDS = 20.0  # within which the next command has to say something

#: A command that reads the files of a directory twice, and takes a moment.
READ = (
    *("sh", "-c"),
    'for turn in 1 2; do cat "$0"/* >/dev/null; sleep 0.3; done',
)

State = tuple[tuple[str, ...], tuple[tuple[str, str], ...]]


def shard_name(shard: int) -> str:
    """Return the name of a shard, counted from 0, by which loaders know the split of one model."""
    return f"m-{shard + 1:05d}-of-{SHARDS:05d}.gguf"


@dataclass
class Bench:
    """A run directory, two small models, and how commands are run there."""

    directory: Path

    def __post_init__(self) -> None:
        for name in ("one", "two"):
            (self.directory / name).mkdir()
            for shard in range(SHARDS):
                with (self.directory / name / shard_name(shard)).open("wb") as file:
                    file.write(bytes([shard + 1]) * FILE_BYTES)
                    os.fsync(file.fileno())

    def command(self, words: Sequence[str]) -> list[str]:
        """Return the command line of pagecache-bpf with these words."""
        return [sys.executable, "-m", "pagecache_bpf", *words]

    def environment(self) -> dict[str, str]:
        """Return the environment that leads commands to the run directory."""
        run_dir = str(self.directory / "run")
        return {**os.environ, "PYTHONPATH": str(ROOT), "PAGECACHE_BPF_RUN_DIR": run_dir}

    def start(self, *words: str) -> subprocess.Popen[str]:
        """Start a command without waiting for it."""
        pipe = subprocess.PIPE
        return subprocess.Popen(
            self.command(words), env=self.environment(), stdout=pipe, stderr=pipe, text=True
        )

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a command; TimeoutExpired when it does not answer."""
        return subprocess.run(
            self.command(words),
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=ANSWER_SECONDS,
        )

    def state(self) -> State:
        """Return which policies are attached and which files are tagged, asked of the agent."""
        from pagecache_bpf.policy.agent_device import AgentDevice, is_running

        socket = self.directory / "run" / "agent.sock"
        if not is_running(socket):
            return (), ()
        with AgentDevice(socket) as agent:
            tags = sorted((tag.path, tag.policy) for tag in agent.tags())
            return tuple(sorted(agent.details())), tuple(tags)

    def clear(self) -> None:
        """Detach everything."""
        from pagecache_bpf.policy.agent_device import AgentDevice, is_running

        socket = self.directory / "run" / "agent.sock"
        if is_running(socket):
            with AgentDevice(socket) as agent:
                for name in agent.details():
                    agent.detach(name)

    def prepare(self, verb: Verb) -> None:
        """Make the state that a verb starts from: by its commands, or without them if that is so.

        An agent that runs is asked directly, which takes a tenth of the time.
        """
        from pagecache_bpf.policy import catalog
        from pagecache_bpf.policy.agent_device import AgentDevice, is_running

        socket = self.directory / "run" / "agent.sock"
        if not is_running(socket):
            for words in verb.before:
                self.run(*words).check_returncode()
            return
        for _, policy, *_, model in verb.before:
            info = catalog.find(policy)
            with AgentDevice(socket) as agent:
                agent.attach(info, catalog.agent_object(info), {}, {})
                for path in sorted(Path(model).iterdir()):
                    fd = os.open(path, os.O_RDONLY)
                    try:
                        agent.tag(fd, policy=policy, model=Path(model).name, path=str(path))
                    finally:
                        os.close(fd)

    def end_agent(self) -> None:
        """End the agent, if one runs: there is one controller at a time."""
        from pagecache_bpf.policy.agent_device import is_running

        socket = self.directory / "run" / "agent.sock"
        if is_running(socket):
            pid = self.agent_pid()
            os.kill(pid, signal.SIGTERM)
            await_true(lambda: not Path(f"/proc/{pid}").exists())

    def agent_pid(self) -> int:
        """Return the agent's process."""
        from pagecache_bpf.policy.agent_device import AgentDevice

        with AgentDevice(self.directory / "run" / "agent.sock") as agent:
            return agent.pid

    def strays(self) -> set[int]:
        """Return our processes that run for this directory, without the agent and its workers."""
        from pagecache_bpf.policy.agent_device import is_running

        known = set()
        if is_running(self.directory / "run" / "agent.sock"):
            known = {agent := self.agent_pid(), *workers_of(agent)}
        mark = f"PAGECACHE_BPF_RUN_DIR={self.directory / 'run'}".encode()
        found = set()
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with suppress(OSError):
                    if mark in (entry / "environ").read_bytes().split(b"\0"):
                        found.add(int(entry.name))
        return found - known

    def path(self, name: str) -> str:
        """Return the path of a model."""
        return str(self.directory / name)


@dataclass(frozen=True)
class Verb:
    """A command under test, and the commands that make the state it starts from."""

    words: tuple[str, ...]
    before: tuple[tuple[str, ...], ...] = ()


def verbs(bench: Bench) -> dict[str, Verb]:
    """Return every verb that changes policies or tags, by the name of its row."""
    attach = ("attach", "sequential", "--engine", "agent")
    one, two = bench.path("one"), bench.path("two")
    return {
        "attach": Verb((*attach, one)),
        "attach --replace": Verb(
            ("attach", "noop", "--engine", "agent", "--replace", one), ((*attach, one),)
        ),
        "tag": Verb(("tag", "--policy", "sequential", two), ((*attach, one),)),
        "untag": Verb(("untag", one), ((*attach, one),)),
        "detach": Verb(("detach", "sequential"), ((*attach, one),)),
        "run": Verb(("run", "--weights", one, "--", *READ, one)),
        "record": Verb(
            ("record", "-o", str(bench.directory / "load.pcrec"), one, "--", *READ, one),
            ((*attach, one),),
        ),
    }


def disturb(bench: Bench, verb: Verb, name: str, seconds: float) -> tuple[str, str]:
    """Run a verb, send it a signal after so long, and return what the next command finds and says.

    The first is a word of the table.
    """
    bench.clear()
    bench.prepare(verb)
    before = bench.state()
    process = bench.start(*verb.words)
    time.sleep(seconds)
    process.send_signal(getattr(signal, f"SIG{name}"))
    said = ""
    if name == "STOP":
        try:
            said = bench.run("status").stderr
        except subprocess.TimeoutExpired:
            process.kill()
            return "LEFT: status hangs", ""
        process.send_signal(signal.SIGCONT)
    try:
        _, error = process.communicate(timeout=90)
    except subprocess.TimeoutExpired:
        process.kill()
        return "LEFT: it hangs", ""
    if ("Traceback" in error and reached(error)) or "bug of pagecache-bpf" in error:
        return f"LEFT: {error.strip().splitlines()[-1]}", error
    if name == "KILL":  # what it has started notices a moment later
        with suppress(TimeoutError):
            await_true(lambda: not bench.strays(), 10)
    following = bench.run("status")
    said += following.stderr
    after = bench.state()
    if following.returncode:
        return f"LEFT: status says {following.stderr.strip()}", said
    if strays := bench.strays():
        return f"LEFT: {len(strays)} processes", said
    if after == before:
        return "cleared" if "half-way" in said else "undone", said
    if complete(verb, before, after):
        return "cleared" if "half-way" in said else "done", said
    return f"LEFT: {after[0]} {len(after[1])} tags", said


def reached(error: str) -> bool:
    """Return whether a traceback has a frame of ours: Python's own start can be interrupted, too.

    Nothing that a package does can mend that, and nothing has been changed by then.
    """
    return f'File "{ROOT / "pagecache_bpf"}/' in error


def complete(verb: Verb, before: State, after: State) -> bool:
    """Return whether the state is what the verb was to bring about."""
    policies, tags = after
    kind, policy = verb.words[0], verb.words[1]
    if kind == "attach":
        governed = [tag for tag in tags if tag[1] == policy]
        return policy in policies and len(governed) == 4
    if kind == "tag":
        return len(tags) == 8
    if kind == "untag":
        return policies == before[0] and not tags
    if kind == "detach":
        return not policies and not tags
    return after == before  # whatever was attached for the command's time is gone


@contextmanager
def reading(bench: Bench) -> Iterator[subprocess.Popen[str]]:
    """A process that reads a governed model again and again and checks every byte."""
    code = (
        "import os, sys\n"
        "while True:\n"
        "    for shard, name in enumerate(sorted(os.listdir(sys.argv[1]))):\n"
        "        with open(os.path.join(sys.argv[1], name), 'rb', buffering=0) as file:\n"
        "            while data := file.read(1 << 17):\n"
        "                assert data == bytes([shard + 1]) * len(data)\n"
        "            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)\n"
    )
    reader = subprocess.Popen([sys.executable, "-c", code, bench.path("one")], text=True)
    try:
        yield reader
    finally:
        reader.kill()
        reader.wait()


def strike(bench: Bench, role: str, name: str, seconds: float) -> tuple[str, str]:
    """Send a process beside the command a signal while a governed file is read.

    Returns:
        A word of the table, and what the next command said.
    """
    bench.clear()
    serve = None
    if role == "controller":
        bench.end_agent()
        serve = bench.start("serve", "--config", str(config_file(bench)))
        await_true(lambda: (bench.directory / "run" / "control.sock").exists())
    bench.run("attach", "sequential", "--engine", "agent", bench.path("one")).check_returncode()
    with reading(bench) as reader:
        time.sleep(seconds)
        agent = bench.agent_pid()
        pid = {"reader": reader.pid, "worker": next(iter(workers_of(agent)), agent)}.get(
            role, agent
        )
        os.kill(pid, getattr(signal, f"SIG{name}"))
        time.sleep(0.2)
        try:
            following = bench.run("status")
            said = (following.stdout + following.stderr).strip()
        except subprocess.TimeoutExpired:
            said = "HANGS"
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
        wrong = role != "reader" and reader.poll() is not None
    if serve is not None:
        serve.send_signal(signal.SIGTERM)
        try:
            serve.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            serve.kill()
            return "LEFT: serve does not end", said
    following = bench.run("status")
    if wrong:
        return "LEFT: the reader ended", said
    if said == "HANGS" or "Traceback" in said or following.returncode:
        return f"LEFT: {said}", said
    if "no policy is attached" in said:
        told = any(word in said for word in ("killed", "ended", "detached"))
        return "told" if told else "LEFT: not told", said
    return "told" if "stopped" in said else "goes on", said


def workers_of(agent: int) -> list[int]:
    """Return the worker processes of the agent; none where that has ended."""
    from tests.native.controller import children_of

    with suppress(OSError):
        return children_of(agent)
    return []


def config_file(bench: Bench) -> Path:
    """Return a configuration for `serve` in the run directory."""
    path = bench.directory / "config.toml"
    path.write_text(f'[socket]\nlisten = "{bench.directory / "run" / "control.sock"}"\n')
    return path


def await_true(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    """Wait until something is so.  Raises TimeoutError."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("it does not come about")
        time.sleep(0.02)


def duration(bench: Bench, verb: Verb) -> float:
    """Return how long a verb takes undisturbed, in seconds."""
    bench.clear()
    bench.prepare(verb)
    start = time.monotonic()
    bench.run(*verb.words).check_returncode()
    return time.monotonic() - start


def cells(
    bench: Bench, rows: Sequence[str], names: Sequence[str], moments: int
) -> Iterator[tuple[str, str, int, Callable[[], tuple[str, str]]]]:
    """Yield each row, signal and moment, and what runs it; durations are measured once a row."""
    known = verbs(bench)
    total: dict[str, float] = {}

    def run(row: str, name: str, moment: int) -> tuple[str, str]:
        if row not in total:
            total[row] = duration(bench, known[row]) if row in known else 2.0
        seconds = total[row] * moment / (moments + 1)
        if row in known:
            return disturb(bench, known[row], name, seconds)
        return strike(bench, row, name, seconds / 2)

    for row in rows:
        for name in names:
            for moment in range(1, moments + 1):
                yield row, name, moment, functools.partial(run, row, name, moment)


def table(results: Sequence[dict[str, Any]]) -> str:
    """Return the results as a table: a row for each verb and process, a column for each signal."""
    lines = [f"| | {' | '.join(SIGNALS)} |", f"|{' --- |' * (len(SIGNALS) + 1)}"]
    for row in dict.fromkeys(result["row"] for result in results):
        columns = []
        for name in SIGNALS:
            found = collections.Counter(
                result["found"]
                for result in results
                if result["row"] == row and result["signal"] == name
            )
            columns.append(", ".join(f"{times} {what}" for what, times in found.most_common()))
        lines.append(f"| {row} | {' | '.join(columns)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the matrix; 1 when something was left."""
    parser = argparse.ArgumentParser(prog="python -m tests.crash_matrix", description=__doc__)
    parser.add_argument("rows", nargs="*", help="verbs and processes (default: all)")
    parser.add_argument("--signals", default=",".join(SIGNALS))
    parser.add_argument("--moments", type=int, default=MOMENTS)
    parser.add_argument("--results", type=Path, help="where cells are kept, one a line, as JSON")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no cell later")
    parser.add_argument("--log", action="store_true", help="print what each next command said")
    args = parser.parse_args(argv)
    results: list[dict[str, Any]] = []
    if args.results and args.results.exists():
        results = [json.loads(line) for line in args.results.read_text().splitlines()]
    there = {(result["row"], result["signal"], result["moment"]) for result in results}
    until = time.monotonic() + args.seconds
    # Not in /tmp: that may be a tmpfs, which has no pages to read ahead.
    with tempfile.TemporaryDirectory(dir=ROOT / "build", prefix="crash-") as directory:
        bench = Bench(Path(directory))
        rows = args.rows or [*verbs(bench), "agent", "worker", "controller", "reader"]
        for row, name, moment, run in cells(bench, rows, args.signals.split(","), args.moments):
            if (row, name, moment) in there:
                continue
            if time.monotonic() > until:
                break
            found, said = run()
            result = {"row": row, "signal": name, "moment": moment, "found": found, "said": said}
            results.append(result)
            if args.results:
                with args.results.open("a") as file:
                    file.write(f"{json.dumps(result)}\n")
            if args.log:
                print(row, name, moment, found, said.strip(), sep=": ", flush=True)
        bench.clear()
        bench.end_agent()
    print(table(results))
    return 1 if any(result["found"].startswith("LEFT") for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
