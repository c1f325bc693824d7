# SPDX-License-Identifier: Apache-2.0
"""Break lines of the core modules on purpose and see whether their unit tests fail (`make mutate`).

cosmic-ray makes the mutations.  They are taken in a random order that a seed fixes, one module
after the other, until the time is up, and each is tried with the unit tests that import the module,
or, where there are none, the modules that import it.
All happens in a copy of the tree; what is left of a mutation that was interrupted lies there.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPY = ROOT / "build" / "mutate" / "tree"
#: What is mutated: packages that hold decisions, not declarations.
PACKAGES = ("weights", "templates", "controller", "ipc", "loads", "policy", "agent")
#: Operators that make equivalent or senseless programs too often to be worth a run of the tests.
SENSELESS = re.compile(r"Decorator|VariableInserter|VariableReplacer|ReplaceBinaryOperator_BitOr")
TEST_SECONDS = 120.0


def copy_tree(into: Path) -> None:
    """Copy what git tracks, and what is built from it, to where mutations do no harm.

    Args:
        into: the folder of the copy; it is made anew.
    """
    shutil.rmtree(into, ignore_errors=True)
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True
    )
    for name in listed.stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (into / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, into / name)
    (into / "build").mkdir()
    for built in ("bpf", "deps", "kmod"):
        if (ROOT / "build" / built).exists():
            (into / "build" / built).symlink_to(ROOT / "build" / built)


def tests_of(module: Path, root: Path) -> list[str]:
    """Return the files of unit tests that import a module by its name.

    Args:
        module: the module's source, below `root`.
        root: the tree.

    Returns:
        Their paths below `root`; where no test imports it, those of the modules that do; empty:
        there are none either.
    """
    found = _tests(module, root)
    if not found:
        users = _importing(module, root, root / module.parts[0], "*.py")
        found = sorted({test for user in users for test in _tests(Path(user), root)})
    return found


def _tests(module: Path, root: Path) -> list[str]:
    """Return the files of unit tests that import a module themselves."""
    return _importing(module, root, root / "tests" / "unit", "test_*.py")


def _importing(module: Path, root: Path, folder: Path, pattern: str) -> list[str]:
    """Return which sources in a folder import a module by its name, as paths below `root`."""
    package, name = ".".join(module.parts[:-1]), module.stem
    wanted = re.compile(
        rf"^\s*(?:from {re.escape(package)}\.{name} import|import {re.escape(package)}\.{name}\b"
        rf"|from {re.escape(package)} import (?:\([^)]*|[^\n]*)\b{name}\b)",
        re.M,
    )
    return [
        str(path.relative_to(root))
        for path in sorted(folder.rglob(pattern))
        if wanted.search(path.read_text(encoding="utf-8"))
    ]


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Work in another folder: cosmic-ray takes paths and the test command from where it is.

    Args:
        folder: where to be during the block.
    """
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def mutate(
    module: Path, tests: Sequence[str], seed: int, until: float
) -> tuple[Counter[str], list[str]]:
    """Try mutations of one module until the time is up or there are no more.

    Args:
        module: its source, below the current folder.
        tests: the files of its tests.
        seed: of the order.
        until: time.monotonic() at which no further mutation begins.

    Returns:
        How many were "killed", "survived" or "incompetent" (the module could not be used at all),
        and the changes that survived, as diffs.
    """
    from cosmic_ray import commands
    from cosmic_ray.mutating import mutate_and_test
    from cosmic_ray.work_db import WorkDB, use_db

    command = f"{sys.executable} -m pytest -x -q -p no:cacheprovider {' '.join(tests)}"
    outcomes: Counter[str] = Counter()
    survived: list[str] = []
    with use_db(":memory:", WorkDB.Mode.create) as work:
        commands.init([module], work, {})
        items = [
            item
            for item in work.pending_work_items
            if not any(SENSELESS.search(mutation.operator_name) for mutation in item.mutations)
        ]
    random.Random(seed).shuffle(items)
    # A line gets its second mutation when all lines have had their first.
    tried: Counter[int] = Counter()
    turn = {}
    for item in items:
        line = item.mutations[0].start_pos[0]
        turn[item.job_id] = tried[line]
        tried[line] += 1
    items.sort(key=lambda item: turn[item.job_id])
    for item in items:
        if time.monotonic() >= until:
            break
        result = mutate_and_test(item.mutations, command, TEST_SECONDS)
        if result.test_outcome is None:
            continue
        outcomes[result.test_outcome.value] += 1
        if result.test_outcome.value == "survived":
            survived.append(result.diff or "")
    return outcomes, survived


def main(arguments: Sequence[str] | None = None) -> int:
    """Mutate the core modules, print a row for each and the share that was killed.

    Args:
        arguments: the command line, without the program's name; sys.argv's by default.

    Returns:
        0; the figures are for people, and a bounded sample is no verdict.
    """
    parser = argparse.ArgumentParser(prog="python -m tools.mutate", description=__doc__)
    parser.add_argument("--seconds", type=float, default=1200.0, help="the whole run (1200)")
    parser.add_argument("--seed", type=int, default=1, help="of the order of mutations (1)")
    parser.add_argument("modules", nargs="*", help="sources below pagecache_bpf/ (all core ones)")
    options = parser.parse_args(arguments)
    copy_tree(COPY)
    with inside(COPY):
        named = [Path(name) for name in options.modules]
        found = named or [
            path
            for package in PACKAGES
            for path in sorted(Path("pagecache_bpf", package).rglob("*.py"))
        ]
        tested = {module: tests_of(module, COPY) for module in found}
        with_tests = [module for module, tests in tested.items() if tests]
        print(f"{len(with_tests)} modules with unit tests, {len(found) - len(with_tests)} without")
        started, total = time.monotonic(), Counter[str]()
        for index, module in enumerate(with_tests):
            left = options.seconds - (time.monotonic() - started)
            if left <= 0:
                print(f"the time was up before the last {len(with_tests) - index} modules")
                break
            until = time.monotonic() + left / (len(with_tests) - index)
            outcomes, survived = mutate(module, tested[module], options.seed, until)
            total += outcomes
            print(f"{module}: {outcomes['killed']} killed, {outcomes['survived']} survived")
            for diff in survived:
                print("".join(f"    {line}\n" for line in diff.splitlines()), end="", flush=True)
    judged = total["killed"] + total["survived"]
    if judged:
        print(f"{total['killed']} of {judged} mutations killed: {total['killed'] / judged:.0%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
