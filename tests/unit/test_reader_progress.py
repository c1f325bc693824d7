# SPDX-License-Identifier: Apache-2.0
"""How far readers have come: by a procfs that is made up, and by real reads of this process."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from pagecache_bpf.kernel.file_pages import PAGE_SIZE
from pagecache_bpf.kernel.kernelfs import KernelFS
from pagecache_bpf.loads.reader_progress import (
    FileProgress,
    Mapping,
    ReaderProgress,
    blocked_seconds,
)

PAGES = 7


class Proc:
    """A procfs of this process and one that it has started, below a directory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.child = 987_654
        self.put(f"{os.getpid()}/task/{os.getpid()}/children", f"{self.child} ")
        self.put(f"{self.child}/task/{self.child}/children", "")

    def put(self, name: str, text: str) -> None:
        path = self.root / "proc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def open(self, pid: int, fd: int, path: Path, position: int, flags: int = 0) -> None:
        """Have a process have a file open."""
        link = self.root / "proc" / str(pid) / "fd" / str(fd)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
        self.put(f"{pid}/fdinfo/{fd}", f"pos:\t{position}\nflags:\t0{flags:o}\nmnt_id:\t5\n")

    def progress(self, *files: Path) -> ReaderProgress:
        identities = [(file.stat().st_dev, file.stat().st_ino) for file in files]
        return ReaderProgress(identities, KernelFS(self.root))


@pytest.fixture
def proc(tmp_path: Path) -> Proc:
    return Proc(tmp_path / "root")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(bytes(PAGES * PAGE_SIZE))
    return path


def test_the_furthest_descriptor_of_all_processes_counts(
    proc: Proc, file: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.write_bytes(b"x")
    proc.open(os.getpid(), 3, file, 100)
    proc.open(os.getpid(), 4, file, 300)
    proc.open(proc.child, 3, file, 200, os.O_DIRECT)
    proc.open(proc.child, 4, other, 999)
    found = proc.progress(tmp_path / "root", file).look()
    assert found == {1: FileProgress(True, 300, True, [])}


def test_our_own_descriptors_are_no_readers(proc: Proc, file: Path) -> None:
    """Those of this process: a child's descriptor of the same number is a reader's."""
    proc.open(os.getpid(), 3, file, 300)
    proc.open(proc.child, 3, file, 200)
    found = proc.progress(file).look(our_descriptors=frozenset({3}))
    assert found[0].position == 200
    assert not found[0].direct


def test_a_descriptor_that_was_closed_is_passed_over(proc: Proc, file: Path) -> None:
    proc.open(os.getpid(), 3, file, 300)
    (proc.root / "proc" / str(os.getpid()) / "fd" / "3").unlink()
    proc.open(os.getpid(), 4, file, 5)
    (proc.root / "proc" / str(os.getpid()) / "fdinfo" / "4").unlink()
    assert proc.progress(file).look() == {}


def test_mappings_are_found_but_for_our_own(proc: Proc, file: Path) -> None:
    ino = file.stat().st_ino
    line = "{0:x}-{1:x} r--s {2:08x} fd:01 {3}                 /models/weights\n"
    ours = line.format(0x1000, 0x2000, PAGE_SIZE, ino)
    theirs = line.format(0x70000, 0x73000, 2 * PAGE_SIZE, ino)
    proc.put(f"{os.getpid()}/maps", ours + line.format(0x5000, 0x6000, 0, ino + 1))
    proc.put(f"{proc.child}/maps", theirs + ours)
    parts = frozenset({(0, PAGE_SIZE, 0x1000)})
    found = proc.progress(file).look(our_parts=parts)[0]
    assert found.opened and found.position == 0
    assert found.mappings == [
        Mapping(proc.child, 0x70000, 2 * PAGE_SIZE, 0x3000),
        Mapping(proc.child, 0x1000, PAGE_SIZE, 0x1000),
    ]


def test_what_was_read_counts_from_the_first_look_on(proc: Proc, file: Path) -> None:
    """By all processes of the family, without our own threads."""
    proc.put(f"{os.getpid()}/io", "rchar: 1000\nwchar: 5\n")
    proc.put(f"{proc.child}/io", "rchar: 50\n")
    proc.put("self/task/77/io", "rchar: 10\n")
    progress = proc.progress(file)
    assert progress.read_bytes(frozenset({77})) == 0
    proc.put(f"{os.getpid()}/io", "rchar: 1700\nwchar: 5\n")
    proc.put(f"{proc.child}/io", "rchar: 53\n")
    proc.put("self/task/77/io", "rchar: 610\n")
    assert progress.read_bytes(frozenset({77})) == 700 + 3 - 600
    proc.put("self/task/77/io", "rchar: 9999\n")
    assert progress.read_bytes(frozenset({77})) == 0


def test_a_touched_page_is_seen(file: Path) -> None:
    """Of this process, by the kernel's own page table."""
    identity = (file.stat().st_dev, file.stat().st_ino)
    progress = ReaderProgress([identity])
    fd = os.open(file, os.O_RDONLY)
    try:
        with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as mapped:
            mapped.madvise(mmap.MADV_RANDOM)  # no fault-around
            (mapping,) = progress.look()[0].mappings
            assert progress.touched(mapping, 0) is False
            assert mapped[3 * PAGE_SIZE] == 0
            assert progress.touched(mapping, 3 * PAGE_SIZE) is True
            assert progress.touched(mapping, PAGES * PAGE_SIZE) is None
    finally:
        os.close(fd)
        progress.close()


def test_a_process_that_has_ended_tells_nothing(proc: Proc, file: Path) -> None:
    gone = Mapping(proc.child, 0, 0, PAGE_SIZE)
    assert proc.progress(file).touched(gone, 0) is None


@pytest.fixture
def accounted(monkeypatch: pytest.MonkeyPatch, proc: Proc) -> Iterator[Proc]:
    monkeypatch.setattr("pagecache_bpf.loads.reader_progress.LIVE", KernelFS(proc.root))
    yield proc


def test_time_that_threads_waited_for_disks(accounted: Proc) -> None:
    ticks = os.sysconf("SC_CLK_TCK")
    for tid, waited in ((1, 3 * ticks), (2, ticks), (3, 70 * ticks)):
        fields = ["S", *map(str, range(4, 42)), str(waited), "43"]
        accounted.put(f"self/task/{tid}/stat", f"{tid} (a ) name) {' '.join(fields)}\n")
    assert blocked_seconds(frozenset({3})) is None  # the kernel does not account for it
    accounted.put("sys/kernel/task_delayacct", "1\n")
    assert blocked_seconds(frozenset({3})) == 4.0
