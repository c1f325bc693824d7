# SPDX-License-Identifier: Apache-2.0
"""What engine `agent` may not do, whatever happens: exceed its bounds, or leave anything behind."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from benchmarks.cachestat import PAGE_SIZE, cachestat, drop, resident_pages
from pagecache_bpf.agent.engine import Agent
from pagecache_bpf.errors import UnsupportedError
from pagecache_bpf.kernel import cgroups, event_sources, libbpf
from pagecache_bpf.policy import agent_device
from pagecache_bpf.policy.catalog import agent_object, find
from tests.native.readahead import window_of
from tests.native.test_agent import (  # noqa: F401  # fixtures
    KERNEL_AHEAD,
    PAGES,
    ROOT,
    _nothing_attached,
    file,
    idle,
    policy,
    read,
)
from tests.unit.command import COMMAND, done, environment, run
from tests.vm.kernel import wait_for

pytestmark = pytest.mark.native

MIB = 1 << 20
UNKNOWN_BYTES = 16 * MIB  # what is read ahead of a reader at whom the agent has not looked yet
#: Files of a large model; 100,000 take one and a half minutes.
MANY = int(os.environ.get("PAGECACHE_BPF_FILES", "30011"))
CHUNK = 512  # pages of a huge one: what is read may end so much later
READER = """
import os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
if len(sys.argv) > 2:
    open(sys.argv[2], "w").write(str(os.getpid()))
print("ready", flush=True)
sys.stdin.readline()
while os.read(fd, 131072):
    pass
print("done", flush=True)
sys.stdin.readline()
"""


@contextmanager
def reader(path: Path, *words: str) -> Iterator[subprocess.Popen[str]]:
    """A process that reads the file from front to back when it is told a line."""
    with subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", READER, str(path), *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        try:
            yield process
        finally:
            process.kill()


def begin(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def position(process: subprocess.Popen[str], path: Path) -> int:
    """The page that a reader has come to."""
    for link in Path(f"/proc/{process.pid}/fd").iterdir():
        if os.readlink(link) == str(path):
            info = Path(f"/proc/{process.pid}/fdinfo/{link.name}").read_text()
            return int(info.split()[1]) // PAGE_SIZE
    raise AssertionError(f"{path} is not open")


def reached(process: subprocess.Popen[str], path: Path, page: int) -> bool:
    return position(process, path) >= page


def cached_behind(path: Path, page: int) -> int:
    """Pages of a file in the cache from a page on."""
    with path.open("rb") as opened:
        return cachestat(opened.fileno(), page * PAGE_SIZE).cached


@pytest.fixture
def large(tmp_path: Path, file: Path) -> Path:  # noqa: F811  # for its readahead window
    """128 MiB, cold."""
    path = tmp_path / "large.safetensors"
    with path.open("wb") as out:
        for _ in range(128):
            out.write(os.urandom(MIB))
    drop([path])
    return path


def test_a_window_is_not_exceeded_wherever_the_reader_stops(large: Path) -> None:
    window = 8
    done(
        *("attach", "sequential", "--engine", "agent", large),
        *("--knob", f"max_window_mib={window}"),
    )
    drop([large])
    with reader(large) as process:
        begin(process)
        for goal in (1009, 7001, 20011):
            wait_for(partial(reached, process, large, goal), "the reader to read")
            process.send_signal(signal.SIGSTOP)
            idle()
            at = position(process, large)
            held = cached_behind(large, at)
            assert held <= window * MIB // PAGE_SIZE + CHUNK + KERNEL_AHEAD
            assert cached_behind(large, at) == held
            process.send_signal(signal.SIGCONT)
    assert policy().counters["prefetch_bytes"] > window * MIB


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A memory cgroup that can hold 48 MiB."""
    home = cgroups.directory_of(os.getpid())
    if home is None:
        pytest.skip("this machine has no memory cgroups")
    path = home / f"pagecache-test-{os.getpid()}"
    try:
        path.mkdir()
    except OSError as error:
        pytest.skip(f"no cgroup can be made here: {error.strerror}")
    limit = path / "memory.max"
    limit = limit if limit.exists() else path / "memory.limit_in_bytes"
    try:
        limit.write_text(str(48 * MIB))
        yield path
    finally:
        wait_for(lambda: not (path / "cgroup.procs").read_text(), "the cgroup to be empty")
        path.rmdir()


