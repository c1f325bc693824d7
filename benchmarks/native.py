# SPDX-License-Identifier: Apache-2.0
"""Cold loads on this machine's own kernel and disk, with engine `agent`, beside today's warmers.

The block device's read_ahead_kb is set to what distributions ship for the time of the
benchmark, and restored whatever happens.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import directio, hosted, loaders, memory, peers, rounds, schema
from benchmarks.control import CommandLine
from benchmarks.directio import Plan
from benchmarks.disks import queue_of
from pagecache_bpf.errors import PrivilegeError
from pagecache_bpf.weights.models import Model

_LINK = {"prefetch threads": "+"}
SWEEP = (Plan(1 << 20, 8), Plan(2 << 20, 8), Plan(2 << 20, 16))


def file_system(path: Path) -> str:
    """Return the name of the file system that a path is on."""
    best = ("", "unknown")
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, where, kind = line.split()[:3]
        inside = path.resolve() == Path(where) or Path(where) in path.resolve().parents
        if inside and len(where) >= len(best[0]):
            best = (where, kind)
    return best[1]


@contextmanager
def read_ahead(path: Path, kib: int) -> Iterator[None]:
    """Set the device's readahead window for the block; it is as before after it."""
    setting = queue_of(path) / "read_ahead_kb"
    before = setting.read_text()
    setting.write_text(str(kib))
    try:
        yield
    finally:
        setting.write_text(before)


def facts(read_ahead_kb: int) -> dict[str, Any]:
    """Return what a report says of the device and of how memory is allocated."""
    return {
        "read_ahead_kb": read_ahead_kb,
        "delay_ms": None,
        "cap_bytes_per_s": None,
        "malloc": os.environ.get("GLIBC_TUNABLES", ""),
    }


def memory_of(checkpoint: Model) -> AbstractContextManager[None]:
    """Return the memory of its loads: page cache and tensors (memory.backed())."""
    return memory.backed(2 * checkpoint.size + (1 << 30))


def measure(
    checkpoint: Model,
    policy: str,
    count: int,
    names: list[str],
    read_ahead_kb: int,
    say: hosted.Say,
    with_peers: bool = True,
    picture: bool = False,
) -> schema.Report:
    """Measure all rounds; rows as in the guest, and one for each peer and loader."""
    if os.geteuid() != 0:
        raise PrivilegeError("only root can attach a policy", "", "Run the benchmark with sudo")
    loaders.warm_up()
    control = CommandLine("agent")
    fs = file_system(checkpoint.root)
    have, lack = peers.replacements() if with_peers else ({}, {})
    for name, why in lack.items():
        say(f"without {name}: {why}")
    report = schema.Report(schema.machine(device=facts(read_ahead_kb), peers_absent=lack))
    sizes = [path.stat().st_size for path in checkpoint.files]
    reference = loaders.Reference(checkpoint.files)
    with (
        read_ahead(checkpoint.root, read_ahead_kb),
        directio.reserved(sizes) as huge,
        memory_of(checkpoint),
    ):
        if not huge:
            say("too few huge pages: direct I/O goes into transparent ones")
        case = rounds.Case(
            checkpoint,
            fs,
            reference,
            {"host": "native", "delay_ms": None, "cap_bytes_per_s": None},
            engine="agent",
            huge_pages=huge,
        )
        plan = rounds.best_plan(case, SWEEP, say)
        runs = {
            f"{name} {_LINK.get(peer, 'after')} {peer}": partial(
                loaders.run_loader, name, case.files, case.reference, peers.PEERS[peer]
            )
            for name in names
            for peer in (peers.available() if with_peers else [])
        }
        runs |= {name: partial(run, case.files) for name, run in have.items()}
        report.rows = rounds.interleave(
            case, policy, control, names, count, plan, 1, say, others=runs
        )
        if picture:
            rounds.add_pictures(report.rows, policy, case, control)
    return report
