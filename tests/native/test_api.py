# SPDX-License-Identifier: Apache-2.0
"""The Python API on this kernel: as root, through a real controller, and as nobody."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import pagecache_bpf as pc
from benchmarks.cachestat import PAGE_SIZE, drop, resident_pages
from pagecache_bpf.explain import model_residency
from pagecache_bpf.kernel import kernelfs
from pagecache_bpf.kernel.numa import nodes
from pagecache_bpf.loads import open_load, through_controller, unprivileged, unprivileged_window
from pagecache_bpf.loads.attached import AttachedLoad
from pagecache_bpf.loads.request import LoadRequest, Starting
from pagecache_bpf.loads.residency_snapshot import Snapshot
from pagecache_bpf.policy import agent_device, hints
from pagecache_bpf.topology import runtime
from pagecache_bpf.weights import models
from tests.native.controller import NOBODY, as_user, serving
from tests.native.readahead import usual_readahead
from tests.unit.command import COMMAND, ROOT, environment
from tests.unit.command import NOBODY as AS_NOBODY
from tests.vm.kernel import make_file, wait_for

pytestmark = pytest.mark.native

PAGES = 8191
SIZE = PAGES * PAGE_SIZE

# What a server does: load with the API around it, and say how it went.  It takes its time, so that
# what reads ahead of it gets its share of a busy machine.
SERVER = """
import json, os, sys, time
import pagecache_bpf as pc
path, wishes = sys.argv[1], json.loads(sys.argv[2])
with pc.load(path, **wishes) as load:
    load.ready()
    with open(path, "rb", buffering=0) as file:
        got = 0
        while data := file.read(131072):
            got += len(data)
            time.sleep(0.002)
            if got == 131072 * 16 and len(sys.argv) > 3:
                print("under way", flush=True)
                sys.stdin.readline()
    before = load.report()
print(json.dumps([got, before.as_json(), load.report().as_json(), os.geteuid()]))
"""


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Path]:
    """A cold file that all may read, on a device with the usual readahead window."""
    path = make_file(tmp_path / "model.safetensors", PAGES)
    with usual_readahead(path):
        drop([path])
        yield path


def server(
    file: Path, directory: Path, *rights: str, stop: bool = False, **wishes: Any
) -> subprocess.Popen[str]:
    """Start it, with a run directory of its own; stop: it waits in the middle of its load."""
    command = [sys.executable, "-c", SERVER, str(file), json.dumps(wishes)]
    return subprocess.Popen(
        [*rights, *command, *(["stop"] if stop else [])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment(PAGECACHE_BPF_RUN_DIR=str(directory)),
    )


def finish(process: subprocess.Popen[str]) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Its reports before and after done(), and its user; all bytes have to have come."""
    out, err = process.communicate("\n", timeout=120)
    assert process.returncode == 0, err
    got, before, after, uid = json.loads(out.splitlines()[-1])
    assert got == SIZE
    return before, after, uid


def test_root_attaches_a_policy_and_takes_it_back(file: Path, tmp_path: Path) -> None:
    before, after, uid = finish(server(file, tmp_path / "run"))
    assert uid == 0 and before["via"] == "direct" and before["policy"] == "sequential"
    if before["engine"] == "agent":
        takes = Path("/proc/modules").exists()
        assert ("module is not loaded" if takes else "cannot load modules") in before["why"]
        wait_for(
            lambda: not agent_device.is_running(tmp_path / "run" / "agent.sock"),
            "the agent to end",
            20,
        )
    assert before["prefetched_bytes"] > 0.5 * SIZE
    assert before["resident_before_bytes"] == 0
    assert before["resident_bytes"] == SIZE and not before["done"]
    assert after["done"] and after["evicted_bytes"] == SIZE and after["resident_bytes"] == 0
    assert resident_pages(file) == 0


def test_root_hints_at_the_node_of_its_devices(file: Path) -> None:
    model = models.resolve(file)
    request = LoadRequest(model, node=nodes()[0])
    way = AttachedLoad(request, Snapshot(model.files), Starting())
    try:
        mine = {"key": {"tgid": os.getpid()}, "value": {"node": nodes()[0]}}
        assert mine in hints.read_map("sequential", "consumers")
    finally:
        way.finish(keep=False)
    if agent_device.is_running():
        with agent_device.AgentDevice() as agent:
            assert "sequential" not in agent.details()


def test_root_leaves_a_policy_that_was_attached_before(file: Path, tmp_path: Path) -> None:
    run_dir = {"PAGECACHE_BPF_RUN_DIR": str(tmp_path / "run")}

    def cli(*words: str) -> Any:
        done = subprocess.run(
            [*COMMAND, *words, "--json"], capture_output=True, text=True, cwd=ROOT,
            env=environment(**run_dir), check=True,
        )  # fmt: skip
        return json.loads(done.stdout)

    cli("attach", "sequential", "--engine", "agent")
    try:
        _, after, _ = finish(server(file, tmp_path / "run", budget="8MiB", keep=True))
        assert after["engine"] == "agent" and any("already" in note for note in after["notes"])
        assert after["evicted_bytes"] == 0 and resident_pages(file) == PAGES
        (policy,) = cli("status")["policies"]
        assert policy["tags"] == 0
    finally:
        cli("detach", "sequential")


def test_nobody_is_served_by_the_controller(file: Path, tmp_path: Path) -> None:
    with serving(tmp_path / "run", '[loads]\nengine = "agent"\n'):
        before, after, uid = finish(
            server(file, tmp_path / "run", *AS_NOBODY, devices=["npu:0"], budget=16 << 20)
        )
    assert uid == NOBODY
    assert (before["via"], before["engine"]) == ("controller", "agent")
    assert before["policy"] and before["budget_bytes"] == 16 << 20
    assert before["devices"][0]["node"] is None
    assert after["done"] and after["evicted_bytes"] is not None
    assert resident_pages(file) == 0


