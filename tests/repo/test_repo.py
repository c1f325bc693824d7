# SPDX-License-Identifier: Apache-2.0
"""The repository itself: what must hold of its files, whoever adds one."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TRACKED = [
    ROOT / name
    for name in subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    if (ROOT / name).is_file()
]
POLICIES = sorted(path.name.removesuffix(".bpf.c") for path in ROOT.glob("bpf/policies/*.bpf.c"))


def text(path: Path) -> str:
    return path.read_text(errors="replace")


def version() -> str:
    match = re.search(r'^version = "(.+)"$', text(ROOT / "pyproject.toml"), re.M)
    assert match
    return match[1]


def test_one_version() -> None:
    changes = re.findall(r"^## \[?(\d+\.\d+\.\d+)", text(ROOT / "CHANGELOG.md"), re.M)
    assert changes[0] == version()
    assert f'MODULE_VERSION("{version()}")' in text(ROOT / "kmod/main.c")
    assert f'PACKAGE_VERSION="{version()}"' in text(ROOT / "kmod/dkms.conf")
    assert f"pagecache_bpf-{version()}" in text(ROOT / "Makefile")


@pytest.mark.parametrize("policy", POLICIES)
def test_each_policy_has_a_test_and_a_header(policy: str) -> None:
    tests = "".join(text(path) for path in ROOT.glob("tests/vm/*.py"))
    assert f'"{policy}"' in tests
    header = text(ROOT / f"bpf/policies/{policy}.bpf.c").split("*/")[0]
    assert re.search(rf"^ \* {policy} - \S", header, re.M)
    assert " * When to use:" in header
    assert " * Limits:" in header


def test_modules_hold_one_idea() -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for path in TRACKED
        if path.suffix in {".py", ".c", ".h"} and (lines := text(path).count("\n")) > 500
    }
    assert not long


def test_no_build_output_and_no_binaries() -> None:
    assert not [path for path in TRACKED if path.relative_to(ROOT).parts[0] == "build"]
    assert not [path for path in TRACKED if path.suffix in {".o", ".ko", ".so", ".img", ".pyc"}]
    binary = [path for path in TRACKED if b"\0" in path.read_bytes() and path.suffix != ".png"]
    assert not binary


def test_no_hosts_and_no_paths_of_a_machine() -> None:
    # Put together here, so that this file does not contain them.
    hosts = ["pypi" + ".org", "deb.debian" + ".org", "registry.npmjs" + ".org"]
    hosts += ["pythonhosted" + ".org", "debian.org" + "/debian"]
    homes = ["/" + "work/", "/" + "root/", "/" + "home/"]
    found = [
        (str(path.relative_to(ROOT)), word)
        for path in TRACKED
        for word in hosts + homes
        if word in text(path)
    ]
    assert not found


def test_every_source_names_its_licence() -> None:
    sources = [path for path in TRACKED if path.suffix in {".py", ".c", ".h", ".sh"}]
    without = [
        str(path.relative_to(ROOT))
        for path in sources
        if path.stat().st_size and "SPDX-License-Identifier" not in text(path)[:200]
    ]
    assert not without


def test_kernel_drift_is_probed() -> None:
    """No version of a kernel is compared anywhere."""
    words = ["LINUX_VERSION" + "_CODE", "KERNEL" + "_VERSION(", "LINUX_KERNEL" + "_VERSION"]
    found = [str(p) for p in TRACKED if p.suffix in {".c", ".h"} for w in words if w in text(p)]
    assert not found
