# SPDX-License-Identifier: Apache-2.0
"""Who lends a load's files to the module: load(), run and the controller, and for how long."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import pagecache_bpf as pc
from benchmarks.cachestat import PAGE_SIZE
from pagecache_bpf.kernel.control_device import Device
from tests.native.controller import serving
from tests.unit.command import COMMAND, ROOT
from tests.vm.kernel import Policy, make_file, read_all, resident, wait_for

pytestmark = pytest.mark.vm

SHARDS, PAGES = 8, 1031
LOADS = '[loads]\npolicies = ["sequential"]\n'


@pytest.fixture
def shards(mount: Path) -> list[Path]:
    folder = mount / "model"
    folder.mkdir()
    return [
        make_file(folder / f"model-{number:05}-of-{SHARDS:05}.safetensors", PAGES)
        for number in range(1, SHARDS + 1)
    ]


def lent() -> int:
    """How many files are lent."""
    with Device() as device:
        return device.info().lent


def read_in_order(shards: list[Path]) -> list[int]:
    """Read a model; returns the pages of each shard that were there before its first access."""
    before = []
    with Device() as device:
        policy = Policy("sequential", device)
        for path in shards:
            policy.idle()
            before.append(resident(path))
            read_all(path)
        policy.idle()
        assert policy.count("added_bytes") == SHARDS * PAGES * PAGE_SIZE
        assert policy.count("removed_bytes") == 0
    return before


def test_a_load_lends_its_files(shards: list[Path]) -> None:
    load = pc.load(shards[0].parent, policy="sequential")
    try:
        assert load.ready(60)
        assert load.report().engine == "struct_ops"
        assert lent() == SHARDS
        before = read_in_order(shards)
    finally:
        load.done()
    assert before[0] == 0 and all(pages >= 512 for pages in before[1:]), before
    assert lent() == 0


#: Runs below `run`: waits until its files are lent, and reads them.
COMMAND_OF_RUN = f"""
import sys
from pathlib import Path
from tests.vm.kernel import wait_for
from tests.vm.test_lending import lent, read_in_order
wait_for(lambda: lent() == {SHARDS}, "the files to be lent", 60)
print(*read_in_order([Path(name) for name in sys.argv[1:]]))
"""


def test_run_lends_the_files_of_its_command(shards: list[Path]) -> None:
    command = [*COMMAND, "run", "--policy", "sequential", "--weights", str(shards[0].parent), "--"]
    done = subprocess.run(
        [*command, sys.executable, "-c", COMMAND_OF_RUN, *map(str, shards)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    before = [int(pages) for pages in done.stdout.split()]
    assert before[0] == 0 and all(pages >= 512 for pages in before[1:]), before
    assert lent() == 0


def test_the_controller_lends_the_files_of_its_loads(shards: list[Path], tmp_path: Path) -> None:
    """Until the load is done; what a killed controller has lent the kernel takes back."""
    with serving(tmp_path / "run", LOADS) as controller, controller.client() as client:
        fds = [os.open(path, os.O_RDONLY) for path in shards]
        try:
            first = client.open_load(fds, model="m")
            assert first["engine"] == "struct_ops"
            assert lent() == SHARDS
            second = client.open_load(fds[:2], model="m")
            assert lent() == SHARDS + 2
        finally:
            for fd in fds:
                os.close(fd)
        before = read_in_order(shards)
        assert before[0] == 0 and all(pages >= 512 for pages in before[1:]), before
        client.done(first["load"], keep=True)
        assert lent() == 2
        shown = controller.run("status", "sequential").out
        assert "into 2 files lent by loads" in shown, shown
        assert second["load"]
        controller.process.send_signal(signal.SIGKILL)
        controller.process.wait(20)
        wait_for(lambda: lent() == 0, "the files to be taken back")
