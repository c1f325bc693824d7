# SPDX-License-Identifier: Apache-2.0
"""Each engine starts on a cold disk in each way that docs/engines.md names, and answers the same.

Seconds are written down in build/test/engines.json and judged by nobody.  The weights lie on this
machine's own disk, which reads ahead as most do; their pages are dropped before each start, and
that is verified.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cachestat import drop, resident_bytes
from pagecache_bpf.weights.models import resolve
from tests.engines import models
from tests.native.readahead import usual_readahead
from tests.unit.command import COMMAND, ROOT, run

START = Path(__file__).with_name("start.py")
PLACE = ROOT / "build" / "models" / "engines"
TOLD = ROOT / "build" / "test" / "engines.json"
MODELS: dict[str, Callable[[Path], Path]] = {
    "transformers": models.llama,
    "sentence_transformers": models.minilm,
    "llama_cpp": models.gguf,
    "vllm": models.llama,
}
WAYS = ("attach", "load", "run", "controller")
SERVED = re.compile(r"\(engine (\w+)(?:, policy (\w+))?\)")
PREFETCHED = re.compile(r"prefetched (.+?), hit ratio")
# What vLLM says of its own phases.
WEIGHTS_TOOK = re.compile(r"Loading weights took ([0-9.]+) seconds")
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root (BPF)")


@dataclass(frozen=True)
class Started:
    """An engine's start: what it answered, and what was said on the way."""

    answer: Any
    seconds: dict[str, float]
    said: str

    @property
    def served(self) -> tuple[str, str | None]:
        """Engine and policy that served it, by the report; vLLM's is in its log."""
        found = SERVED.search(self.said)
        assert found, self.said[-3000:]
        return found[1], found[2]


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """The models' directory, on a disk whose read_ahead_kb is 128."""
    PLACE.mkdir(parents=True, exist_ok=True)
    with usual_readahead(PLACE):
        yield PLACE


@pytest.fixture
def controller(tmp_path: Path) -> Iterator[Path]:
    """The socket of `pagecache-bpf serve` in a container; in a process where podman is missing."""
    from tests.engines.controllers import running

    with running(tmp_path) as socket:
        yield socket


def started(engine: str, model: Path, way: str, **more: str) -> Started:
    """Start an engine on cold weights, with nothing of us but what the way says."""
    files = resolve(model).files
    os.sync()
    drop(files)
    assert resident_bytes(files) == 0
    command = [sys.executable, str(START), engine, str(model)]
    if engine != "vllm" and way in ("load", "controller"):
        command.append("--load")
    if way == "run":
        command = [*COMMAND, "run", "--weights", str(model), "--", *command]
    environment = {**os.environ, **QUIET, **more}
    if way in ("default", "attach", "run"):
        environment["VLLM_PLUGINS"] = ""
    # Not pipes: what an engine has started may outlive it, and would keep them open.
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        done = subprocess.run(command, stdout=out, stderr=errors, timeout=900, env=environment)
        for file in (out, errors):
            file.seek(0)
        printed, complained = out.read(), errors.read()
    assert done.returncode == 0, complained[-3000:]
    # vLLM logs to its output, also after the answer.
    (line,) = (line for line in printed.splitlines() if line.startswith('{"seconds"'))
    told = json.loads(line)
    said = printed + complained
    if took := WEIGHTS_TOOK.findall(said):
        told["seconds"]["weights"] = max(map(float, took))
    return Started(told["answer"], told["seconds"], said)


@cache
def default(engine: str, model: Path) -> Started:
    """How an engine starts without us."""
    made = started(engine, model, "default")
    write_down(engine, "default", made, "the kernel's own readahead", 0)
    return made


def write_down(engine: str, way: str, made: Started, verdict: str, prefetched: int | str) -> None:
    """Keep a row of the table that `python -m tests.engines.table` prints."""
    TOLD.parent.mkdir(parents=True, exist_ok=True)
    told = json.loads(TOLD.read_text()) if TOLD.exists() else {}
    row = {"seconds": made.seconds, "verdict": verdict, "prefetched": prefetched}
    told[f"{engine}, {way}"] = row
    TOLD.write_text(json.dumps(told, indent=1) + "\n")


def pagecache_bpf(*words: str) -> Any:
    """Run a command of ours and return what it says as JSON."""
    done = run(*words, "--json")
    assert done.code == 0, done.err
    return done.data


@pytest.mark.parametrize("engine", MODELS)
@pytest.mark.parametrize("way", WAYS)
def test_an_engine_answers_the_same(
    engine: str, way: str, place: Path, request: pytest.FixtureRequest
) -> None:
    model = MODELS[engine](place)
    without = default(engine, model)
    size = sum(file.stat().st_size for file in resolve(model).files)
    prefetched: int | str
    if way == "attach":
        pagecache_bpf("attach", "sequential", str(model))
        try:
            made = started(engine, model, way)
            (told,) = pagecache_bpf("stats")["models"]
        finally:
            pagecache_bpf("detach", "sequential")
        assert told["bytes"] == size
        prefetched = told["counters"]["prefetched_bytes"]
        assert told["counters"]["prefetched_bytes"] > 0
        verdict = f"{told['engine']}, sequential"
    else:
        socket = Path("/nonexistent/control.sock")  # whatever controller this machine has
        if way == "controller":
            socket = request.getfixturevalue("controller")
        made = started(engine, model, way, PAGECACHE_BPF_SOCKET=str(socket))
        served, policy = made.served
        verdict = f"{served}, {policy}" if policy else served
        found = PREFETCHED.search(made.said)
        assert found
        prefetched = found[1]
    assert made.answer == without.answer
    write_down(engine, way, made, verdict, prefetched)
    assert pagecache_bpf("tags")["tags"] == []
