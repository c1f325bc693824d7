# SPDX-License-Identifier: Apache-2.0
"""The controller at work: loads, budgets, the ends of processes, templates."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cachestat import PAGE_SIZE, drop, resident_pages
from pagecache_bpf.cli.verbs import attach, serve, status
from pagecache_bpf.controller.processes import CONNECTOR, PIDFD, DiskDelays, ProcessWatch
from pagecache_bpf.errors import PagecacheError
from tests.native.controller import AGENT, Controller, load, opened, serving, tagged
from tests.native.readahead import usual_readahead
from tests.unit.command import undocumented
from tests.vm.kernel import make_file, wait_for

pytestmark = pytest.mark.native

PAGES = 8191
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def files(tmp_path: Path) -> Iterator[list[Path]]:
    """Two cold shards, on a device whose readahead is not so deep that policies stand down."""
    with usual_readahead(tmp_path):
        yield [make_file(tmp_path / f"{name}.safetensors", PAGES) for name in ("a", "b")]


@pytest.fixture
def controller(tmp_path: Path) -> Iterator[Controller]:
    with serving(tmp_path / "run", AGENT) as found:
        yield found


def links(controller: Controller) -> list[str]:
    """What the controller has open."""
    found = []
    for link in Path(f"/proc/{controller.process.pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            found.append(os.readlink(link))
    return found


def read(path: Path) -> None:
    command = "import sys\nwhile sys.stdin.buffer.raw.read(131072): pass"
    with path.open("rb", buffering=0) as source:
        subprocess.run([sys.executable, "-c", command], stdin=source, check=True)


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
        # The window has gone on into the second file.
        with controller.root() as root:
            wait_for(lambda: not next(iter(root.policies())).inflight_pages, "an idle queue")
        there = sum(resident_pages(path) for path in files) * PAGE_SIZE
        assert client.load_report(report["load"])["resident_bytes"] == there >= size
        last = client.done(report["load"])
        assert (last["state"], last["dropped_bytes"], last["resident_bytes"]) == ("done", there, 0)
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
        dropped = []

        def drop_the_rest() -> bool:
            """A page that is still being read, or mapped by who reads it, stays for now."""
            answer = client.drop(fd, 0, half)
            assert answer["in_use"] is False
            dropped.append(answer["dropped_bytes"])
            return not client.residency(fd, 0, half)["resident_bytes"]

        wait_for(drop_the_rest, "the range to be dropped")
        assert sum(dropped) >= half  # more, if a page came in again between two drops
        assert client.drop(fd)["dropped_bytes"] > 0
        with pytest.raises(PagecacheError, match="multiple"):
            client.residency(fd, 1)
    os.close(fd)
    wait_for(lambda: str(files[0]) not in links(controller), "the file to be closed")


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


def test_the_node_of_the_devices(controller: Controller, files: list[Path]) -> None:
    """Known where all of them are near one node that there is; else it stays unknown."""
    here = {"name": "cuda:0", "pci": None, "node": 0}
    for devices, node in (
        ([here, here], 0),
        ([here, {"name": "cuda:1", "node": None}], None),
        ([{"name": "cuda:0", "node": 1023}], None),
        ([], None),
    ):
        with controller.client() as client:
            report = load(client, files[:1], devices=devices)
            assert report["node"] == node
            assert client.close(report["load"])["state"] == "done"


def test_a_policy_that_does_not_exist(controller: Controller, files: list[Path]) -> None:
    with controller.client() as client:
        with pytest.raises(PagecacheError, match="cannot serve loads"):
            load(client, files, policy="nosuch")
        assert load(client, files, policy="noop")["policy"] == "noop"


SLEEPER = """
import os, socket, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from pagecache_bpf.ipc.public_client import PublicClient
client = PublicClient(Path({socket!r}))
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
    watch = ProcessWatch(ended.append, connector=how == CONNECTOR)
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
        delays = DiskDelays()
        assert "task_delayacct is 0" in delays.why and delays.of(os.getpid()) is None
        delays.close()
        switch.write_text("1")
        delays = DiskDelays()
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
        assert "64.0 MiB of 64.0 MiB claimed" in controller.run("status").out
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


def test_a_load_of_a_thousand_files(controller: Controller, tmp_path: Path) -> None:
    shards = []
    for number in range(1000):
        path = tmp_path / f"shard{number:04}.safetensors"
        path.write_bytes(b"x" * 100)
        shards.append(path)
    with controller.client() as client:
        begin = time.monotonic()
        report = load(client, shards)
        took = time.monotonic() - begin
        assert (report["files"], len(tagged(controller))) == (1000, 1000)
        client.done(report["load"])
        # a load's descriptors are held for as long as it is open, and no longer
        assert not [path for path in links(controller) if "shard" in path]
    assert took < 60


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


def test_templates_of_loads(tmp_path: Path) -> None:
    """Derived where none comes along; one that is passed is used if it is of these files."""
    np = pytest.importorskip("numpy")
    numpy_files = pytest.importorskip("safetensors.numpy")
    from pagecache_bpf import templates
    from pagecache_bpf.weights.models import resolve

    names = {"a": tmp_path / "a.safetensors", "b": tmp_path / "b.safetensors"}
    for seed, path in enumerate(names.values()):
        shape = (1021 + seed, 1024)
        tensors = {f"layer.{n}": np.full(shape, seed + n, np.float32) for n in range(4)}
        numpy_files.save_file(tensors, path)
    texts = {
        name: b"".join(templates.text.render(templates.derive(resolve(path))))
        for name, path in names.items()
    }
    with (
        serving(tmp_path / "run", AGENT.replace('"sequential"', '"maio"')) as controller,
        controller.client() as client,
    ):
        report = load(client, [names["a"]], model="a")
        assert (report["policy"], report["template"], report["template_why"]) == (
            *("maio", "derived", ""),
        )
        (policy,) = controller.run("status", "--json").data["policies"]
        assert [template["model"] for template in policy["templates"]] == ["a"]
        read(names["a"])
        passed = load(client, [names["b"]], model="b", template=texts["b"])
        assert passed["template"] == "derived"
        assert client.close(passed["load"])["state"] == "done"
        other = load(client, [names["b"]], model="b", template=texts["a"])
        assert other["template"] is None
        assert "does not fit the files" in other["template_why"]
        client.close(other["load"])
        broken = load(client, [names["b"]], model="b", template="nonsense")
        assert broken["template"] is None and broken["template_why"]
        client.done(report["load"])
