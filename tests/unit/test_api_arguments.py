# SPDX-License-Identifier: Apache-2.0
"""What callers of the Python API may give it, where no file on a disk is needed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import pagecache_bpf as pc
from pagecache_bpf.kernel import kernelfs
from pagecache_bpf.loads.arguments import guarded
from tests.unit.command import ROOT


def test_no_public_function_is_hidden_by_a_module() -> None:
    """`import pagecache_bpf.tag` would make pagecache_bpf.tag a module."""
    package = ROOT / "pagecache_bpf"
    taken = {path.stem for path in package.glob("*.py")} | {path.name for path in package.iterdir()}
    assert not taken & set(pc.__all__)


def test_weights_in_memory_are_no_mistake() -> None:
    memory = Path("/dev/shm")
    if kernelfs.LIVE.fstype(memory.stat().st_dev if memory.exists() else -1) != "tmpfs":
        pytest.skip("there is no /dev/shm")
    path = memory / f"pagecache-bpf-test-{os.getpid()}.gguf"
    path.write_bytes(b"x")
    try:
        with pc.load(path) as load:
            assert load.report().engine == "none" and "in memory" in load.report().why
        assert pc.residency(path).bytes == 0
    finally:
        path.unlink()


def test_s16_what_is_swallowed_can_be_found_out(caplog: pytest.LogCaptureFixture) -> None:
    def fails() -> int:
        raise RuntimeError("some reason")

    with caplog.at_level("DEBUG", "pagecache_bpf"):
        assert guarded(fails, 7) == 7
    assert "some reason" in caplog.text
