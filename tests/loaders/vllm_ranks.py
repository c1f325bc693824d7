# SPDX-License-Identifier: Apache-2.0
"""Two ranks of vLLM, each in a process of its own, told what to do in turns."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

#: Importing vLLM takes a quarter of a minute, on a busy machine many times that.
_SECONDS = 1800.0


class Refused(Exception):
    """vLLM did not take a checkpoint; it says why."""


class Ranks:
    """Starts the ranks; close() ends them."""

    def __init__(self, count: int, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        script = str(Path(__file__).with_name("vllm_rank.py"))
        environment = {
            **os.environ,
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_NO_USAGE_STATS": "1",
            # What its CPU worker would set: names of shared memory, of each group its own.
            "VLLM_DIST_IDENT": f"loaders-{os.getpid()}-{count}",
            "VLLM_PLUGINS": "",  # the loader alone, without this project's plug-in
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",  # so that a tensor is copied from its begin to its end
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
        }
        self._log = log.open("w")
        self._ranks = [
            subprocess.Popen(
                [sys.executable, script, str(rank), str(count), str(port)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                text=True,
                env=environment,
            )
            for rank in range(count)
        ]

    def close(self) -> None:
        """End the ranks."""
        for rank in self._ranks:
            assert rank.stdin
            rank.stdin.close()
        for rank in self._ranks:
            try:
                rank.wait(30)
            except subprocess.TimeoutExpired:
                rank.kill()
                rank.wait()
        self._log.close()

    def build(self, directory: Path, tp: int, pp: int, ep: bool, **options: Any) -> None:
        """Have all ranks build a model.  Raises Refused."""
        request = {"build": str(directory), "tp": tp, "pp": pp, "ep": ep, "options": options}
        self._all(request)

    def load(self, rank: int) -> None:
        """Have one rank load its weights.  Raises Refused."""
        self._send(self._ranks[rank], {"load": True})
        self._answers([self._ranks[rank]])

    def drop(self) -> None:
        """Have all ranks forget their model."""
        self._all({"drop": True})

    def _all(self, request: dict[str, Any]) -> None:
        for rank in self._ranks:
            self._send(rank, request)
        self._answers(self._ranks)

    def _send(self, rank: subprocess.Popen[str], request: dict[str, Any]) -> None:
        assert rank.stdin
        rank.stdin.write(json.dumps(request) + "\n")
        rank.stdin.flush()

    def _answers(self, ranks: list[subprocess.Popen[str]]) -> None:
        """Wait for an answer of each; raise what the first one says went wrong."""
        errors = []
        for rank in ranks:
            assert rank.stdout
            ready, _, _ = select.select([rank.stdout], [], [], _SECONDS)
            line = rank.stdout.readline() if ready else ""
            assert line, f"a rank of vLLM has ended or hangs; see {self._log.name}"
            errors.append(json.loads(line)["error"])
        if any(errors):
            raise Refused(next(error for error in errors if error))
