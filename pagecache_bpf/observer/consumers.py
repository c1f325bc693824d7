# SPDX-License-Identifier: Apache-2.0
"""The consumers of observed models: which processes have read, and what the programs counted.

The programs count by model and process in the map `observed`.  A process that has ended is taken
out of it, so that its number can be another's, and its counters are kept here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pagecache_bpf.kernel import abi
from pagecache_bpf.kernel.abi import OBSERVED
from pagecache_bpf.kernel.bpf_maps import BpfMap
from pagecache_bpf.kernel.process_tree import is_alive

#: How many consumers of a model are listed after their end.
ENDED_KEPT = 32
_RETIRED_KEPT = 1000  # slots of untagged files that await the next purge


@dataclass
class Consumer:
    """A process that has read files of a model.

    Attributes:
        tgid: its process id; 0: of several that have ended and are not listed one by one.
        comm: its name, as the kernel has it.
        last_ns: its last access, CLOCK_MONOTONIC.
        counters: in the order of kernel.abi.OBSERVED.
    """

    tgid: int
    comm: str
    last_ns: int
    counters: list[int]


class Consumers:
    """Reads the consumers out of the observer's maps, and keeps those that have ended."""

    def __init__(self, maps: Mapping[str, BpfMap]) -> None:
        """Read from the maps of an observer.

        Args:
            maps: by name; "observed", "seen_bits" and "mappers" are used.
        """
        self._maps = maps
        self._ended: dict[int, list[Consumer]] = {}
        self._retired: set[int] = set()

    def retire(self, slot: int) -> None:
        """Note that a file is observed no more: what was kept of it can be forgotten.

        Args:
            slot: the file's number in the maps.
        """
        self._retired.add(slot)

    def by_model(self) -> dict[int, list[Consumer]]:
        """Read all consumers; those that have ended are taken out of the maps.

        Returns:
            Consumers by the number of their model, the ended ones last.
        """
        found: dict[int, list[Consumer]] = {}
        dead = set()
        for key, raw in self._maps["observed"].items().items():
            identity = abi.pagecache_observed_key.from_buffer_copy(key)
            value = abi.pagecache_observed_value.from_buffer_copy(raw)
            comm = value.comm.decode(errors="replace")
            consumer = Consumer(identity.tgid, comm, value.last_ns, list(value.counters))
            if identity.tgid and not is_alive(identity.tgid):
                dead.add(identity.tgid)
                self._maps["observed"].delete(key)
                self._end(identity.model, consumer)
            else:
                found.setdefault(identity.model, []).append(consumer)
        if dead or len(self._retired) > _RETIRED_KEPT:
            self._purge(dead)
        for model, ended in self._ended.items():
            found.setdefault(model, []).extend(ended)
        return found

    def _end(self, model: int, consumer: Consumer) -> None:
        kept = self._ended.setdefault(model, [])
        kept.append(consumer)
        if len(kept) > ENDED_KEPT + 1:
            # The first stands for all that are not listed; it is nobody's process.
            one, two = kept.pop(0), kept.pop(0)
            both = [a + b for a, b in zip(one.counters, two.counters, strict=True)]
            kept.insert(0, Consumer(0, "", 0, both))

    def _purge(self, dead: set[int]) -> None:
        """Forget what processes that have ended, or untagged files, had mapped."""
        seen = self._maps["seen_bits"]
        for key in list(seen.keys()):
            slot, tgid = int.from_bytes(key[:4], "little"), int.from_bytes(key[4:8], "little")
            if tgid in dead or slot in self._retired:
                seen.delete(key)
        self._retired.clear()
        mappers = self._maps["mappers"]
        for key in list(mappers.keys()):
            if not is_alive(int.from_bytes(key, "little")):
                mappers.delete(key)


def sums(rows: Iterable[list[int]]) -> list[int]:
    """Add the counters of several processes.

    Args:
        rows: counters in the order of kernel.abi.OBSERVED, a list a process.

    Returns:
        The sum of each counter, in that order; zeros without a row.
    """
    return [sum(column) for column in zip([0] * len(OBSERVED), *rows, strict=True)]


def by_process(consumers: Iterable[Consumer]) -> dict[int, list[int]]:
    """Put the counters of a model's consumers by process.

    Args:
        consumers: of one model.

    Returns:
        Counters by process id; those of an ended process of the same number are added.
    """
    found: dict[int, list[int]] = {}
    for consumer in consumers:
        before = found.get(consumer.tgid, [0] * len(OBSERVED))
        found[consumer.tgid] = sums([before, consumer.counters])
    return found
