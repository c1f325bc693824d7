# SPDX-License-Identifier: Apache-2.0
"""What is installed beside the package: the service."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.unit.command import ROOT, run

UNIT = ROOT / "packaging" / "systemd" / "pagecache-bpf.service"
needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed"
)


@needs_systemd
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    """Every line is known to it; only what is not installed here is put aside."""
    unit = tmp_path / UNIT.name
    text = re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", UNIT.read_text(), flags=re.M)
    unit.write_text(re.sub(r"^Documentation=.*$", "", text, flags=re.M))
    done = subprocess.run(
        ["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, timeout=60
    )
    told = [line for line in done.stderr.splitlines() if UNIT.name in line]
    # An older systemd does not know every system call by name, and goes on.
    assert [line for line in told if "system call" not in line] == []


@needs_systemd
def test_the_unit_gives_up_what_it_does_not_need() -> None:
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager", str(UNIT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    found = re.search(r"exposure level for \S+: ([0-9.]+)", done.stdout)
    if not found:
        pytest.skip(f"this systemd-analyze cannot rate a file: {done.stderr.strip()[-100:]}")
    assert float(found[1]) <= 5.0


def test_the_unit_starts_what_there_is() -> None:
    """Its command line parses; the signals and exit codes in it are those of `serve`."""
    text = UNIT.read_text()
    command = re.search(r"^ExecStart=\S+/pagecache-bpf (.+)$", text, re.M)
    assert command
    words = command[1].split()
    assert run(*words, "--help").code == 0
    assert "Type=notify" in text and "kill -HUP" in text
    # What a restart would not cure: usage and what the machine lacks.
    assert "RestartPreventExitStatus=2 3" in text
