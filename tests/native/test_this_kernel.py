# SPDX-License-Identifier: Apache-2.0
"""What works on this machine's own kernel, as root, and what is said where it does not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.cachestat import drop, resident_pages

pytestmark = pytest.mark.native


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pagecache_bpf", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


def test_doctor_describes_this_kernel() -> None:
    done = run("doctor", "--json")
    assert "Traceback" not in done.stderr
    told = json.loads(done.stdout)
    assert told["engines"]["agent"] == [] and told["ready"] and done.returncode == 0


def test_attach_without_a_loadable_module_says_so(tmp_path: Path) -> None:
    if Path("/lib/modules", Path("/proc/sys/kernel/osrelease").read_text().strip()).exists():
        pytest.skip("this kernel has modules: tests/vm covers it in the guest")
    file = tmp_path / "weights.safetensors"
    file.write_bytes(b"x" * 65536)
    done = run("attach", "sequential", "--engine", "struct_ops", str(file))
    assert done.returncode == 3, done.stderr
    assert "module" in done.stderr
    assert "Traceback" not in done.stderr
    assert not done.stdout


def test_cache_state_can_be_verified(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"x" * 4096 * 101)
    file.read_bytes()
    if not resident_pages(file):
        pytest.skip("the temporary directory's file system has no page cache")
    drop([file])
    assert resident_pages(file) == 0
