# SPDX-License-Identifier: Apache-2.0
"""The newest kernel's part of `make test`: a kernel that cannot be had is a skip, not a failure."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tools import newest_kernel, summary


def script(directory: Path, *lines: str) -> Path:
    """Stands in for tools/other_kernel.sh."""
    path = directory / "other_kernel.sh"
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)
    return path


def test_a_kernel_that_cannot_be_fetched_is_skipped_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = script(tmp_path, "echo '== fetching' >&2", "echo '== no network <&>' >&2", "exit 4")
    with pytest.raises(newest_kernel.NotFetched, match=r"9\.9 cannot be fetched: no network <&>"):
        newest_kernel.fetch("9.9", asked)
    monkeypatch.setattr(newest_kernel, "REPORT", tmp_path / "reports" / "newest.xml")
    monkeypatch.setattr(newest_kernel.fetch, "__defaults__", (asked,))
    assert newest_kernel.main(["9.9", "tests/vm"]) == 0
    monkeypatch.setattr(summary, "REPORTS", tmp_path / "reports")
    summary.main()
    assert (
        "skipped in newest, 1 times: 9.9 cannot be fetched: no network" in capsys.readouterr().out
    )


def test_a_module_that_does_not_compile_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = script(tmp_path, "echo '/boot/image'", "exit 1")
    with pytest.raises(subprocess.CalledProcessError):
        newest_kernel.fetch("9.9", broken)
    monkeypatch.setattr(newest_kernel.fetch, "__defaults__", (broken,))
    assert newest_kernel.main(["9.9", "tests/vm"]) == 1


def test_the_image_is_what_the_script_says_last(tmp_path: Path) -> None:
    good = script(tmp_path, "echo building", "echo /build/$1/vmlinuz")
    assert newest_kernel.fetch("9.9", good) == Path("/build/9.9/vmlinuz")