def test_the_headroom_of_the_readers_cgroup_is_respected(large: Path, cgroup: Path) -> None:
    done(
        *("attach", "sequential", "--engine", "agent", large, "--knob", "max_window_mib=1024"),
        *("--knob", "start_window_kib=131072"),
    )
    drop([large])
    with reader(large, str(cgroup / "cgroup.procs")) as process:
        headroom = cgroups.of_process(process.pid).headroom
        assert headroom is not None and headroom < 48 * MIB
        begin(process)
        for goal in (2003, 9001, 20011):
            wait_for(partial(reached, process, large, goal), "the reader to read")
            process.send_signal(signal.SIGSTOP)
            idle()
            held = cached_behind(large, position(process, large)) * PAGE_SIZE
            # The agent may not have looked at the reader before its first window was asked for.
            window = max(headroom / 4, UNKNOWN_BYTES) if goal == 2003 else headroom / 4
            assert held <= window + (CHUNK + KERNEL_AHEAD) * PAGE_SIZE
            process.send_signal(signal.SIGCONT)
        wait_for(lambda: position(process, large) == 128 * MIB // PAGE_SIZE, "the end of the file")
        idle()
        # Who brought it in pays: all of it is in the reader's cgroup, and none could be elsewhere.
        used = cgroups.of_process(process.pid).levels[0].reclaimable
        assert used >= 0.95 * resident_pages(large) * PAGE_SIZE
        shown = done("status", "--json").data["policies"][0]
        assert not any("could not be moved" in reason for reason in shown["not_honored"])
    counters = policy().counters
    assert counters["prefetch_bytes"] > 16 * MIB
    # The fixture waits until the worker has left, and removes the cgroup.


def test_nothing_stays_behind_a_killed_agent(large: Path) -> None:
    ahead = window_of(large)
    before = ahead.read_text() if ahead else None
    others = set(programs())
    done("attach", "sequential", "--engine", "agent", large)
    drop([large])
    with reader(large) as process:
        begin(process)
        wait_for(lambda: policy().counters["prefetch_bytes"] > MIB, "prefetching to begin")
        with agent_device.AgentDevice() as agent:
            pid = agent.pid
            workers = done("status", "--json").data["policies"][0]["workers"]
            os.kill(pid, signal.SIGKILL)
        assert workers and set(programs()) - others
        assert process.stdout is not None and process.stdout.readline() == "done\n"
    wait_for(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers), "the workers")
    wait_for(lambda: not set(programs()) - others, "the programs to be gone")
    assert (ahead.read_text() if ahead else None) == before
    done("attach", "sequential", "--engine", "agent", large)


def device_of(path: Path) -> str:
    number = path.stat().st_dev
    return f"{os.major(number)}:{os.minor(number)}"


def programs() -> list[int]:
    """The programs of policies on tracepoints that the kernel holds, whoever does so."""
    library = libbpf.library()
    number, found = ctypes.c_uint32(0), []
    while library.bpf_prog_get_next_id(number, ctypes.byref(number)) == 0:
        fd = library.bpf_prog_get_fd_by_id(number)
        if fd < 0:
            continue
        info, size = ctypes.create_string_buffer(256), ctypes.c_uint32(256)
        if library.bpf_obj_get_info_by_fd(fd, info, ctypes.byref(size)) == 0:
            name = info.raw[64:80].rstrip(b"\0")  # struct bpf_prog_info
            if name.startswith((b"agent_get_pages", b"agent_fault")):
                found.append(number.value)
        os.close(fd)
    return found


def test_a_killed_worker_is_replaced(large: Path) -> None:
    done("attach", "sequential", "--engine", "agent", large)
    drop([large])
    read_whole(large)
    idle()
    for pid in done("status", "--json").data["policies"][0]["workers"]:
        os.kill(pid, signal.SIGKILL)
    drop([large])
    before = policy().counters["prefetch_issued_bytes"]
    read_whole(large)
    idle()
    assert policy().counters["prefetch_issued_bytes"] > before + 64 * MIB


def read_whole(path: Path) -> None:
    with reader(path) as process:
        begin(process)
        assert process.stdout is not None and process.stdout.readline() == "done\n"


