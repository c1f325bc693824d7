# SPDX-License-Identifier: Apache-2.0
"""Engine `agent` on this machine's own kernel: real files, real readers, a real agent."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from benchmarks.cachestat import PAGE_SIZE, drop, resident_pages
from pagecache_bpf.cli.verbs import attach, detach, status, tags
from pagecache_bpf.kernel.control_device import PolicyStatus
from pagecache_bpf.policy import agent_device
from pagecache_bpf.policy.catalog import agent_object, find
from tests.native.readahead import usual_readahead
from tests.unit.command import Result, done, run, undocumented
from tests.vm.kernel import check, make_file, read_all, wait_for

pytestmark = pytest.mark.native

ROOT = Path(__file__).resolve().parents[2]
PAGES = 8191
MIB = 1 << 20
KERNEL_AHEAD = 2 * 32  # pages that the kernel reads ahead by itself, read_ahead_kb being 128


@pytest.fixture(autouse=True)
def _nothing_attached() -> Iterator[None]:
    """Nothing is attached before a test, and no agent is left behind."""
    if agent_device.is_running():
        run("detach", "--all")
    yield
    if agent_device.is_running():
        with agent_device.AgentDevice() as agent:
            for name in agent.details():
                agent.detach(name)


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Path]:
    """A cold file of known contents on a device with the usual readahead window."""
    path = make_file(tmp_path / "model.safetensors", PAGES)
    with usual_readahead(path):
        yield path


READER = """
import mmap, sys
sys.path.insert(0, {root!r})
from tests.vm.kernel import check
path, how, piece, limit = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
with open(path, "rb", buffering=0) as file:
    size = min(limit or (1 << 62), __import__("os").fstat(file.fileno()).st_size)
    mapping = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) if how == "mmap" else None
    for offset in range(0, size, piece):
        data = mapping[offset : offset + piece] if mapping else file.read(piece)
        check(data, offset)
        if offset == 0:
            print("started", flush=True)
print("done", flush=True)
if len(sys.argv) > 5:
    sys.stdin.read()
