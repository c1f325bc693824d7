# SPDX-License-Identifier: Apache-2.0
"""What the kernel tests share: files of known contents, readers, attached policies."""

from __future__ import annotations

import hashlib
import mmap
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import pytest

from benchmarks.cachestat import PAGE_SIZE, cachestat
from benchmarks.cachestat import drop as drop_all
from pagecache_bpf.kernel import libbpf
from pagecache_bpf.kernel.control_device import Device, PolicyStatus
from pagecache_bpf.policy import loader
from pagecache_bpf.policy.catalog import find

ROOT = Path(__file__).resolve().parents[2]
T = TypeVar("T")
#: How many times as long as usual to wait: where all checks of the kernel are on, all takes longer.
PATIENCE = float(os.environ.get("PAGECACHE_BPF_PATIENCE", "1"))


def test_policy(name: str) -> str:
    """The object file of a policy from tests/policies."""
    return str(ROOT / "build" / "bpf" / "test" / f"{name}.bpf.o")


test_policy.__test__ = False  # type: ignore[attr-defined]  # not a test, in spite of its name


def content(index: int, length: int = PAGE_SIZE) -> bytes:
    """The bytes of a page of a test file: no two pages are alike, and anyone can compute them."""
    seed = hashlib.sha256(index.to_bytes(8, "little")).digest()
    return (seed * (PAGE_SIZE // len(seed)))[:length]


def make_file(path: Path, pages: int, tail: int = 0) -> Path:
    """A file of known contents, on the device and out of the cache.  tail: bytes more."""
    with path.open("wb") as out:
        for index in range(pages):
            out.write(content(index))
        out.write(content(pages, tail))
        out.flush()
        os.fsync(out.fileno())
    drop_all([path])
    return path


def check(data: bytes, offset: int) -> None:
    """Data read at a page boundary is what make_file() wrote."""
    for start in range(0, len(data), PAGE_SIZE):
        piece = data[start : start + PAGE_SIZE]
        assert piece == content((offset + start) // PAGE_SIZE, len(piece)), offset + start


def resident(path: Path, start: int = 0, pages: int = 0) -> int:
    """Pages of the file (or of `pages` of it from page `start`) in the cache."""
    with path.open("r+b") as file:
        return cachestat(file.fileno(), start * PAGE_SIZE, pages * PAGE_SIZE).cached


def read_pages(path: Path, start: int, pages: int) -> None:
    """read() a range through a fresh open file, and check what came."""
    fd = os.open(path, os.O_RDONLY)
    try:
        check(os.pread(fd, pages * PAGE_SIZE, start * PAGE_SIZE), start * PAGE_SIZE)
    finally:
        os.close(fd)


def read_all(path: Path, piece: int = 1 << 20) -> None:
    """read() a file from front to back."""
    with path.open("rb", buffering=0) as file:
        offset = 0
        while data := file.read(piece):
            check(data, offset)
            offset += len(data)
        assert offset == path.stat().st_size


#: Page caches have large folios only on kernels with huge pages; Debian's -rt has none.
needs_huge_pages = pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(),
    reason="this kernel is built without transparent huge pages",
)


@contextmanager
def mapped(path: Path, advice: int | None = None) -> Iterator[mmap.mmap]:
    """A read-only mapping of the whole file."""
    with path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    try:
        if advice is not None:
            mapping.madvise(advice)
        yield mapping
    finally:
        mapping.close()


def map_all(path: Path, advice: int | None = None) -> None:
    """Touch a file from front to back through mmap."""
    with mapped(path, advice) as mapping:
        for offset in range(0, len(mapping), 1 << 20):
            check(mapping[offset : offset + (1 << 20)], offset)


#: A loader that maps its file and uses it in the order of ranges (first page, pages).
MAPPED_LOADER = """
import json, mmap, sys
with open(sys.argv[1], "rb") as file:
    mapping = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
for start, pages in json.loads(sys.argv[2]):
    for page in range(start, start + pages):
        mapping[page << 12]
"""
INTERPRETER = 16 << 20  # bytes that it takes itself


def wait_for(condition: Callable[[], T], what: str, seconds: float = 10.0) -> T:
    """Poll until the condition holds, with growing pauses; fail with what was waited for."""
    seconds *= PATIENCE
    deadline = time.monotonic() + seconds
    pause = 0.001
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(pause)
        pause = min(pause * 2, 0.2)
    return value


TRACING = Path("/sys/kernel/tracing")


@contextmanager
def traced(
    event: str, group: str = "pagecache_bpf"
) -> Iterator[Callable[[], list[dict[str, str]]]]:
    """Listen to a trace event, by default one of the module; call what is yielded for the fields.

    event, group: the names of its directory in tracefs.
    """
    enable = TRACING / "events" / group / event / "enable"
    (TRACING / "buffer_size_kb").write_text("16384")
    (TRACING / "trace").write_text("")
    enable.write_text("1")

    def so_far() -> list[dict[str, str]]:
        lines = (TRACING / "trace").read_text().splitlines()
        said = [line.partition(f" {event}: ")[2].split() for line in lines if f" {event}: " in line]
        return [dict(word.split("=") for word in words if "=" in word) for words in said]

    try:
        yield so_far
    finally:
        enable.write_text("0")
        (TRACING / "trace").write_text("")


@contextmanager
def attached(name: str, *files: Path, **knobs: int) -> Iterator[Policy]:
    """A policy, attached, governing these files; everything is undone afterwards."""
    info = find(name)
    with loader.attach(info, knobs, pin=True), Device() as device:
        policy = Policy(info.name, device)
        try:
            for path in files:
                policy.tag(path)
            yield policy
        finally:
            for tag in list(device.tags()):
                if tag.policy == info.name:
                    device.untag(tag.dev_major, tag.dev_minor, tag.ino, tag.generation)
            if info.name in loader.pinned():
                loader.detach(info.name)


@contextmanager
def lending(*files: Path) -> Iterator[Device]:
    """A session that lends these files, in this order."""
    with Device() as device:
        for path in files:
            lend(device, path)
        yield device


def lend(device: Device, path: Path, flags: int = os.O_RDONLY) -> None:
    """Lend one file, opened like this; it is closed again."""
    fd = os.open(path, flags)
    try:
        device.lend(fd)
    finally:
        os.close(fd)


class Policy:
    """An attached policy, as a test looks at it."""

    def __init__(self, name: str, device: Device) -> None:
        self.name = name
        self.device = device

    def tag(self, path: Path, replace: bool = False) -> None:
        """Let this policy govern the file."""
        with path.open("rb") as file:
            self.device.tag(
                file.fileno(), policy=self.name, model="test", path=str(path), replace=replace
            )

    def untag(self, path: Path) -> None:
        """The opposite."""
        with path.open("rb") as file:
            self.device.untag_fd(file.fileno())

    @property
    def status(self) -> PolicyStatus:
        """Its record now; fails if the policy has ended."""
        return next(policy for policy in self.device.policies() if policy.name == self.name)

    @property
    def alive(self) -> bool:
        """Whether the kernel still asks it."""
        return any(policy.name == self.name for policy in self.device.policies())

    def count(self, counter: str) -> int:
        """One counter."""
        return self.status.counters[counter]

    def variable(self, name: str, section: str = "bss") -> list[int]:
        """A global variable of the policy, as 64-bit words, from its pinned map."""
        data, btf = libbpf.read_pinned(loader.PIN_ROOT / self.name / "maps" / section)
        variable = next(found for found in btf.variables(f".{section}") if found.name == name)
        raw = data[variable.offset : variable.offset + variable.size]
        return [int.from_bytes(raw[i : i + 8], "little") for i in range(0, len(raw), 8)]

    def idle(self) -> None:
        """Wait until nothing is queued for prefetch."""
        wait_for(lambda: self.status.inflight_pages == 0, "the prefetch queue to run empty")
