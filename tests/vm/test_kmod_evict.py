# SPDX-License-Identifier: Apache-2.0
"""The hooks evict and pressure: what a policy may keep, what goes first, who wins in the end."""

from __future__ import annotations

import errno
import hashlib
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import pytest

from benchmarks.cachestat import PAGE_SIZE, drop
from benchmarks.guest.cgroups import Group, fill, group, reclaim_by, stretch
from pagecache_bpf.errors import PolicyRejected
from pagecache_bpf.kernel import abi, libbpf
from pagecache_bpf.kernel.bpf_maps import BpfMap
from pagecache_bpf.kernel.control_device import Device, ExitRecord
from pagecache_bpf.policy import loader
from pagecache_bpf.policy.catalog import find
from tests.unit.command import run
from tests.vm.kernel import (
    ROOT,
    Policy,
    attached,
    mapped,
    resident,
    test_policy,
    traced,
    wait_for,
)

pytestmark = pytest.mark.vm

MIB = 1 << 20
LIMIT = 48
GOVERNED = 16
STREAM = 96
PAGES = GOVERNED * MIB // PAGE_SIZE
# Of the stress test, for each kind of lists.  100 in all, by hand: PAGECACHE_BPF_ROUNDS=50 and
# make vm ARGS="--serial -- python -m pytest tests/vm -k unload_under_pressure"
ROUNDS = int(os.environ.get("PAGECACHE_BPF_ROUNDS", "4"))


@pytest.fixture(params=["classic", "generations"])
def lists(request: pytest.FixtureRequest) -> Iterator[str]:
    with reclaim_by(request.param):
        yield request.param


@pytest.fixture
def memory() -> Iterator[Group]:
    with group("pcbevict", max=LIMIT * MIB) as it:
        yield it


@pytest.fixture
def files(mount: Path) -> tuple[Path, Path]:
    """What is governed, and a stream that is twice the cgroup's limit."""
    return fill(mount / "weights", GOVERNED), stretch(mount / "stream", STREAM)


@pytest.fixture(params=["mount", "xfs_mount"], ids=["ext4", "xfs"])
def files_anywhere(request: pytest.FixtureRequest) -> tuple[Path, Path]:
    """The same on each file system: their pages are charged with different masks."""
    mount: Path = request.getfixturevalue(request.param)
    return fill(mount / "weights", GOVERNED), stretch(mount / "stream", STREAM)


def last_exit(policy: str) -> ExitRecord | None:
    with Device() as device:
        record = list(device.exits())[-1:]
    return record[0] if record and record[0].policy == policy else None


def test_default_loses_what_keep_keeps(lists: str, memory: Group, files: tuple[Path, Path]) -> None:
    weights, stream = files
    memory.read(weights, stream)
    assert resident(weights) < PAGES // 10
    drop(files)
    with attached(test_policy("keep_all"), weights) as policy:
        memory.read(weights, stream, stream)
        assert resident(weights) >= PAGES * 99 // 100
        assert policy.status.kept_pages >= PAGES * 99 // 100
        assert policy.count("kept_bytes") >= policy.status.kept_pages * PAGE_SIZE
        words = policy.variable("last")
        seen = abi.pagecache_ctx.from_buffer_copy(b"".join(w.to_bytes(8, "little") for w in words))
        assert (seen.cgroup_id, seen.node) == (memory.id, 0)
        # A page, or a large folio: ext4 has them since 6.16.
        assert seen.nr in {1 << order for order in range(10)}
        assert policy.variable("kinds_seen") == [1 << abi.Kind.CGROUP]
        drop([weights])
        wait_for(lambda: policy.status.kept_pages == 0, "nothing kept of an empty cache")
    assert memory.events("oom_kill") == 0


def test_keep_ends_at_the_budget(lists: str, memory: Group, files: tuple[Path, Path]) -> None:
    weights, stream = files
    budget = PAGES // 4
    with (
        traced("pagecache_keep_refused") as events,
        attached(test_policy("keep_all"), weights, keep_pages=budget) as policy,
    ):
        memory.read(weights, stream, stream)
        refused = {"over_budget": 0, "overruled": 0}
        for event in events():
            refused[event["reason"]] += int(event["nr"]) * PAGE_SIZE
        assert refused["over_budget"] == policy.count("keep_over_budget_bytes")
        assert refused["overruled"] == policy.count("keep_overruled_bytes")
        assert policy.variable("granted") == [budget]
        assert policy.status.keep_max_pages == budget
        assert budget * 9 // 10 <= policy.status.kept_pages <= budget
        assert budget * 9 // 10 <= resident(weights) <= budget + PAGES // 10
        assert policy.count("keep_over_budget_bytes") > 0
        (shown,) = run("status", policy.name, "--json").data["policies"]
        assert shown["keep_max_bytes"] == budget * PAGE_SIZE
        assert shown["kept_bytes"] == policy.status.kept_pages * PAGE_SIZE


