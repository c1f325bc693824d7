# SPDX-License-Identifier: Apache-2.0
"""Tests by privilege: tests/unit needs nothing, tests/native root, tests/vm the guest.

A test that cannot run here is skipped and says why; PAGECACHE_BPF_STRICT=1 makes that a failure.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


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
