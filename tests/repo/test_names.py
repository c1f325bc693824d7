# SPDX-License-Identifier: Apache-2.0
"""The names in the Python package: one name stands for one thing, and says what it is."""

from __future__ import annotations

import ast
import subprocess
from collections import defaultdict
from collections.abc import Iterator
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


def loop_variables(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Names that loops, comprehensions and lambdas give to what they go through, with lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.For | ast.comprehension):
            for name in ast.walk(node.target):
                if isinstance(name, ast.Name):
                    yield name.id, name.lineno
        elif isinstance(node, ast.Lambda):
            for argument in node.args.args:
                yield argument.arg, argument.lineno


def test_a_loop_variable_says_what_it_holds() -> None:
    """`each`, `one` or `it` is every time something else."""
    tracked = subprocess.check_output(["git", "ls-files", "*.py"], cwd=ROOT, text=True).split()
    assert len(tracked) > 300
    for name in tracked:
        found = [
            line
            for variable, line in loop_variables(ast.parse((ROOT / name).read_text()))
            if variable in {"each", "one", "it", "thing", "elem"}
        ]
        assert not found, f"{name}: lines {found}"
