# SPDX-License-Identifier: Apache-2.0
"""What load() promises of the page cache and of budgets, through a controller that runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cachestat import PAGE_SIZE, drop, resident_pages
from pagecache_bpf.errors import UnsupportedError
from pagecache_bpf.ipc.public_client import PublicClient
from tests.native.controller import AGENT, Controller, as_user, load, serving
from tests.unit.command import NOBODY as AS_NOBODY
from tests.unit.command import NOBODY_ID, ROOT, environment, run
from tests.vm.kernel import make_file, wait_for

pytestmark = pytest.mark.native

PAGES = 8192
#: Loads, reads all of it if it is told to, and prints the report of the end.
LOADER = """
import json, sys
import pagecache_bpf as pc
with pc.load(sys.argv[1]) as load:
    load.ready()
    if len(sys.argv) > 2:
        open(sys.argv[1], "rb").read()
print(json.dumps(load.report().as_json()))
"""


def run_loader(file: Path, run_dir: Path, *before: str, read: bool = False) -> dict[str, Any]:
    """Return the report of a load in a process of its own."""
    words: Sequence[str] = [*before, sys.executable, "-c", LOADER, str(file), *["read"] * read]
    done = subprocess.run(
        words,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(PAGECACHE_BPF_RUN_DIR=str(run_dir)),
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def cache(file: Path, pages: int) -> None:
    """Have the first pages of a file in the page cache, and no others."""
    drop([file])
    with file.open("rb", buffering=0) as content:
        os.posix_fadvise(content.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        for _ in range(pages):
            content.read(PAGE_SIZE)
    assert resident_pages(file) == pages


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file that all may read."""
    return make_file(tmp_path / "model.safetensors", PAGES)


@pytest.mark.parametrize("before", [(), tuple(AS_NOBODY)], ids=["root", "nobody"])
def test_what_was_cached_before_a_load_through_the_controller_stays(
    file: Path, tmp_path: Path, before: tuple[str, ...]
) -> None:
    with serving(tmp_path / "run", AGENT):
        for pages in (PAGES, PAGES // 2):
            cache(file, pages)
            report = run_loader(file, tmp_path / "run", *before, read=True)
            assert report["via"] == "controller", report["why"]
            assert report["resident_before_bytes"] == pages * PAGE_SIZE
            # Chunks of 2 MiB are kept or dropped as a whole; the agent's reads ended before.
            assert resident_pages(file) == pages
            assert report["resident_bytes"] == pages * PAGE_SIZE


def attach(controller: Controller, file: Path) -> None:
    shown = controller.run("attach", "sequential", "--engine", "agent", file)
    assert shown.code == 0, shown.err


def test_a_claim_goes_with_what_it_was_for(file: Path, tmp_path: Path) -> None:
    """Nobody asks for the status in between: that once was what took note of tags."""
    with serving(tmp_path / "run", f'total_budget = "40MiB"\n{AGENT}') as controller:
        for _ in range(3):
            attach(controller, file)
            controller.run("detach", "sequential")
        attach(controller, file)
        assert controller.run("untag", "--all").code == 0
        with controller.client() as client:
            assert client.status()["budget"]["claimed_bytes"] == 0
            assert load(client, [file])["admission"] == "fits"
        # A command that ends between its claim and its tags leaves neither.
        with controller.root() as root:
            root.admit("half-way", {"00": 1 << 20}, None)
            assert [claim["model"] for claim in root.controller()["claims"]] == ["half-way"]
        with controller.root() as root:
            wait_for(lambda: not root.controller()["claims"], "the claim to go")


def test_a_refused_load_is_not_served_past_the_budget(file: Path, tmp_path: Path) -> None:
    with serving(tmp_path / "run", f'total_budget = "16MiB"\n{AGENT}') as controller:
        for before in ((), tuple(AS_NOBODY)):
            report = run_loader(file, tmp_path / "run", *before, read=True)
            assert (report["via"], report["engine"], report["done"]) == ("none", "none", True)
            assert "was not admitted" in report["why"] and "16.8 MB budget" in report["why"]
        data = controller.run("status", "--json").data
        assert (data["policies"], data["controller"]["claims"]) == ([], [])


#: By load() itself, to see what the files are, and faults that map what they have mapped.
MOST_LOOKED_AT = 2 << 20
#: A user's server: loads, waits until all is read ahead, and reads it, also through a mapping.
SERVER = """
import json, mmap, os, sys, time
import pagecache_bpf as pc
with pc.load(sys.argv[1]) as load:
    while (load.report().prefetched_bytes or 0) < os.path.getsize(sys.argv[1]):
        time.sleep(0.01)
    with open(sys.argv[1], "rb", buffering=0) as file:
        if sys.argv[2] == "map":
            sum(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)[::4096])
        while file.read(1 << 17):
            pass
print(json.dumps(load.report().as_json()))
"""


@pytest.mark.parametrize("how", ["read", "map"])
def test_a_user_beside_roots_policy(how: str, file: Path, tmp_path: Path) -> None:
    """Without a controller its own threads read ahead: what they read is nobody's reading.

    What is wanted is what the reader has read, and the little that load() has looked at.
    """
    run_dir = tmp_path / "run"
    there = {"PAGECACHE_BPF_RUN_DIR": str(run_dir)}
    drop([file])
    assert run("attach", "sequential", "--engine", "agent", file, env=there).code == 0
    try:
        done = subprocess.run(
            [*AS_NOBODY, sys.executable, "-c", SERVER, str(file), how],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=environment(**there),
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        (model,) = run("stats", "--json", env=there).data["models"]
    finally:
        assert run("detach", "--all", env=there).code == 0
    assert json.loads(done.stdout)["engine"] == "unprivileged"
    counters = model["counters"]
    size = PAGES * PAGE_SIZE
    assert size <= counters["read_bytes"] <= size + MOST_LOOKED_AT
    assert counters["mmap_bytes"] <= (size if how == "map" else 0) + MOST_LOOKED_AT
    assert counters["prefetched_bytes"] >= size - MOST_LOOKED_AT


def test_a_user_beside_an_agent_is_told_that_no_controller_runs(tmp_path: Path) -> None:
    """The agent keeps its directory to itself: nothing there is for users to be let into."""
    run_dir = tmp_path / "run"
    run_dir.mkdir(mode=0o700)
    with pytest.raises(UnsupportedError, match="no controller runs"):
        as_user(NOBODY_ID, lambda: PublicClient(run_dir / "control.sock"))
