# SPDX-License-Identifier: Apache-2.0
"""The simulated cluster: arithmetic of single loads, and what placements do on a small trace."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import cluster_simulation as simulated
from benchmarks.cluster_simulation import HOST_TO_DEVICE, Cluster
from benchmarks.placement import PLACEMENTS, extender_points, main, measure, sample_size, table
from benchmarks.placement_trace import Requests, from_csv, generated
from pagecache_bpf.errors import UsageError
from pagecache_bpf.placement.extender import points
from pagecache_bpf.placement.load_score import relative, seconds_to_load

#: Two models in turn, so far apart that each replica has gone when its model is wanted again.
TRACE = "Timestamp,Model\n" + "".join(
    f"{200 * number},{'llama' if number % 2 else 'qwen'}\n" for number in range(40)
)


@pytest.fixture
def trace(tmp_path: Path) -> Requests:
    path = tmp_path / "trace.csv"
    path.write_text(TRACE)
    return from_csv(path, seed=1)


def test_one_load_takes_what_the_score_says(trace: Requests) -> None:
    """Cold, in part and whole, on a device of known speed, without anything else."""
    size = float(trace.sizes[0])
    only = Requests(np.array([0.0, 1000.0]), np.array([0, 0]), trace.sizes, trace.gpus)
    cluster = Cluster(1, only, seed=1)
    cluster.device[0] = 5e9
    outcome = cluster.run(lambda cluster, model, nodes: int(nodes[0]), 0.0)
    # Other files are far from having filled the page cache.
    assert outcome.seconds == pytest.approx([size / 5e9, size / HOST_TO_DEVICE])
    assert outcome.read == size and outcome.requests == 2
    cluster._until(2000.0)
    left = cluster.resident[0][0] = size * 3 / 4
    took = cluster.finish_times(0)[0] - cluster.now
    assert took == pytest.approx(seconds_to_load(int(size), int(left), 5e9, HOST_TO_DEVICE))


def test_other_files_push_out_what_was_used_longest_ago(
    trace: Requests, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Least recently used first, by bytes: exact, as nothing else happens."""
    sizes = trace.sizes
    monkeypatch.setattr(simulated, "CACHE", float(sizes.sum()))
    both = Requests(np.array([0.0, 300.0]), np.array([1, 0]), sizes, trace.gpus)
    cluster = Cluster(1, both, seed=1)
    cluster.device[0] = 5e9
    cluster.run(lambda cluster, model, nodes: int(nodes[0]), 0.0)
    for now in (400.0, 900.0, 1200.0):
        cluster._until(now)
        cluster._press(0)
        # What was read before the first model was loaded is older and went first.
        older = sizes[1] / 5e9 * simulated.PRESSURE
        left = max(0.0, sizes[1] - (now * simulated.PRESSURE - older))
        assert cluster.resident[1].get(0, 0.0) == pytest.approx(left, rel=1e-6)
        assert cluster.resident[0][0] == sizes[0]
        assert cluster._used[0] == pytest.approx(simulated.CACHE)


def test_the_points_are_those_of_the_extender(trace: Requests) -> None:
    cluster = Cluster(50, trace, seed=3)
    for node in range(0, 50, 3):
        cluster.told[0][node] = float(trace.sizes[0]) * node / 50
    nodes = np.arange(50)
    size = int(trace.sizes[0])
    seconds = {
        str(node): seconds_to_load(
            size, int(cluster.told[0].get(node, 0.0)), cluster.device[node], HOST_TO_DEVICE
        )
        for node in range(50)
    }
    exact = points(relative(seconds))
    assert extender_points(cluster, 0, nodes).tolist() == [exact[str(node)] for node in range(50)]


