# SPDX-License-Identifier: Apache-2.0
"""benchmarks.matrix starts an engine as one of its readers: its load, its bytes and its answer."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks import engines, loaders, matrix_readers
from benchmarks.cachestat import drop, resident_bytes
from benchmarks.matrix_cells import BY_NAME
from pagecache_bpf.errors import PagecacheError
from pagecache_bpf.weights.models import Model, resolve
from tests.engines import models
from tests.engines.starts import require


@pytest.fixture
def model(place: Path, monkeypatch: pytest.MonkeyPatch) -> Model:
    """A model that llama.cpp starts on; it is in this interpreter's environment."""
    require("llama_cpp")
    monkeypatch.setattr(engines, "PYTHON", Path(sys.executable))
    monkeypatch.setattr(matrix_readers, "_answers", {})
    return resolve(models.gguf(place))


def load(model: Model) -> loaders.Outcome:
    """Start llama.cpp once, cold."""
    drop(model.files)
    reader = BY_NAME["llama.cpp"]
    reference = loaders.Reference([])  # its answer tells, not its bytes
    return matrix_readers.run(reader, model, reference, lambda: None, 0)


def test_engine_is_a_reader_whose_answer_is_compared(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = load(model)
    assert outcome.correct
    assert resident_bytes(model.files) >= model.size
    assert outcome.device_bytes is not None and outcome.device_bytes >= model.size
    assert outcome.cpu_s and outcome.cpu_s > 0
    # The load is a part of the start, which has the imports and the answer, too.
    assert 0 < outcome.seconds < outcome.ended_s - outcome.begun_s
    assert load(model).correct
    monkeypatch.setattr(matrix_readers, "_answers", {("llama.cpp", model.root): "another"})
    assert not load(model).correct


def test_engine_that_fails_is_an_error(tmp_path: Path, model: Model) -> None:
    with pytest.raises(PagecacheError, match="llama_cpp did not start"):
        engines.start("llama_cpp", tmp_path)
