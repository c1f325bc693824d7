# SPDX-License-Identifier: Apache-2.0
"""Libraries read the bytes of the derived template; safetensors in its order, too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.cachestat import drop
from pagecache_bpf import templates
from pagecache_bpf.weights import headers
from pagecache_bpf.weights.models import Model, resolve
from tests.loaders import checkpoints
from tests.loaders.page_trace import PageTrace
from tests.loaders.reads import PAGE, Place

_SCRIPT = Path(__file__).with_name("library_load.py")


def _load(how: str, path: Path, model: Model, trace: PageTrace) -> list[Place]:
    """Have a library load a model, and return the pages that it read, each once."""
    files = {file.stat().st_ino: file.name for file in model.files}
    os.sync()
    drop(model.files)
    # With several threads tensors come in the order in which threads are woken.
    own = {"HF_DEACTIVATE_ASYNC_LOAD": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with trace.record() as touches:
        done = subprocess.run(
            [sys.executable, str(_SCRIPT), how, str(path)],
            env={**os.environ, **own},
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
    assert done.returncode == 0, done.stderr[-2000:]
    return list(dict.fromkeys((files[inode], page) for inode, page in touches if inode in files))


def _pages(model: Model, order: str) -> list[Place]:
    """Return the pages of the template in an order, each once."""
    template = templates.derive(model, order)
    pages: dict[Place, None] = {}
    for extent in template.plain():
        name = Path(template.files[int(extent["file"])].path).name
        begin, length = int(extent["offset"]), int(extent["length"])
        for page in range(begin // PAGE, (begin + length - 1) // PAGE + 1):
            pages[name, page] = None
    return list(pages)


def _tensors(model: Model, pages: list[Place]) -> list[str]:
    """Return the tensors in the order in which pages of their own come."""
    owners: dict[Place, str | None] = {}
    for path in model.files:
        found = headers.parse(path)
        ends = (found.offsets + found.lengths).tolist()
        for name, begin, end in zip(found.names, found.offsets.tolist(), ends, strict=True):
            for page in range(begin // PAGE, -(-end // PAGE)):
                place = (path.name, page)
                owners[place] = None if place in owners else name
    own = (owners.get(page) for page in pages)
    return list(dict.fromkeys(name for name in own if name))


@pytest.mark.parametrize(
    ("how", "order"), [("safetensors", "keys"), ("safetensors_offsets", "offset")]
)
def test_a_library_reads_as_its_order_says(
    how: str, order: str, disk: Path, trace: PageTrace, tmp_path: Path
) -> None:
    path = disk / f"deep-{how}"
    checkpoints.deep(tmp_path).rename(tmp_path / path.name)
    checkpoints.copy(tmp_path / path.name, disk)
    model = resolve(path)
    read = _load(how, path, model, trace)
    expected = {name: _pages(model, name) for name in ("keys", "offset", "natural")}
    assert set(read) == set(expected[order])
    by_order = {name: _tensors(model, pages) for name, pages in expected.items()}
    assert len({tuple(names) for names in by_order.values()}) == 3
    assert _tensors(model, read) == by_order[order]


@pytest.mark.parametrize("how", ["llama_cpp", "llama_cpp_mapped"])
def test_llama_cpp_reads_the_template(how: str, disk: Path, trace: PageTrace) -> None:
    """The file's tensors are in an order of their own, in which llama.cpp does not read them."""
    pytest.importorskip("xllamacpp")
    path = checkpoints.gguf(disk / f"{how}.gguf")
    model = resolve(path)
    read = _load(how, path, model, trace)
    assert set(read) == set(_pages(model, "keys"))
