# SPDX-License-Identifier: Apache-2.0
"""The score of a model on a node: exact arithmetic, and what the kernel says of the same files."""

from __future__ import annotations

import io
import json
import os
import shutil
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from pagecache_bpf.cli.verbs import score as verb
from pagecache_bpf.errors import PagecacheError
from pagecache_bpf.kernel.cachestat import cachestat
from pagecache_bpf.kernel.file_pages import PAGE_SIZE
from pagecache_bpf.kernel.kernelfs import LIVE
from pagecache_bpf.metrics.exporter import Address, Collector, Exporter
from pagecache_bpf.placement import node_watch
from pagecache_bpf.placement.content_identity import DIGITS, content_of
from pagecache_bpf.placement.copy_speed import MEASUREMENTS, CopySpeed
from pagecache_bpf.placement.load_score import (
    ModelScore,
    NodeScores,
    from_json,
    relative,
    seconds_to_load,
)
from pagecache_bpf.placement.node_watch import NodeWatch, Speeds, models_at
from pagecache_bpf.placement.score_pages import answer
from pagecache_bpf.weights.files import IN_MEMORY
from pagecache_bpf.weights.models import Model, resolve
from tests.unit import weights
from tests.unit.command import NOBODY, run, undocumented
from tests.unit.snapshots import snapshot
from tests.unit.weights import read_without_readahead

GIB = 1 << 30
DEVICE, COPY = 3_000_000_000, 24_000_000_000
SPEEDS = Speeds(device=DEVICE, host_to_device=COPY)
COPY_UNKNOWN = Speeds(device=DEVICE)


@pytest.mark.parametrize("resident", [0, 1, 333 * 4096, GIB - 1, GIB])
def test_the_formula(resident: int) -> None:
    r = Fraction(resident, GIB)
    exact = (1 - r) * GIB / DEVICE + r * GIB / COPY
    found = seconds_to_load(GIB, resident, DEVICE, COPY)
    assert found is not None and found == pytest.approx(float(exact), rel=1e-15)


def test_what_is_not_known_counts_as_absent() -> None:
    assert seconds_to_load(GIB, None, DEVICE, COPY) == GIB / DEVICE
    assert seconds_to_load(GIB, 2 * GIB, DEVICE, COPY) == GIB / COPY  # whole pages past the end
    assert seconds_to_load(GIB, GIB - 1, None, COPY) is None
    assert seconds_to_load(GIB, GIB, None, COPY) == GIB / COPY  # nothing has to be read


def test_a_device_faster_than_the_copy_makes_no_cold_load_faster_than_a_warm_one() -> None:
    assert seconds_to_load(GIB, 0, 2 * COPY, COPY) == GIB / COPY
    assert seconds_to_load(GIB, GIB // 2, 2 * COPY, COPY) == GIB / COPY


def test_the_best_of_several_measurements_of_the_copy_counts(tmp_path: Path) -> None:
    """A node that was busy while one was made is not a slow node for ever."""
    measured: list[float] = []

    def measure() -> float:
        measured.append(1e9 * (1 + len(measured) % 5))  # 1, 2, 3, 4, 5, 1, ... GB/s
        return measured[-1]

    copy = CopySpeed(measure)
    for _ in range(3):  # each watch looks once, and all of them know what was measured
        watch = NodeWatch([make(tmp_path, f"m{len(measured)}")], speeds=COPY_UNKNOWN, copy=copy)
        (score,) = watch.scores().models
        assert score.host_to_device_rate == 1e9 * len(measured)
    assert [copy.now() for _ in range(3)] == [4e9, 5e9, 5e9]
    assert [copy.now() for _ in range(2 * MEASUREMENTS)] == [5e9] * 2 * MEASUREMENTS
    assert len(measured) == MEASUREMENTS


def test_candidates_are_ranked_by_how_near_they_come_to_the_fastest() -> None:
    assert relative({"a": 10.0, "b": 2.5, "c": None}) == {"a": 0.25, "b": 1.0, "c": 0.0}
    assert relative({"a": 10.0, "b": 2.5, "c": None}, 5.0) == {"a": 0.25, "b": 1.0, "c": 0.5}
    assert relative({"a": 4.0, "b": 4.0}) == {"a": 1.0, "b": 1.0}
    assert relative({"a": None}) == {"a": 0.0}
    assert relative({"a": 0.0, "b": 1.0}) == {"a": 1.0, "b": 0.0}
    assert relative({}) == {}


def scores(**changes: Any) -> NodeScores:
    """A node with a model of which a quarter is cached, and one of which nothing is known."""
    models = (
        ModelScore("qwen", "0123456789abcdef", GIB, GIB // 4, DEVICE, COPY),
        ModelScore("other", "f" * DIGITS, 7, None, None, COPY),
    )
    values = {"node": "n1", "time_ns": 5, "age_ns": 10**9, "free_budget_bytes": None}
    return NodeScores(**{**values, "running": ("qwen",), "models": models, **changes})


def test_what_a_node_says_is_read_as_it_was_meant() -> None:
    said = json.loads(json.dumps(scores().as_json()))
    assert from_json(said) == scores()
    said["models"][0]["seconds"] = 0.0  # a claim that its numbers do not give
    assert from_json(said).models[0].seconds == scores().models[0].seconds


BROKEN: tuple[Any, ...] = (
    *(None, [], "x", {}, 3),
    {**scores().as_json(), "models": {}},
    {**scores().as_json(), "models": [None] * 5000},
    {**scores().as_json(), "age_seconds": float("nan")},
    {**scores().as_json(), "age_seconds": -1},
    {**scores().as_json(), "node": ""},
    {**scores().as_json(), "time_ns": True},
)


@pytest.mark.parametrize("said", BROKEN)
def test_what_no_node_says_is_an_error(said: Any) -> None:
    with pytest.raises(PagecacheError, match="an answer of a node cannot be read"):
        from_json(said)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("bytes", 0),
        ("bytes", -1),
        ("bytes", 1.5),
        ("content", 7),
        ("model", "x" * 2000),
        ("host_to_device_bytes_per_second", 0),
        ("device_bytes_per_second", float("inf")),
        ("resident_bytes", "all"),
    ],
)
def test_a_model_that_cannot_be_is_an_error(key: str, value: Any) -> None:
    said = scores().as_json()
    said["models"][0][key] = value
    with pytest.raises(PagecacheError, match="an answer of a node cannot be read"):
        from_json(said)


