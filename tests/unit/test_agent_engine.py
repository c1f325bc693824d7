# SPDX-License-Identifier: Apache-2.0
"""A policy of engine agent at work on real files; its programs and maps alone are fakes.

What the programs would ask for is put into the ring buffer by the tests; worker processes read and
drop for it, and the kernel itself (cachestat or mincore) tells what is in the page cache then.
"""

from __future__ import annotations

import errno
import os
import queue
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pagecache_bpf.agent import engine, readers
from pagecache_bpf.agent.engine import Agent
from pagecache_bpf.agent.unsupported import check_heard, not_honored
from pagecache_bpf.errors import PolicyRejected, UnsupportedError, UsageError
from pagecache_bpf.kernel import abi, bpf_object, event_sources, libbpf
from pagecache_bpf.kernel.abi import Hook, RequestKind
from pagecache_bpf.kernel.cachestat import cached_pages
from pagecache_bpf.kernel.elf import Elf
from pagecache_bpf.kernel.file_key import key_of
from pagecache_bpf.kernel.file_pages import PAGE_SIZE
from pagecache_bpf.policy import catalog
from tests.vm.kernel import wait_for

PAGES = 97


class FakeMap:
    """A map as a dictionary; one that holds an array answers 0 for what was never written."""

    def __init__(self, name: str) -> None:
        self.name, self.fd, self.entries = name, name, 16
        self.elements: dict[bytes, bytes] = {}

    def lookup(self, key: bytes) -> bytes | None:
        return self.elements.get(key)

    def sum_per_cpu(self, at: int) -> int:
        return at

    def update(self, key: bytes, value: bytes, existing: bool = False) -> None:
        if existing and key not in self.elements:
            raise OSError(errno.ENOENT, "No such file or directory")
        self.elements[key] = value

    def delete(self, key: bytes) -> bool:
        return self.elements.pop(key, None) is not None


class FakeLink:
    """A program that sits on its tracepoint."""

    def __init__(self) -> None:
        self.closed = False

    def close(self) -> None:
        self.closed = True


class FakeProgram:
    """A program: what running it does is the test's."""

    def __init__(self, name: str, section: str, there: bool = True) -> None:
        self.name, self.section, self._there = name, section, there
        self.autoload = True
        self.does: Callable[[Any], int] = lambda arguments: 0
        self.link: FakeLink | None = None

    def run(self, arguments: Any = None) -> int:
        return self.does(arguments)

    def attach(self) -> FakeLink:
        if not self._there:
            raise OSError(errno.ENOENT, "No such file or directory")
        self.link = FakeLink()
        return self.link


class Kernel:
    """What libbpf would give: a loaded object and its ring buffer."""

    def __init__(self) -> None:
        self._maps: dict[str, FakeMap] = {}
        self._records: queue.Queue[bytes] = queue.Queue()
        self._receive: Callable[[bytes], None] = lambda record: None
        self.all_programs = {
            "agent_init": FakeProgram("agent_init", "syscall"),
            "agent_pressure": FakeProgram("agent_pressure", "syscall"),
            "access": FakeProgram("access", "tp_btf/mm_filemap_get_pages"),
            "fault": FakeProgram("fault", "tp_btf/mm_filemap_fault", there=False),
        }
        self.closed = False

    def map(self, name: str) -> FakeMap:
        return self._maps.setdefault(name, FakeMap(name))

    # --- libbpf.Object ---

    def maps(self) -> list[Any]:
        names = ("requests", "inode_bits", "own", "tags", "orders", "state", "counters", "windows")
        return [SimpleNamespace(name=name, fd=name) for name in (*names, "consumers")]

    def btf(self) -> Any:
        with Elf(catalog.agent_object(catalog.find("sequential"))) as elf:
            return elf.btf()

    def programs(self) -> list[FakeProgram]:
        return list(self.all_programs.values())

    def program(self, name: str) -> FakeProgram:
        return self.all_programs[name]

    def close(self) -> None:
        self.closed = True

    # --- libbpf.RingBuffer ---

    def ring(self, fd: str, receive: Callable[[bytes], None]) -> Any:
        assert fd == "requests"
        self._receive = receive
        return SimpleNamespace(poll=self._poll, close=lambda: None)

    def _poll(self, milliseconds: int) -> int:
        try:
            record = self._records.get(timeout=milliseconds / 1000 or None, block=milliseconds > 0)
        except queue.Empty:
            return 0
        self._receive(record)
        return 1

    def ask(self, kind: RequestKind, key: bytes, start: int = 0, nr: int = 0, **more: Any) -> None:
        """Put a request into the ring buffer, as a program does."""
        request = abi.pagecache_request(
            kind=kind, start=start, nr=nr, tgid=os.getpid(), node=-1, **more
        )
        request.file = abi.pagecache_file_key.from_buffer_copy(key)
        self._records.put(bytes(request))

    @property
    def done(self) -> int:
        """Pages that the agent has told the programs to be settled."""
        raw = self.map("orders").elements.get(bytes(4), b"")
        return int(abi.pagecache_agent_orders.from_buffer_copy(raw).done) if raw else 0


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    made = Kernel()
    real = bpf_object.load
    monkeypatch.setattr(
        bpf_object,
        "load",
        lambda path, name, *more: real(path, name, *more) if name == "files" else made,
    )
    monkeypatch.setattr(engine, "BpfMap", made.map)
    monkeypatch.setattr(engine, "map_id", lambda fd: len(fd))
    monkeypatch.setattr(libbpf, "RingBuffer", made.ring)
    return made