def test_placements_on_a_small_trace(trace: Requests) -> None:
    """The warm-aware ones go back to where the pages are; the default does not look."""
    rows = {name: measure(name, 8, trace, 400.0, 1) for name in PLACEMENTS}
    for row in rows.values():
        assert row["requests"] == 38 and row["cold_starts"] == 38 and not row["unplaced"]
    # Two models that fit a node's cache beside each other: nothing is read after the warm-up.
    for name in ("extender", "extender, all", "all or nothing", "oracle"):
        assert rows[name]["read_TB"] == 0, name
    assert rows["default"]["read_TB"] > 0
    warm = {float(trace.sizes[model]) / HOST_TO_DEVICE for model in (0, 1)}
    assert min(warm) <= rows["extender"]["cold_mean_s"] + 0.01
    assert rows["extender"]["cold_p99_s"] <= round(max(warm), 2) < rows["default"]["cold_p99_s"]
    assert rows["labels"]["read_TB"] <= rows["default"]["read_TB"]
    assert rows["labels"]["writes_per_s"] > 0
    assert table(rows.values()).count("\n") == 1 + len(rows)


def test_generated_requests_are_as_asked_for() -> None:
    """Rate and burstiness of many seeds, by the law of large numbers with a wide margin."""
    found = generated(200, 50.0, 2000.0, skew=1.0, variation=1.0, seed=5)
    assert len(found.times) == pytest.approx(100_000, rel=0.05)
    assert (np.diff(found.times) >= 0).all()
    counts = np.sort(np.bincount(found.models, minlength=200))[::-1]
    # Zipf: the first has twice as many as the second, ten times as many as the tenth.
    assert counts[0] / counts[9] == pytest.approx(10, rel=0.3)
    again = generated(200, 50.0, 2000.0, skew=1.0, variation=1.0, seed=5)
    assert (again.times == found.times).all()


@pytest.mark.parametrize(
    ("nodes", "sample"), [(50, 50), (100, 100), (1000, 420), (5000, 500), (10_000, 500)]
)
def test_the_sample_is_that_of_kube_scheduler(nodes: int, sample: int) -> None:
    """The values that Kubernetes' documentation and code give."""
    assert sample_size(nodes) == sample


def test_published_traces_are_read_by_their_columns(tmp_path: Path) -> None:
    """Lines as Azure publishes them; of the counts one line is cut short."""
    path = tmp_path / "trace.csv"
    path.write_text(
        "HashOwner,HashApp,HashFunction,Trigger,1,2,3\no,a,f,http,2,0,3\no,a,g,queue,0,1\n"
    )
    found = from_csv(path, 1)
    assert found.models.tolist().count(0) == 5 and found.models.tolist().count(1) == 1
    first, second, third, *_, last = found.times[found.models == 0].tolist()
    assert second - first < 60 < third - second and last - third < 60
    assert len(found.sizes) == 2
    path.write_text("app,func,end_timestamp,duration\na,f,7.5,2.5\na,g,4.25,0.25\na,f,9.0,1.0\n")
    found = from_csv(path, 1)
    assert (found.times.tolist(), found.models.tolist()) == ([0.0, 1.0, 4.0], [1, 0, 0])
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        + "2023-11-16 18:59:59.5000000,4808,10\n2023-11-16 19:00:01.2500001,3180,8\n" * 500
    )
    found = from_csv(path, 1, models=5, skew=1.0)
    assert set(np.unique(found.times)) == {0.0, 1.75}
    counts = np.sort(np.bincount(found.models, minlength=5))[::-1]
    assert counts.sum() == 1000 and counts[0] / counts[4] == pytest.approx(5, rel=0.4)
    with pytest.raises(UsageError, match="names no models"):
        from_csv(path, 1)


def test_a_trace_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(UsageError, match="cannot be read"):
        from_csv(path, 1)
    path.write_text("Timestamp,Model\n")
    with pytest.raises(UsageError, match="is empty"):
        from_csv(path, 1)
    assert main(["--nodes", "2", "--trace", str(tmp_path / "none.csv")]) == 2
    assert "cannot be read" in capsys.readouterr().err
