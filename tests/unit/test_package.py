# SPDX-License-Identifier: Apache-2.0
"""The package as it is imported by an inference server."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import pagecache_bpf
import pagecache_bpf.policy

CHEAP = """
import sys
before = set(sys.modules)
import pagecache_bpf
pagecache_bpf.PagecacheError
pagecache_bpf.load
loaded = set(sys.modules) - before
heavy = {"argparse", "ctypes", "elftools", "numpy", "rich", "socket", "subprocess", "torch"}
print(*sorted(loaded & heavy))
"""


def test_importing_it_loads_nothing_heavy() -> None:
    done = subprocess.run(
        [sys.executable, "-S", "-c", CHEAP], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == ""


def test_a_command_meets_an_early_ctrl_c_before_it_imports_anything() -> None:
    """Until main() has set its handling, an interrupt is a traceback of whatever is imported."""
    code = "import sys, signal; before = set(sys.modules); import pagecache_bpf.__main__; "
    done = subprocess.run(
        [sys.executable, "-S", "-c", f"{code}print(*sorted(set(sys.modules) - before))"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["__future__", "pagecache_bpf", "pagecache_bpf.__main__"]


@pytest.mark.parametrize("package", [pagecache_bpf, pagecache_bpf.policy])
def test_every_public_name_is_there(package: ModuleType) -> None:
    for name in package.__all__:
        assert getattr(package, name) is not None, name
    assert set(package.__all__) <= set(dir(package))
    assert not hasattr(package, "no_such_name")


def test_the_public_names_are_few() -> None:
    """About a dozen and the errors; what is about policies is one package further down."""
    assert len(pagecache_bpf.__all__) <= 17


def test_version() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+.*|unknown", pagecache_bpf.__version__)


def test_s16_the_version_is_not_that_of_a_file_that_another_project_left(tmp_path: Path) -> None:
    """Beside the installed package, where some wheels leave one."""
    shutil.copytree(
        Path(pagecache_bpf.__file__).parent,
        tmp_path / "pagecache_bpf",
        ignore=lambda directory, names: [name for name in names if not name.endswith(".py")],
    )
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "other"\nversion = "99.0"\n')
    done = subprocess.run(
        [sys.executable, "-c", "import pagecache_bpf; print(pagecache_bpf.__version__)"],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    assert done.stdout.strip() != "99.0"
