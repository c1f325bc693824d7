# SPDX-License-Identifier: Apache-2.0
"""The views and the exporter on real loads: this kernel, engine agent, a real Prometheus."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cachestat import PAGE_SIZE, drop, resident_bytes
from pagecache_bpf.cli import views
from pagecache_bpf.metrics import strips
from pagecache_bpf.metrics.declarations import PARTS
from pagecache_bpf.policy import agent_device
from pagecache_bpf.policy.engines import Engines
from tests.native.prometheus import BIN, Prometheus
from tests.native.readahead import usual_readahead
from tests.unit.command import COMMAND, ROOT, environment, run, undocumented
from tests.unit.test_metrics import dashboard_queries, documented_queries, promtool
from tests.vm.kernel import make_file, wait_for

pytestmark = pytest.mark.native

PAGES = (12281, 4093)
SIZE = sum(PAGES) * PAGE_SIZE
MODEL = "prime"
needs_prometheus = pytest.mark.skipif(
    not (BIN / "prometheus").exists(), reason="no Prometheus: run `make deps`"
)


def _end() -> None:
    """No agent, so that nothing is counted yet."""
    if agent_device.is_running():
        run("detach", "--all")
        with agent_device.AgentDevice() as agent:
            os.kill(agent.pid, signal.SIGTERM)
        wait_for(lambda: not agent_device.is_running(), "the agent to end")


@pytest.fixture
def model(tmp_path: Path) -> Iterator[Path]:
    """A cold model of two files on a device with the usual readahead window; not tagged."""
    _end()
    directory = tmp_path / "model"
    directory.mkdir()
    for name, pages in zip("ab", PAGES, strict=True):
        make_file(directory / f"{name}.safetensors", pages)
    with usual_readahead(directory):
        drop(directory.iterdir())
        yield directory
    _end()


def attach(model: Path) -> None:
    done = run("attach", "sequential", "--engine", "agent", model, "--model", MODEL)
    assert done.code == 0, done.err


def load(model: Path) -> None:
    """Read every file from front to back, in a process of its own."""
    subprocess.run(["cat", *sorted(model.iterdir())], stdout=subprocess.DEVNULL, check=True)


def stats() -> dict[str, Any]:
    done = run("stats", "--json")
    assert done.code == 0, done.err
    return dict(done.data)


def counters() -> dict[str, int]:
    (found,) = stats()["models"]
    return dict(found["counters"])


@contextmanager
def exporter() -> Iterator[str]:
    """The command, serving on a free port; gives the address."""
    with subprocess.Popen(
        [*COMMAND, "export", "--listen", "127.0.0.1:0", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        cwd=ROOT,
    ) as process:
        assert process.stdout and process.stderr
        try:
            text = "".join(iter(process.stdout.readline, "}\n")) + "}"
            yield str(json.loads(text)["listen"])
        finally:
            process.send_signal(signal.SIGTERM)
            assert (process.wait(30), process.stderr.read()) == (0, "")


def scrape(address: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every sample of a scrape that promtool likes."""
    from prometheus_client.parser import text_string_to_metric_families

    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    if BIN.exists():
        checked = promtool("check", "metrics", text=text)
        assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def total(samples: dict[Any, float], name: str, **labels: str) -> float:
    """The sum of the samples that have these labels."""
    return sum(
        value
        for (metric, having), value in samples.items()
        if metric == name and labels.items() <= dict(having).items()
    )


