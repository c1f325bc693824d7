# SPDX-License-Identifier: Apache-2.0
"""The wheel for arm64, under emulation of its user space: there is no such kernel here."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

from tests.delivery.conftest import only
from tests.unit.command import ROOT
from tools import dist

SYSTEM = ROOT / "build" / "arm64"
TRY = """
import ctypes, json, platform, sys
import pagecache_bpf as pc

library = ctypes.CDLL(sys.argv[1])
with pc.load(sys.argv[2]) as load:
    size = len(open(sys.argv[2], "rb").read())
version = [library.libbpf_major_version(), library.libbpf_minor_version()]
told = {"machine": platform.machine(), "libbpf": version, "bytes": [size, load.report().bytes]}
print(json.dumps(told))
"""


def test_the_wheel_for_arm64_loads_its_library_and_a_model(wheel: Path, tmp_path: Path) -> None:
    if shutil.which("qemu-aarch64-static") is None or not (SYSTEM / ".complete").exists():
        pytest.skip("needs what `make wheel-arm64` installs")
    other = only(f"arm64/pagecache_bpf-{dist.version()}-*.whl")
    assert other.name.endswith("_aarch64.whl") and "manylinux" in other.name
    package = tmp_path / "package"
    with zipfile.ZipFile(other) as archive, zipfile.ZipFile(wheel) as ours:
        archive.extractall(package)
        for name in ours.namelist():
            if name.endswith((".bpf.o", ".bpf.c", ".py")):
                assert archive.read(name) == ours.read(name), name
    model = tmp_path / "model.bin"
    model.write_bytes(bytes(1 << 20))
    library = package / "pagecache_bpf" / "lib" / "libbpf.so.1"
    python = SYSTEM / "usr" / "bin" / "python3.11"
    done = subprocess.run(
        [
            "qemu-aarch64-static",
            "-L",
            str(SYSTEM),
            str(python),
            "-c",
            TRY,
            str(library),
            str(model),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(package), "PYTHONHOME": str(SYSTEM / "usr")},
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["machine"] == "aarch64"
    assert tuple(told["libbpf"]) >= (1, 4)
    assert told["bytes"] == [1 << 20, 1 << 20]