def test_a_file_too_big_to_keep(lists: str, memory: Group, files: tuple[Path, Path]) -> None:
    """Everything there is belongs to a policy that keeps it all: reads go on."""
    _, stream = files
    with attached(test_policy("keep_all"), stream) as policy:
        memory.read(stream, stream)
        assert policy.count("keep_overruled_bytes") > 0
        assert policy.count("keep_ignored_bytes") >= policy.count("keep_overruled_bytes")
    assert memory.events("oom_kill") == 0


def test_keep_yields_to_whoever_needs_memory(
    lists: str, memory: Group, files: tuple[Path, Path]
) -> None:
    """No OOM kill that the default does not have."""
    weights, stream = files
    with attached(test_policy("keep_all"), weights, stream) as policy:
        memory.read(stream)
        assert memory.allocate(LIMIT * 3 // 4) == 0
        assert policy.count("keep_overruled_bytes") > 0
        memory.read(stream)
    assert memory.events("oom_kill") == 0


def test_a_protected_neighbor_survives(
    lists: str, memory: Group, files: tuple[Path, Path], mount: Path
) -> None:
    """Two in a group at its limit: one keeps everything, the other is below its memory.low."""
    _, stream = files
    protected = fill(mount / "protected", GOVERNED // 2)
    pages = GOVERNED // 2 * MIB // PAGE_SIZE
    with (
        group("other", memory.path, low=GOVERNED * MIB) as other,
        group("greedy", memory.path) as greedy,
        attached(test_policy("keep_all"), stream) as policy,
    ):
        other.read(protected)
        greedy.read(stream, stream)
        assert policy.count("keep_overruled_bytes") > 0
        assert resident(protected) >= pages * 99 // 100
        assert other.events("low") == 0
    assert memory.events("oom_kill") == 0


def test_evict_now(lists: str, memory: Group, files: tuple[Path, Path]) -> None:
    weights, stream = files
    with attached(test_policy("evict_all"), weights, stream) as policy:
        memory.read(weights, stream)
        assert resident(weights) < PAGES // 10
        assert policy.count("evicted_now_bytes") > STREAM * MIB // 3
        assert policy.status.kept_pages == 0


TOUCH = """
import mmap, sys, zlib
with open(sys.argv[1], "rb") as file:
    data = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
print("go", flush=True)
while True:
    print(zlib.crc32(data), flush=True)
"""


@pytest.mark.parametrize(
    ("name", "kind"), [("evict_all", None), ("alternate", None), ("evict_garbage", "invalid")]
)
def test_what_is_in_use_survives(
    lists: str, memory: Group, files: tuple[Path, Path], name: str, kind: str | None
) -> None:
    """A mapping that is read all the time, below a policy that throws its pages out."""
    weights, stream = files
    before = hashlib.sha256(weights.read_bytes()).digest()
    with attached(test_policy(name), weights, stream) as policy:
        reader = memory.start(sys.executable, "-c", TOUCH, str(weights))
        assert reader.stdout and reader.stdout.readline() == "go\n"
        first = reader.stdout.readline()
        memory.read(stream)
        if kind is None:
            assert policy.count("evict_calls") > 0
        for _ in range(2):
            assert reader.stdout.readline() == first
        assert reader.poll() is None
        reader.kill()
        reader.communicate()
        if kind:
            # Its pressure hook drops pages as well: reclaim may have had few to ask about so far.
            read_until_ended(policy, memory, stream)
            ended(policy, kind, "evict")
    assert hashlib.sha256(weights.read_bytes()).digest() == before
    assert memory.events("oom_kill") == 0


def read_until_ended(policy: Policy, memory: Group, *files: Path, seconds: float = 60) -> None:
    """Read files in a cgroup that is too small for them, until the kernel has ended the policy."""
    deadline = time.monotonic() + seconds
    while policy.alive and time.monotonic() < deadline:
        memory.read(*files)


def ended(policy: Policy, kind: str, hook: str) -> None:
    """The policy was ended, with a record that says why, and reclaim does without it."""
    record = wait_for(lambda: last_exit(policy.name), "the exit record")
    assert record and (record.kind, record.hook) == (kind, hook), record
    assert not policy.alive


def test_slow_evict_is_ended(memory: Group, files: tuple[Path, Path]) -> None:
    weights, stream = files
    with attached(test_policy("slow"), weights, loops=25_000) as policy:
        memory.read(weights, stream)
        ended(policy, "slow", "evict")
        assert resident(weights) < PAGES // 10


def test_slow_pressure_is_ended(memory: Group, files: tuple[Path, Path]) -> None:
    weights, stream = files
    with attached(test_policy("slow"), weights, loops=8_000_000, hook=7) as policy:
        memory.read(weights)
        read_until_ended(policy, memory, weights, stream)
        ended(policy, "slow", "pressure")


@contextmanager
def blocked(function: str) -> Iterator[None]:
    """Somebody else has taken the function for the block."""
    blocker = ROOT / "build" / "kmod" / os.uname().release / "test" / "pcb_blocker.ko"
    subprocess.run(["insmod", str(blocker), f"function={function}"], check=True)
    try:
        yield
    finally:
        subprocess.run(["rmmod", "pcb_blocker"], check=True)


@pytest.mark.parametrize(
    ("function", "policy", "hook"),
    [
        ("folio_referenced", "keep_all", "evict"),
        ("page_cache_sync_ra", "minimal", "readahead"),
        ("filemap_read", "every_access", "access"),
    ],
)
def test_a_hook_that_is_taken(function: str, policy: str, hook: str) -> None:
    """Not half attached: refused, with the hook's name and the reason; others are not disturbed."""
    with blocked(function):
        with pytest.raises(PolicyRejected, match=f"{hook}: .*redirected already"):
            loader.attach(find(test_policy(policy)))
        record = last_exit(policy)
        assert record and (record.kind, record.code) == ("hook", -errno.EBUSY)
        with attached(test_policy("pressure_drop")) as other:
            assert other.status.hooks == ("pressure",)
    with attached(test_policy(policy)) as again:
        assert hook in again.status.hooks


def test_an_optional_hook_that_is_taken(memory: Group, files: tuple[Path, Path]) -> None:
    """The policy does without, for as long as it is attached, and says so."""
    weights, stream = files
    with ExitStack() as stack:
        with blocked("folio_referenced"):
            done = run("attach", "sequential", str(weights))
            assert "(hooks: readahead)" in done.out and "not done  the hook evict" in done.out
            stack.callback(loader.detach, "sequential")
        with Device() as device, attached(test_policy("keep_all"), stream):
            policy = Policy("sequential", device)
            memory.read(weights, stream)
            assert policy.status.hooks == ("readahead",)
            assert policy.count("prefetch_calls") > 0
            assert policy.count("evict_calls") == 0
    with attached("sequential") as again:
        assert again.status.hooks == ("readahead", "evict")


@pytest.mark.parametrize("first", ["tracer", "policy"])
def test_beside_a_tracer(first: str, memory: Group, files: tuple[Path, Path]) -> None:
    """BPF's fentry takes the place of the direct call, if it comes first; if not, it is refused."""
    weights, stream = files
    with ExitStack() as stack:
        object_ = stack.enter_context(libbpf.Object(Path(test_policy("tracer")), "tracer"))
        object_.load()
        (tracer,) = object_.programs()
        if first == "tracer":
            stack.callback(tracer.attach().close)
        stack.enter_context(attached(test_policy("keep_all"), weights))
        if first == "policy":
            with pytest.raises(OSError) as refused:
                tracer.attach()
            # Which of the two it is depends on how many direct calls this kernel's ftrace takes.
            assert refused.value.errno in (errno.EBUSY, errno.EINVAL)
        memory.read(weights, stream, stream)
        assert resident(weights) >= PAGES * 99 // 100
        if first == "tracer":
            counter = next(bpf_map for bpf_map in object_.maps() if bpf_map.name.endswith(".bss"))
            assert any(BpfMap(counter.fd).lookup(bytes(4)) or b"")


# --- pressure ---


def test_pressure_goes_first(lists: str, memory: Group, files_anywhere: tuple[Path, Path]) -> None:
    """A cgroup is short: what the policy names goes, though it is not the oldest."""
    weights, stream = files_anywhere
    given = PAGES // 2
    with attached(test_policy("pressure_drop"), weights, drop_pages=given) as policy:
        # First what is not governed, so that it is the oldest.
        memory.read_part(stream, 0, LIMIT - GOVERNED - 6)
        memory.read(weights)
        assert resident(weights) == PAGES
        memory.read_part(stream, STREAM // 2, 8)
        wait_for(lambda: policy.count("pressure_dropped_bytes"), "something to be dropped")
        assert policy.variable("cgroup_id") == [memory.id]
        assert policy.variable("machine") == [0]
        assert policy.variable("files") == [1]
        wait_for(lambda: resident(weights, 0, given) < given // 20, "the front to go")
        assert resident(weights, given) > (PAGES - given) * 9 // 10
        assert policy.count("pressure_dropped_bytes") >= given * PAGE_SIZE * 9 // 10


def test_pressure_comes_to_all_files_in_the_end(
    memory: Group, files: tuple[Path, Path], mount: Path
) -> None:
    """1024 are asked about at a time; those before the last one are mapped and stay."""
    weights, stream = files
    small = [mount / f"small{number}" for number in range(1100)]
    for path in small:
        path.write_bytes(b"x")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with (
        attached(test_policy("pressure_drop"), *small, weights, drop_pages=PAGES) as policy,
        ExitStack() as stack,
    ):
        # Python's mappings keep their files open.
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(2048, hard), hard))
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        for path in small:
            assert stack.enter_context(mapped(path))[0] == ord("x")
        memory.read_part(stream, 0, LIMIT - GOVERNED - 6)  # so that it is the oldest
        memory.read(weights)
        assert resident(weights) == PAGES
        memory.read_part(stream, STREAM // 2, 16)
        dropped = partial(policy.count, "pressure_dropped_bytes")
        wait_for(lambda: dropped() >= PAGES * PAGE_SIZE // 2, "the last file's turn", 30)


def test_pressure_asks_again_in_round_1(memory: Group, files: tuple[Path, Path]) -> None:
    weights, stream = files
    with attached(test_policy("pressure_drop"), weights, in_round=1) as policy:
        memory.read(weights)
        memory.read(stream)
        wait_for(lambda: policy.variable("rounds") == [3], "both rounds")
        wait_for(lambda: policy.count("pressure_dropped_bytes"), "something to be dropped")
        assert policy.count("pressure_wanted_bytes") >= policy.count("pressure_dropped_bytes") // 4


def test_pressure_elsewhere_is_no_concern(
    memory: Group, files: tuple[Path, Path], mount: Path
) -> None:
    weights, stream = files
    with (
        attached(test_policy("pressure_drop"), weights) as policy,
        group("pcbother", max=16 * MIB) as other,
    ):
        memory.read(weights)
        other.read(stream)
        assert policy.count("pressure_calls") == 0
        assert resident(weights) == PAGES


def test_pressure_on_the_machine(files: tuple[Path, Path]) -> None:
    """The shrinker: what writes 2 to drop_caches asks every one."""
    weights, _ = files
    with attached(test_policy("pressure_drop"), weights) as policy:
        weights.read_bytes()
        before = resident(weights)
        Path("/proc/sys/vm/drop_caches").write_text("2")
        wait_for(lambda: policy.count("pressure_dropped_bytes"), "something to be dropped")
        assert policy.variable("machine")[0] > 0
        assert resident(weights) < before


def test_pressure_and_files_that_go(
    memory: Group, scratch_fs: Path, remount: Callable[[], None], files: tuple[Path, Path]
) -> None:
    """Deleted files and file systems that are unmounted: nobody holds or misses them."""
    _, stream = files
    with attached(test_policy("pressure_drop"), drop_pages=64) as policy:
        for round_ in range(4):
            paths = [fill(scratch_fs / f"{round_}-{i}", 2) for i in range(4)]
            for path in paths:
                policy.tag(path)
            memory.read(*paths)
            with paths[0].open("rb"):
                paths[0].unlink()
                memory.read(stream)
            paths[1].unlink()
            remount()
        assert policy.count("pressure_calls") > 0
        wait_for(lambda: policy.status.governed_pages == 0, "the count to be right")


# --- all at once ---


@contextmanager
def squeezed(memory: Group, *files: Path) -> Iterator[None]:
    """Readers that thrash a cgroup for the block."""
    script = "while :; do for f; do cat $f >/dev/null || exit 1; done; done"
    readers = [memory.start("sh", "-c", script, "sh", *map(str, files)) for _ in range(2)]
    try:
        yield
        assert all(reader.poll() is None for reader in readers)
    finally:
        for reader in readers:
            reader.kill()
            reader.communicate()


def asked(policy: Policy) -> bool:
    """Whether reclaim has come to it a few times."""
    return policy.count("evict_calls") + policy.count("pressure_calls") > 20


def test_attach_load_and_unload_under_pressure(
    lists: str, memory: Group, files: tuple[Path, Path], module: object
) -> None:
    """Rounds of attach, detach, load and unload while a cgroup thrashes.

    The kind of lists is not switched meanwhile: that has OOM kills of its own (a6a8c087dc,
    "mm/mglru: fix cgroup OOM during MGLRU state switching").
    """
    assert hasattr(module, "load") and hasattr(module, "unload")
    names = ["keep_all", "evict_all", "alternate", "pressure_drop"]
    with squeezed(memory, *files):
        for round_ in range(ROUNDS):
            with attached(test_policy(names[round_ % 4]), *files) as policy:
                wait_for(partial(asked, policy), f"{policy.name} to be asked", 60)
            if round_ % 2:
                module.unload()
                module.load()
    assert memory.events("oom_kill") == 0
    assert not loader.pinned()