def test_requests_that_find_the_buffer_full_are_counted(file: Path) -> None:  # noqa: F811
    done("attach", ROOT / "tests" / "policies" / "flood.bpf.c", "--engine", "agent", file)
    with agent_device.AgentDevice() as agent:
        pid = agent.pid
    os.kill(pid, signal.SIGSTOP)
    try:
        read_whole(file)
    finally:
        os.kill(pid, signal.SIGCONT)
    (shown,) = done("status", "--json").data["policies"]
    assert shown["lost_requests"] > 0
    assert shown["lost_requests"] == shown["counters"]["refused_calls"]
    assert "the buffer was full" in done("status").out


def test_a_model_of_very_many_files(tmp_path: Path) -> None:
    model = tmp_path / "many"
    model.mkdir()
    for number in range(MANY):
        with (model / f"{number:06}.bin").open("wb") as out:
            out.truncate(PAGE_SIZE)
    begun = time.monotonic()
    result = subprocess.run(
        [*COMMAND, "attach", "sequential", "--engine", "agent", str(model), "--json"],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)
    with agent_device.AgentDevice() as agent:
        status = Path(f"/proc/{agent.pid}/status").read_text()
    memory = next(int(line.split()[1]) for line in status.splitlines() if "VmRSS" in line)
    assert memory < 80 * 1024 + 2.2 * MANY, "KiB of the agent"
    (shown,) = done("status", "--json").data["policies"]
    assert shown["tags"] == MANY
    gone = done("detach", "sequential", "--json").data
    assert gone["detached"][0]["untagged"] == MANY
    assert time.monotonic() - begun < 240  # a bound against quadratic work, not a speed


def test_a_file_deleted_while_tagged_is_let_go(file: Path) -> None:  # noqa: F811
    done("attach", "sequential", "--engine", "agent", file)
    drop([file])
    with file.open("rb", buffering=0) as opened:
        file.unlink()
        command = "import sys\nwhile sys.stdin.buffer.raw.read(131072): pass"
        subprocess.run([sys.executable, "-c", command], stdin=opened, check=True)
        idle()
    shown = done("status", "--json").data["policies"][0]
    assert str(2) in shown["read_errors"]  # ENOENT
    with agent_device.AgentDevice() as agent:
        for pid in (agent.pid, *shown["workers"]):
            held = [os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()]
            assert not any(target.startswith(str(file)) for target in held)
    done("detach", "sequential")


def test_a_second_agent_gives_way() -> None:
    done("attach", "noop", "--engine", "agent")
    second = subprocess.run(
        [sys.executable, "-m", "pagecache_bpf.controller"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
    )
    assert second.returncode == 1
    told = second.stdout + second.stderr
    assert "another controller runs already" in told and "Traceback" not in told
    assert [policy["name"] for policy in done("status", "--json").data["policies"]] == ["noop"]


def test_a_read_only_bpffs_does_not_matter(file: Path) -> None:  # noqa: F811
    """Nothing of this engine is pinned."""
    words = " ".join([*COMMAND, "attach", "sequential", "--engine", "agent", str(file)])
    mounted = "{ mountpoint -q /sys/fs/bpf || mount -t bpf bpf /sys/fs/bpf; }"
    read_only = "mount -o remount,bind,ro /sys/fs/bpf && ! mkdir /sys/fs/bpf/x 2>&-"
    script = f"{mounted} && {read_only} && exec {words}"
    result = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=60,
    )
    assert (result.returncode, result.stderr) == (0, "")
    drop([file])
    read(file)
    assert policy().counters["prefetch_bytes"] > PAGES * PAGE_SIZE / 2


def test_a_kernel_that_tells_of_no_reader_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forced: as on a kernel without the tracepoints that lets no program be attached elsewhere."""
    monkeypatch.setenv(event_sources.VARIABLE, event_sources.FUNCTION)
    monkeypatch.setattr(event_sources, "_attachable", frozenset)
    info = find("sequential")
    before = programs()
    with pytest.raises(UnsupportedError) as told:
        Agent(info, agent_object(info))
    assert told.value.exit_code == 3
    assert "hook readahead" in told.value.why and "mm_filemap_get_pages" in told.value.why
    assert told.value.fix
    wait_for(lambda: programs() == before, "the programs to be gone")


def test_attach_fails_with_one_message(tmp_path: Path) -> None:
    missing = run("attach", "sequential", "--engine", "agent", tmp_path / "gone")
    assert missing.code == 2 and "does not exist" in missing.err and not missing.out
