# SPDX-License-Identifier: Apache-2.0
"""What happened to a model, an agent or a worker is told by the command that comes next."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.crash_matrix import Bench, shard_name
from tests.vm.kernel import wait_for

pytestmark = pytest.mark.native

ATTACH = ("attach", "sequential", "--engine", "agent", "--template", "none")


@pytest.fixture
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """Two small models and a run directory of their own."""
    bench = Bench(tmp_path_factory.mktemp("told"))
    yield bench
    bench.clear()


def model_of(bench: Bench) -> dict[str, Any]:
    (policy,) = json.loads(bench.run("status", "--json").stdout)["policies"]
    (model,) = policy["models"]
    return dict(model)


def test_files_that_changed_since_they_were_tagged_are_told(bench: Bench) -> None:
    directory = Path(bench.path("one")).resolve()
    bench.run(*ATTACH, bench.path("one")).check_returncode()
    told = model_of(bench)
    assert (told["replaced"], told["gone"], told["untagged"]) == ([], [], [])
    assert "stale" not in bench.run("status").stdout

    # As a download does it: written beside, then renamed.
    first, last = directory / shard_name(0), directory / shard_name(3)
    (directory / "fresh").write_bytes(first.read_bytes())
    (directory / "fresh").rename(first)
    last.unlink()
    told = model_of(bench)
    assert (told["replaced"], told["gone"]) == ([str(first)], [str(last)])
    text = " ".join(bench.run("status").stdout.split())
    assert f"replaced, and no longer governed: 1 file ({first.name})" in text
    assert f"gone: 1 file ({last.name})" in text

    last.write_bytes(b"x" * 4096)  # often by the inode number of the one that went
    assert "tag again: pagecache-bpf tag --policy sequential --model one" in " ".join(
        bench.run("status").stdout.split()
    )
    bench.run("tag", "--policy", "sequential", "--model", "one", str(directory)).check_returncode()
    told = model_of(bench)
    assert (told["replaced"], told["gone"], told["untagged"]) == ([], [], [])
    assert told["files"] == 4  # the tags of those that went are off


def test_new_files_of_a_tagged_directory_are_told(bench: Bench) -> None:
    directory = Path(bench.path("one")).resolve()
    for shard in range(4):
        (directory / shard_name(shard)).rename(directory / f"part{shard}.safetensors")
    bench.run(*ATTACH, bench.path("one")).check_returncode()
    fresh = directory / "part4.safetensors"
    fresh.write_bytes(b"x" * 4096)
    assert model_of(bench)["untagged"] == [str(fresh)]
    text = " ".join(bench.run("status").stdout.split())
    assert f"not tagged, in the same directory: 1 file ({fresh.name})" in text
    bench.run("tag", "--policy", "sequential", "--model", "one", str(directory)).check_returncode()
    assert model_of(bench)["untagged"] == []


def test_what_is_left_out_of_a_model_is_told(bench: Bench) -> None:
    directory = Path(bench.path("one"))
    (directory / "original").mkdir()
    for name in ("optimizer.pt", "original/consolidated.00.pth"):
        (directory / name).write_bytes(b"x" * 4096)
    tag = ("tag", "--policy", "sequential", "--model", "one")
    for command in (ATTACH, tag):
        done = bench.run(*command, "--json", str(directory))
        (model,) = json.loads(done.stdout)["models"]
        assert len(model["files"]) == 4
        told = {item["path"]: item["why"] for item in model["left_out"]}
        assert told == {
            "optimizer.pt": "training state, which no inference loader reads",
            "original": "the publisher's own copy, which Hugging Face loaders do not read",
        }
    text = " ".join(bench.run(*tag, str(directory)).stdout.split())
    assert all(f"{path} ({why})" in text for path, why in told.items())


def test_a_killed_agent_is_told_by_stats_too(bench: Bench) -> None:
    bench.run(*ATTACH, bench.path("one")).check_returncode()
    agent = bench.agent_pid()
    os.kill(agent, signal.SIGKILL)
    wait_for(lambda: not Path(f"/proc/{agent}").exists(), "the agent to end", 60)
    told = bench.run("stats")
    assert told.returncode == 0 and "nothing is tagged" in told.stdout
    said = " ".join(told.stderr.split())
    assert "sequential is not attached any more: the agent's process was killed" in said
    assert "killed" in json.loads(bench.run("stats", "--json").stderr)["warning"]


def test_a_worker_that_ended_is_told_as_that(bench: Bench) -> None:
    """It is ended while it holds a request; where it was faster there is nothing to tell."""
    from pagecache_bpf.policy.read_errors import meaning

    bench.run(*ATTACH, bench.path("one")).check_returncode()

    def workers() -> list[int]:
        (policy,) = json.loads(bench.run("status", "--json").stdout)["policies"]
        return list(policy["workers"])

    wait_for(lambda: bool(workers()), "a worker to start", 60)
    for worker in workers():
        os.kill(worker, signal.SIGSTOP)
    for shard in range(4):
        Path(bench.path("one"), shard_name(shard)).read_bytes()
    for worker in workers():
        os.kill(worker, signal.SIGKILL)
    wait_for(lambda: "failed" in bench.run("status").stdout, "the failure to be told", 60)
    text = " ".join(bench.run("status").stdout.split())
    assert meaning(10) in text and "No child processes" not in text
