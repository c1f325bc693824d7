# SPDX-License-Identifier: Apache-2.0
"""The names in the Python package: one name stands for one thing, and says what it is."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "pagecache_bpf"
#: A verb's module has the name that people type.
VERBS = PACKAGE / "cli" / "verbs"
SOURCES = {path: ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}


def shared(places: dict[str, list[str]]) -> dict[str, list[str]]:
    """What more than one place has, with those places."""
    return {name: found for name, found in places.items() if len(found) > 1}


def test_no_two_public_classes_have_one_name() -> None:
    places: dict[str, list[str]] = defaultdict(list)
    for path, tree in SOURCES.items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(str(path.relative_to(ROOT)))
    assert len(places) > 100
    assert not shared(places)


def test_no_two_modules_have_one_name() -> None:
    places: dict[str, list[str]] = defaultdict(list)
    for path in SOURCES:
        if path.parent != VERBS and not path.stem.startswith("__"):
            places[path.stem].append(str(path.relative_to(ROOT)))
    assert len(places) > 100
    assert not shared(places)


def test_no_variable_is_called_each() -> None:
    """A loop variable says what it holds; `each` is every time something else."""
    for path, tree in SOURCES.items():
        lines = [
            node.lineno
            for node in ast.walk(tree)
            if (isinstance(node, ast.Name) and node.id == "each")
            or (isinstance(node, ast.arg) and node.arg == "each")
        ]
        assert not lines, f"{path.relative_to(ROOT)}: lines {lines}"