def make(directory: Path, name: str, seed: int = 0) -> Path:
    """A model of two shards; seed changes a byte in 20, as a fine-tuning would, no header."""
    root = directory / name
    root.mkdir(parents=True)
    for number in (1, 2):
        path = root / f"model-0000{number}-of-00002.safetensors"
        places = weights.safetensors(path, {f"w{number}.{part}": (512, 256) for part in range(8)})
        if seed:
            with path.open("r+b") as file:
                for offset, length in places.values():
                    file.seek(offset)
                    file.write(bytes([seed]) * (length // 20))
    return root


def test_a_model_is_known_by_its_content(tmp_path: Path) -> None:
    one = make(tmp_path / "node1", "qwen")
    copy = tmp_path / "node2" / "another-name"
    shutil.copytree(one, copy)
    os.utime(copy / "model-00001-of-00002.safetensors", (1, 1))
    tuned = make(tmp_path / "node3", "qwen", seed=9)
    headers = [
        next(path.read_bytes()[:600] for path in sorted(root.iterdir())) for root in (one, tuned)
    ]
    assert headers[0] == headers[1]  # so the header alone would not tell them apart
    found = content_of(resolve(one))
    assert len(found) == DIGITS and int(found, 16) >= 0
    assert content_of(resolve(copy)) == found
    assert content_of(resolve(tuned)) != found
    assert content_of(resolve(one)) == found


def test_a_file_of_no_known_format_has_an_identity(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"\x80\x02" + bytes(5000))
    (tmp_path / "b.bin").write_bytes(b"\x80\x02" + bytes(4999) + b"\x01")
    assert content_of(resolve(tmp_path / "a.bin")) != content_of(resolve(tmp_path / "b.bin"))


def drop(root: Path) -> None:
    """Write a model's files back and drop them from the page cache."""
    for path in root.iterdir():
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


@pytest.fixture
def cold(tmp_path: Path) -> Path:
    """A model on a disk, written back and dropped from the page cache."""
    if LIVE.fstype(tmp_path.stat().st_dev) in IN_MEMORY:
        pytest.skip("the temporary directory is in memory (give --basetemp on a disk)")
    root = make(tmp_path, "cold")
    drop(root)
    return root


def kernel_says(root: Path) -> int:
    """Bytes of a model's files in the page cache, in whole pages up to the end of each."""
    total = 0
    for path in root.iterdir():
        with path.open("rb") as file:
            cached = cachestat(file.fileno()).cached * PAGE_SIZE
        total += min(cached, path.stat().st_size)
    return total


def test_the_score_is_what_the_kernel_says(cold: Path) -> None:
    """At each of several states; asking changes none of them."""
    shard = min(cold.iterdir())
    size = sum(path.stat().st_size for path in cold.iterdir())
    NodeWatch([cold], speeds=SPEEDS).scores()  # reads the headers, once
    for pages in (0, 1, 37, 211):
        read_without_readahead(shard, 0, pages * PAGE_SIZE)
        before = kernel_says(cold)
        found = NodeWatch([cold], speeds=SPEEDS).scores()
        (model,) = found.models
        assert kernel_says(cold) == before == model.resident_bytes
        assert before >= pages * PAGE_SIZE
        assert model.bytes == size and model.fraction == before / size
        assert model.seconds == (size - before) / DEVICE + before / COPY
        assert model.cold_seconds == size / DEVICE and model.warm_seconds == size / COPY
    assert found.age_ns >= 0 and found.missing == ()


def test_of_two_copies_the_warmer_one_counts(cold: Path, tmp_path: Path) -> None:
    shutil.copytree(cold, tmp_path / "copy")
    drop(cold)  # it was read for the copy, which is cached as it was just written
    found = NodeWatch([cold, tmp_path / "copy"], speeds=SPEEDS).scores()
    assert [model.model for model in found.models] == ["copy"]


def test_a_directory_of_models(tmp_path: Path) -> None:
    for name in ("b", "a"):
        make(tmp_path, name)
    (tmp_path / "notes").mkdir()
    assert [model.name for model in models_at(tmp_path)] == ["a", "b"]
    found = NodeWatch([tmp_path, tmp_path / "gone"], speeds=SPEEDS).scores()
    # Two that are the same by content are one.
    assert len(found.models) == 1
    assert len(found.missing) == 1 and "gone" in found.missing[0]


def test_files_that_do_not_answer_keep_no_look_from_ending(
    cold: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the others it is told; who did not answer is not asked again before it has."""
    asked: list[str] = []
    gone = threading.Event()

    def hang(path: Path) -> list[Model]:
        asked.append(path.name)
        if path.name == "hung" and not gone.wait(60):
            raise AssertionError("the test is over")
        return [resolve(cold)]

    monkeypatch.setattr(node_watch, "models_at", hang)
    monkeypatch.setattr(node_watch, "ANSWER_SECONDS", 0.5)
    monkeypatch.setattr(node_watch, "KEEP_SECONDS", 0.0)
    watch = NodeWatch([tmp_path / "hung", cold], speeds=SPEEDS)
    for _ in range(3):
        found = watch.scores()
        assert len(found.models) == 1
        assert [text.partition(": ")[2] for text in found.missing] == [
            "its file system does not answer"
        ]
    assert asked == ["hung", cold.name, cold.name, cold.name]
    gone.set()
    deadline = time.monotonic() + 30
    while watch.scores().missing:
        assert time.monotonic() < deadline
    assert asked.count("hung") == 2


def test_the_command(cold: Path) -> None:
    content_of(resolve(cold))  # reads the headers, which the command would add to the page cache
    done = run(
        *("--json", "score", str(cold), "--device-speed", "3GB"),
        *("--host-to-device-speed", "24GB"),
    )
    assert done.code == 0, done.err
    assert not undocumented(done.data, verb.JSON["score"])
    found = from_json(done.data)
    assert found.models[0].content == content_of(resolve(cold))
    assert found.models[0].resident_bytes == kernel_says(cold)
    human = run("score", str(cold), "--no-probe")
    assert human.code == 0 and found.models[0].content in human.out


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_without_rights_what_is_not_told_counts_as_absent(cold: Path) -> None:
    done = run("--json", "score", str(cold), "--device-speed", "1GB", rights=NOBODY)
    assert done.code == 0, done.err
    (model,) = done.data["models"]
    assert model["resident_bytes"] is None
    assert model["seconds"] == model["cold_seconds"] == model["bytes"] / 1e9


def test_a_path_to_no_model_is_an_error(tmp_path: Path) -> None:
    done = run("--json", "score", str(tmp_path / "nothing"))
    assert done.code == 2 and "does not exist" in json.dumps(done.error)


def test_readiness() -> None:
    assert answer("/readyz", "model=qwen&min=0.25", scores())[0] == "200 OK"
    assert answer("/readyz", "model=0123456789abcdef&min=0.25", scores())[0] == "200 OK"
    assert answer("/readyz", "model=qwen", scores())[0].startswith("503")
    assert answer("/readyz", "model=nobody&min=0", scores())[0].startswith("503")
    assert answer("/readyz", "min=0", scores(models=()))[0].startswith("503")
    for text in ("x", "2", "-1", "nan"):
        assert answer("/readyz", f"min={text}", scores())[0].startswith("400")


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The exporter with these scores; its URL without a path."""
    pytest.importorskip("prometheus_client", reason="prometheus_client is not installed")
    monkeypatch.setattr(Collector.__init__, "__defaults__", (lambda text: None, snapshot))
    with Exporter(Address("127.0.0.1", 0), scores=scores, score_metrics=True) as running:
        yield running.url.removesuffix("/metrics")


def test_the_pages_are_beside_the_metrics(served: str) -> None:
    with urllib.request.urlopen(f"{served}/scores", timeout=60) as said:
        assert from_json(json.load(said)) == scores()
    with urllib.request.urlopen(f"{served}/metrics", timeout=60) as said:
        lines = said.read().decode().splitlines()
    labels = 'content="0123456789abcdef",model="qwen"'
    (line,) = (line for line in lines if line.startswith(f"pagecache_load_seconds{{{labels}"))
    assert float(line.split()[-1]) == scores().models[0].seconds
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"{served}/readyz?model=qwen", timeout=60)
    assert caught.value.code == 503
    assert json.load(caught.value) == {"ready": False, "min": 0.9, "fractions": {"qwen": 0.25}}
    request = urllib.request.Request(f"{served}/scores", method="POST", data=b"{}")
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=60)
    assert caught.value.code == 405


def test_that_nothing_is_tagged_is_told() -> None:
    text = io.StringIO()
    nothing = SimpleNamespace(node="n", free_budget_bytes=None, running=[], models=[])
    verb._human(Console(file=text, width=96), nothing)  # type: ignore[arg-type]
    assert "no model is tagged" in text.getvalue() and "content" not in text.getvalue()