def start(started: Callable[[int], None] = lambda pid: None) -> Agent:
    return Agent(catalog.find("sequential"), Path("sequential.bpf.o"), started=started)


@pytest.fixture
def agent(kernel: Kernel) -> Iterator[Agent]:
    with start() as made:
        yield made


@pytest.fixture
def weights(tmp_path: Path) -> Iterator[int]:
    """A file of PAGES pages, none of them cached."""
    path = tmp_path / "weights"
    path.write_bytes(os.urandom(PAGES * PAGE_SIZE))
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    assert cached_pages(fd) == 0
    yield fd
    os.close(fd)


def path_of(fd: int) -> str:
    return os.readlink(f"/proc/self/fd/{fd}")


def test_what_a_program_asks_for_is_read(agent: Agent, kernel: Kernel, weights: int) -> None:
    tag = agent.tag(weights, "m", path_of(weights))
    kernel.ask(RequestKind.PREFETCH, tag.key, start=3, nr=PAGES - 3)
    wait_for(lambda: kernel.done == PAGES - 3, "the pages to be settled", 60)
    assert cached_pages(weights) >= PAGES - 3
    numbers = agent.numbers()
    assert numbers["counters"]["prefetch_issued_bytes"] == (PAGES - 3) * PAGE_SIZE
    assert numbers["refused_bytes"] == 0 and numbers["errors"] == {}
    # The record of the file says how far it has been read, for the programs.
    record = abi.pagecache_agent_tag.from_buffer_copy(kernel.map("tags").elements[tag.key])
    assert (record.model, record.done) == (1, PAGES)


def test_what_is_cached_is_not_read_again(agent: Agent, kernel: Kernel, weights: int) -> None:
    os.pread(weights, PAGES * PAGE_SIZE, 0)
    assert cached_pages(weights) == PAGES
    tag = agent.tag(weights, "m", path_of(weights))
    kernel.ask(RequestKind.PREFETCH, tag.key, start=3, nr=PAGES - 3)
    wait_for(lambda: kernel.done == PAGES - 3, "the pages to be settled", 60)
    numbers = agent.numbers()
    assert numbers["counters"]["prefetch_issued_bytes"] == 0
    assert numbers["already_cached_bytes"] == (PAGES - 3) * PAGE_SIZE
    record = abi.pagecache_agent_tag.from_buffer_copy(kernel.map("tags").elements[tag.key])
    assert record.done == PAGES


def test_what_a_program_drops_is_dropped(agent: Agent, kernel: Kernel, weights: int) -> None:
    tag = agent.tag(weights, "m", path_of(weights))
    assert len(os.pread(weights, PAGES * PAGE_SIZE, 0)) == PAGES * PAGE_SIZE
    assert cached_pages(weights) == PAGES
    kernel.ask(RequestKind.DROP, tag.key, nr=PAGES)
    wait_for(lambda: cached_pages(weights) == 0, "the pages to go", 60)
    wait_for(lambda: agent.counters()["drop_bytes"] == PAGES * PAGE_SIZE, "them to be counted", 60)
    assert kernel.done == 0


