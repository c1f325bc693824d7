# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin: several runs share the tests, whoever is free takes the next file.

`--share DIR` names a directory that all of them reach; which file takes how long need not be known.
"""

from __future__ import annotations

from pathlib import Path

import pytest

_mine: dict[Path, bool] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    """The option --share."""
    parser.addoption(
        "--share",
        type=Path,
        metavar="DIR",
        help="run the files of tests that no other run with this DIR has taken",
    )


def _take(item: pytest.Item, taken: Path) -> bool:
    """Whether this run has an item's file; the first to make the entry in `taken` gets it."""
    if item.path not in _mine:
        try:
            (taken / item.path.name).mkdir(parents=True)
            _mine[item.path] = True
        except FileExistsError:
            _mine[item.path] = False
    return _mine[item.path]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
    """True, which is "done" to pytest, for what another run does: it isn't reported here."""
    taken = item.config.getoption("--share")
    return None if taken is None or _take(item, taken) else True
