# SPDX-License-Identifier: Apache-2.0
"""What the code says about the documents is true."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_errors_lead_to_a_section() -> None:
    text = (ROOT / "docs/troubleshooting.md").read_text()
    titles = re.findall(r"^## (.+)$", text, re.M)
    anchors = {title.replace(" ", "-").lower() for title in titles}
    named = {
        anchor
        for path in (ROOT / "pagecache_bpf").rglob("*.py")
        for anchor in re.findall(r"(?:_DOCS\}|troubleshooting\.md)#([\w-]+)", path.read_text())
    }
    assert named
    assert named <= anchors, f"no section for {', '.join(sorted(named - anchors))}"


def test_the_table_of_kernels_is_what_was_run() -> None:
    """As recorded by the last `make test-kernels`, and as run last where that was here."""
    command = [sys.executable, str(ROOT / "tools/kernel_matrix.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert not done.returncode, done.stderr