def test_two_loads_are_counted_by_everything_alike(model: Path) -> None:
    attach(model)
    load(model)
    load(model)
    with exporter() as address:
        samples = scrape(address)
    shown = stats()
    assert not undocumented(shown, views.JSON)
    (row,) = shown["models"]
    counted = row["counters"]
    assert row["observed"] and row["bytes"] == SIZE
    assert row["resident_bytes"] == resident_bytes(model.iterdir())
    # The second load found everything; of the first, what the policy had brought in time.  How
    # exact the observer is, is for its own tests.
    assert counted["read_bytes"] == pytest.approx(2 * SIZE, rel=0.05)
    assert 0.45 < row["hit_ratio"] < 1
    accessed = "pagecache_accessed_bytes_total"
    assert total(samples, accessed, result="hit") == counted["read_hit_bytes"]
    assert total(samples, accessed, model=MODEL) == counted["read_bytes"]
    assert total(samples, "pagecache_added_bytes_total") == counted["added_bytes"] >= SIZE
    assert total(samples, "pagecache_hit_ratio") == pytest.approx(row["hit_ratio"])
    assert total(samples, "pagecache_resident_bytes", engine="agent") == row["resident_bytes"]
    assert total(samples, "pagecache_policy_prefetch_bytes_total", policy="sequential") > 0
    text = run("stats").out
    assert MODEL in text and f"{row['hit_ratio']:.1%} hit" in text


def test_watch_follows_a_load(model: Path) -> None:
    attach(model)
    with subprocess.Popen(
        [*COMMAND, "watch", "--interval", "0.2", "--json"],
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
        cwd=ROOT,
    ) as process:
        assert process.stdout
        lines = [json.loads(process.stdout.readline())]
        load(model)
        counted = counters()["read_bytes"]
        while lines[-1]["models"][0]["counters"]["read_bytes"] < counted:
            lines.append(json.loads(process.stdout.readline()))
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    read = sum(
        line["models"][0]["rates"]["accessed"] * (line["time_ns"] - before["time_ns"]) / 1e9
        for before, line in pairwise(lines)
    )
    assert read == pytest.approx(counted, rel=1e-6)


def test_an_exporter_outlives_the_agent(model: Path) -> None:
    with exporter() as address:
        empty = scrape(address)
        assert total(empty, "pagecache_up") == 1
        assert total(empty, "pagecache_engine_up") == 0
        assert not total(empty, "pagecache_model_bytes")
        attach(model)
        assert total(scrape(address), "pagecache_model_bytes", model=MODEL) == SIZE
        with agent_device.AgentDevice() as agent:
            os.kill(agent.pid, signal.SIGKILL)
        wait_for(lambda: not agent_device.is_running(), "the agent to die")
        assert set(scrape(address)) == set(empty)
        attach(model)
        assert total(scrape(address), "pagecache_model_bytes", model=MODEL) == SIZE


@needs_prometheus
def test_a_real_prometheus_answers(model: Path, tmp_path: Path) -> None:
    accessed = f'sum(pagecache_accessed_bytes_total{{model="{MODEL}"}})'
    ratio = f'sum(pagecache_accessed_bytes_total{{model="{MODEL}",result="hit"}}) / {accessed}'
    with exporter() as address, Prometheus(tmp_path, address) as prometheus:
        attach(model)
        # A rate needs a sample from before.
        wait_for(lambda: prometheus.value(accessed) == 0, "a scrape of the tagged model", 60)
        load(model)  # the agent starts its workers
        drop(model.iterdir())
        load(model)
        load(model)
        counted = counters()
        assert counted["prefetch_useful_bytes"] > 0
        wanted = counted["read_bytes"] + counted["mmap_bytes"]
        wait_for(lambda: prometheus.value(accessed) == wanted, "a scrape after the loads", 60)
        hits = counted["read_hit_bytes"] + counted["mmap_hit_bytes"]
        assert prometheus.value(ratio) == pytest.approx(hits / wanted, rel=1e-9)
        assert 0.3 < prometheus.value(ratio) < 1
        assert prometheus.value("pagecache_hit_ratio") == pytest.approx(hits / wanted, rel=1e-9)
        assert MODEL in prometheus.get("label/model/values")
        for title, query in dashboard_queries():
            # Wide enough for the slowest machine: from before the loads.
            query = query.replace("$model", ".*").replace("$__rate_interval", "5m")
            answer = prometheus.query(query)
            # This policy follows no template.
            assert bool(answer) == ("template" not in query), f"{title}: {query}: {answer}"
            if title in ("Hit ratio", "Residency", "Prefetch accuracy"):
                assert all(0 <= value <= 1 for value in answer.values()), (title, answer)
            assert not any(math.isnan(value) for value in answer.values()), (title, answer)
        for query in documented_queries():
            if "pagecache_load_seconds" in query:
                continue  # only with --scores, whose reading of headers is an access
            # Loads of another time are not looked at; what is a question here has an answer.
            assert prometheus.query(re.sub(r"\[\d+m\]", "[5m]", query)), query
        groups = prometheus.get("rules")["groups"]
        assert [rule for group in groups for rule in group["rules"]]
        wait_for(
            lambda: all(
                rule["health"] == "ok"
                for group in prometheus.get("rules")["groups"]
                for rule in group["rules"]
            ),
            "the alerts to be evaluated",
        )