def test_requests_for_a_file_that_was_let_go_are_settled(
    agent: Agent, kernel: Kernel, weights: int
) -> None:
    """Or the programs would wait for pages that nobody reads."""
    kernel.ask(RequestKind.DROP, key_of(weights), nr=5)
    kernel.ask(RequestKind.PREFETCH, key_of(weights), nr=PAGES)
    wait_for(lambda: kernel.done == PAGES, "the request to be settled", 60)
    assert cached_pages(weights) == 0


def test_memory_that_the_reader_has_not_is_not_filled(
    agent: Agent, kernel: Kernel, weights: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "host_window", lambda memory: 3 * PAGE_SIZE + 100)
    tag = agent.tag(weights, "m", path_of(weights))
    kernel.ask(RequestKind.PREFETCH, tag.key, nr=PAGES)
    wait_for(lambda: kernel.done == PAGES, "all of it to be settled", 60)
    assert agent.numbers()["refused_bytes"] == (PAGES - 3) * PAGE_SIZE
    assert agent.counters()["prefetch_issued_bytes"] == 3 * PAGE_SIZE
    (window,) = kernel.map("windows").elements.values()
    assert int.from_bytes(window, sys.byteorder) == 3


def test_a_file_that_is_let_go(agent: Agent, kernel: Kernel, weights: int) -> None:
    os.pread(weights, PAGES * PAGE_SIZE, 0)
    tag = agent.tag(weights, "m", path_of(weights), hold=True)
    held = tag.held
    assert os.fstat(held).st_ino == os.fstat(weights).st_ino
    assert any(any(word) for word in kernel.map("inode_bits").elements.values())
    assert agent.numbers()["governed_pages"] == PAGES
    assert agent.untag(tag.key) and not agent.untag(tag.key)
    assert agent.numbers()["governed_pages"] == 0
    assert not kernel.map("tags").elements and not agent.tags
    assert not any(any(word) for word in kernel.map("inode_bits").elements.values())
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(held)
    assert agent.settle(60)