def test_a_controller_that_is_killed_ends_no_server(file: Path, tmp_path: Path) -> None:
    with serving(tmp_path / "run", '[loads]\nengine = "agent"\n') as controller:
        process = server(file, tmp_path / "run", *AS_NOBODY, stop=True)
        assert process.stdout and process.stdout.readline() == "under way\n"
        controller.process.send_signal(signal.SIGKILL)
        controller.process.wait(20)
        before, after, _ = finish(process)
    assert before["engine"] == "agent"  # the last that is known
    assert after["done"]


def test_nobody_alone_may_not_know_what_is_in_the_cache(file: Path, tmp_path: Path) -> None:
    before, after, uid = finish(server(file, tmp_path / "none", *AS_NOBODY))
    assert uid == NOBODY and (before["engine"], before["via"]) == ("unprivileged", "alone")
    assert "no controller runs" in before["why"] and "takes root" in before["why"]
    assert before["resident_bytes"] is None and after["evicted_bytes"] is None
    assert any("belong to somebody else" in note for note in after["notes"])
    assert resident_pages(file) == PAGES  # nothing was dropped


def test_nobody_owning_the_files_leaves_the_cache_clean(file: Path, tmp_path: Path) -> None:
    os.chown(file, NOBODY, NOBODY)
    before, after, _ = finish(server(file, tmp_path / "none", *AS_NOBODY, budget="4MiB"))
    assert before["resident_before_bytes"] == 0 and before["prefetched_bytes"] > 0
    assert after["evicted_bytes"] > 0 and resident_pages(file) == 0


def test_who_cannot_open_a_file_learns_nothing(tmp_path: Path) -> None:
    """A user without rights, in a child: nothing is loaded, told or dropped."""
    assert (
        unprivileged_window
        and through_controller
        and unprivileged
        and runtime
        and open_load
        and model_residency
    )  # imported while they can be read
    assert kernelfs.LIVE.mounts()  # which takes a codec that is imported when it is used
    for directory in (tmp_path, *tmp_path.parents):
        if directory.stat().st_uid == 0 and directory != Path("/"):
            directory.chmod(directory.stat().st_mode | stat.S_IXOTH)
    secret = make_file(tmp_path / "secret.safetensors", 101)
    secret.read_bytes()
    secret.chmod(0o600)
    for call in (pc.load, pc.residency, pc.drop, pc.prefetch, pc.tag):
        with pytest.raises(pc.PrivilegeError, match="cannot be opened"):
            as_user(NOBODY, lambda call=call: call(secret) and None)  # type: ignore[misc]
    assert resident_pages(secret) == 101


def test_run_as_root(file: Path, tmp_path: Path) -> None:
    """The command begins to read when its weights are governed."""
    tags = " ".join(map(str, COMMAND)) + " tags --json"
    script = f"until {tags} | grep -q '{file}'; do sleep 0.1; done; cat {file} | wc -c; exit 7"
    done = subprocess.run(
        [
            *(*COMMAND, "run", "--json", "--policy", "sequential", "--weights", str(file)),
            *("--", "sh", "-c", script),
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(PAGECACHE_BPF_RUN_DIR=str(tmp_path / "run")),
        timeout=120,
    )
    assert done.returncode == 7 and int(done.stdout) == SIZE
    (report,) = json.loads(done.stderr)["reports"]
    assert report["via"] == "direct" and report["evicted_bytes"] == SIZE
    assert resident_pages(file) == 0


def test_a_load_that_is_over_before_the_agent_is_ready_leaves_nothing(
    file: Path, tmp_path: Path
) -> None:
    """The policy goes with the load's connection, even while it is being attached."""
    code = (
        "import sys, pagecache_bpf as pc\n"
        "with pc.load(sys.argv[1]) as load: pass\n"
        "print(load.report().engine)"
    )
    run_dir = tmp_path / "run"
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", code, str(file)],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=environment(PAGECACHE_BPF_RUN_DIR=str(run_dir)),
            timeout=120,
        )
        assert (done.returncode, done.stderr) == (0, "")
    wait_for(lambda: not agent_device.is_running(run_dir / "agent.sock"), "the agent to end", 60)


def test_a_server_that_is_killed_leaves_no_policy(file: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    process = server(file, run_dir, stop=True)
    assert process.stdout and process.stdout.readline() == "under way\n"
    with agent_device.AgentDevice(run_dir / "agent.sock") as agent:
        assert [status.tags for status in agent.policies()] == [1]
        process.kill()
        process.communicate()
        wait_for(lambda: not list(agent.policies()) and not list(agent.tags()), "the end", 30)


def test_a_lease_takes_nothing_that_a_command_has_tagged(file: Path, tmp_path: Path) -> None:
    """A policy that was attached for a load stays for the files that root has tagged since."""
    other = make_file(tmp_path / "other.safetensors", 64)
    run_dir = tmp_path / "run"
    process = server(file, run_dir, stop=True)
    assert process.stdout and process.stdout.readline() == "under way\n"
    with agent_device.AgentDevice(run_dir / "agent.sock") as agent:
        with other.open("rb") as opened:
            agent.tag(opened.fileno(), policy="sequential", model="other", path=str(other))
        process.kill()
        process.communicate()
        wait_for(lambda: len(list(agent.tags())) == 1, "the lease to end", 30)
        assert [tag.model for tag in agent.tags()] == ["other"]
        assert [status.name for status in agent.policies()] == ["sequential"]
        agent.detach("sequential")