def test_strips_tell_which_parts_are_cached(model: Path) -> None:
    """By file for top and by model for Prometheus, against what was read."""
    attach(model)
    first, second = sorted(model.iterdir())
    drop([first, second])
    with second.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        os.pread(file.fileno(), 100 * PAGE_SIZE, 3000 * PAGE_SIZE)
    wait_for(lambda: resident_bytes([second]) >= 100 * PAGE_SIZE, "the pages")
    key = (MODEL, "sequential", "agent")
    with Engines() as engines:
        by_file = strips.of_files(engines, 11, [key], 10)
        by_model = strips.of_models(engines, PARTS)[key]
        assert strips.of_files(engines, 11, [key], 1) == by_file[:1]
    assert [Path(found.path) for found in by_file] == [first, second]
    assert [sum(found.resident) for found in by_file] == [
        resident_bytes([path]) for path in (first, second)
    ]
    assert by_file[1].resident[3000 * 11 // PAGES[1]] >= 100 * PAGE_SIZE
    assert sum(by_model) == resident_bytes([first, second])
    first_page = PAGES[0] + 3000  # the range may lie in two parts
    parts = {page * PARTS // sum(PAGES) for page in (first_page, first_page + 99)}
    assert sum(by_model[part] for part in parts) >= 100 * PAGE_SIZE
    with exporter() as address:
        samples = scrape(address)
    name = "pagecache_resident_part_bytes"
    assert [total(samples, name, part=f"{part:02}") for part in range(PARTS)] == list(by_model)


def test_top_with_a_real_engine(model: Path) -> None:
    from tests.unit.test_top import Terminal

    attach(model)
    load(model)
    terminal = Terminal(command=COMMAND)
    try:
        terminal.wait(lambda text: MODEL in text and "a.safetensors" in text, "the model")
        terminal.press("q")
        assert terminal.end() == 0
        terminal.assert_restored()
    finally:
        terminal.close()


def test_explain_beside_an_agent(model: Path) -> None:
    attach(model)
    shown = run("explain", model, "--json")
    assert shown.code == 0, shown.err
    assert shown.data["size_bytes"] == shown.data["to_read_bytes"] == SIZE
    assert resident_bytes(model.iterdir()) == 0  # it was a dry run
    load(model)
    left = run("explain", model, "--json").data["to_read_bytes"]
    assert left == SIZE - resident_bytes(model.iterdir())


def test_a_scrape_reads_nothing_of_a_model(model: Path) -> None:
    """Only --scores or --model has the headers read; else a scrape is no reader."""
    drop(model.iterdir())
    attach(model)
    with exporter() as address:
        samples = scrape(address)
        scrape(address)
    assert total(samples, "pagecache_accessed_bytes_total") == 0
    assert not any(name == "pagecache_load_seconds" for name, _ in samples)
    assert resident_bytes(model.iterdir()) == 0
    assert stats()["models"][0]["counters"]["read_bytes"] == 0
