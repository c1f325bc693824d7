# SPDX-License-Identifier: Apache-2.0
"""The controller at work: loads, budgets, the ends of processes, restarts."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cachestat import PAGE_SIZE, drop, resident_pages
from pagecache_bpf.cli.verbs import attach, serve, status
from pagecache_bpf.controller.processes import CONNECTOR, PIDFD, Delays, Watch
from pagecache_bpf.controller.protocol import Client
from pagecache_bpf.errors import PagecacheError, UnsupportedError
from tests.native.controller import Controller, serving, start
from tests.unit.command import undocumented
from tests.vm.kernel import make_file, wait_for

pytestmark = pytest.mark.native

PAGES = 8191
ROOT = Path(__file__).resolve().parents[2]
AGENT = '[loads]\nengine = "agent"\npolicies = ["sequential", "noop"]\n'


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Two cold shards."""
    return [make_file(tmp_path / f"{name}.safetensors", PAGES) for name in ("a", "b")]


@pytest.fixture
def controller(tmp_path: Path) -> Iterator[Controller]:
    with serving(tmp_path / "run", AGENT) as found:
        yield found


def opened(paths: list[Path]) -> list[int]:
    return [os.open(path, os.O_RDONLY) for path in paths]


def load(client: Client, paths: list[Path], **arguments: Any) -> dict[str, Any]:
    """Open a load of these files."""
    fds = opened(paths)
    try:
        return client.open_load(fds, **{"model": "m", **arguments})
    finally:
        for fd in fds:
            os.close(fd)


def read(path: Path) -> None:
    command = "import sys\nwhile sys.stdin.buffer.raw.read(131072): pass"
    with path.open("rb", buffering=0) as source:
        subprocess.run([sys.executable, "-c", command], stdin=source, check=True)


def tagged(controller: Controller) -> list[tuple[str, str]]:
    with controller.root() as root:
        return sorted((tag.path, tag.policy) for tag in root.tags())


def test_a_load_from_the_beginning_to_the_end(controller: Controller, files: list[Path]) -> None:
    assert not undocumented(controller.ready, serve.JSON["serve"])
    size = PAGES * PAGE_SIZE
    with controller.client() as client:
        assert client.hello()["policies"] == ["sequential", "noop"]
        report = load(client, files)
        assert (report["state"], report["policy"], report["engine"]) == (
            "open",
            "sequential",
            "agent",
        )
        assert (report["files"], report["bytes"]) == (2, 2 * size)
        assert (report["admission"], report["resident_at_open_bytes"]) == ("fits", 0)
        assert tagged(controller) == [(str(path), "sequential") for path in files]
        read(files[0])
        with controller.root() as root:
            (policy,) = root.policies()
            assert policy.counters["prefetch_bytes"] > size // 2
        wait_for(lambda: resident_pages(files[0]) == PAGES, "the file to be in the cache")
        assert client.load_report(report["load"])["resident_bytes"] == size
        last = client.done(report["load"])
        assert (last["state"], last["dropped_bytes"], last["resident_bytes"]) == ("done", size, 0)
        assert resident_pages(files[0]) == 0
        with pytest.raises(PagecacheError, match="no such load"):
            client.load_report(report["load"])
    assert tagged(controller) == []


def test_what_a_file_has_in_the_cache(controller: Controller, files: list[Path]) -> None:
    half = 12 << 20  # where a huge page ends
    (fd,) = opened(files[:1])
    with controller.client() as client:
        assert client.residency(fd)["resident_bytes"] == 0
        queued = client.prefetch(fd, [(0, half), (half, PAGE_SIZE), (1 << 40, 7)])
        assert queued == {"queued_bytes": half + PAGE_SIZE, "refused_bytes": 7}
        wait_for(
            lambda: client.residency(fd, 0, half + PAGE_SIZE)["resident_bytes"] > half,
            "the ranges to be read",
        )
        assert client.drop(fd, 0, half) == {"dropped_bytes": half, "in_use": False}
        assert client.residency(fd, 0, half)["resident_bytes"] == 0
        assert client.drop(fd)["dropped_bytes"] > 0
        with pytest.raises(PagecacheError, match="multiple"):
            client.residency(fd, 1)
    os.close(fd)
    held = [os.readlink(each) for each in Path(f"/proc/{controller.process.pid}/fd").iterdir()]
    assert str(files[0]) not in held


def test_loads_share_files(controller: Controller, files: list[Path]) -> None:
    """The first to end takes neither the other's tags nor its pages."""
    with controller.client() as first, controller.client() as second:
        one, two = load(first, files), load(second, files[:1])
        for path in files:
            path.read_bytes()
        (fd,) = opened(files[:1])
        assert first.drop(fd) == {"dropped_bytes": 0, "in_use": True}
        os.close(fd)
        first.done(one["load"])
        assert resident_pages(files[0]) == PAGES and resident_pages(files[1]) == 0
        assert tagged(controller) == [(str(files[0]), "sequential")]
        second.close(two["load"])
        assert resident_pages(files[0]) == PAGES
    assert tagged(controller) == []


