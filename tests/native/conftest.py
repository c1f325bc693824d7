# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the tests that need root."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that other users get to; those of pytest are for its own user."""
    with tempfile.TemporaryDirectory(prefix="pagecache-bpf-", dir="/var/tmp") as name:
        os.chmod(name, 0o755)
        yield Path(name)
