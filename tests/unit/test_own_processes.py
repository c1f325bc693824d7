# SPDX-License-Identifier: Apache-2.0
"""Programs that keep what they found of our processes hear of each change, after it was made."""

from __future__ import annotations

import os
import subprocess
import sys

from pagecache_bpf.kernel.own_processes import OwnProcesses


class Elements(dict[bytes, bytes]):
    """A map, and what another map held whenever this one was written."""

    def __init__(self, other: dict[bytes, bytes]) -> None:
        super().__init__()
        self._other = other
        self.seen: list[set[int]] = []

    def update(self, key: bytes, value: bytes) -> None:  # type: ignore[override]
        self[key] = value
        self.seen.append({int.from_bytes(pid, sys.byteorder) for pid in self._other})

    def delete(self, key: bytes) -> bool:
        return self.pop(key, None) is not None

    @property
    def number(self) -> int:
        (value,) = self.values()
        return int.from_bytes(value, sys.byteorder)


def test_a_change_is_told_after_it_was_made() -> None:
    processes = Elements({})
    changes = Elements(processes)
    own = OwnProcesses(processes, changes)
    assert changes.number == 1  # a state of zeroes is of no change
    own.add(os.getpid())
    assert (changes.number, changes.seen[-1]) == (2, {os.getpid()})
    own.prune()  # nothing has ended
    assert changes.number == 2


def test_a_process_that_ended_is_a_change() -> None:
    processes = Elements({})
    changes = Elements(processes)
    own = OwnProcesses(processes, changes)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        own.add(child.pid)
        before = changes.number
        child.communicate(b"\n")
    own.prune()
    assert changes.number == before + 1
    assert not processes and not changes.seen[-1]


def test_the_map_of_processes_alone_is_enough() -> None:
    processes = Elements({})
    OwnProcesses(processes).add(os.getpid())
    assert len(processes) == 1
