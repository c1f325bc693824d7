# SPDX-License-Identifier: Apache-2.0
"""pagecache_bpf.torch against safetensors, byte for byte; needs torch (`make test-torch`)."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.unit.command import ROOT, environment

if importlib.util.find_spec("torch") is None:
    pytest.skip("torch is not installed: `make test-torch` runs this", allow_module_level=True)

import torch
from safetensors.torch import load_file as reference
from safetensors.torch import save_file

import pagecache_bpf as pc
from pagecache_bpf import torch as pct

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.bool, torch.float64)


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No policy is attached, whoever runs this."""
    monkeypatch.setenv("PAGECACHE_BPF_API", "alone")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.manual_seed(7)
    tensors = {
        f"layers.{n}": torch.randint(0, 2, (13, 257 + n)).to(dtype)
        for n, dtype in enumerate(DTYPES)
    }
    tensors["scalar"] = torch.tensor(3.5)
    tensors["empty"] = torch.empty(0, 4)
    tensors["large"] = torch.randn(211, 997)
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def same(ours: dict[str, torch.Tensor], path: Path) -> None:
    theirs = reference(path)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        mine = ours[name].cpu()
        assert (mine.dtype, mine.shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(
            mine.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)
        ), name


def test_on_the_cpu_it_is_what_safetensors_loads(file: Path) -> None:
    ours = pct.load_file(file)
    same(ours, file)
    maps = Path("/proc/self/maps").read_text()
    assert str(file) not in maps  # copies, not views of the mapping


@pytest.mark.parametrize("size", [1 << 12, 1 << 17, 64 << 20])
def test_staging_gives_the_same_bytes(
    file: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way through the buffers, with ordinary memory in the place of pinned memory."""
    from safetensors import safe_open

    monkeypatch.setattr(pct, "STAGING_BYTES", size)
    stream: Any = None
    buffers = [pct._Buffer(stream, False), pct._Buffer(stream, False)]
    with safe_open(file, framework="pt") as opened:
        same(pct.send(opened, torch.device("cpu"), buffers), file)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU that torch can use")
@pytest.mark.parametrize("pinned", [True, False])
def test_on_a_gpu(file: Path, pinned: bool) -> None:
    ours = pct.load_file(file, "cuda:0", pinned=pinned)
    assert all(tensor.device.type == "cuda" for tensor in ours.values())
    same(ours, file)
    placed = pct.place("cuda:0")
    assert placed.accelerator is not None


def test_places(file: Path) -> None:
    assert pct.place("cpu").node is None
    if not torch.cuda.is_available():
        with pytest.raises(pc.UsageError, match="there is no device cuda"):
            pct.load_file(file, "cuda:0")
        assert pct.place("cuda:3").node is None  # not in sight, so unknown


def test_what_is_no_safetensors_file_says_so(tmp_path: Path) -> None:
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"\xff" * 4096)
    with pytest.raises(pc.PagecacheError, match=r"bad\.safetensors"):
        pct.load_file(bad)


def test_importing_the_package_does_not_import_torch() -> None:
    code = (
        "import sys, pagecache_bpf as pc; pc.load; pc.UsageError; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=environment(), cwd=ROOT)
