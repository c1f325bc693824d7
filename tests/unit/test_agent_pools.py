# SPDX-License-Identifier: Apache-2.0
"""Worker processes and their queues, with real files and without a kernel that runs programs."""

from __future__ import annotations

import errno
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pagecache_bpf.agent import worker, workers
from pagecache_bpf.agent.read_threads import Extent, Source
from pagecache_bpf.agent.worker import CHUNK_BYTES
from pagecache_bpf.agent.worker_process import WorkerPlace
from pagecache_bpf.agent.workers import Pools
from pagecache_bpf.kernel.cachestat import cached_pages
from tests.vm.kernel import wait_for

PAGE = os.sysconf("SC_PAGE_SIZE")


class Log:
    """What was settled."""

    def __init__(self) -> None:
        self.parts: list[tuple[Extent, int, int]] = []
        self.started: list[int] = []
        self._lock = threading.Lock()

    def settled(self, extent: Extent, start: int, length: int) -> None:
        with self._lock:
            self.parts.append((extent, start, length))

    @property
    def total(self) -> int:
        with self._lock:
            return sum(length for _, _, length in self.parts)


@pytest.fixture
def log() -> Log:
    return Log()


@pytest.fixture
def pools(log: Log) -> Iterator[Pools]:
    made = Pools(log.settled, lambda device: 4, log.started.append)
    yield made
    made.stop()
    for pid in log.started:
        assert not Path(f"/proc/{pid}").exists()


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    with path.open("wb") as out:
        out.write(os.urandom(1 << 20) * 16 + b"tail")
        out.flush()
        os.fsync(out.fileno())
        os.posix_fadvise(out.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return path


def source(path: Path) -> Source:
    return Source(lambda: os.open(path, os.O_RDONLY | os.O_CLOEXEC))


def test_a_worker_is_there_at_once(pools: Pools) -> None:
    (pid,) = pools.pids()
    assert Path(f"/proc/{pid}/comm").read_text() == "pagecache-read\n"


def test_extents_are_read_whole(pools: Pools, log: Log, weights: Path) -> None:
    size = weights.stat().st_size
    pages = -(-size // PAGE)
    pools.submit(Extent(source(weights), 3 * PAGE, (pages - 3) * PAGE, 1))
    wait_for(lambda: log.total == (pages - 3) * PAGE, "the extent to be settled")
    with weights.open("rb") as file:
        assert cached_pages(file.fileno()) >= pages - 3
    assert pools.totals.errors == 0 and pools.queued_bytes() == 0


def test_a_file_that_is_gone_fails(pools: Pools, log: Log, tmp_path: Path) -> None:
    pools.submit(Extent(source(tmp_path / "gone"), 0, CHUNK_BYTES, 1))
    wait_for(lambda: log.total == CHUNK_BYTES, "the extent to be settled")
    assert pools.totals.by_errno == {errno.ENOENT: 1}


def test_what_is_queued_can_be_cancelled(pools: Pools, log: Log, weights: Path) -> None:
    file = source(weights)
    for owner in (1, 2):
        for _ in range(64):
            pools.submit(Extent(file, 0, 8 * CHUNK_BYTES, owner))
    pools.cancel(1)
    wait_for(lambda: log.total == 128 * 8 * CHUNK_BYTES, "all of it to be settled")
    totals = pools.totals
    assert totals.read_bytes + totals.cancelled_bytes == 128 * 8 * CHUNK_BYTES
    assert 0 < totals.cancelled_bytes <= 64 * 8 * CHUNK_BYTES


def test_no_file_stays_open(pools: Pools, log: Log, weights: Path) -> None:
    pools.submit(Extent(source(weights), 0, 8 * CHUNK_BYTES, 1))
    wait_for(lambda: log.total == 8 * CHUNK_BYTES, "the extent to be settled")

    def held() -> bool:
        pids = [os.getpid(), *pools.pids()]
        return any(
            os.readlink(link) == str(weights)
            for pid in pids
            for link in Path(f"/proc/{pid}/fd").iterdir()
            if link.is_symlink()
        )

    wait_for(lambda: not held(), "the file to be closed")


def test_a_file_is_opened_once_for_as_long_as_it_is_read(
    pools: Pools, log: Log, weights: Path
) -> None:
    opened: list[int] = []

    def opener() -> int:
        opened.append(os.open(weights, os.O_RDONLY | os.O_CLOEXEC))
        return opened[-1]

    file = Source(opener)
    (pid,) = pools.pids()
    os.kill(pid, signal.SIGSTOP)
    for turn in range(4):
        pools.submit(Extent(file, turn * CHUNK_BYTES, CHUNK_BYTES, 1))
    os.kill(pid, signal.SIGCONT)
    wait_for(lambda: log.total == 4 * CHUNK_BYTES, "the extents to be settled")
    assert len(opened) == 1
    pools.submit(Extent(file, 4 * CHUNK_BYTES, CHUNK_BYTES, 1))
    wait_for(lambda: log.total == 5 * CHUNK_BYTES, "the extent to be settled")
    assert len(opened) == 2


@pytest.mark.parametrize("killed", [True, False], ids=["killed", "stopped"])
def test_files_of_a_worker_that_ends_are_closed(log: Log, weights: Path, killed: bool) -> None:
    pools = Pools(log.settled, lambda device: 4)
    try:
        (pid,) = pools.pids()
        os.kill(pid, signal.SIGSTOP)
        pools.submit(Extent(source(weights), 0, CHUNK_BYTES, 1))
        assert str(weights) in _open_files()
        os.kill(pid, signal.SIGKILL if killed else signal.SIGCONT)
        if killed:
            wait_for(lambda: pools.queued_bytes() == 0, "the rest to be settled")
    finally:
        pools.stop()
    assert str(weights) not in _open_files()


def _open_files() -> list[str]:
    links = Path("/proc/self/fd").iterdir()
    return [os.readlink(link) for link in links if link.is_symlink()]


def test_no_more_threads_are_woken_than_there_are_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each wakeup takes CPU time from the reader, and one thread goes on with the next chunk."""
    woken: list[int] = []

    class Counted(threading.Condition):
        def notify(self, n: int = 1) -> None:
            woken.append(n)
            super().notify(n)

        def notify_all(self) -> None:
            super().notify(worker.MAX_DEPTH)

    read: list[tuple[int, int]] = []
    monkeypatch.setattr(worker, "by_populate", lambda fd, at, size, huge: read.append((at, size)))
    path = tmp_path / "weights"
    path.write_bytes(bytes(16))
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    process = worker.Worker(its)
    process._wake = Counted()
    running = threading.Thread(target=process.run, daemon=True)
    running.start()
    with ours, its, path.open("rb") as file:
        ours.settimeout(30)
        assert worker.DONE.unpack(ours.recv(64))[1] == worker.READY
        ours.send(worker.ORDER.pack(worker.DEPTH, 8, 0, 0, 0))
        # Three chunks of which the first and the last are cut, ten, and ten more.
        extents = [(4096, 5 << 20), (0, 20 << 20), (0, 20 << 20)]
        for extent, (start, length) in enumerate(extents, 1):
            order = worker.ORDER.pack(worker.READ, 0, extent, start, length)
            socket.send_fds(ours, [order], [file.fileno()])
            told = 0
            while told < length:
                code, which, nbytes, _ = worker.DONE.unpack(ours.recv(64))
                assert (code, which) == (0, extent)
                told += nbytes
        assert sum(size for _, size in read) == (5 << 20) + 2 * (20 << 20)
        its.shutdown(socket.SHUT_RDWR)
        running.join(30)
    # Beside these, one at a time while a thread tells of 8 MiB.
    assert [n for n in woken if n > 1] == [3, 8, 8] and woken.count(1) <= 6


def test_no_spare_worker_is_started_in_the_middle_of_a_load(
    pools: Pools, log: Log, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "SPARE_SECONDS", 0.0)
    monkeypatch.setattr(workers, "IDLE_SECONDS", 0.04)
    (pid,) = pools.pids()
    os.kill(pid, signal.SIGSTOP)
    pools.submit(Extent(source(weights), 0, CHUNK_BYTES, 1))
    time.sleep(0.3)
    assert pools.pids() == [pid]
    os.kill(pid, signal.SIGCONT)
    wait_for(lambda: len(pools.pids()) == 2, "a spare worker, once nothing is read")


def test_a_killed_worker_settles_what_it_had(pools: Pools, log: Log, weights: Path) -> None:
    pools.submit(Extent(source(weights), 0, CHUNK_BYTES, 1))
    wait_for(lambda: log.total == CHUNK_BYTES, "the extent to be settled")
    for pid in pools.pids():
        os.kill(pid, signal.SIGSTOP)
        pools.submit(Extent(source(weights), 0, 8 * CHUNK_BYTES, 1))
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: pools.queued_bytes() == 0, "the rest to be settled")
    assert errno.ECHILD in pools.totals.by_errno
    before = log.total
    pools.submit(Extent(source(weights), 0, CHUNK_BYTES, 1))
    wait_for(lambda: log.total == before + CHUNK_BYTES, "another worker")


def test_a_lent_worker_leaves_though_the_agent_is_stopped(
    pools: Pools, log: Log, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cgroup of a reader could not be removed otherwise: it was busy as long as that."""
    monkeypatch.setattr(workers, "IDLE_SECONDS", 600.0)  # as if the agent did nothing meanwhile
    at_home, lent = pools.pids()[0], WorkerPlace("1:2", tmp_path)  # cgroup.procs is a file here
    pools.submit(Extent(source(weights), 0, CHUNK_BYTES, 1))
    wait_for(lambda: log.total == CHUNK_BYTES, "the extent to be settled")
    pools.submit(Extent(source(weights), 0, CHUNK_BYTES, 1), lent)
    wait_for(lambda: log.total == 2 * CHUNK_BYTES, "the extent to be settled")
    pid = int((tmp_path / "cgroup.procs").read_text())
    wait_for(lambda: not Path(f"/proc/{pid}").exists(), "the lent worker to leave", 30)
    assert pools.totals.errors == 0 and at_home in pools.pids()
    assert Path(f"/proc/{at_home}").exists()
    pools.submit(Extent(source(weights), 0, CHUNK_BYTES, 1), lent)
    wait_for(lambda: log.total == 3 * CHUNK_BYTES, "another worker")


def test_a_cgroup_that_cannot_be_entered_is_told(
    pools: Pools, log: Log, weights: Path, tmp_path: Path
) -> None:
    pools.submit(Extent(source(weights), 0, CHUNK_BYTES, 1), WorkerPlace("1:2", tmp_path / "gone"))
    wait_for(lambda: log.total == CHUNK_BYTES, "the extent to be settled")
    assert pools.charged.refused == {errno.ENOENT: 1} and pools.totals.errors == 0


def test_drops_are_carried_out(pools: Pools, log: Log, weights: Path) -> None:
    weights.read_bytes()
    pools.submit(Extent(source(weights), 0, 4 * CHUNK_BYTES, 1, drop=True))
    wait_for(lambda: log.total == 4 * CHUNK_BYTES, "the drop")
    with weights.open("rb") as file:
        if cached_pages(file.fileno(), 0, 4 * CHUNK_BYTES):
            pytest.skip("the temporary directory's file system keeps its pages")
    assert pools.totals.dropped_bytes == 4 * CHUNK_BYTES


def test_s8_cpus_that_the_reader_may_not_use(
    pools: Pools, log: Log, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel refuses a cpuset's other CPUs: the thread reads all the same, and goes on."""
    absent = str(max(os.sched_getaffinity(0)) + 512)
    with pytest.raises(OSError, match="Invalid argument"):
        os.sched_setaffinity(0, {int(absent)})
    monkeypatch.setattr("pagecache_bpf.agent.workers.cpus_of", lambda node: absent)
    size = weights.stat().st_size // PAGE * PAGE
    for number in range(3):
        pools.submit(Extent(source(weights), 0, size, number), WorkerPlace("s8", None, 0))
    wait_for(lambda: log.total == 3 * size, "every extent to be settled")
    assert pools.totals.by_errno == {}
    assert len(pools.pids()) >= 1


def test_s12_a_worker_that_cannot_be_started_is_told(
    pools: Pools, log: Log, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What no process can read is settled as failed: the reader reads by itself."""

    def refuse(*_: object, **__: object) -> None:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr("pagecache_bpf.agent.worker_process.subprocess.Popen", refuse)
    for node in (-1, 0):  # the first takes the spare worker, for the second there is none
        pools.submit(Extent(source(weights), 0, PAGE, node), WorkerPlace("s12", None, node))
    wait_for(lambda: len(log.parts) == 2, "both to be settled")
    assert pools.totals.by_errno[errno.EAGAIN] >= 1
    monkeypatch.undo()
    wait_for(lambda: len(pools.pids()) >= 2, "a worker to be there again")


def test_s16_workers_have_no_rights(pools: Pools, log: Log, weights: Path) -> None:
    """They read open files: no capability, no way to one, nothing of the agent's environment."""
    for pid in pools.pids():
        for status in Path(f"/proc/{pid}/task").glob("*/status"):
            text = status.read_text()
            for name in ("CapPrm", "CapEff", "CapInh", "CapAmb"):
                assert f"{name}:\t0000000000000000" in text
            assert "NoNewPrivs:\t1" in text
        environment = Path(f"/proc/{pid}/environ").read_bytes()
        assert {line.split(b"=")[0] for line in environment.split(b"\0")} <= {
            *(b"", b"LD_LIBRARY_PATH"),
        }
    weights.chmod(0o000)  # the right is the descriptor's
    pools.submit(Extent(source(weights), 0, PAGE, 1), WorkerPlace("rights", None, -1))
    wait_for(lambda: log.total == PAGE, "the page to be read")
    assert pools.totals.errors == 0
