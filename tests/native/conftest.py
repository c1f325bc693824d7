# SPDX-License-Identifier: Apache-2.0
"""Tests on this machine's own kernel, which may take pages back while they count them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from _pytest.runner import runtestprotocol

TRIES = 3


def reclaimed() -> int:
    """File pages that the kernel has reclaimed since it booted; DAMON's are among them."""
    text = Path("/proc/vmstat").read_text()
    return sum(map(int, re.findall(r"^pgsteal_file (\d+)$", text, re.M)))


def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool:
    """Once more if a test has failed while the kernel reclaimed pages: then its counts are not
    what it has done.  Some machines are set up to give memory back that is not used (DAMON).
    """
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for left in reversed(range(TRIES)):
        before = reclaimed()
        reports = runtestprotocol(item, nextitem=nextitem, log=False)
        if not left or not any(each.failed for each in reports) or reclaimed() == before:
            break
        item._initrequest()  # type: ignore[attr-defined]
    for each in reports:
        item.ihook.pytest_runtest_logreport(report=each)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True
