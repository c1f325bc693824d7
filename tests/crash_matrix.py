# SPDX-License-Identifier: Apache-2.0
"""What is left when a process ends at a bad moment: `python -m tests.crash_matrix`, as root.

Each verb that changes something is started and sent INT, TERM, KILL or STOP at ten moments of its
run; each process beside the command (agent, worker, controller, reader) is sent the same while a
governed file is read.  Then the next command runs.  A cell of the table is what that command finds:

    undone    everything is as before
    done      the verb had done all it was asked
    cleared   the next command said what was left, and settled it
    LEFT      something else: a mistake

Engine agent only, with a run directory of its own.
"""

from __future__ import annotations

import argparse
import collections
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SIGNALS = ("INT", "TERM", "KILL", "STOP")
MOMENTS = 10
FILE_BYTES = 8 << 20
SHARDS = 4
ANSWER_SECONDS = 20.0  # within which the next command has to say something

State = tuple[tuple[str, ...], tuple[tuple[str, str], ...]]


def shard_name(shard: int) -> str:
    """Return the name of a shard, counted from 0, by which loaders know the split of one model."""
    return f"m-{shard + 1:05d}-of-{SHARDS:05d}.gguf"


@dataclass
class Bench:
    """A run directory, two small models, and how commands are run there."""

    directory: Path
    log: list[str] = field(default_factory=list)

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

    def agent_pid(self) -> int:
        """Return the agent's process."""
        from pagecache_bpf.policy.agent_device import AgentDevice

        with AgentDevice(self.directory / "run" / "agent.sock") as agent:
            return agent.pid

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
    }


def disturb(bench: Bench, verb: Verb, name: str, seconds: float) -> str:
    """Run a verb, send it a signal after so long, and return what the next command finds."""
    bench.clear()
    for words in verb.before:
        bench.run(*words).check_returncode()
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
            return "LEFT: status hangs"
        process.send_signal(signal.SIGCONT)
    try:
        _, error = process.communicate(timeout=90)
    except subprocess.TimeoutExpired:
        process.kill()
        return "LEFT: it hangs"
    if ("Traceback" in error and reached(error)) or "bug of pagecache-bpf" in error:
        return f"LEFT: {error.strip().splitlines()[-1]}"
    following = bench.run("status")
    said += following.stderr
    after = bench.state()
    bench.log.append(
        f"{' '.join(verb.words[:2])} {name} {seconds:.2f}: {process.returncode} {said}"
    )
    if following.returncode:
        return f"LEFT: status says {following.stderr.strip()}"
    if after == before:
        return "cleared" if "half-way" in said else "undone"
    if complete(verb, before, after):
        return "cleared" if "half-way" in said else "done"
    return f"LEFT: {after[0]} {len(after[1])} tags"


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
    return not policies and not tags


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


def strike(bench: Bench, role: str, name: str, seconds: float) -> str:
    """Send a process beside the command a signal while a governed file is read."""
    bench.clear()
    serve = None
    if role == "controller":
        serve = bench.start("serve", "--config", str(config_file(bench)))
        await_true(lambda: (bench.directory / "run" / "control.sock").exists())
    bench.run("attach", "sequential", "--engine", "agent", bench.path("one")).check_returncode()
    with reading(bench) as reader:
        time.sleep(seconds)
        agent = bench.agent_pid()
        pid = {"reader": reader.pid, "worker": worker_of(agent) or agent}.get(role, agent)
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
            return "LEFT: serve does not end"
    following = bench.run("status")
    bench.log.append(f"{role} {name} {seconds:.2f}: {said.splitlines()[:2]}")
    if wrong:
        return "LEFT: the reader ended"
    if said == "HANGS" or "Traceback" in said or following.returncode:
        return f"LEFT: {said}"
    if "no policy is attached" in said:
        told = any(word in said for word in ("killed", "ended", "detached"))
        return "told" if told else "LEFT: not told"
    return "told" if "stopped" in said else "goes on"


def worker_of(agent: int) -> int | None:
    """Return a worker process of the agent."""
    with suppress(OSError):
        for task in Path(f"/proc/{agent}/task").iterdir():
            if children := (task / "children").read_text().split():
                return int(children[0])
    return None


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
    for words in verb.before:
        bench.run(*words).check_returncode()
    start = time.monotonic()
    bench.run(*verb.words).check_returncode()
    return time.monotonic() - start


def table(bench: Bench, rows: Sequence[str], names: Sequence[str], moments: int) -> int:
    """Print a row for each verb and process and a column for each signal; return the mistakes."""
    known = verbs(bench)
    mistakes = 0
    for row in rows:
        total = duration(bench, known[row]) if row in known else 2.0
        cells = []
        for name in names:
            found: collections.Counter[str] = collections.Counter()
            for moment in range(1, moments + 1):
                seconds = total * moment / (moments + 1)
                if row in known:
                    found[disturb(bench, known[row], name, seconds)] += 1
                else:
                    found[strike(bench, row, name, seconds / 2)] += 1
            mistakes += sum(times for what, times in found.items() if what.startswith("LEFT"))
            cells.append(", ".join(f"{times} {what}" for what, times in found.most_common()))
        print(f"| {row} ({total:.2f} s) | {' | '.join(cells)} |", flush=True)
    bench.clear()
    return mistakes


def main(argv: Sequence[str] | None = None) -> int:
    """Run the matrix; 1 when something was left."""
    parser = argparse.ArgumentParser(prog="python -m tests.crash_matrix", description=__doc__)
    parser.add_argument("rows", nargs="*", help="verbs and processes (default: all)")
    parser.add_argument("--signals", default=",".join(SIGNALS))
    parser.add_argument("--moments", type=int, default=MOMENTS)
    parser.add_argument("--log", action="store_true", help="print what each next command said")
    args = parser.parse_args(argv)
    # Not in /tmp: that may be a tmpfs, which has no pages to read ahead.
    with tempfile.TemporaryDirectory(dir=ROOT / "build", prefix="crash-") as directory:
        bench = Bench(Path(directory))
        rows = args.rows or [*verbs(bench), "agent", "worker", "controller", "reader"]
        names = args.signals.split(",")
        print(f"| | {' | '.join(names)} |\n|{' --- |' * (len(names) + 1)}")
        mistakes = table(bench, rows, names, args.moments)
        if args.log:
            print("\n".join(bench.log))
    return 1 if mistakes else 0


if __name__ == "__main__":
    sys.exit(main())