def test_a_path_that_leads_elsewhere_is_refused(
    agent: Agent, kernel: Kernel, weights: int, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.write_bytes(b"other")
    with pytest.raises(UsageError, match="was not tagged"):
        agent.tag(weights, "m", str(other))
    assert not kernel.map("tags").elements and not agent.tags


def test_each_file_knows_the_next_of_its_model(
    agent: Agent, kernel: Kernel, weights: int, tmp_path: Path
) -> None:
    second = tmp_path / "second"
    second.write_bytes(b"x" * (PAGE_SIZE + 1))
    with second.open("rb") as file:
        first = agent.tag(weights, "m", path_of(weights))
        after = agent.tag(file.fileno(), "m", str(second))

        def record() -> Any:
            return abi.pagecache_agent_tag.from_buffer_copy(kernel.map("tags").elements[first.key])

        assert (record().next.ino, record().next_pages) == (after.ino, 2)
        assert agent.untag(after.key)
        assert (record().next.ino, record().next_pages) == (0, 0)


def test_a_policy_that_ends_itself(agent: Agent, kernel: Kernel, weights: int) -> None:
    kernel.ask(
        RequestKind.EXIT, key_of(weights), start=int(Hook.ACCESS), code=-5, message=b"no more"
    )
    wait_for(lambda: agent.exit is not None, "the exit to be noted", 60)
    assert agent.exit == (-5, "no more", "access")


def test_what_the_policy_gives_up_under_pressure(
    agent: Agent, kernel: Kernel, weights: int
) -> None:
    os.pread(weights, PAGES * PAGE_SIZE, 0)
    tag = agent.tag(weights, "m", path_of(weights))
    asked: list[Any] = []

    def gives(arguments: Any) -> int:
        asked.append(arguments)
        agent._given += 10  # as a drop request of 10 pages does
        return 0

    kernel.all_programs["agent_pressure"].does = gives
    ask = agent._asker(tag)
    assert ask(40, 7, 2) == 10
    (told,) = asked
    assert (told.want.pages, told.want.cgroup_id, told.want.round, told.want.files) == (40, 7, 2, 1)
    assert (told.file_pages, told.resident_pages, told.file.ino) == (PAGES, PAGES, tag.ino)
    agent.exit = (0, "", "access")
    assert ask(40, 7, 3) == 0 and len(asked) == 1


def test_a_node_that_a_process_wants(agent: Agent, kernel: Kernel) -> None:
    key = os.getpid().to_bytes(4, sys.byteorder)
    agent.hint(os.getpid(), 1)
    assert kernel.map("consumers").elements == {key: (1).to_bytes(4, sys.byteorder)}
    agent.hint(os.getpid(), None)
    agent.hint(os.getpid(), None)
    assert kernel.map("consumers").elements == {}


def test_tracepoints_that_the_kernel_lacks_are_named(agent: Agent) -> None:
    assert agent.missing == ["mm_filemap_fault"]


def test_without_any_tracepoint_it_cannot_run(kernel: Kernel) -> None:
    kernel.all_programs["access"]._there = False
    workers: list[int] = []
    with pytest.raises(UnsupportedError, match="sequential cannot run") as caught:
        start(workers.append)
    assert "its hook readahead" in caught.value.why and caught.value.exit_code == 3
    assert "mm_filemap_get_pages, mm_filemap_map_pages, mm_filemap_fault" in caught.value.why
    assert kernel.closed
    assert all(pid == os.getpid() or not Path(f"/proc/{pid}").exists() for pid in workers)


def test_pages_that_come_and_go_are_no_source_of_readahead(kernel: Kernel) -> None:
    """As on Linux before 6.12: what is attached by then is taken off again."""
    kernel.all_programs["access"]._there = False
    added = FakeProgram("added", "raw_tp/mm_filemap_add_to_page_cache")
    kernel.all_programs["added"] = added
    with pytest.raises(UnsupportedError, match="nothing would call its hook readahead"):
        start()
    assert added.link is not None and added.link.closed and kernel.closed


def test_each_hook_is_called_from_its_own_events() -> None:
    reads = ["mm_filemap_fault"]
    pages = ["mm_filemap_add_to_page_cache", "mm_filemap_delete_from_page_cache"]
    check_heard("a", ("init", "evict", "pressure"), [])
    check_heard("a", ("access", "readahead", "pressure"), reads)
    check_heard("a", ("added", "removed", "evict"), pages)
    for hook, attached in (
        *(("access", pages), ("readahead", pages)),
        *(("added", [*reads, pages[1]]), ("removed", [*reads, pages[0]])),
    ):
        with pytest.raises(UnsupportedError, match=f"its hook {hook}"):
            check_heard("a", ("init", hook), attached)


def test_what_an_old_verifier_refuses_is_told_as_an_old_kernel(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any) -> Any:
        raise bpf_object.ProgramsRefused("sequential", "too complex", None)

    monkeypatch.setattr(bpf_object, "load", refuse)
    with pytest.raises(PolicyRejected, match="too complex"):
        start()
    pages = ["mm_filemap_add_to_page_cache", "mm_filemap_delete_from_page_cache"]
    monkeypatch.setattr(event_sources, "sources_here", lambda: dict.fromkeys(pages))
    with pytest.raises(UnsupportedError, match="nothing would call its hook readahead"):
        start()


def test_init_that_fails_leaves_nothing(kernel: Kernel) -> None:
    kernel.all_programs["agent_init"].does = lambda arguments: -errno.E2BIG
    with pytest.raises(PolicyRejected, match=os.strerror(errno.E2BIG)):
        start()
    assert kernel.closed and kernel.all_programs["access"].link is None


def test_init_that_ends_the_policy_says_why(kernel: Kernel) -> None:
    def ends(arguments: Any) -> int:
        kernel.ask(RequestKind.EXIT, bytes(24), code=3, message=b"not this machine")
        return 0

    kernel.all_programs["agent_init"].does = ends
    with pytest.raises(PolicyRejected, match=r"in init: not this machine \(3\)"):
        start()
    assert kernel.closed


def test_the_end_takes_everything_along(kernel: Kernel, weights: int) -> None:
    workers: list[int] = []
    agent = start(workers.append)
    held = agent.tag(weights, "m", path_of(weights), hold=True).held
    assert os.getpid() in workers and len(workers) > 1
    own = {int.from_bytes(key, sys.byteorder) for key in kernel.map("own").elements}
    assert own == set(workers)  # what these read is no access
    agent.close()
    link = kernel.all_programs["access"].link
    assert link is not None and link.closed and kernel.closed
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(held)
    assert [pid for pid in workers if Path(f"/proc/{pid}").exists()] == [os.getpid()]


def test_what_is_not_done_on_this_engine() -> None:
    assert len(not_honored(["evict"])) == len(not_honored([])) + 1
    assert "evict" in not_honored(["readahead", "evict"])[0]
