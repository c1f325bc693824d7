# SPDX-License-Identifier: Apache-2.0
"""Loads the observer's programs with libbpf and has them called."""

from __future__ import annotations

import platform
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from pagecache_bpf.errors import UnsupportedError
from pagecache_bpf.kernel import bpf_object, event_sources, libbpf, pid_namespace
from pagecache_bpf.kernel.bpf_maps import BpfMap
from pagecache_bpf.kernel.file_pages import PAGE_SIZE
from pagecache_bpf.observer.count_maps import MAPS, RING
from pagecache_bpf.observer.fault_probe import maps_whole_folios

#: Without these nothing can be counted ...
NEEDED = frozenset(event.name for event in event_sources.MOVES)
#: ... and without these no access, without that no stall.
ACCESSES = frozenset(event.name for event in event_sources.ACCESSES)
SWITCH = "sched_switch"
#: Without these only what is mapped by huge pages is not seen; arm64 does not have them.
FAULTS = frozenset({"page_fault_user", "page_fault_kernel", "vm_unmapped_area"})

# Numbers of system calls: of x86-64, and of the table that newer architectures share.
_SYSCALLS = {
    "x86_64": {
        **{"readahead": 187, "fadvise": 221, "madvise": 28, "mmap": 9},
        **{"read": 0, "readv": 19, "pread": 17, "preadv": 295, "preadv2": 327},
    },
    "generic": {
        **{"readahead": 213, "fadvise": 223, "madvise": 233, "mmap": 222},
        **{"read": 63, "readv": 65, "pread": 67, "preadv": 69, "preadv2": 286},
    },
}


@dataclass(frozen=True)
class RecordingGrid:
    """How finely a recording tells events apart.

    Attributes:
        tick_ns: the interval of time, in nanoseconds.
        start_ns: when the first one begins, by CLOCK_MONOTONIC.
        cell_pages: pages of a cell of a file; a power of two.
    """

    tick_ns: int
    start_ns: int
    cell_pages: int


def constants(moves: int, grid: RecordingGrid | None = None) -> dict[str, int]:
    """Return what the programs are told before they are loaded.

    Args:
        moves: which cursor moves are told: 0, 1 or 2, as in observer_core.bpf.h.
        grid: what a recording tells apart; None: nothing is recorded.

    Returns:
        The programs' read-only variables, by name.
    """
    calls = _SYSCALLS.get(platform.machine(), _SYSCALLS["generic"])
    return {
        "observer_page_shift": PAGE_SIZE.bit_length() - 1,
        "observer_moves": moves,
        "observer_record_tick_ns": grid.tick_ns if grid else 0,
        "observer_record_start_ns": grid.start_ns if grid else 0,
        "observer_record_cell_shift": grid.cell_pages.bit_length() - 1 if grid else 0,
        "observer_whole_folios": int(maps_whole_folios()),
        **pid_namespace.constants("observer"),
        **{f"observer_sys_{name}": number for name, number in calls.items()},
    }


class Programs:
    """The loaded and attached programs.

    Args:
        moves: which cursor moves are told: 0, 1 or 2, as in bpf/include/observer_core.bpf.h.
        without: events to leave out.
        log_dir: where the verifier's log goes if it refuses; None: the run directory.
        grid: how finely a recording is to tell events apart; None: nothing is recorded.

    Raises:
        UnsupportedError: the kernel has not even the two tracepoints without which nothing can be
            counted, or it refuses the programs.
    """

    backend = "libbpf"

    def __init__(
        self,
        moves: int,
        without: Collection[str] = (),
        log_dir: Path | None = None,
        grid: RecordingGrid | None = None,
    ):
        self.missing: list[str] = []
        self.ring_fd = -1
        self._links: list[libbpf.Link] = []

        def prepare(opened: libbpf.Object) -> None:
            event_sources.choose(opened)
            opened.set_constants(constants(moves, grid))
            for found in opened.maps():
                if found.name == "recorded" and grid is None:
                    found.resize(1)  # it is allocated as a whole

        try:
            self._object = bpf_object.load(
                bpf_object.compiled("observer/observer.bpf.o", "the observer is not built"),
                "observer",
                prepare,
                "observer-load.log",
                log_dir,
            )
        except bpf_object.ProgramsRefused as error:
            raise UnsupportedError(
                "the kernel refused to load the observer", error.why, error.fix
            ) from error
        try:
            self._attach(without)
        except BaseException:
            self.close()
            raise
        self.maps: dict[str, BpfMap] = {}
        for found in self._object.maps():
            if found.name == RING:
                self.ring_fd = found.fd
            elif found.name in MAPS:
                self.maps[found.name] = BpfMap(found.fd)

    def close(self) -> None:
        """Detach and free everything."""
        for link in self._links:
            link.close()
        self._links = []
        self._object.close()

    def _attach(self, without: Collection[str]) -> None:
        _, self.missing = event_sources.attach(self._object.programs(), self._links, without)
        check_tracepoints(self.missing)


def check_tracepoints(missing: Collection[str]) -> None:
    """Refuse a kernel on which nothing could be counted.

    Args:
        missing: events that nothing on this kernel tells this process of.

    Raises:
        UnsupportedError: one of NEEDED is among them; without the others there are fewer numbers.
    """
    needed = sorted(NEEDED.intersection(missing))
    if needed:
        raise UnsupportedError(
            "the observer cannot run on this kernel",
            f"it does not have, or does not let this process use, the tracepoints "
            f"{', '.join(needed)}",
            "It needs root, Linux 5.15 or newer, and CONFIG_BPF_EVENTS",
        )
