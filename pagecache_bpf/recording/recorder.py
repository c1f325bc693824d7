# SPDX-License-Identifier: Apache-2.0
"""Makes a recording of a load with the observer's programs.  Root only.

The kernel adds events up by cell, interval and reader; this takes the intervals that are over out
of the kernel's map every tenth of a second.  A recording that grows beyond a bound is made coarser:
two intervals become one.  So neither a long load nor a large model makes a large file.
"""

from __future__ import annotations

import os
import platform
import socket
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pagecache_bpf._run_dir import RUN_DIR
from pagecache_bpf.errors import PagecacheError
from pagecache_bpf.ipc.peer import credentials
from pagecache_bpf.kernel import cgroups
from pagecache_bpf.kernel.cachestat import cachestat
from pagecache_bpf.kernel.file_key import open_to_read
from pagecache_bpf.kernel.file_pages import PAGE_SIZE
from pagecache_bpf.kernel.kernelfs import LIVE
from pagecache_bpf.kernel.process_tree import descendants, is_alive
from pagecache_bpf.observer import Observer, RecordingGrid
from pagecache_bpf.recording.format import (
    EVENT,
    RecordedFile,
    RecordedTensor,
    Recording,
    Sample,
)
from pagecache_bpf.recording.phases import PhaseListener
from pagecache_bpf.weights.models import Model

TICK_NS = 10_000_000
#: A model is cut into about so many cells, none smaller than CELL_BYTES.
CELLS = 1024
CELL_BYTES = 256 << 10
#: With more events than this, intervals are joined.
MAX_EVENTS = 200_000
POLL_SECONDS = 0.1
_OUR_POLL_SECONDS = 0.02  # how soon a new worker of the agent has to be known
_ROOT_SOCKET = RUN_DIR / "agent.sock"

_Place = tuple[int, int, int, int]  # slot of the file, cell, interval, process


