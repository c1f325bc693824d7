# SPDX-License-Identifier: Apache-2.0
"""Policies, and what bounds them, are sized in bytes: kernels with 64 KiB pages read the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pagecache_bpf.policy.catalog import names
from pagecache_bpf.simulate.simulator import Result
from tests.unit.policies.traces import MIB, Script, simulator

ROOT = Path(__file__).resolve().parents[3]
SMALL, LARGE = 4096, 65536
KNOBS = {"budget_mib": 24, "window_kib": 1024, "idle_ms": 50}
#: Numbers of pages that are right whatever a page is.
RIGHT = {
    "PCB_CANARY_PAGES": "a file of our own, larger than the readahead that is tried on it,",
    "PCB_CANARY_WINDOW": "which is so much,",
    "PCB_CANARY_READS": "and is read up to here",
    "BITS_PAGES": "bits of one element of a map",
    "MAX_FOLIO_PAGES": "bounds a loop",
}


def partly() -> Script:
    """Readers that stream, stop early, come back and go here and there, in 32 MiB of memory."""
    script = Script()
    names = [script.has(f"/m/shard-{number}", 16) for number in range(3)]
    script.scan(names[0], stop=2 * MIB)
    script.wait(0.2)
    script.scan(names[1], by="d")
    script.scan(names[2], start=5 * MIB, stop=6 * MIB)
    for at in (3, 11, 7, 1, 13):
        script.scan(names[0], start=at * MIB, stop=at * MIB + MIB // 8, by="e")
    script.wait(0.2)
    for name in names:
        script.scan(name, by="f", piece=MIB)
    return script


def replay(policy: str, unit: int) -> Result:
    """Replay that with pages of so many bytes."""
    it = simulator(policy)
    known = {knob.name for knob in it.info.knobs}
    knobs = {name: value for name, value in KNOBS.items() if name in known}
    trace = partly()
    trace.settle()
    return it.replay(trace, 32 * MIB, unit=unit, knobs=knobs)


@pytest.mark.parametrize("policy", names())
def test_pages_of_any_size_are_read_alike(policy: str) -> None:
    small, large = replay(policy, SMALL), replay(policy, LARGE)
    assert small.ended is None and large.ended is None
    for total in ("read_bytes", "ahead_bytes", "dropped_bytes", "unused_bytes", "peak_bytes"):
        expected = small.totals[total]
        assert large.totals[total] == pytest.approx(expected, rel=0.05, abs=MIB), total


#: How a number of pages looks: a name or a comment says so, or it bounds one.
BARE = (
    re.compile(r"#define (\w*(?:PAGES|STEP)) \d+\b"),
    re.compile(r"#define (\w+) \d+ /\* pages\b"),
    re.compile(r"(_pages = \d{2,})"),
    re.compile(r"\b((?:min|max)_u64\([^;]*?, \d{2,}\))"),
)


def test_no_size_is_a_number_of_pages() -> None:
    """A bound of pages that is written down as such is 16 times as large with 64 KiB pages."""
    found: dict[str, str] = {}
    for folder in ("bpf/policies", "bpf/include", "kmod"):
        for path in sorted((ROOT / folder).glob("*.[ch]")):
            for bare in BARE:
                found |= dict.fromkeys(bare.findall(path.read_text()), path.name)
    assert found.keys() == RIGHT.keys(), found
