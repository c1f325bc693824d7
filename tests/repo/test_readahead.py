# SPDX-License-Identifier: Apache-2.0
"""A setting of the kernel that several runs of tests share: who ends first leaves it to others."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.native.readahead import shared_setting
from tests.unit.command import ROOT

HOLD = """
import sys
from pathlib import Path
from tests.native.readahead import shared_setting
with shared_setting(Path(sys.argv[1]), "128"):
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(setting: Path) -> subprocess.Popen[str]:
    """Another process that has the setting until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(setting)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout and process.stdout.readline() == "held\n"
    return process


@pytest.fixture
def setting(tmp_path: Path) -> Path:
    """A file that stands for read_ahead_kb."""
    path = tmp_path / "read_ahead_kb"
    path.write_text("8192\n")
    return path


def test_who_ends_first_leaves_it_to_the_others(setting: Path) -> None:
    first = holder(setting)
    with shared_setting(setting, "128"):
        first.communicate()
        assert first.returncode == 0
        assert setting.read_text() == "128"
        with shared_setting(setting, "128"):
            pass
        assert setting.read_text() == "128"
    assert setting.read_text() == "8192\n"


def test_what_a_killed_one_has_left_is_put_back_by_the_next(setting: Path) -> None:
    killed = holder(setting)
    killed.kill()
    killed.communicate()
    assert setting.read_text() == "128"
    with shared_setting(setting, "128"):
        assert setting.read_text() == "128"
    assert setting.read_text() == "8192\n"
