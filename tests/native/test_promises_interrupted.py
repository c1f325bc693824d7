# SPDX-License-Identifier: Apache-2.0
"""What is interrupted is undone, and what is killed is found and settled by the next command.

The moment is not a time: a test waits until the command has written down what it is about to do,
which is before its first change.  `python -m tests.crash_matrix` tries many moments.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.crash_matrix import Bench, shard_name
from tests.unit.command import ROOT

pytestmark = pytest.mark.native


@pytest.fixture
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """Two small models and a run directory of their own."""
    bench = Bench(tmp_path_factory.mktemp("promises"))
    yield bench
    bench.clear()


def log_of(bench: Bench) -> dict[str, object]:
    """What the command under way has written down; empty before it has."""
    try:
        return dict(json.loads((bench.directory / "run" / "change.lock").read_bytes()))
    except (OSError, ValueError):
        return {}


def start_and_wait(bench: Bench, *words: str) -> subprocess.Popen[str]:
    """Start a command and wait until it is about to change something."""
    process = bench.start(*words)
    deadline = time.monotonic() + 60
    while not (log_of(bench).get("detach") or log_of(bench).get("untag_paths")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    return process


ATTACH = ("attach", "sequential", "--engine", "agent", "--template", "none")


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [
        (signal.SIGINT, 130, "interrupted"),
        (signal.SIGTERM, 143, "terminated"),
        (signal.SIGHUP, 129, "the terminal hung up"),
    ],
)
def test_an_interrupted_attach_is_undone(bench: Bench, number: int, code: int, said: str) -> None:
    process = start_and_wait(bench, *ATTACH, bench.path("one"))
    process.send_signal(number)
    out, err = process.communicate(timeout=90)
    assert (process.returncode, out) == (code, "")
    assert f"error: {said}\n  note: rolled back: " in err
    assert bench.state() == ((), ())
    assert log_of(bench) == {}
    # The agent holds no claim on the budget either, and the same attach succeeds.
    assert bench.run(*ATTACH, bench.path("one")).returncode == 0


def test_a_second_signal_does_not_cut_undoing_short(bench: Bench) -> None:
    process = start_and_wait(bench, *ATTACH, bench.path("one"))
    for _ in range(20):
        process.send_signal(signal.SIGINT)
        time.sleep(0.005)
    assert "rolled back" in process.communicate(timeout=90)[1]
    assert (process.returncode, bench.state()) == (130, ((), ()))


def test_what_a_killed_attach_left_is_cleared_by_the_next_command(bench: Bench) -> None:
    process = start_and_wait(bench, *ATTACH, bench.path("one"))
    process.kill()
    process.communicate()
    done = bench.run("status", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["policies"] == []
    warning = json.loads(done.stderr)["warning"]
    assert f"(process {process.pid}) came to an end half-way; rolled back" in warning
    assert bench.state() == ((), ())
    assert bench.run("status").stderr == ""


def test_detaching_what_a_killed_attach_left_is_no_error(bench: Bench) -> None:
    """Settling detaches the policy, and that is what was asked for."""
    process = start_and_wait(bench, *ATTACH, bench.path("one"))
    left = (bench.directory / "run" / "change.lock").read_bytes()
    process.communicate(timeout=90)
    assert process.returncode == 0 and left
    # As if it had been killed between its last change and the end of its record.
    (bench.directory / "run" / "change.lock").write_bytes(left)
    done = bench.run("detach", "sequential", "--json")
    assert (done.returncode, bench.state()) == (0, ((), ()))
    assert "came to an end half-way; rolled back" in json.loads(done.stderr)["warning"]
    (entry,) = json.loads(done.stdout)["detached"]
    assert (entry["name"], entry["exit"]["kind"]) == ("sequential", "detached")
    assert bench.run("detach", "sequential").returncode == 2


def test_files_go_back_to_the_policy_they_were_taken_from(bench: Bench) -> None:
    bench.run(*ATTACH, bench.path("one")).check_returncode()
    before = bench.state()
    take = ("attach", "noop", "--engine", "agent", "--replace", bench.path("one"))
    process = start_and_wait(bench, *take)
    process.terminate()
    assert "rolled back" in process.communicate(timeout=90)[1]
    assert bench.state() == before
    process = start_and_wait(bench, *take)
    process.kill()
    process.communicate()
    bench.run("tags")
    assert bench.state() == before


def test_an_interrupted_tag_leaves_what_was_tagged_before(bench: Bench) -> None:
    bench.run(*ATTACH, bench.path("one")).check_returncode()
    before = bench.state()
    process = start_and_wait(bench, "tag", "--policy", "sequential", bench.path("two"))
    process.kill()
    process.communicate()
    bench.run("status").check_returncode()
    assert bench.state() == before


def test_a_stopped_command_is_told_and_nothing_hangs(bench: Bench) -> None:
    process = start_and_wait(bench, *ATTACH, bench.path("one"))
    process.send_signal(signal.SIGSTOP)
    refused = bench.run(*ATTACH, bench.path("two"))
    assert refused.returncode == 1 and f"kill -CONT {process.pid}" in refused.stderr
    assert "nothing was changed" in refused.stderr
    process.send_signal(signal.SIGCONT)
    assert process.wait(timeout=90) == 0
    assert len(bench.state()[1]) == 4


def test_a_stopped_agent_is_told(bench: Bench) -> None:
    bench.run(*ATTACH, bench.path("one")).check_returncode()
    agent = bench.agent_pid()
    os.kill(agent, signal.SIGSTOP)
    try:
        for words in (("status",), ("detach", "sequential"), ("tags",)):
            refused = bench.run(*words)
            assert refused.returncode == 1
            assert f"process {agent} is stopped" in refused.stderr
    finally:
        os.kill(agent, signal.SIGCONT)
    # What `detach` could not do is finished by the next command.
    bench.run("status").check_returncode()


@pytest.mark.parametrize("pause", [0.0, 0.02, 0.05, 0.1])
def test_an_early_interrupt_is_no_traceback(pause: float, bench: Bench) -> None:
    code = "import pagecache_bpf.__main__ as m, sys; print('!', flush=True); sys.exit(m.main())"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "policy", "list"],
        env=bench.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout and process.stdout.readline() == "!\n"
    time.sleep(pause)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert "Traceback" not in err
    assert process.returncode in (-signal.SIGINT, 130, 0, 1)


def test_the_policies_of_a_killed_agent_are_told(bench: Bench) -> None:
    bench.run(*ATTACH, bench.path("one")).check_returncode()
    agent = bench.agent_pid()
    os.kill(agent, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while Path(f"/proc/{agent}").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    told = bench.run("status")
    assert told.returncode == 0 and "no policy is attached" in told.stdout
    assert "the agent's process was killed, and its policies ended with it" in " ".join(
        told.stdout.split()
    )
    # It is told by the agent that comes after, too, and once.
    bench.run(*ATTACH, bench.path("one")).check_returncode()
    exits = json.loads(bench.run("status", "--json").stdout)["exits"]
    assert [record["kind"] for record in exits] == ["killed"]
    bench.run("detach", "sequential").check_returncode()
    exits = json.loads(bench.run("status", "--json").stdout)["exits"]
    assert [record["kind"] for record in exits] == ["killed", "detached"]


def test_names_cannot_send_sequences_to_the_terminal(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")  # in a narrow one the path would go on in the next line
    name = bench.directory / "evil\x1b[31m\nrow.gguf"
    (bench.directory / "one" / shard_name(0)).rename(name)
    bench.run(*ATTACH, str(name), "--model", "evil").check_returncode()
    listed = bench.run("tags")
    assert "\x1b" not in listed.stdout and "evil\\x1b[31m\\nrow.gguf" in listed.stdout
    paths = [tag["path"] for tag in json.loads(bench.run("tags", "--json").stdout)["tags"]]
    assert str(name) in paths


def test_a_run_directory_that_cannot_be_written_is_told(bench: Bench) -> None:
    """A file where the directory should be: nobody can write there, root neither."""
    (bench.directory / "run").write_text("")
    refused = bench.run(*ATTACH, bench.path("one"))
    assert refused.returncode == 1 and "cannot be written" in refused.stderr
    assert "bug" not in refused.stderr and "Traceback" not in refused.stderr
    (bench.directory / "run").unlink()
