# SPDX-License-Identifier: Apache-2.0
"""The package as it is imported by an inference server."""

from __future__ import annotations

import re
import subprocess
import sys

import pagecache_bpf

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


def test_every_public_name_is_there() -> None:
    for name in pagecache_bpf.__all__:
        assert getattr(pagecache_bpf, name) is not None, name
    assert set(pagecache_bpf.__all__) <= set(dir(pagecache_bpf))
    assert not hasattr(pagecache_bpf, "no_such_name")


def test_version() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+.*|unknown", pagecache_bpf.__version__)
