# SPDX-License-Identifier: Apache-2.0
"""stats and export on engine struct_ops; explain in a cgroup v2 with a real limit."""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.cachestat import PAGE_SIZE, drop, resident_bytes
from pagecache_bpf.cli import views
from pagecache_bpf.cli.verbs import explain
from pagecache_bpf.kernel import cgroups
from pagecache_bpf.metrics.exporter import Address, Exporter
from tests.unit.command import run, undocumented
from tests.vm.kernel import make_file, read_all

pytestmark = pytest.mark.vm

PAGES = 2039
MIB = 1 << 20


@pytest.fixture
def model(mount: Path) -> Path:
    """A cold file."""
    path = make_file(mount / "llama.safetensors", PAGES)
    drop([path])
    return path


def test_stats_and_export_on_struct_ops(model: Path) -> None:
    done = run("attach", "sequential", "--engine", "struct_ops", model, "--model", "llama")
    assert done.code == 0, done.err
    read_all(model, 32 * PAGE_SIZE)
    shown = run("stats", "--json")
    assert shown.code == 0, shown.err
    assert not undocumented(shown.data, views.JSON)
    assert shown.data["engines"]["struct_ops"]
    (policy,), (row,) = shown.data["policies"], shown.data["models"]
    assert (policy["name"], policy["engine"]) == ("sequential", "struct_ops")
    assert policy["counters"]["prefetch_calls"] > 0
    assert policy["counters"]["added_bytes"] == PAGES * PAGE_SIZE
    assert (row["model"], row["policy"], row["engine"]) == ("llama", "sequential", "struct_ops")
    assert row["resident_bytes"] == resident_bytes([model]) == PAGES * PAGE_SIZE
    with Exporter(Address("127.0.0.1", 0)) as exporter:
        text = urllib.request.urlopen(exporter.url, timeout=30).read().decode()
    labels = 'engine="struct_ops",policy="sequential"'
    assert f"pagecache_policy_up{{{labels}}} 1.0" in text
    added = f"pagecache_policy_added_bytes_total{{{labels}}} "
    (line,) = [line for line in text.splitlines() if line.startswith(added)]
    assert float(line.removeprefix(added)) == PAGES * PAGE_SIZE
    assert "llama" in run("stats").out
    assert run("detach", "sequential").code == 0


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A memory cgroup below one with a lower memory.high."""
    root = Path("/sys/fs/cgroup")
    if "memory" not in (root / "cgroup.controllers").read_text().split():
        pytest.skip("cgroup v2 has no memory controller here")
    (root / "cgroup.subtree_control").write_text("+memory")
    pod = root / "pagecache-test"
    pod.mkdir()
    (pod / "cgroup.subtree_control").write_text("+memory")
    job = pod / "job"
    job.mkdir()
    yield job
    job.rmdir()
    pod.rmdir()


def test_explain_reads_the_limits_of_cgroup_v2(model: Path, cgroup: Path) -> None:
    (cgroup / "memory.max").write_text(str(64 * MIB))
    (cgroup.parent / "memory.high").write_text(str(4 * MIB))
    words = ("explain", model, "--no-probe", "--json")
    shown = run(*words, "--cgroup", str(cgroup)).data
    assert not undocumented(shown, explain.JSON["explain"])
    assert shown["cgroup"] == {"path": "/pagecache-test/job", "version": 2}
    limits = {limit["name"]: limit["bound_bytes"] for limit in shown["places"]}
    assert limits == {
        "host": None,
        "cgroup /pagecache-test/job": 64 * MIB,
        "cgroup /pagecache-test": 4 * MIB,
    }
    assert not shown["fits"] and shown["limited_by"] == "cgroup /pagecache-test"
    missing = shown["places"][2]["missing_bytes"]
    assert PAGES * PAGE_SIZE - 4 * MIB <= missing <= PAGES * PAGE_SIZE

    (cgroup.parent / "memory.high").write_text("max")
    assert run(*words, "--cgroup", str(cgroup)).data["fits"]
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        (cgroup / "cgroup.procs").write_text(str(process.pid))
        assert run(*words, "--pid", str(process.pid)).data["cgroup"] == shown["cgroup"]


def test_headroom_counts_what_can_be_reclaimed(model: Path, cgroup: Path) -> None:
    """Pages of a file that is read there are room, anonymous memory is not."""
    (cgroup / "memory.max").write_text(str(64 * MIB))
    code = (
        "import sys; block = bytearray(b'x') * (16 << 20)\n"
        f"open({str(model)!r}, 'rb').read(); print('ready', flush=True); input()"
    )
    start = f'echo $$ >{cgroup}/cgroup.procs; exec {sys.executable} -c "$CODE"'
    with subprocess.Popen(
        ["sh", "-c", start],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "CODE": code},
    ) as process:
        assert process.stdout and process.stdin
        assert process.stdout.readline() == "ready\n"
        (level,) = cgroups.of_path(cgroup).levels[:1]
        assert level.limit == 64 * MIB
        assert level.reclaimable >= PAGES * PAGE_SIZE
        assert level.headroom is not None
        assert 24 * MIB < level.headroom <= (64 - 16) * MIB
        process.stdin.close()
