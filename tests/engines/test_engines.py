# SPDX-License-Identifier: Apache-2.0
"""Each engine starts on a cold disk in each way that docs/engines.md names, and answers the same.

Seconds are written down in build/test/engines.json and judged by nobody.  The weights lie on this
machine's own disk, which reads ahead as most do; their pages are dropped before each start, and
that is verified.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.engines import models
from tests.engines.starts import (
    NO_CONTROLLER,
    default,
    pagecache_bpf,
    require,
    started,
    told_by_report,
    write_down,
)

MODELS: dict[str, Callable[[Path], Path]] = {
    "transformers": models.llama,
    "sentence_transformers": models.minilm,
    "llama_cpp": models.gguf,
    "sglang_loader": models.llama,
    "vllm": models.llama,
}
WAYS = ("attach", "load", "run", "controller")

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root (BPF)")


@pytest.mark.parametrize("engine", MODELS)
@pytest.mark.parametrize("way", WAYS)
def test_an_engine_answers_the_same(
    engine: str, way: str, place: Path, request: pytest.FixtureRequest
) -> None:
    require(engine)
    model = MODELS[engine](place)
    without = default(engine, model)
    verdicts: Sequence[str]
    prefetched: Sequence[int | str]
    if way == "attach":
        pagecache_bpf("attach", "sequential", str(model))
        try:
            made = started(engine, model, way)
            (told,) = pagecache_bpf("stats")["models"]
        finally:
            pagecache_bpf("detach", "sequential")
        assert told["bytes"] == made.size
        ahead = told["counters"]["prefetched_bytes"]
        assert ahead > 0
        verdicts, prefetched = [f"{told['engine']}, sequential"], [ahead]
    else:
        socket = NO_CONTROLLER
        if way == "controller":
            socket = request.getfixturevalue("controller")
        made = started(engine, model, way, PAGECACHE_BPF_SOCKET=str(socket))
        if way == "controller" and engine != "vllm":  # its plug-in does not wait to be served
            assert [served for served, _ in made.served] == ["agent"], made.said[-3000:]
            assert "unknown" not in made.prefetched
        verdicts, prefetched = told_by_report(made)
    assert made.answer == without.answer
    write_down(engine, way, made, verdicts, prefetched)
    assert pagecache_bpf("tags")["tags"] == []