"""


def read(path: Path, how: str = "read", piece: int = 128 << 10, limit: int = 0) -> None:
    """Read a file in a process of its own, and check every byte."""
    command = [sys.executable, "-c", READER.format(root=str(ROOT))]
    subprocess.run([*command, path, how, str(piece), str(limit)], check=True, timeout=120)


def policy(name: str = "sequential") -> PolicyStatus:
    """Its record now."""
    with agent_device.AgentDevice() as agent:
        return next(policy for policy in agent.policies() if policy.name == name)


def idle() -> None:
    """Wait until nothing is on its way."""
    wait_for(lambda: policy().inflight_pages == 0, "the prefetch queue to run empty")


@pytest.mark.parametrize(
    ("how", "piece", "share"),
    [
        ("read", 128 << 10, 0.8),
        ("read", 1 << 20, 0.8),
        ("read", PAGES * PAGE_SIZE, 0.7),  # it is told of in pieces of 2 MiB, three make a stream
        ("mmap", 128 << 10, 0.8),
    ],
    ids=["pieces", "large_pieces", "at_once", "mmap"],
)
def test_streams_are_read_ahead(file: Path, how: str, piece: int, share: float) -> None:
    shown = done("attach", "sequential", "--engine", "agent", file, "--json").data
    assert not undocumented(shown, attach.JSON["attach"])
    assert shown["engine"]["name"] == "agent" and shown["engine"]["not_honored"]
    drop([file])
    read(file, how, piece)
    idle()
    counters = policy().counters
    assert counters["prefetch_bytes"] > share * PAGES * PAGE_SIZE
    # Each page came once: by the kernel, or by the agent.
    assert counters["added_bytes"] - counters["removed_bytes"] == PAGES * PAGE_SIZE
    assert policy().governed_pages == resident_pages(file) == PAGES


def test_the_window_goes_on_into_the_next_file(file: Path, tmp_path: Path) -> None:
    """The last shards of a model are read ahead before anybody opens them, a window of them."""
    (tmp_path / "m").mkdir()
    shards = [make_file(tmp_path / "m" / f"{n}.safetensors", PAGES) for n in range(3)]
    # It begins as large as it gets: it grows while readers wait, and on a busy machine they do not.
    windows = ("--knob", "max_window_mib=16", "--knob", "start_window_kib=16384")
    done("attach", "sequential", "--engine", "agent", *windows, tmp_path / "m")
    drop(shards)
    read_all(shards[0])
    idle()
    head = resident_pages(shards[1])
    assert 8 * MIB <= head * PAGE_SIZE <= 16 * MIB and resident_pages(shards[2]) == 0
    before = policy().counters["prefetch_bytes"]
    read_all(shards[1])
    idle()
    assert resident_pages(shards[1]) == PAGES
    assert resident_pages(shards[2]) * PAGE_SIZE >= 8 * MIB
    # What was there is not asked for again.
    rest = PAGES - head + resident_pages(shards[2])
    assert policy().counters["prefetch_bytes"] - before <= 1.1 * rest * PAGE_SIZE
    done("untag", shards[1])
    assert [tag["path"] for tag in done("tags", "--json").data["tags"]] == [
        str(shards[0]),
        str(shards[2]),
    ]


def test_status_tags_and_detach_tell_the_engine(file: Path) -> None:
    done("attach", "sequential", "--engine", "agent", file, "--knob", "max_window_mib=8")
    shown = done("status", "--json").data
    assert not undocumented(shown, status.JSON["status"])
    (policy,) = shown["policies"]
    assert (policy["engine"], policy["tags"], policy["knobs"]["max_window_mib"]) == ("agent", 1, 8)
    listed = done("tags", "--json").data
    assert not undocumented(listed, tags.JSON["tags"])
    assert [tag["path"] for tag in listed["tags"]] == [str(file)]
    assert listed["tags"][0]["ino"] == file.stat().st_ino
    assert "engine agent" in done("status").out
    gone = done("detach", "sequential", "--json").data
    assert not undocumented(gone, detach.JSON["detach"])
    assert gone["detached"][0]["untagged"] == 1
    assert gone["detached"][0]["exit"]["kind"] == "detached"
    assert done("tags", "--json").data == {"tags": []}
    wait_for(lambda: not agent_device.is_running(), "the agent to end with its last policy", 20)


def test_auto_says_what_it_took_and_why(file: Path) -> None:
    if Path("/proc/modules").exists():
        pytest.skip("this kernel takes modules: the guest's tests cover auto there")
    shown = done("attach", "sequential", file, "--json").data
    assert shown["engine"]["name"] == "agent"
    assert "cannot load modules" in shown["engine"]["why"]


def test_a_window_is_not_exceeded_when_the_reader_stops(file: Path) -> None:
    done(
        *("attach", "sequential", "--engine", "agent", file),
        *("--knob", "start_window_kib=1024", "--knob", "max_window_mib=1"),
    )
    drop([file])
    command = [sys.executable, "-c", READER.format(root=str(ROOT))]
    pages = 1009
    with subprocess.Popen(
        [*command, file, "read", str(PAGE_SIZE), str(pages * PAGE_SIZE), "wait"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as reader:
        assert reader.stdout is not None
        assert [reader.stdout.readline() for _ in range(2)] == ["started\n", "done\n"]
        reader.send_signal(signal.SIGSTOP)
        try:
            idle()
            held = resident_pages(file)
            # Huge pages are filled whole: the window ends at most one of them later.
            assert pages < held <= pages + 256 + 512 + KERNEL_AHEAD
            time.sleep(0.3)
            assert resident_pages(file) == held
        finally:  # a stopped process would be waited for for ever
            reader.send_signal(signal.SIGCONT)
            reader.stdin.close()  # type: ignore[union-attr]


def test_random_readers_are_not_punished(file: Path) -> None:
    def misses() -> int:
        drop([file])
        places = random.Random(1)
        fd = os.open(file, os.O_RDONLY)
        for _ in range(211):
            at = places.randrange(PAGES) * PAGE_SIZE
            check(os.pread(fd, PAGE_SIZE, at), at)
        os.close(fd)
        return resident_pages(file)

    default = misses()
    done("attach", "sequential", "--engine", "agent", file)
    governed = misses()
    assert governed <= 1.05 * default
    assert policy().counters["prefetch_calls"] == 0


def test_a_killed_agent_leaves_nothing_behind(file: Path) -> None:
    """The reader finishes with the right bytes; the next attach starts from nothing."""
    done("attach", "sequential", "--engine", "agent", file)
    drop([file])
    reader = threading.Thread(target=read, args=(file,), kwargs={"piece": PAGE_SIZE})
    reader.start()
    wait_for(lambda: policy().counters["prefetch_calls"] > 2, "prefetching to begin")
    with agent_device.AgentDevice() as agent:
        os.kill(agent.pid, signal.SIGKILL)
    reader.join()
    wait_for(lambda: not agent_device.is_running(), "the killed process to be gone")
    assert not list(Path("/sys/fs/bpf").glob("pagecache/*"))
    assert done("status", "--json").data["policies"] == []
    done("attach", "sequential", "--engine", "agent", file)


def test_two_commands_share_one_agent(file: Path) -> None:
    results: list[Result] = []
    words = ("attach", "--engine", "agent")
    threads = [
        threading.Thread(target=lambda name=name: results.append(run(*words, name)))
        for name in ("sequential", "noop", "sequential")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(result.code for result in results) == [0, 0, 1]
    assert "attached already" in next(result.err for result in results if result.code)
    with agent_device.AgentDevice() as agent:
        assert sorted(policy.name for policy in agent.policies()) == ["noop", "sequential"]


#: Reads 1 MiB of its stdin, says so, and reads the rest when it is sent SIGUSR1.
READS_A_QUARTER_FIRST = """
import signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
for piece in range(8):
    sys.stdin.buffer.raw.read(131072)
