# SPDX-License-Identifier: Apache-2.0
"""Engine `agent` on a stock kernel: the same policies, on the tracepoints that 6.12 has, cgroup v2.

Commands are left out, since Python takes seconds to start here; tests/native covers them.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks.cachestat import PAGE_SIZE, drop
from pagecache_bpf.agent.engine import Agent
from pagecache_bpf.kernel import cgroups, event_sources
from pagecache_bpf.kernel.control_device import PolicyStatus
from pagecache_bpf.observer import Observer
from pagecache_bpf.policy import agent_device
from pagecache_bpf.policy.agent_device import AgentDevice
from pagecache_bpf.policy.catalog import agent_object, find
from tests import observing
from tests.vm.kernel import make_file, map_all, read_all, resident, wait_for

pytestmark = pytest.mark.vm

PAGES = 8191
MIB = 1 << 20


@contextmanager
def governed(path: Path, **knobs: int) -> Iterator[AgentDevice]:
    """The policy sequential on engine agent, governing a file; all of it ends with the block."""
    info = find("sequential")
    agent_device.start()
    with AgentDevice() as agent:
        agent.attach(info, agent_object(info), knobs)
        with path.open("rb") as file:
            agent.tag(file.fileno(), policy=info.name, model="test", path=str(path))
        drop([path])
        try:
            yield agent
        finally:
            agent.detach(info.name)


def status(agent: AgentDevice) -> PolicyStatus:
    return next(iter(agent.policies()))


def idle(agent: AgentDevice) -> None:
    wait_for(lambda: status(agent).inflight_pages == 0, "the prefetch queue to run empty", 30)


@pytest.mark.parametrize("how", ["read", "mmap"])
def test_streams_are_read_ahead(mount: Path, how: str) -> None:
    path = make_file(mount / "model.safetensors", PAGES)
    with governed(path) as agent:
        assert agent.details()["sequential"]["missing"] == []
        (read_all if how == "read" else map_all)(path)
        idle(agent)
        counters = status(agent).counters
        assert counters["prefetch_bytes"] > 0.8 * PAGES * PAGE_SIZE
        assert counters["added_bytes"] - counters["removed_bytes"] == PAGES * PAGE_SIZE
        assert status(agent).governed_pages == resident(path) == PAGES


def test_functions_tell_what_tracepoints_do(mount: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on kernels before 6.12 (tests/native/test_older_kernel.py)."""
    monkeypatch.setenv(event_sources.VARIABLE, event_sources.FUNCTION)
    path = make_file(mount / "model.safetensors", PAGES)
    with Observer() as observer, path.open("rb") as file:
        assert observer.missing == [] and observer.level == "full"
        observer.tag(file.fileno(), "model", path=str(path))
        observing.reader(path, observing.stream(), observing.touch())
        (model,) = observer.snapshot()["models"]
        assert model["counters"]["read_bytes"] == PAGES * PAGE_SIZE
        assert model["counters"]["mmap_bytes"] == PAGES * PAGE_SIZE
    info = find("sequential")
    drop([path])
    with Agent(info, agent_object(info)) as agent, path.open("rb") as file:
        assert sorted(agent.events.values())[:3] == [
            "fentry/filemap_fault",
            "fexit/filemap_get_pages",
            "fexit/filemap_map_pages",
        ]
        agent.tag(file.fileno(), "model", str(path))
        observing.reader(path, observing.stream())
        assert agent.counters()["prefetch_bytes"] > 0.8 * PAGES * PAGE_SIZE


# It pauses, as a consumer does: emulated in one thread, the agent would not get to run.
READER = """
import os, sys, time
fd = os.open(sys.argv[1], os.O_RDONLY)
print("ready", flush=True)
sys.stdin.readline()
for _ in range(int(sys.argv[2])):
    os.read(fd, 131072)
    time.sleep(0.01)
print("done", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A cgroup that can hold 48 MiB."""
    root = Path("/sys/fs/cgroup")
    if "memory" not in (root / "cgroup.controllers").read_text().split():
        pytest.skip("this guest has no cgroup v2 with a memory controller")
    (root / "cgroup.subtree_control").write_text("+memory")
    path = root / "pagecache-test"
    path.mkdir()
    (path / "memory.max").write_text(str(48 * MIB))
    yield path
    # The worker leaves by itself, so that the cgroup of a container can be removed.
    wait_for(lambda: not (path / "cgroup.procs").read_text(), "the cgroup to be empty")
    path.rmdir()


def test_pages_are_charged_to_the_reader_within_its_headroom(mount: Path, cgroup: Path) -> None:
    path = mount / "large.safetensors"
    with path.open("wb") as out:
        for _ in range(96):
            out.write(os.urandom(MIB))
    with (
        governed(path, max_window_mib=1024, start_window_kib=131072) as agent,
        subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", READER, path, str(24 * 8)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process,
    ):
        try:
            assert process.stdin is not None and process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            (cgroup / "cgroup.procs").write_text(str(process.pid))
            headroom = cgroups.of_process(process.pid).headroom
            assert headroom is not None and headroom <= 48 * MIB
            process.stdin.write("\n")
            process.stdin.flush()
            assert process.stdout.readline() == "done\n"
            process.send_signal(signal.SIGSTOP)
            idle(agent)
            ahead = resident(path, 24 * MIB // PAGE_SIZE) * PAGE_SIZE
            assert MIB < ahead <= headroom / 4 + 3 * MIB
            (level, *_) = cgroups.of_process(process.pid).levels
            # Pages of other files may lie there too, but those of this one nowhere else.
            assert level.reclaimable >= 0.95 * resident(path) * PAGE_SIZE
            assert not any(
                "could not be moved" in reason
                for reason in agent.details()["sequential"]["not_honored"]
            )
        finally:
            process.kill()  # also when it is stopped: leaving the block waits for it
