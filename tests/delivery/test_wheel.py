# SPDX-License-Identifier: Apache-2.0
"""The wheel in a clean system without compilers: a policy attaches and serves a load."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.delivery.chroot import Chroot
from tests.unit.command import ROOT

COMMAND = "/opt/venv/bin/pagecache-bpf"
DROP = 'import pagecache_bpf as pc; pc.drop("/models/model.bin")'
POLICIES = sorted(
    path.name.removesuffix(".bpf.c") for path in (ROOT / "bpf" / "policies").glob("*.bpf.c")
)


def test_the_wheel_has_every_policy_for_both_engines(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for policy in POLICIES:
        for name in (f"{policy}.bpf.c", f"{policy}.bpf.o", f"agent/{policy}.bpf.o"):
            assert f"pagecache_bpf/bpf/{name}" in names
    headers = {path.name for path in (ROOT / "bpf" / "include").glob("*.h")}
    assert headers <= {name.removeprefix("pagecache_bpf/bpf/include/") for name in names}
    assert {"pagecache_bpf/lib/libbpf.so.1", "pagecache_bpf/lib/include/bpf/bpf_helpers.h"} <= names
    assert "pagecache_bpf/py.typed" in names
    assert any(name.startswith("pagecache_bpf.libs/libelf") for name in names)
    assert not any(name.startswith(("tests/", "benchmarks/", "tools/")) for name in names)


def test_auditwheel_finds_nothing_left_to_do(wheel: Path) -> None:
    auditwheel = Path(sys.executable).with_name("auditwheel")
    if not auditwheel.exists() and shutil.which("auditwheel") is None:
        pytest.skip("auditwheel is not installed")
    shown = subprocess.run(
        [str(auditwheel), "show", str(wheel)], capture_output=True, text=True, check=True
    ).stdout
    assert "manylinux_2_" in shown.split("is consistent with", 1)[1][:200]


def test_a_load_is_served_in_a_system_without_compilers(system: Chroot, wheels: Path) -> None:
    system.run("apt-get update -qq && apt-get install -y -qq --no-install-recommends python3-venv")
    assert system.run("command -v clang gcc cc make || echo none").strip() == "none"
    shutil.copytree(wheels, system.root / "srv" / "wheels")
    system.run("python3 -m venv /opt/venv")
    install = "/opt/venv/bin/pip install -q --no-index --find-links /srv/wheels"
    system.run(f"{install} 'pagecache-bpf[cli]'")
    listed = json.loads(system.run(f"{COMMAND} policy list --json"))
    assert sorted(policy["name"] for policy in listed["policies"]) == POLICIES
    if system.run(f"{COMMAND} doctor >/dev/null 2>&1; echo $?").strip() == "3":
        pytest.skip("this kernel has no engine that runs here")
    _cold_load(system)


def _cold_load(system: Chroot) -> None:
    """A file on this machine's own disk: the system's is an overlay over a tmpfs."""
    place = ROOT / "build" / "test" / "delivery"
    place.mkdir(parents=True, exist_ok=True)
    size = 48 << 20
    model = place / "model.bin"
    model.write_bytes(bytes(size))
    inside = system.root / "models"
    inside.mkdir()
    pins = system.root / "sys/fs/bpf"
    subprocess.run(["mount", "--bind", str(place), str(inside)], check=True)
    subprocess.run(["mount", "--bind", "/sys/fs/bpf", str(pins)], check=True)
    try:
        system.run(f"{COMMAND} attach sequential /models/model.bin")
        try:
            subprocess.run(["sync", str(model)], check=True)
            system.run(f"/opt/venv/bin/python -c '{DROP}'")
            assert system.run("wc -c </models/model.bin").strip() == str(size)
            told = json.loads(system.run(f"{COMMAND} stats --json"))
        finally:
            system.run(f"{COMMAND} detach sequential")
        (model_told,) = told["models"]
        assert model_told["bytes"] == size
        assert model_told["counters"]["prefetched_bytes"] > size // 2
        assert json.loads(system.run(f"{COMMAND} tags --json"))["tags"] == []
    finally:
        subprocess.run(["umount", str(pins)], check=True)
        subprocess.run(["umount", str(inside)], check=True)
        shutil.rmtree(place)
