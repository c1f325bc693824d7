# SPDX-License-Identifier: Apache-2.0
"""Tests by privilege: tests/unit needs nothing, tests/native root, tests/vm the guest.

A test that cannot run here is skipped and says why; PAGECACHE_BPF_STRICT=1 makes that a failure.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from _pytest.runner import runtestprotocol

# A shell ignores it for what it runs in the background, and so would the commands under test.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

TRIES = 3
LOOK_SECONDS = 10.0


class Reclaim:
    """What the kernel has taken back so far, in pages and bytes: any change means that it has.

    DAMON's schemes count for themselves, and tell when they are asked to, by root.  They take half
    a second to answer, so of theirs the answer may be LOOK_SECONDS old unless `now` is asked for.
    """

    def __init__(self) -> None:
        self._asked = -LOOK_SECONDS

    def so_far(self, now: bool = False) -> int:
        """A number that only grows."""
        text = Path("/proc/vmstat").read_text()
        total = sum(map(int, re.findall(r"^pgsteal_file (\d+)$", text, re.M)))
        ask = now or time.monotonic() >= self._asked + LOOK_SECONDS
        for daemon in Path("/sys/kernel/mm/damon/admin/kdamonds").glob("[0-9]*"):
            with suppress(OSError):
                if ask:
                    (daemon / "state").write_text("update_schemes_stats")
                for stat in daemon.glob("contexts/*/schemes/*/stats/sz_applied"):
                    total += int(stat.read_text())
        if ask:
            self._asked = time.monotonic()
        return total


_RECLAIM = Reclaim()


def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """Once more if a test has failed while this kernel reclaimed pages: then its counts are not
    what it has done.  Some machines are set up to give memory back that is not used (DAMON).
    """
    if item.get_closest_marker("vm"):
        return None  # the guest does so only where a test makes it
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for left in reversed(range(TRIES)):
        before = _RECLAIM.so_far()
        reports = runtestprotocol(item, nextitem=nextitem, log=False)
        if not left or not any(report.failed for report in reports):
            break
        if _RECLAIM.so_far(now=True) == before:
            break
        item._initrequest()  # type: ignore[attr-defined]
    for report in reports:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def _missing(item: pytest.Item) -> str:
    if item.get_closest_marker("vm") and os.environ.get("PAGECACHE_BPF_GUEST") != "1":
        return "needs the module: runs in the guest, `make test-vm`"
    if item.get_closest_marker("native") and os.geteuid() != 0:
        return "needs root"
    return ""


@pytest.fixture(autouse=True)
def _privilege(request: pytest.FixtureRequest) -> Iterator[None]:
    missing = _missing(request.node)
    if missing:
        (pytest.fail if os.environ.get("PAGECACHE_BPF_STRICT") == "1" else pytest.skip)(missing)
    yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip before fixtures of wider scope are set up: they would touch the kernel."""
    if os.environ.get("PAGECACHE_BPF_STRICT") == "1":
        return
    for item in items:
        missing = _missing(item)
        if missing:
            item.add_marker(pytest.mark.skip(reason=missing))
