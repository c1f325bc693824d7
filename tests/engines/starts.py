# SPDX-License-Identifier: Apache-2.0
"""Start an engine on cold weights in one of the ways that docs/engines.md names, and note how."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from benchmarks import engines
from benchmarks.cachestat import drop, resident_bytes
from pagecache_bpf.weights.models import resolve
from tests.native.readahead import USUAL, window_of
from tests.unit.command import COMMAND, ROOT, run

START = Path(__file__).with_name("start.py")
#: Apart from the others: what it brings does not go with their torch.
SGLANG = Path(sys.prefix) / "sglang"
TOLD = ROOT / "build" / "test" / "engines.json"
NO_CONTROLLER = Path("/nonexistent/control.sock")  # whatever controller this machine has
SERVED = re.compile(r"\(engine (\w+)(?:, policy (\w+))?\)")
PREFETCHED = re.compile(r"prefetched (.+?), hit ratio")


@dataclass(frozen=True)
class Started:
    """An engine's start: what it answered, and what was said on the way.

    Attributes:
        answer: what the engine answered; it depends on every weight.
        seconds: how long each phase took, by its name.
        said: all that was printed.
        size: bytes of the model's files.
        cached: bytes of them that were in the page cache afterwards, by cachestat(2).
    """

    answer: Any
    seconds: dict[str, float]
    said: str
    size: int
    cached: int

    @property
    def served(self) -> list[tuple[str, str]]:
        """Engine and policy, "" for none, of each load by its report; vLLM's are in its log."""
        found = SERVED.findall(self.said)
        assert found, self.said[-3000:]
        return found

    @property
    def prefetched(self) -> list[str]:
        """How much was read ahead for each load, as its report says it."""
        found = PREFETCHED.findall(self.said)
        assert found, self.said[-3000:]
        return found


def require(engine: str) -> None:
    """Skip the test where an engine is not installed; `make test` has llama.cpp alone.

    Args:
        engine: a function of tests/engines/start.py.
    """
    if engine == "sglang_loader":
        is_there = SGLANG.exists()
    elif engine == "llama_cpp":
        is_there = find_spec("xllamacpp") is not None
    else:
        is_there = all(map(find_spec, ("torch", engine)))
    if not is_there:
        pytest.skip(f"{engine} is not installed here: make test-engines")


def command_of(engine: str, model: str, way: str) -> list[str]:
    """Return the command that starts an engine, with nothing of us but what the way says.

    Args:
        engine: a function of tests/engines/start.py.
        model: a path, or the name of a repository.
        way: "default", "attach", "load", "run" or "controller".
    """
    command = [sys.executable, str(START), engine, model]
    if not engine.startswith("vllm") and way in ("load", "controller"):
        command += ["--load", "--ready"] if way == "controller" else ["--load"]
    if way == "run":
        command = [*COMMAND, "run", "--weights", model, "--", *command]
    return command


def environment(engine: str, way: str, **more: str) -> dict[str, str]:
    """Return the environment of a start; vLLM's plug-in is on in the ways that use it."""
    own = {"VLLM_PLUGINS": ""} if way in ("default", "attach", "run") else {}
    if engine.startswith("sglang"):
        own["PYTHONPATH"] = str(SGLANG)
    return {**os.environ, **engines.QUIET, **own, **more}


def make_cold(model: Path) -> list[Path]:
    """Drop a model from the page cache, and return its files."""
    files = list(resolve(model).files)
    os.sync()
    drop(files)
    assert resident_bytes(files) == 0
    return files


def started(engine: str, model: Path, way: str, name: str = "", **more: str) -> Started:
    """Start an engine on cold weights and have it answer.

    Args:
        engine: a function of tests/engines/start.py.
        model: where the model lies.
        way: see command_of().
        name: what the engine is told instead of the path.
        more: additions to the environment.
    """
    files = make_cold(model)
    window = window_of(files[0])
    # Not pipes: what an engine has started may outlive it, and would keep them open.
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        done = subprocess.run(
            command_of(engine, name or str(model), way),
            stdout=out,
            stderr=errors,
            timeout=900,
            env=environment(engine, way, **more),
        )
        for file in (out, errors):
            file.seek(0)
        printed, complained = out.read(), errors.read()
    assert done.returncode == 0, complained[-3000:]
    # With a deep window the kernel keeps up, and nothing is read ahead: another row.
    assert window is None or window.read_text().strip() == USUAL, "somebody has set read_ahead_kb"
    answer, seconds = engines.told(printed, complained)
    size = sum(file.stat().st_size for file in files)
    return Started(answer, seconds, printed + complained, size, resident_bytes(files))


@cache
def default(engine: str, model: Path, ranks: int = 1) -> Started:
    """Start an engine without us, once."""
    made = started(engine, model, "default", TP=str(ranks))
    write_down(named(engine, ranks), "default", made, ["the kernel's own readahead"], [0])
    return made


def named(engine: str, ranks: int = 1) -> str:
    """Return what the table calls an engine with so many tensor-parallel ranks."""
    return engine if ranks == 1 else f"{engine}, tensor parallel {ranks}"


def told_by_report(made: Started) -> tuple[list[str], list[int | str]]:
    """Return who served each load and how much was read ahead, as the table has it."""
    verdicts = [f"{served}, {policy}" if policy else served for served, policy in made.served]
    return verdicts, list(made.prefetched)


def write_down(
    engine: str,
    way: str,
    made: Started,
    verdicts: Sequence[str],
    prefetched: Sequence[int | str],
) -> None:
    """Keep a row of the table that `python -m tests.engines.table` prints."""
    TOLD.parent.mkdir(parents=True, exist_ok=True)
    told = json.loads(TOLD.read_text()) if TOLD.exists() else {}
    told[f"{engine}, {way}"] = {
        "seconds": made.seconds,
        "verdicts": list(verdicts),
        "prefetched": list(prefetched),
        "size": made.size,
        "cached": made.cached,
    }
    TOLD.write_text(json.dumps(told, indent=1) + "\n")


def pagecache_bpf(*words: str, **more: str) -> Mapping[str, Any]:
    """Run a command of ours and return what it says as JSON.

    Args:
        words: the command line, without --json.
        more: additions to the environment.
    """
    done = run(*words, "--json", env=more)
    assert done.code == 0, done.err
    data: Mapping[str, Any] = done.data
    return data