def cell_pages(total_bytes: int) -> int:
    """Return the size of a cell for a model.

    Args:
        total_bytes: the size of all its files.

    Returns:
        Pages, a power of two.
    """
    wanted = -(-max(CELL_BYTES, -(-total_bytes // CELLS)) // PAGE_SIZE)
    return 1 << max(0, (wanted - 1).bit_length())


@dataclass
class EventSums:
    """Events as they come out of the kernel's map, made coarser when they are too many.

    Attributes:
        limit: so many events are kept at most, about.
        joined: intervals of the kernel's that are one interval here; a power of two.
    """

    limit: int = MAX_EVENTS
    joined: int = 1
    _sums: dict[_Place, list[int]] = field(default_factory=dict)

    def add(self, events: Mapping[_Place, Sequence[int]]) -> None:
        """Add what was taken from the kernel.

        Args:
            events: counters by (slot, cell, interval, process).
        """
        for (slot, cell, tick, tgid), counters in events.items():
            self._add((slot, cell, tick // self.joined, tgid), counters)
        while len(self._sums) > self.limit:
            self.joined *= 2
            before, self._sums = self._sums, {}
            for (slot, cell, tick, tgid), counters in before.items():
                self._add((slot, cell, tick // 2, tgid), counters)
            if len(self._sums) == len(before):
                return  # one interval: cells and readers alone are too many

    def _add(self, place: _Place, counters: Sequence[int]) -> None:
        known = self._sums.get(place)
        if known is None:
            self._sums[place] = list(counters)
        else:
            for at, value in enumerate(counters):
                known[at] += value

    def table(self, file_of: Mapping[int, int]) -> np.ndarray:
        """Return the events as an array of EVENT, in the order of time.

        Args:
            file_of: the file's place in the model, by its slot.

        Returns:
            One row for each file, cell, tick and process in which something was counted.
        """
        rows = [
            (file_of[slot], cell, tick, tgid, *counters)
            for (slot, cell, tick, tgid), counters in self._sums.items()
            if slot in file_of
        ]
        rows.sort(key=lambda row: (row[2], row[0], row[1], row[3]))
        return np.array(rows, EVENT)


def yield_to_the_load() -> None:
    """Let the processor be the load's first: a recorder that waits loses nothing for a while."""
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, 19)


def agent_process() -> int | None:
    """Find the process of engine agent, whose reads are prefetches and no accesses.

    Returns:
        Its process id, by its socket's credentials; None if none runs.
    """
    with suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        probe.connect(str(_ROOT_SOCKET))
        return credentials(probe)[0]
    return None


def device_bytes(device: int) -> int:
    """Return how many bytes a block device has read since the machine started.

    Args:
        device: as st_dev has it.

    Returns:
        Bytes; 0 for what is no block device, such as a network file system.
    """
    wanted = [str(os.major(device)), str(os.minor(device))]
    for line in (LIVE.read("/proc/diskstats") or "").splitlines():
        fields = line.split()
        if fields[:2] == wanted:
            return int(fields[5]) * 512
    return 0


class Recorder:
    """A recording that is being made, of one model.  A context manager."""

    def __init__(self, model: Model, *, tick_ns: int = TICK_NS) -> None:
        """Begin to record.

        Args:
            model: whose files are watched.
            tick_ns: the shortest interval that is told apart, in nanoseconds.

        Raises:
            PrivilegeError: not root.
            UnsupportedError: the kernel has not what it takes.
            UsageError: a file cannot be opened or observed.
        """
        self._model = model
        self._tick_ns = tick_ns
        self._start = time.monotonic_ns()
        self._recording = Recording(
            model=model.name,
            kernel=platform.release(),
            started_ns=time.time_ns(),
            cell_bytes=cell_pages(model.size) * PAGE_SIZE,
        )
        self._sums = EventSums()
        self._file_of: dict[int, int] = {}
        self._agent: int | None = None
        self._ours: set[int] = set()
        self._looked = 0.0
        self._cgroup_of: int | None = None
        with ExitStack() as stack:
            grid = RecordingGrid(tick_ns, self._start, cell_pages(model.size))
            self._observer = stack.enter_context(Observer(grid=grid))
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pcrec-")))
            directory.chmod(0o711)
            self._phases = PhaseListener(directory)
            stack.callback(self._phases.close)
            self._know_ours()
            for number, path in enumerate(model.files):
                self._watch(number, path)
            self._device = os.stat(model.files[0]).st_dev
            self._read_before = device_bytes(self._device)
            self._sample()
            self._stack = stack.pop_all()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def environment(self) -> dict[str, str]:
        """What a command needs in its environment to mark its phases."""
        return self._phases.environment

    @property
    def phase_socket(self) -> str:
        """The socket that marks are sent to, for a process that runs already."""
        return self._phases.path

    def follow(self, pid: int) -> None:
        """Look at the memory cgroup of a process: that of the reader.

        Args:
            pid: the process.
        """
        self._cgroup_of = pid

    def counters(self) -> dict[int, dict[str, int]]:
        """Return the observer's own counters, which the recording's sums are equal to.

        Returns:
            The counters of kernel.abi.OBSERVED by process; those of all together by 0.
        """
        (model,) = self._observer.snapshot()["models"]
        by_reader = {consumer["tgid"]: consumer["counters"] for consumer in model["consumers"]}
        return {0: model["counters"], **by_reader}

    def poll(self) -> None:
        """Take what is over; to be called about every POLL_SECONDS.  Waits for a fiftieth."""
        self._know_ours()
        now = time.monotonic()
        if now - self._looked >= POLL_SECONDS:
            self._looked = now
            self._drain((time.monotonic_ns() - self._start) // self._tick_ns - 1)
            self._sample()
        time.sleep(_OUR_POLL_SECONDS)

    def finish(
        self, *, policy: str = "", engine: str = "", command: str = "", exit_code: int | None = None
    ) -> Recording:
        """End the recording.

        Args:
            policy: what governed the files.
            engine: what ran it.
            command: what was run, for people.
            exit_code: how it ended.

        Returns:
            The recording.

        Raises:
            PagecacheError: nobody read any of the files.
        """
        self._drain(1 << 32)
        self._sample()
        seen = self._observer.snapshot()
        recording = self._recording
        recording.seconds = (time.monotonic_ns() - self._start) / 1e9
        recording.policy, recording.engine = policy, engine
        recording.command, recording.exit_code = command, exit_code
        recording.tick_ns = self._tick_ns * self._sums.joined
        recording.events = self._sums.table(self._file_of)
        recording.lost = int(seen["lost_events"])
        recording.uncounted = tuple(seen["uncounted"])
        recording.readers = {
            reader["tgid"]: reader["comm"]
            for model in seen["models"]
            for reader in model["consumers"]
        }
        recording.device = f"{os.major(self._device)}:{os.minor(self._device)}"
        if not len(recording.events):
            raise PagecacheError(
                "nothing was recorded",
                "nothing of the model was read, prefetched or dropped meanwhile",
                "Check PATH, and that the command does not read with O_DIRECT",
            )
        return recording

    def close(self) -> None:
        """Detach the programs."""
        self._stack.close()

    def _watch(self, number: int, path: Path) -> None:
        """Observe a file, and note what of it is in the cache already."""
        fd = open_to_read(path)
        try:
            size = os.fstat(fd).st_size
            cell = self._recording.cell_bytes
            for index in range(-(-size // cell)):
                cached = cachestat(fd, index * cell, cell).cached * PAGE_SIZE
                if cached:
                    self._recording.resident[number, index] = min(cached, size - index * cell)
            self._observer.tag(fd, self._model.name, path=str(path))
            self._file_of[self._observer.slot_of(fd)] = number
        finally:
            os.close(fd)
        self._recording.files.append(RecordedFile(str(path), size))

    def _know_ours(self) -> None:
        """Tell the programs of workers that the agent has started since.

        Their reads are prefetch, and no accesses.  An agent that is known is not asked again for
        as long as it lives: this is done many times a second.
        """
        if self._agent is None or not is_alive(self._agent):
            self._agent = agent_process()
        ours = set(descendants(self._agent)) if self._agent is not None else set()
        for pid in ours - self._ours:
            self._observer.own(pid)
        self._ours = ours

    def _drain(self, before_tick: int) -> None:
        self._sums.add(self._observer.take_recorded(before_tick))
        self._recording.phases += [
            phase._replace(time_ns=max(0, phase.time_ns - self._start))
            for phase in self._phases.take()
        ]

    def _sample(self) -> None:
        headroom = None
        if self._cgroup_of is not None:
            with suppress(PagecacheError, OSError):
                headroom = cgroups.of_process(self._cgroup_of).headroom
        self._recording.samples.append(
            Sample(
                time.monotonic_ns() - self._start,
                device_bytes(self._device) - self._read_before,
                headroom,
            )
        )


def tensors_of(model: Model) -> list[RecordedTensor]:
    """Return where the tensors of a model lie, as far as the format of its files says so.

    Args:
        model: a model whose files have headers that can be read.

    Returns:
        The tensors by file and offset; none of a file whose header cannot be read.
    """
    from pagecache_bpf.weights import headers

    found = []
    for number, path in enumerate(model.files):
        try:
            contents = headers.parse(path)
        except PagecacheError:
            continue
        rows = zip(contents.names, contents.offsets, contents.lengths, strict=True)
        found += [
            RecordedTensor(number, name, int(offset), int(length)) for name, offset, length in rows
        ]
    return sorted(found, key=lambda tensor: (tensor.file, tensor.offset))
