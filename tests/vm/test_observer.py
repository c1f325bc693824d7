# SPDX-License-Identifier: Apache-2.0
"""The observer on a stock 6.12: known counts, large folios on xfs, the module's prefetch."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pagecache_bpf.policy import agent_device
from pagecache_bpf.recording.recorder import Recorder
from pagecache_bpf.weights.models import Model
from tests.observing import (
    PAGE_SIZE,
    consistent,
    counts,
    drop,
    observing,
    pages,
    pread,
    reader,
    reader_command,
    recorded_exactly,
    stream,
    touch,
)
from tests.unit.command import run
from tests.vm.conftest import device
from tests.vm.kernel import attached, make_file, wait_for

pytestmark = pytest.mark.vm

PAGES = 2039


@pytest.fixture(params=["ext4", "xfs"])
def file(request: pytest.FixtureRequest) -> Path:
    # With a delay, so that readers have to wait however slowly the guest itself runs.
    mount = device(0 if request.param == "ext4" else 1, request.param, delay_ms=1).mount
    return make_file(mount / "model.safetensors", PAGES)


def test_reads_and_mappings(file: Path) -> None:
    """Everything in one observer: starting Python takes seconds here."""
    some = random.Random(4711)
    size = PAGES * PAGE_SIZE
    spans = [(some.randrange(size - 9_000), some.randrange(1, 9_000)) for _ in range(307)]
    wanted = {page for at, n in spans for page in range(at // PAGE_SIZE, -(-(at + n) // PAGE_SIZE))}
    with observing(file) as observer:
        begun = counts(observer)
        reader(file, stream(), stream(3 * PAGE_SIZE))
        found = counts(observer)
        consistent(found, file)
        assert found.read_miss + found.read_ahead == PAGES == found.added
        assert found.read_hit == PAGES and found.read_stall_ns > 0

        drop([file])
        begun = counts(observer)
        reader(file, ["advise", 0, 0, os.POSIX_FADV_RANDOM], pread(*spans))
        consistent(counts(observer), file)
        found = counts(observer) - begun
        assert found.read == pages(*spans)
        assert found.read_miss + found.read_ahead == len(wanted) <= found.added
        assert found.read_hit == found.read - len(wanted)

        drop([file])
        begun = counts(observer)
        reader(file, touch())
        consistent(counts(observer), file)
        found = counts(observer) - begun
        assert abs(found.mmap - PAGES) <= 0.01 * PAGES
        assert found.mmap_hit <= 0.01 * PAGES and found.mmap_stall_ns > 0
        begun = counts(observer)
        reader(file, touch(), touch())
        found = counts(observer) - begun
        assert abs(found.mmap_hit - 2 * PAGES) <= 0.01 * 2 * PAGES
        assert found.mmap == found.mmap_hit


def test_the_modules_prefetch(xfs_mount: Path) -> None:
    file = make_file(xfs_mount / "model.safetensors", PAGES)
    recorder = Recorder(Model("test", file, (file,)))
    with attached("sequential", file), observing(file) as observer, recorder:
        reader(file, stream())
        found = counts(observer)
        consistent(found, file)
        assert found.prefetched > 0.5 * PAGES
        assert found.read == PAGES
        assert found.read_hit == found.prefetch_useful + found.prefetch_late
        assert found.prefetched >= found.read_hit > 0
        drop([file])
        found = counts(observer)
        consistent(found, file)
        assert found.prefetch_wasted == found.prefetched - found.read_hit
        recorder.poll()
        exact = recorder.counters()
        recording = recorder.finish()
        recorded_exactly(recording, exact)
        assert recording.total("prefetched_bytes") == found.prefetched * PAGE_SIZE
        assert recording.total("wasted_bytes") == found.prefetch_wasted * PAGE_SIZE


@pytest.fixture
def small_group() -> Iterator[Path]:
    """A memory cgroup of 40 MiB."""
    top = Path("/sys/fs/cgroup")
    (top / "cgroup.subtree_control").write_text("+memory")
    group = top / "observed"
    group.mkdir()
    (group / "memory.max").write_text(str(40 << 20))
    yield group
    group.rmdir()


def test_a_cold_read_of_more_than_the_memory_hits_nothing(mount: Path, small_group: Path) -> None:
    """Where cachestat(8) says 50%: nothing hit, readahead covered nearly all, reclaim took it."""
    file = mount / "model.safetensors"
    large = 24_593
    with file.open("wb") as out:
        for _ in range(large):
            out.write(bytes(PAGE_SIZE))
        out.flush()
        os.fsync(out.fileno())
    drop([file])
    join = f"import os; open({str(small_group / 'cgroup.procs')!r}, 'w').write(str(os.getpid()))\n"
    command = reader_command(file, stream(), first=join)
    with observing(file) as observer, Recorder(Model("test", file, (file,))) as recorder:
        subprocess.run(command, check=True, timeout=300)
        found = counts(observer)
        consistent(found, file)
        exact = recorder.counters()
        recording = recorder.finish()
        recorded_exactly(recording, exact)
        assert recording.total("reclaimed_bytes") == found.evicted_reclaim * PAGE_SIZE
        assert found.read == large == found.read_miss + found.read_ahead
        assert found.read_hit == 0
        assert found.read_ahead > 0.9 * large
        assert found.evicted_reclaim > large / 2


def test_policies_of_the_module_are_observed(mount: Path) -> None:
    """A process is started for it, lists what it sees, and ends with the policy."""
    file = make_file(mount / "model.safetensors", 211)
    assert run("attach", "noop", file, "--model", "seen").code == 0
    with agent_device.AgentDevice() as agent:
        (model,) = agent.stats()["models"]
        assert (model["model"], model["engine"], model["files"]) == ("seen", "struct_ops", 1)
        reader(file, stream())
        counters = agent.stats()["models"][0]["counters"]
        assert counters["read_bytes"] == 211 * PAGE_SIZE == counters["added_bytes"]
        assert run("untag", file).code == 0
        assert agent.stats()["models"][0]["files"] == 0
    assert run("detach", "noop").code == 0
    wait_for(lambda: not agent_device.is_running(), "the observer to end", 30)


def test_bcc_counts_the_same(slow_mount: Path) -> None:
    """The same programs, compiled by the distribution's BCC against this kernel's headers."""
    file = make_file(slow_mount / "model.safetensors", PAGES)
    with observing(file, backend="bcc") as observer:
        assert observer.snapshot()["backend"] == "bcc"
        reader(file, stream(), stream(3 * PAGE_SIZE))
        found = counts(observer)
        consistent(found, file)
        assert found.read_miss + found.read_ahead == PAGES == found.added
        assert found.read_hit == PAGES and found.read_stall_ns > 0
        drop([file])
        begun = counts(observer)
        reader(file, touch())
        consistent(counts(observer), file)
        found = counts(observer) - begun
        assert abs(found.mmap - PAGES) <= 0.01 * PAGES
        assert found.mmap_hit <= 0.01 * PAGES and found.mmap_stall_ns > 0


def test_the_kernel_lacks_nothing_that_is_needed(mount: Path) -> None:
    with observing(make_file(mount / "model.safetensors", 3)) as observer:
        assert (observer.level, observer.missing) == ("full", [])
