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
from tests.native.controller import AGENT, Controller, load, serving
from tests.unit.command import NOBODY as AS_NOBODY
from tests.unit.command import ROOT, environment
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