def test_roots_tags_are_left_alone(controller: Controller, files: list[Path]) -> None:
    done = controller.run("attach", "noop", "--engine", "agent", files[0])
    assert (done.code, done.err) == (0, "")
    with controller.client() as client:
        report = load(client, files[:1])
        assert report["policy"] == "noop"
        client.done(report["load"])
    assert tagged(controller) == [(str(files[0]), "noop")]


def test_a_policy_that_does_not_exist(controller: Controller, files: list[Path]) -> None:
    with controller.client() as client:
        with pytest.raises(PagecacheError, match="cannot serve loads"):
            load(client, files, policy="nosuch")
        assert load(client, files, policy="noop")["policy"] == "noop"


SLEEPER = """
import os, socket, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from pagecache_bpf.controller.protocol import Client
client = Client(Path({socket!r}))
fd = os.open({file!r}, os.O_RDONLY)
client.open_load([fd], model="m")
if {heir!r}:
    os.set_inheritable(client._socket.fileno(), True)
    if not os.fork():
        os.execvp("sleep", ["sleep", "60"])
print("open", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("heir", [False, True], ids=["alone", "with-an-heir"])
def test_a_load_ends_with_its_process(
    controller: Controller, files: list[Path], heir: bool
) -> None:
    """Killed, it is over; also when a child keeps the connection open."""
    text = SLEEPER.format(
        root=str(ROOT), socket=str(controller.socket), file=str(files[0]), heir=heir
    )
    process = subprocess.Popen(
        [sys.executable, "-c", text],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        assert len(tagged(controller)) == 1
        process.kill()
        process.wait()
        wait_for(lambda: tagged(controller) == [], "the load to end")
        with controller.client() as client:
            assert client.status()["loads"] == []
        if heir:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("how", [CONNECTOR, PIDFD])
def test_ends_are_seen_both_ways(how: str) -> None:
    ended: list[int] = []
    watch = Watch(ended.append, connector=how == CONNECTOR)
    if watch.how != how:
        pytest.skip(watch.why)
    with subprocess.Popen(["sleep", "60"]) as watched, subprocess.Popen(["sleep", "60"]) as other:
        assert watch.add(watched.pid) and watch.add(watched.pid) and watch.add(other.pid)
        watch.remove(watched.pid)  # once of twice
        watch.remove(other.pid)
        other.kill()
        other.wait()
        subprocess.run(["true"], check=True)
        watched.kill()
        wait_for(lambda: ended == [watched.pid], "the end to be told")
    assert not watch.add(watched.pid)
    watch.close()
    assert ended == [watched.pid]


def test_waiting_for_the_disk_is_known_where_the_kernel_counts(tmp_path: Path) -> None:
    switch = Path("/proc/sys/kernel/task_delayacct")
    if not switch.exists():
        pytest.skip("this kernel has no kernel.task_delayacct")
    before = switch.read_text()
    path = make_file(tmp_path / "file", 2003)
    reader = "import sys\nwhile sys.stdin.buffer.raw.read(4096): pass\nprint(1, flush=True)\n"
    try:
        switch.write_text("0")
        delays = Delays()
        assert "task_delayacct is 0" in delays.why and delays.of(os.getpid()) is None
        delays.close()
        switch.write_text("1")
        delays = Delays()
        if delays.why:
            pytest.skip(delays.why)
        with (
            path.open("rb", buffering=0) as source,
            subprocess.Popen(
                [sys.executable, "-c", reader + "import time; time.sleep(60)"],
                stdin=source,
                stdout=subprocess.PIPE,
            ) as process,
        ):
            assert process.stdout is not None
            process.stdout.readline()
            assert delays.of(process.pid) or 0 > 0
            process.kill()
        assert delays.of(process.pid) is None
        delays.close()
    finally:
        switch.write_text(before)


# --- budgets ---


def test_a_load_beyond_the_budget_streams(tmp_path: Path, files: list[Path]) -> None:
    size = PAGES * PAGE_SIZE
    # Smaller ones are refused: nothing is gained by such a window.
    budget = 64 << 20
    big = tmp_path / "big.safetensors"
    with big.open("wb") as out:
        out.truncate(100 << 20)
    with (
        serving(tmp_path / "run", f"total_budget = {budget}\n{AGENT}") as controller,
        controller.client() as client,
    ):
        report = load(client, [big])
        assert report["message"] == "104.9 MB wanted, 67.1 MB budget, will stream"
        assert (report["admission"], report["budget_bytes"]) == ("stream", budget)
        assert client.status()["budget"]["claimed_bytes"] == budget
        with pytest.raises(PagecacheError, match="was not admitted"):
            load(client, files)
        # What the policy reads ahead is bounded by it, in the kernel's own memory.
        details = controller.run("status", "--json").data
        (policy,) = details["policies"]
        assert policy["knobs"]["budget_mib"] == 64
        assert not undocumented(details, status.JSON["status"])
        (claim,) = details["controller"]["claims"]
        assert (claim["model"], claim["uid"], claim["charged_bytes"]) == ("m", 0, budget)
        assert "67.1 MB" in controller.run("status").out
        client.done(report["load"])
        assert load(client, files)["admission"] == "fits"
        assert client.status()["budget"]["claimed_bytes"] == 2 * size


def test_a_load_waits_for_its_turn(tmp_path: Path, files: list[Path]) -> None:
    rule = f'total_budget = "40MiB"\nadmission = "queue"\n{AGENT}'
    with serving(tmp_path / "run", rule) as controller:
        first, second, third = (controller.client() for _ in range(3))
        with first, second, third:
            one = load(first, files[:1])
            with pytest.raises(PagecacheError, match="waits for room"):
                load(second, files[1:])
            with pytest.raises(PagecacheError, match="was not admitted"):
                load(second, files[1:], wait=0.3)
            answers: list[dict[str, Any]] = []
            thread = threading.Thread(
                target=lambda: answers.append(load(third, files[1:], wait=30))
            )
            thread.start()
            with controller.client() as other:
                # Others are served meanwhile, and the ranks of a model that is in are let in.
                wait_for(lambda: other.status()["loads"], "the first load to be shown")
            thread.join(0.3)
            assert thread.is_alive() and not answers
            first.done(one["load"])
            thread.join(10)
            assert answers and answers[0]["admission"] == "fits"


def test_attach_tells_of_the_budget(tmp_path: Path, files: list[Path]) -> None:
    with serving(tmp_path / "run", f'total_budget = "40MiB"\n{AGENT}') as controller:
        words = ("attach", "sequential", "--engine", "agent", "--json")
        shown = controller.run(*words, files[0], "--budget", "16MiB")
        assert (shown.code, shown.err) == (0, "")
        assert not undocumented(shown.data, attach.JSON["attach"])
        (admission,) = shown.data["admission"]
        assert (admission["kind"], admission["granted_bytes"]) == ("stream", 16 << 20)
        assert shown.data["policy"]["knobs"]["budget_mib"] == 16
        refused = controller.run("attach", "noop", "--engine", "agent", *files)
        assert refused.code == 1 and "was not admitted" in refused.err
        assert "rolled back" in refused.err
        assert tagged(controller) == [(str(files[0]), "sequential")]
        controller.run("detach", "sequential")
        data = controller.run("status", "--json").data
        assert data["controller"]["claims"] == []


# --- life ---


def test_one_at_a_time(controller: Controller, files: list[Path]) -> None:
    second = start(controller.directory, AGENT)
    assert second.wait(20) == 1
    text = (controller.directory / "stderr").read_text()
    assert "another controller runs already" in text
    assert f"process {controller.process.pid}" in text
    # What attach wants is done by the one that runs.
    assert controller.run("attach", "noop", "--engine", "agent", files[0]).code == 0
    with controller.root() as root:
        assert root.pid == controller.process.pid
    with controller.client() as client:
        assert client.hello()["pid"] == controller.process.pid


def test_an_agent_on_demand_is_named(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    env = {"PAGECACHE_BPF_RUN_DIR": str(directory)}
    from tests.unit.command import run

    assert run("attach", "noop", "--engine", "agent", env=env).code == 0
    assert start(directory, AGENT).wait(20) == 1
    assert "pagecache-bpf detach --all" in (directory / "stderr").read_text()
    assert not (directory / "control.sock").exists()
    assert run("detach", "--all", env=env).code == 0


def test_nothing_is_left_behind(tmp_path: Path, files: list[Path]) -> None:
    directory = tmp_path / "run"
    with serving(directory, AGENT) as controller:
        assert controller.run("attach", "noop", "--engine", "agent", files[0]).code == 0
        assert controller.stop() == 0
    assert sorted(path.name for path in directory.iterdir()) == [
        "agent.lock",
        "config.toml",
        "stderr",
    ]
    with serving(directory, AGENT) as controller:
        assert tagged(controller) == []


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_what_persists_is_taken_up_again(
    tmp_path: Path, files: list[Path], how: signal.Signals
) -> None:
    directory = tmp_path / "run"
    with serving(directory, AGENT, "--persist") as controller:
        words = ("attach", "sequential", "--engine", "agent", "--knob", "max_window_mib=8")
        assert controller.run(*words, *files).code == 0
        with controller.client() as client:  # a load is not: its process would have to ask again
            load(client, [make_file(tmp_path / "c.safetensors", 3)])
            files[1].unlink()
            make_file(files[1], 5)
            controller.process.send_signal(how)
            controller.process.wait(20)
    with serving(directory, AGENT, "--persist") as controller:
        assert tagged(controller) == [(str(files[0]), "sequential")]
        (sentence,) = controller.ready["failed"]
        assert "another file has its name now" in sentence
        (policy,) = controller.run("status", "--json").data["policies"]
        assert policy["knobs"]["max_window_mib"] == 8
        assert controller.run("detach", "--all").code == 0
    with serving(directory, AGENT, "--persist") as controller:
        assert tagged(controller) == [] and controller.ready["policies"] == {}


def test_the_configuration_is_read_again(tmp_path: Path, files: list[Path]) -> None:
    def text(path: Path) -> str:
        listen = f'[socket]\nmode = "0600"\nlisten = "{directory}/control.sock"\n'
        model = f'[[model]]\npath = "{path}"\npolicy = "sequential"\nbudget = "16MiB"\n'
        return f"{listen}{AGENT}{model}"

    directory = tmp_path / "run"
    with serving(directory, text(files[0])) as controller:
        assert controller.ready["policies"] == {"sequential": "agent"}
        assert tagged(controller) == [(str(files[0]), "sequential")]
        config = directory / "config.toml"
        config.write_text("nonsense = 1\n")
        controller.process.send_signal(signal.SIGHUP)
        wait_for(
            lambda: "the old configuration stays" in (directory / "stderr").read_text(),
            "the mistake to be told",
        )
        assert tagged(controller) == [(str(files[0]), "sequential")]
        config.write_text(text(files[1]))
        controller.process.send_signal(signal.SIGHUP)
        wait_for(
            lambda: tagged(controller) == [(str(files[1]), "sequential")],
            "the other model to be tagged",
        )
        with controller.client() as client:  # by its file, whatever the client calls it
            report = load(client, files[1:], model="another-name")
            assert (report["model"], report["budget_bytes"]) == ("b.safetensors", 16 << 20)


def test_the_service_manager_is_told(tmp_path: Path) -> None:
    address = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(address)
        manager.settimeout(20)
        told = ""

        def expect(what: str) -> None:
            nonlocal told
            while what not in told:
                told += manager.recv(4096).decode() + "\n"

        env = {"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "400000"}
        with serving(tmp_path / "run", AGENT, **env) as controller:
            expect("READY=1")
            expect("WATCHDOG=1")
            told = ""
            controller.process.send_signal(signal.SIGHUP)
            expect("RELOADING=1\nMONOTONIC_USEC=")
            expect("READY=1")
            assert controller.stop() == 0
            expect("STOPPING=1")


def test_a_bad_configuration_is_a_usage_error(tmp_path: Path) -> None:
    process = start(tmp_path / "run", "persist = 1\n")
    assert process.wait(20) == 2
    assert "line 1: persist" in (tmp_path / "run" / "stderr").read_text()
    process = start(tmp_path / "run", '[socket]\ngroup = "nosuchgroup"\n')
    assert process.wait(20) == 2
    text = (tmp_path / "run" / "stderr").read_text()
    assert "there is no group nosuchgroup" in text and "Traceback" not in text
    assert not (tmp_path / "run" / "control.sock").exists()


def test_without_a_controller_the_client_is_told(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="no controller runs"):
        Client(tmp_path / "control.sock")


def test_a_load_of_a_thousand_files(controller: Controller, tmp_path: Path) -> None:
    shards = []
    for number in range(1000):
        path = tmp_path / f"shard{number:04}.safetensors"
        path.write_bytes(b"x" * 100)
        shards.append(path)
    before = controller.descriptors()
    with controller.client() as client:
        begin = time.monotonic()
        report = load(client, shards)
        took = time.monotonic() - begin
        assert (report["files"], len(tagged(controller))) == (1000, 1000)
        client.done(report["load"])
    assert took < 60
    wait_for(lambda: controller.descriptors() <= before, "the descriptors to be closed")


def test_pages_of_others_are_not_touched(controller: Controller, files: list[Path]) -> None:
    """Of a file that was replaced meanwhile, nothing is dropped."""
    with controller.client() as client:
        report = load(client, files[:1])
        files[0].unlink()
        make_file(files[0], 101)
        files[0].read_bytes()
        assert client.done(report["load"])["dropped_bytes"] == 0
        assert resident_pages(files[0]) == 101
    drop(files[:1])
    assert json.dumps(report)
