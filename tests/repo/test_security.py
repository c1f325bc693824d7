# SPDX-License-Identifier: Apache-2.0
"""SECURITY.md: each hole that it lists has tests, and each test of a hole is listed."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HOLE = re.compile(r"s\d+")


def holes_of(name: str) -> list[str]:
    """Return the holes that a test is of by its name: test_s1_s2_... is of S1 and S2."""
    found = []
    for part in name.removeprefix("test_").split("_"):
        if not HOLE.fullmatch(part):
            break
        found.append(part.upper())
    return found


def names_of_tests() -> list[str]:
    """Return the names of all tests."""
    return [
        node.name
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]


def test_each_hole_has_the_tests_that_the_table_names() -> None:
    rows = re.findall(r"^\| (S\d+) \|.*\| (`.*`) \|$", (ROOT / "SECURITY.md").read_text(), re.M)
    assert [hole for hole, _ in rows] == [f"S{number}" for number in range(1, 17)]
    names = names_of_tests()
    for hole, prefixes in rows:
        assert any(hole in holes_of(name) for name in names), hole
        for prefix in re.findall(r"`(\w+)`", prefixes):
            assert any(name.startswith(prefix) for name in names), prefix


def test_each_test_of_a_hole_is_of_one_that_is_listed() -> None:
    text = (ROOT / "SECURITY.md").read_text()
    found = {hole for name in names_of_tests() for hole in holes_of(name)}
    assert len(found) >= 16
    assert all(f"| {hole} |" in text for hole in found)


def test_s16_nothing_of_ours_runs_between_fork_and_exec() -> None:
    """A lock that another thread holds would never be let go of there."""
    found = [
        f"{path.name}:{node.lineno}"
        for path in sorted((ROOT / "pagecache_bpf").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.keyword) and node.arg == "preexec_fn"
    ]
    assert found == []
