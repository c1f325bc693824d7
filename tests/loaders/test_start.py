# SPDX-License-Identifier: Apache-2.0
"""A real start of vLLM on a cold snapshot of the Hugging Face cache reads its templates."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.cachestat import drop
from benchmarks.checkpoints import hub_snapshot
from tests.loaders import checkpoints
from tests.loaders.page_trace import PageTrace
from tests.loaders.reads import PAGE, expected

_SCRIPT = Path(__file__).with_name("vllm_start.py")
_TP = {"tp": 2, "ep": 1, "pp": 1}


def test_a_start_of_vllm_reads_the_templates(disk: Path, trace: PageTrace, tmp_path: Path) -> None:
    at = hub_snapshot(checkpoints.make("qwen2", tmp_path, shards="32MB"), disk / "hub")
    names = {path.stat().st_ino: path.name for path in sorted(at.glob("*.safetensors"))}
    assert len(names) > 2
    os.sync()
    drop(path.resolve() for path in at.iterdir())
    environment = {
        **os.environ,
        "HF_HUB_CACHE": str(disk / "hub"),
        "HF_HUB_OFFLINE": "1",
        "VLLM_PLUGINS": "",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
    }
    log = Path("build/test/vllm_start.log")
    with trace.record() as touches, log.open("w") as errors:
        done = subprocess.run(
            [sys.executable, str(_SCRIPT), "acme/tiny"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            timeout=900,
            check=False,
        )
    assert done.returncode == 0, f"see {log}"
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("worker ")]
    workers = {int(process): int(rank) for _, rank, process in lines}
    assert sorted(workers.values()) == [0, 1], done.stdout[-1000:]
    brought: dict[int, set[tuple[str, int]]] = {0: set(), 1: set()}
    others: set[tuple[str, int]] = set()
    for (inode, page), thread in zip(touches, trace.threads, strict=True):
        if inode in names:
            rank = workers.get(thread)
            (others if rank is None else brought[rank]).add((names[inode], page))
    told = {rank: set(expected(at, _TP, rank)) for rank in (0, 1)}
    read = brought[0] | brought[1] | others
    assert read == told[0] | told[1]
    # What a rank brings in is its own; of what both want, one of them finds it there.
    for rank in (0, 1):
        assert brought[rank] <= told[rank]
        assert told[rank] - told[1 - rank] <= brought[rank] | others
    # Beside the workers only headers are looked at.
    headers = {(name, 0) for name in names.values()}
    assert others <= headers
    rows = {
        f"rank {rank}": {
            "template": len(told[rank]) * PAGE,
            "accessed": len(told[rank] & read) * PAGE,
            "brought_in": len(brought[rank]) * PAGE,
        }
        for rank in (0, 1)
    }
    both = {"template": len(told[0] | told[1]) * PAGE, "accessed": len(read) * PAGE}
    Path("build/test/vllm_start.json").write_text(json.dumps({**rows, "both": both}, indent=1))
