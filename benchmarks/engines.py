# SPDX-License-Identifier: Apache-2.0
"""Real engines for the benchmarks: models of their own classes, and how they are started.

They live in an environment of their own (make build/venv-loaders/.engines); tests/engines/start.py
starts one, has it answer and tells the seconds of each phase.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import hosted, memory
from pagecache_bpf.errors import PagecacheError

PYTHON = hosted.BUILD / "venv-loaders" / "bin" / "python"
START = hosted.ROOT / "tests" / "engines" / "start.py"
#: No network, no reports, one thread where more would only take turns.
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}
#: The same, without our plug-in for vLLM.
ENVIRONMENT = {**QUIET, "VLLM_PLUGINS": ""}
#: Layers of the models: 30 make 1.1 GB, in eight files or as GGUF in one.
LAYERS = 30
#: What an engine's process takes beside its weights in two types and its packages, in bytes.
PROCESS_BYTES = 1536 << 20
#: The models that are made, by the function of tests/engines/models.py that makes them.
LLAMA, GGUF = "llama", "gguf"
_SECONDS = 600
#: What vLLM says of its own phases.
WEIGHTS_TOOK = re.compile(r"Loading weights took ([0-9.]+) seconds")


@dataclass(frozen=True)
class Started:
    """One start of an engine.

    Attributes:
        answer: what it answered, which depends on every weight.
        phases: seconds of each phase; of vLLM "weights", too, what it says itself.
        begun_s, ended_s: of its process, on CLOCK_MONOTONIC.
        cpu_s: CPU seconds of all its processes.
    """

    answer: Any
    phases: dict[str, float]
    begun_s: float
    ended_s: float
    cpu_s: float

    @property
    def load_seconds(self) -> float:
        """How long the weights took, without imports and without the answer."""
        return self.phases.get("weights", self.phases.get("load", 0.0))


def make(kind: str, directory: Path) -> Path:
    """Make a model with an engine's own class, once.

    Args:
        kind: LLAMA or GGUF.
        directory: where it is made.

    Returns:
        The directory of the model's files.

    Raises:
        PagecacheError: the engines are not installed.
    """
    if not PYTHON.exists():
        raise PagecacheError(
            "the engines are not installed for the benchmarks",
            "",
            "make build/venv-loaders/.engines",
        )
    directory.mkdir(parents=True, exist_ok=True)
    code = (
        "import sys, pathlib\nfrom tests.engines import models\n"
        f"models.LAYERS = {LAYERS}\nmodels.{kind}(pathlib.Path(sys.argv[1]))\n"
    )
    subprocess.run([PYTHON, "-c", code, directory], check=True, cwd=hosted.ROOT)
    return directory / "llama" if kind == LLAMA else directory


def command(engine: str, model: Path) -> list[str]:
    """Return the command that starts an engine on a model.

    Args:
        engine: a function of tests/engines/start.py.
        model: the directory of its files.

    Returns:
        Words.
    """
    found = sorted(model.glob("*.gguf"))
    return [str(PYTHON), str(START), engine, str(found[0] if found else model)]


def memory_of(size: int) -> AbstractContextManager[None]:
    """Return the memory of a start: page cache, and tensors of a larger type (memory.backed()).

    Args:
        size: bytes of the model's files.
    """
    return memory.backed(3 * size + PROCESS_BYTES)


def told(printed: str, complained: str = "") -> tuple[Any, dict[str, float]]:
    """Find what tests/engines/start.py has told in what was printed; vLLM logs there, too.

    Args:
        printed: to standard output.
        complained: to standard error.

    Returns:
        The answer, and the seconds of each phase; of vLLM "weights", too, what it says itself.
    """
    (line,) = (line for line in printed.splitlines() if line.startswith('{"seconds"'))
    made = json.loads(line)
    seconds: dict[str, float] = made["seconds"]
    if took := WEIGHTS_TOOK.findall(printed + complained):
        seconds["weights"] = max(map(float, took))
    return made["answer"], seconds


def start(engine: str, model: Path, enter: Callable[[], None] | None = None) -> Started:
    """Start an engine on a model and wait for its end.

    Args:
        engine: a function of tests/engines/start.py.
        model: the directory of its files.
        enter: called in the new process before it begins: puts it into a cgroup.

    Returns:
        How it went.

    Raises:
        PagecacheError: it failed; with the end of what it printed.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        begun = time.monotonic()
        process = subprocess.Popen(
            ["timeout", "--signal=KILL", str(_SECONDS), *command(engine, model)],
            stdout=out,
            stderr=errors,
            env={**os.environ, **ENVIRONMENT},
            preexec_fn=enter,
        )
        _, status, usage = os.wait4(process.pid, 0)
        ended = time.monotonic()
        process.returncode = os.waitstatus_to_exitcode(status)
        for file in (out, errors):
            file.seek(0)
        printed, complained = out.read(), errors.read()
    if process.returncode:
        raise PagecacheError(f"{engine} did not start", complained[-2000:])
    answer, seconds = told(printed, complained)
    return Started(answer, seconds, begun, ended, usage.ru_utime + usage.ru_stime)
