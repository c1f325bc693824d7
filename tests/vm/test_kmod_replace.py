# SPDX-License-Identifier: Apache-2.0
"""A policy is replaced while its files are read: no hook is answered by nobody."""

from __future__ import annotations

import os
import threading
from functools import partial
from pathlib import Path

import pytest

from benchmarks.cachestat import PAGE_SIZE, drop
from benchmarks.guest.cgroups import group
from pagecache_bpf.errors import PagecacheError, PolicyRejected, UsageError
from pagecache_bpf.policy import loader
from pagecache_bpf.policy.catalog import find
from pagecache_bpf.policy.replacing import replace
from tests.unit.command import run
from tests.vm.kernel import attached, make_file, read_pages, resident, test_policy, wait_for
from tests.vm.test_kmod_canary import silenced

pytestmark = pytest.mark.vm

PAGES = 1009
WINDOW = test_policy("window")
REPLACEMENTS = 7


class Reader(threading.Thread):
    """Reads one page of a file again and again, each time from the device."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file, self.reads, self.enough = file, 0, threading.Event()

    def run(self) -> None:
        fd = os.open(self.file, os.O_RDONLY)
        while not self.enough.is_set():
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.pread(fd, PAGE_SIZE, 0)
            self.reads += 1
        os.close(fd)

    def has_read(self, times: int) -> bool:
        """Whether it has read so often since it was started."""
        return self.reads >= times


def test_no_hook_goes_unanswered(mount: Path) -> None:
    """Each read is told to a policy, and the kernel never decides by itself."""
    file = make_file(mount / "weights", PAGES)
    with attached(WINDOW, file, window_pages=1) as policy:
        attached_ns = policy.status.attached_ns
        reader = Reader(file)
        reader.start()
        try:
            for number in range(1, REPLACEMENTS + 1):
                before = reader.reads
                assert replace(find(WINDOW), {"window_pages": 10 * number})["node"] == -1
                assert loader.knobs_of("window")["window_pages"] == 10 * number
                wait_for(partial(reader.has_read, before + 3), "it to be read on", 60)
        finally:
            reader.enough.set()
            reader.join()
        assert policy.count("access_calls") == reader.reads > 3 * REPLACEMENTS
        assert policy.count("readahead_calls") == policy.count("readahead_override") > 0
        assert policy.count("readahead_default") == 0
        assert (policy.status.attached_ns, policy.status.tags) == (attached_ns, 1)
        os.posix_fadvise(fd := os.open(file, os.O_RDONLY), 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
        read_pages(file, 0, 1)
        assert policy.status.governed_pages == resident(file) == 10 * REPLACEMENTS
        # What is counted in the policy's own memory begins anew with each version.
        assert 0 < policy.variable("kinds")[1] < policy.count("readahead_miss")
        replaced = [record for record in policy.device.exits() if record.kind == "replaced"]
        assert len(replaced) == REPLACEMENTS
    record = replaced[-1]
    assert (record.policy, record.reason) == ("window", "replaced")


def test_what_is_kept_stays_kept(mount: Path) -> None:
    """And a successor that does not evict keeps nothing."""
    weights = make_file(mount / "weights", 4099)
    stream = make_file(mount / "stream", 3 * 4099)
    with (
        group("pcbreplace", max=32 << 20) as memory,
        attached(test_policy("keep_all"), weights) as policy,
    ):
        memory.read(weights, stream)
        kept = policy.status.kept_pages
        assert kept > 0
        replace(find(test_policy("keep_all")), {"keep_pages": 3 * kept})
        assert policy.status.kept_pages == kept
        assert policy.status.keep_max_pages == 3 * kept
        calls = policy.count("evict_calls")
        replace(find(test_policy("keep_none")))
        assert policy.status.hooks == ("readahead",)
        memory.read(stream)
        assert policy.count("evict_calls") == calls
        wait_for(lambda: policy.status.kept_pages == 0, "what was kept to be forgotten")
        replace(find(test_policy("keep_all")))
        drop([weights, stream])
        memory.read(weights, stream)
        assert policy.status.kept_pages > 0


@pytest.mark.parametrize("why", ["init", "hook"])
def test_a_successor_that_is_refused(mount: Path, why: str) -> None:
    """The old programs go on as if nothing had been tried, with their knobs and their maps."""
    file = make_file(mount / "weights", PAGES)
    with attached(test_policy("quitter"), file, quit_hook=7, quit_code=-5) as policy:
        inodes = {path.name: path.stat().st_ino for path in _pins("quitter")}
        if why == "init":
            with pytest.raises(PolicyRejected, match="the test asked for it"):
                replace(find(test_policy("quitter")), {"quit_hook": 0})
        else:
            silent = pytest.raises(PolicyRejected, match="page_cache_sync_ra is hooked, but")
            with silenced("pcb_redirect_sync"), silent:
                replace(find(test_policy("quitter")))
        assert loader.knobs_of("quitter") == {"quit_hook": 7, "quit_code": -5}
        assert {path.name: path.stat().st_ino for path in _pins("quitter")} == inodes
        assert not (loader.PIN_ROOT / "quitter" / "new").exists()
        read_pages(file, 0, 1)
        assert policy.count("readahead_calls") == 1


def test_a_policy_that_has_ended_is_not_replaced(mount: Path) -> None:
    file = make_file(mount / "weights", PAGES)
    with pytest.raises(UsageError, match="is not attached"):
        replace(find(test_policy("quitter")))
    with attached(test_policy("quitter"), file, quit_hook=2) as policy:
        read_pages(file, 0, 1)
        assert not policy.alive
        with pytest.raises(PagecacheError, match="has ended by itself"):
            replace(find(test_policy("quitter")), {"quit_hook": 7})
        read_pages(file, 100, 1)


def test_on_the_command_line(mount: Path) -> None:
    """Hints and templates are handed on; the files stay under the policy."""
    file = make_file(mount / "model.safetensors", PAGES)
    with attached("multiplex", file) as policy:
        plan = ("model=test", "due_ns=+1h", "mb_per_s=77")
        assert run("hint", "multiplex", "plans", *plan).code == 0
        update = ("--json", "attach", "multiplex", "--update", "--knob", "idle_ms=4321")
        assert run(*update).data["policy"]["knobs"]["idle_ms"] == 4321
        assert loader.knobs_of("multiplex")["idle_ms"] == 4321
        (element,) = run("--json", "hint", "multiplex", "plans").data["elements"]
        assert element["value"]["mb_per_s"] == 77
        assert [tag.path for tag in policy.device.tags()] == [str(file)]
        refused = run(*update, file)
        assert (refused.code, refused.error["what"]) == (2, "PATH cannot be given with --update")


def _pins(name: str) -> list[Path]:
    return sorted((loader.PIN_ROOT / name / "maps").iterdir())
