# SPDX-License-Identifier: Apache-2.0
"""The wheel in a clean system without compilers: a policy attaches and serves a load."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
import zipfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.delivery.chroot import Chroot
from tests.delivery.conftest import MODEL, PYTHONS, SIZE, interpreter, on_a_disk, write_down
from tests.unit.command import ROOT
from tools import dist

DROP = 'import pagecache_bpf as pc; pc.drop("{}")'
READ = 'f = open("{}", "rb"); print(sum(map(len, iter(lambda: f.read(1 << 20), b""))))'
LOAD = """
import pagecache_bpf as pc

with pc.load("{0}") as load:
    print(len(open("{0}", "rb").read()))
assert load.report().bytes == {1}, load.report()
"""
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
    documents = {path.name for path in (ROOT / "docs").glob("*.md")}
    assert documents == {Path(name).name for name in names if name.endswith(".md")}
    assert f"pagecache_bpf/docs/{min(documents)}" in names
    assert not any(".data/" in name for name in names)  # where it lands differs by installer
    assert any(name.startswith("pagecache_bpf.libs/libelf") for name in names)
    assert not any(name.startswith(("tests/", "benchmarks/", "tools/")) for name in names)


def test_auditwheel_finds_nothing_left_to_do(wheel: Path) -> None:
    auditwheel = dist.VENV / "bin" / "auditwheel"
    shown = subprocess.run(
        [str(auditwheel), "show", str(wheel)], capture_output=True, text=True, check=True
    ).stdout
    tag = wheel.stem.rpartition("-")[2]
    assert f'is consistent with the following platform tag: "{tag}"' in " ".join(shown.split())


@pytest.mark.parametrize("system", sorted(PYTHONS), indirect=True)
def test_a_load_is_served_in_a_system_without_compilers(
    system: Chroot,
    wheels: Callable[[str], Path],
    request: pytest.FixtureRequest,
) -> None:
    suite = request.node.callspec.params["system"]
    system.run("apt-get update -qq && apt-get install -y -qq --no-install-recommends python3-venv")
    assert system.run("command -v clang gcc cc make || echo none").strip() == "none"
    shutil.copytree(wheels(PYTHONS[suite]), system.root / "srv" / "wheels")
    with on_a_disk() as place, ExitStack() as undo:
        for ours, theirs in ((place, "models"), (Path("/sys/fs/bpf"), "sys/fs/bpf")):
            inside = system.root / theirs
            inside.mkdir(exist_ok=True)
            subprocess.run(["mount", "--bind", str(ours), str(inside)], check=True)
            undo.callback(subprocess.run, ["umount", str(inside)], check=True)
        begun = time.monotonic()
        system.run("python3 -m venv /opt/venv")
        _installed_and_used(system.run, "/opt/venv/bin", "/srv/wheels", "/models")
        write_down(f"seconds from venv to detach, {suite}", round(time.monotonic() - begun, 1))


@pytest.mark.parametrize("version", ["3.10", "3.12"])  # Debian has none of these
def test_a_load_is_served_by_each_python_of_this_machine(
    version: str, wheels: Callable[[str], Path], tmp_path: Path
) -> None:
    python = interpreter(version)
    if python is None:
        pytest.skip(f"this machine has no Python {version}")
    if os.geteuid() != 0:
        pytest.skip("needs root (BPF)")

    def run(command: str) -> str:
        """As Chroot.run, with no program in PATH at all."""
        words = ["/bin/sh", "-c", command]
        done = subprocess.run(
            words, capture_output=True, text=True, env={"PATH": str(programs), "HOME": "/root"}
        )
        assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    programs = tmp_path / "programs"
    programs.mkdir()
    with on_a_disk() as place:
        run(f"{python} -m venv {tmp_path}/venv")
        _installed_and_used(run, f"{tmp_path}/venv/bin", str(wheels(version)), str(place))


def _installed_and_used(run: Callable[[str], str], bin_: str, wheels: str, models: str) -> None:
    """Install the wheel without any other package, load; then with the command, attach and load."""
    install = f"{bin_}/python -m pip install -q --no-index --find-links {wheels}"
    run(f"{install} pagecache-bpf")
    listed = json.loads(run(f"{bin_}/python -m pip list --format json"))
    assert {package["name"] for package in listed} <= {
        "pagecache-bpf",
        "pip",
        "setuptools",
        "wheel",
    }
    model = f"{models}/{MODEL}"
    size = int(run(f"{bin_}/python -c '{READ.format(model)}'"))
    assert size > SIZE
    assert run(f"{bin_}/python -c '{LOAD.format(model, size)}'").strip() == str(size)

    run(f"{install} 'pagecache-bpf[cli]'")
    command = f"{bin_}/pagecache-bpf"
    policies = json.loads(run(f"{command} policy list --json"))["policies"]
    assert sorted(policy["name"] for policy in policies) == POLICIES
    if run(f"{command} doctor >/dev/null 2>&1; echo $?").strip() == "3":
        pytest.skip("this kernel has no engine that runs here")
    run(f"{command} attach sequential {model}")
    try:
        os.sync()
        run(f"{bin_}/python -c '{DROP.format(model)}'")
        assert int(run(f"{bin_}/python -c '{READ.format(model)}'")) == size
        told = json.loads(run(f"{command} stats --json"))
    finally:
        run(f"{command} detach sequential")
    (model_told,) = told["models"]
    assert model_told["bytes"] == size
    assert model_told["counters"]["prefetched_bytes"] > size // 2
    assert json.loads(run(f"{command} tags --json"))["tags"] == []
