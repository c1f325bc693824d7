# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the unit tests."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pagecache_bpf.ipc import peer as peers
from pagecache_bpf.kernel.kernelfs import LIVE
from pagecache_bpf.weights.files import IN_MEMORY


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory on a disk, and no caches but those that a test makes."""
    if LIVE.fstype(tmp_path.stat().st_dev) in IN_MEMORY:
        pytest.skip("the temporary directory is in memory (give --basetemp on a disk)")
    for name in list(os.environ):
        if name.startswith(("HF_", "HUGGINGFACE_", "MODELSCOPE_", "OLLAMA_", "LLAMA_", "XDG_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path


@pytest.fixture
def become(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Has whoever connects from now on be of that user; the kernel's side of SO_PEERCRED."""

    def become(uid: int) -> None:
        monkeypatch.setattr(peers, "credentials", lambda sock: (os.getpid(), uid, uid))

    return become
