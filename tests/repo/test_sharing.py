# SPDX-License-Identifier: Apache-2.0
"""Runs that share the tests run each of them once, and fail if it fails."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TESTS = """
import time

import pytest

@pytest.mark.parametrize("number", range(3))
def test_that_takes_a_while(number):
    time.sleep({seconds})
    assert {right}
"""


def run(tests: Path, name: str, *options: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
            *("-p", "tests.sharing", "--rootdir", str(tests), f"--junitxml={tests / name}.xml"),
            *(*options, str(tests)),
        ],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
    )


def reported(tests: Path, name: str) -> list[tuple[str | None, str | None]]:
    cases = ElementTree.parse(tests / f"{name}.xml").iter("testcase")
    return [(case.get("classname"), case.get("name")) for case in cases]


@pytest.mark.parametrize("right", [True, False])
def test_each_test_is_run_once(tmp_path: Path, right: bool) -> None:
    for number in range(8):
        (tmp_path / f"test_{number}.py").write_text(
            TESTS.format(seconds=0.1, right=right or number != 5)
        )
    (tmp_path / "taken" / "test_7.py").mkdir(parents=True)  # by a third one
    runs = [run(tmp_path, name, "--share", str(tmp_path / "taken")) for name in "ab"]
    codes = [run.wait() for run in runs]
    assert sorted(codes) == [0, 0 if right else 1]
    mine, yours = reported(tmp_path, "a"), reported(tmp_path, "b")
    assert len({*mine, *yours}) == len(mine) + len(yours) == 21


def test_without_a_directory_all_are_run(tmp_path: Path) -> None:
    (tmp_path / "test_a.py").write_text(TESTS.format(seconds=0, right=True))
    assert run(tmp_path, "a").wait() == 0
    assert len(reported(tmp_path, "a")) == 3
