# SPDX-License-Identifier: Apache-2.0
"""Snapshots with known numbers; run as a script, a command that sees them.

python -m tests.unit.snapshots top      pagecache-bpf top, of a load that never ends
"""

from __future__ import annotations

import sys
import time

from pagecache_bpf.kernel.abi import COUNTERS, OBSERVED
from pagecache_bpf.metrics import collect
from pagecache_bpf.metrics.collect import (
    ConsumerStats,
    ModelStats,
    ObserverState,
    PolicyStats,
    StatsSnapshot,
    TemplateStats,
)
from pagecache_bpf.placement.load_score import ModelScore, NodeScores

LLAMA, GGUF = "meta-llama/Llama-3.1-8B", "phi.gguf"
BEGIN = time.time_ns()


def counters(scale: int) -> dict[str, int]:
    """Every observed counter: no two are alike."""
    found = {counter.name: scale * (7 + index) for index, counter in enumerate(OBSERVED)}
    for how in ("read", "mmap"):
        parts = ("hit", "ahead", "miss")
        found[f"{how}_bytes"] = sum(found[f"{how}_{part}_bytes"] for part in parts)
    return found


def snapshot(scale: int = 1000, *, after_ns: int = 0, level: str = "full") -> StatsSnapshot:
    """Three models: observed on the agent, tagged but never read, known to the module only."""
    sequential = {counter.name: 3 + index for index, counter in enumerate(COUNTERS)}
    return StatsSnapshot(
        BEGIN + after_ns,
        {"struct_ops": True, "agent": True},
        ObserverState(level, () if level == "full" else ("mm_filemap_fault",), 5),
        (
            PolicyStats(
                *("sequential", "agent", BEGIN, 4096, 8192, sequential, 3, {5: 2, 9999: 1}),
                (TemplateStats(LLAMA, "derived", 900, 100, 3, True),),
            ),
            PolicyStats("noop", "struct_ops", BEGIN, 0, 0, dict.fromkeys(sequential, 0)),
            PolicyStats("quitter", "agent", 0, 0, 0),
        ),
        (
            ModelStats(
                *(LLAMA, "sequential", "agent", 4, 1 << 30, 100 << 20),
                *({"0": 70 << 20, "1": 30 << 20}, True, counters(scale)),
                (
                    ConsumerStats(4711, "python3", True, counters(scale)),
                    ConsumerStats(4712, "cat", False, counters(0)),
                ),
                *(BEGIN, counters(scale), (60 << 20, 40 << 20)),
            ),
            ModelStats(
                *("cold", "sequential", "agent", 1, 1 << 20, 0, {}, True, counters(0), ()),
                *(BEGIN, counters(0)),
            ),
            ModelStats(GGUF, "noop", "struct_ops", 1, 1 << 20, 1 << 20),
        ),
        {
            "connections": 3,
            "accepted": 17,
            "refused": {"too many connections": 2, "idle": 5},
            "requests_waiting": 1,
            "requests_running": 4,
            "threads_not_started": 6,
            "inspectors": 2,
            "inspectors_filtered": True,
            "inspectors_started": 9,
            "inspectors_lost": {"its process has ended": 1},
            "loads_waiting": 8,
            "prefetch_bytes": 1 << 20,
        },
        NodeScores(
            *("node", BEGIN + after_ns, 0, 5 << 30, ()),
            (ModelScore(LLAMA, "0123456789abcdef", 1 << 30, 100 << 20, 3e9, 24e9),),
        ),
    )


def growing(parts: int = 0) -> StatsSnapshot:
    """The same, of a load that goes on: each microsecond a little more."""
    passed = time.time_ns() - BEGIN
    return snapshot(1000 + passed // 1000, after_ns=passed)


if __name__ == "__main__":
    collect.take = growing
    from pagecache_bpf.cli.main import main

    sys.exit(main())
