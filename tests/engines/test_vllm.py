# SPDX-License-Identifier: Apache-2.0
"""vLLM in its other shapes: a server, several ranks, a model by its name, a crash in mid-load."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.checkpoints import hub_snapshot
from benchmarks.engines import WEIGHTS_TOOK
from tests.engines import models
from tests.engines.starts import (
    NO_CONTROLLER,
    command_of,
    default,
    environment,
    make_cold,
    named,
    pagecache_bpf,
    require,
    started,
    told_by_report,
    write_down,
)
from tests.native.controller import serving
from tests.vm.kernel import wait_for

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root (BPF)")
#: What hub_snapshot() calls the repository.
REPOSITORY = "acme/tiny"


@pytest.fixture(scope="module", autouse=True)
def vllm() -> None:
    """It is installed."""
    require("vllm")


@pytest.fixture(scope="module")
def hub(place: Path) -> Iterator[Path]:
    """A cache of huggingface_hub that has the model."""
    cache = place / "hub"
    shutil.rmtree(cache, ignore_errors=True)
    hub_snapshot(models.llama(place), cache)
    yield cache
    shutil.rmtree(cache)


@pytest.mark.parametrize("way", ["attach", "load", "run", "controller"])
def test_two_tensor_parallel_ranks_answer_the_same(
    way: str, place: Path, request: pytest.FixtureRequest
) -> None:
    model = models.llama(place)
    without = default("vllm", model, 2)
    socket = request.getfixturevalue("controller") if way == "controller" else NO_CONTROLLER
    more = {"TP": "2", "PAGECACHE_BPF_SOCKET": str(socket)}
    if way == "attach":
        pagecache_bpf("attach", "sequential", str(model))
        try:
            made = started("vllm", model, way, **more)
            (told,) = pagecache_bpf("stats")["models"]
        finally:
            pagecache_bpf("detach", "sequential")
        write_down(
            *(named("vllm", 2), way, made, [f"{told['engine']}, sequential"]),
            [told["counters"]["prefetched_bytes"]],
        )
        assert told["counters"]["prefetched_bytes"] > 0
    else:
        made = started("vllm", model, way, **more)
        # The plug-in opens a load in each worker; `run` opens one for all.
        assert len(made.served) == (1 if way == "run" else 2), made.said[-3000:]
        write_down(named("vllm", 2), way, made, *told_by_report(made))
    assert made.answer == without.answer
    assert pagecache_bpf("tags")["tags"] == []


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_server_of_a_named_model_answers_the_same(
    ranks: int, place: Path, hub: Path, controller: Path
) -> None:
    """`vllm serve ORG/NAME` out of the cache of Hugging Face, with data-parallel ranks."""
    without = default("vllm", models.llama(place))
    (model,) = (hub / "models--acme--tiny" / "snapshots").iterdir()
    made = started(
        *("vllm_serve", model, "controller", REPOSITORY),
        PAGECACHE_BPF_SOCKET=str(controller),
        HF_HUB_CACHE=str(hub),
        DP=str(ranks),
    )
    assert len(made.served) == ranks, made.said[-3000:]
    assert made.answer == [without.answer] * len(made.answer)
    name = "vllm serve ORG/NAME" + (f", data parallel {ranks}" if ranks > 1 else "")
    write_down(name, "controller", made, *told_by_report(made))
    assert pagecache_bpf("tags")["tags"] == []


def test_a_crash_in_mid_load_leaves_nothing_and_the_next_start_is_served(
    place: Path, tmp_path: Path
) -> None:
    model = models.llama(place)
    without = default("vllm", model)
    with serving(tmp_path / "run") as controller, tempfile.TemporaryFile("w+") as log:

        def loading() -> list[dict[str, Any]]:
            """Who has a load open."""
            with controller.root() as root:
                clients: list[dict[str, Any]] = root.request("clients")["clients"]
            return [client for client in clients if client["loads"]]

        make_cold(model)
        engine = subprocess.Popen(
            command_of("vllm", str(model), "controller"),
            stdout=log,
            stderr=log,
            env=environment("vllm", "controller", PAGECACHE_BPF_SOCKET=str(controller.socket)),
            start_new_session=True,
        )
        try:
            (client,) = wait_for(loading, "the engine to load its weights", 300)
            os.kill(client["pid"], signal.SIGKILL)  # the worker, as the kernel does without memory
            assert engine.wait(120) != 0
        finally:
            os.killpg(engine.pid, signal.SIGKILL)
        log.seek(0)
        assert not WEIGHTS_TOOK.search(log.read())
        wait_for(lambda: not loading(), "the controller to end the load", 20)
        assert controller.run("tags", "--json").data["tags"] == []
        made = started("vllm", model, "controller", PAGECACHE_BPF_SOCKET=str(controller.socket))
    assert made.answer == without.answer
    assert [served for served, _ in made.served] == ["agent"]