print(flush=True)
signal.sigwait([signal.SIGUSR1])
while sys.stdin.buffer.raw.read(131072):
    pass
"""


def test_a_file_that_is_replaced_is_left_alone(file: Path) -> None:
    """Its name leads to another file now; nothing of that one is read."""
    done("attach", "sequential", "--engine", "agent", file)
    drop([file])
    with file.open("rb", buffering=0) as old:
        file.unlink()
        other = make_file(file, 1021)
        check(old.read(PAGE_SIZE), 0)
        command = [sys.executable, "-c", READS_A_QUARTER_FIRST]
        with subprocess.Popen(command, stdin=old, stdout=subprocess.PIPE) as reader:
            assert reader.stdout
            reader.stdout.readline()
            idle()  # what is ahead of it has been asked for, before it is there anyway
            reader.send_signal(signal.SIGUSR1)
        assert reader.returncode == 0
        idle()
        assert resident_pages(other) == 0
    shown = done("status", "--json").data["policies"][0]
    assert shown["read_errors"]
    assert "failed" in done("status").out


def test_a_policy_that_ends_itself(file: Path) -> None:
    source = ROOT / "tests" / "policies" / "quitter.bpf.c"
    done("attach", source, "--engine", "agent", file)
    drop([file])
    read(file, limit=PAGE_SIZE)
    ended = wait_for(
        lambda: [policy for policy in done("status", "--json").data["policies"] if policy["exit"]],
        "the end of the policy",
    )
    assert ended[0]["state"] == "ended"
    record = ended[0]["exit"]
    assert (record["kind"], record["code"]) == ("policy", 4711)
    assert record["message"] == "the test asked for it"
    assert record["hook"] in ("readahead", "access", "added")
    assert "it had ended by itself" in done("detach", "quitter").out


def test_a_failed_init_is_told(file: Path) -> None:
    source = ROOT / "tests" / "policies" / "fail_init.bpf.c"
    failed = run("attach", source, "--engine", "agent", file)
    assert failed.code == 1 and "its init failed" in failed.err
    wait_for(lambda: not agent_device.is_running(), "the agent to end", 20)


def test_attach_tags_all_or_nothing(file: Path, tmp_path: Path) -> None:
    done("attach", "noop", "--engine", "agent", file)
    shards = tmp_path / "shards"
    shards.mkdir()
    os.link(file, shards / "z.safetensors")
    make_file(shards / "a.safetensors", 3)
    failed = run("attach", "sequential", "--engine", "agent", shards)
    assert failed.code == 1 and "rolled back" in failed.err
    listed = done("tags", "--json").data["tags"]
    assert [(tag["path"], tag["policy"]) for tag in listed] == [(str(file), "noop")]
    done("attach", "sequential", "--engine", "agent", shards, "--replace")
    assert {tag["policy"] for tag in done("tags", "--json").data["tags"]} == {"sequential"}


def test_an_untagged_file_is_left_to_the_kernel(file: Path) -> None:
    done("attach", "sequential", "--engine", "agent", file)
    done("untag", file)
    drop([file])
    read(file)
    assert policy().counters["readahead_calls"] == 0


def test_a_file_can_be_unmounted_after_a_load(file: Path) -> None:
    """No descriptor stays open when the work is done."""
    done("attach", "sequential", "--engine", "agent", file)
    drop([file])
    read(file)
    idle()
    with agent_device.AgentDevice() as agent:
        held = []
        for link in Path(f"/proc/{agent.pid}/fd").iterdir():
            with suppress(FileNotFoundError):  # closed since it was listed
                held.append(os.readlink(link))
        maps = Path(f"/proc/{agent.pid}/maps").read_text()
    assert str(file) not in held and str(file) not in maps


def test_objects_for_the_agent_are_found_or_compiled(tmp_path: Path) -> None:
    assert agent_object(find("sequential")).parent.name == "agent"
    source = tmp_path / "minimal.bpf.c"
    source.write_text((ROOT / "tests" / "policies" / "minimal.bpf.c").read_text())
    assert agent_object(find(str(source))).name == "minimal.bpf.agent.o"


def test_only_root_reaches_the_agent() -> None:
    done("attach", "noop", "--engine", "agent")
    for path in (agent_device.SOCKET, agent_device.SOCKET.parent):
        assert path.stat().st_mode & 0o077 == 0


def test_what_is_tagged_is_observed(file: Path) -> None:
    # An agent that was there before still tells of what it has observed.
    name = file.parent.name
    done("attach", "noop", "--engine", "agent", file, "--model", name)
    drop([file])
    read(file)
    with agent_device.AgentDevice() as agent:
        shown = agent.stats()
    (model,) = [model for model in shown["models"] if model["model"] == name]
    assert (model["model"], model["policy"], model["engine"]) == (name, "noop", "agent")
    assert model["counters"]["added_bytes"] == PAGES * PAGE_SIZE == model["resident_bytes"]
    assert model["counters"]["read_hit_bytes"] == 0 < model["counters"]["read_bytes"]
    done("untag", file)
    with agent_device.AgentDevice() as agent:
        (model,) = [model for model in agent.stats()["models"] if model["model"] == name]
        assert model["files"] == 0


def test_what_nobody_observes(file: Path, tmp_path: Path) -> None:
    # In an agent of its own: one that has observed something keeps its observer.
    directory = tmp_path / "run"
    words = ("attach", "noop", "--engine", "agent", file, "--no-observe")
    result = run(*words, env={"PAGECACHE_BPF_RUN_DIR": str(directory)})
    assert (result.code, result.err) == (0, "")
    with agent_device.AgentDevice(directory / "agent.sock") as agent:
        shown = agent.stats()
        assert (shown["level"], shown["models"]) == ("off", [])
        agent.detach("noop")
