# SPDX-License-Identifier: Apache-2.0
"""The one declaration of metrics: names by the rules, every counter once, what is made from it."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pagecache_bpf.kernel.abi import COUNTERS, OBSERVED
from pagecache_bpf.metrics import declarations
from pagecache_bpf.metrics.declarations import LABELS, METRICS, MODEL
from tests.unit.snapshots import GGUF, LLAMA, snapshot
from tools import generate_docs

ROOT = Path(__file__).resolve().parents[2]
PROMTOOL = ROOT / "build" / "deps" / "prometheus" / "bin" / "promtool"
DASHBOARD = ROOT / "packaging" / "grafana" / "pagecache-bpf.json"
ALERTS = ROOT / "packaging" / "prometheus" / "alerts.yml"
MONITORING = ROOT / "docs" / "monitoring.md"
needs_promtool = pytest.mark.skipif(not PROMTOOL.exists(), reason="no promtool: run `make deps`")


def promtool(*words: str | Path, text: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run([PROMTOOL, *words], input=text, capture_output=True, text=True)


def samples(name: str) -> dict[tuple[str, ...], float]:
    return {tuple(labels): value for labels, value in declarations.find(name).read(snapshot())}


def test_names_follow_the_rules() -> None:
    names = [metric.name for metric in METRICS]
    assert len(names) == len(set(names))
    for metric in METRICS:
        assert re.fullmatch(r"pagecache_[a-z][a-z_]*[a-z]", metric.name)
        assert (metric.kind == "counter") == metric.name.endswith("_total")
        assert not re.search(r"_(ns|ms|us|kib|mib|pages|percent)(_|$)", metric.name)
        assert metric.help[0].isupper() or metric.help[0].isdigit()
        assert not metric.help.endswith(".") and "of these: of these" not in metric.help
        assert not set(metric.labels) & {"path", "file", "tgid", "pid", "comm", "device"}
        assert set(metric.labels) <= set(LABELS)


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_samples_have_a_value_for_each_label(metric: declarations.Metric) -> None:
    seen = [tuple(labels) for labels, _ in metric.read(snapshot())]
    assert len(seen) == len(set(seen))
    assert all(len(labels) == len(metric.labels) for labels in seen)
    assert all(isinstance(label, str) for labels in seen for label in labels)
    assert seen  # the snapshot has something of everything
    assert not list(metric.read(None)) or metric.name in ("pagecache_up", "pagecache_build_info")


def test_every_observed_counter_is_exported_once() -> None:
    """Each has a value of its own in the snapshot; the sums come out of their parts."""
    model = snapshot().models[0]
    exported = sorted(
        value
        for metric in METRICS
        if metric.kind == "counter"
        and metric.labels[: len(MODEL)] == MODEL
        and "template" not in metric.name
        for labels, value in metric.read(snapshot())
        if labels[0] == LLAMA
    )
    expected = [
        model.counters[counter.name] / (1e9 if counter.unit == "ns" else 1)
        for counter in OBSERVED
        if counter.name not in ("read_bytes", "mmap_bytes", "added_bytes", "removed_bytes")
    ]
    assert exported == sorted(expected)


def test_every_counter_of_policies_is_exported() -> None:
    for counter in COUNTERS:
        found = samples(f"pagecache_policy_{counter.name}_total")
        assert found["sequential", "agent"] == snapshot().policies[0].counters[counter.name]


def test_labels_come_from_the_names_of_counters() -> None:
    model = snapshot().models[0]
    found = samples("pagecache_accessed_bytes_total")

    def key(*labels: str) -> tuple[str, ...]:
        return (LLAMA, "sequential", "agent", *labels)

    assert found[key("mmap", "ahead")] == model.counters["mmap_ahead_bytes"]
    assert sum(value for labels, value in found.items() if labels[0] == LLAMA) == (
        model.counters["read_bytes"] + model.counters["mmap_bytes"]
    )
    assert samples("pagecache_stall_seconds_total")[key("read")] == (
        model.counters["read_stall_ns"] / 1e9
    )
    assert (
        samples("pagecache_added_bytes_total")[key("prefetched")]
        == (model.counters["prefetched_bytes"])
    )
    assert (
        samples("pagecache_evicted_bytes_total")[key("reclaim")]
        == (model.counters["evicted_reclaim_bytes"])
    )


def test_gauges() -> None:
    assert samples("pagecache_hit_ratio") == {
        (LLAMA, "sequential", "agent"): pytest.approx(snapshot().models[0].hit_ratio)
    }
    assert samples("pagecache_resident_bytes")[GGUF, "noop", "struct_ops"] == 1 << 20
    assert samples("pagecache_resident_node_bytes")[LLAMA, "sequential", "agent", "1"] == 30 << 20
    assert samples("pagecache_policy_up") == {
        ("sequential", "agent"): 1,
        ("noop", "struct_ops"): 1,
        ("quitter", "agent"): 0,
    }
    assert samples("pagecache_consumers") == {
        (LLAMA, "sequential", "agent"): 2,
        ("cold", "sequential", "agent"): 0,
    }
    assert samples("pagecache_observer_info") == {("full",): 1}


def test_errors_by_kind() -> None:
    found = samples("pagecache_errors_total")
    assert found["sequential", "agent", "lost_request"] == 3
    assert found["sequential", "agent", "read_EIO"] == 2
    assert found["sequential", "agent", "read_9999"] == 1
    assert found["noop", "struct_ops", "invalid_answer"] == 0


def test_templates() -> None:
    key = (LLAMA, "sequential", "agent")
    assert samples("pagecache_template_bytes_total") == {
        (*key, "followed"): 900,
        (*key, "strayed"): 100,
    }
    assert samples("pagecache_template_jumps_total") == {key: 3}
    assert samples("pagecache_template_up") == {key: 0}


def test_the_page_has_everything() -> None:
    page = generate_docs.metrics_page()
    for metric in METRICS:
        assert f"| `{metric.name}` | {', '.join(metric.labels)} | {metric.help} |" in page
    for label in {label for metric in METRICS for label in metric.labels}:
        assert f"| `{label}` |" in page


# --- what is packaged and documented uses metrics that exist ---


def dashboard_queries() -> Iterator[tuple[str, str]]:
    """Title and query of each panel."""
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel["targets"]:
            yield panel["title"], target["expr"]


def documented_queries() -> list[str]:
    return re.findall(r"```promql\n(.*?)```", MONITORING.read_text(), re.S)


def test_queries_name_metrics_and_labels_that_exist() -> None:
    queries = [query for _, query in dashboard_queries()]
    queries += [*documented_queries(), ALERTS.read_text()]
    assert len(queries) > 15
    known = {metric.name for metric in METRICS}
    used = {name for query in queries for name in re.findall(r"\bpagecache_\w+", query)}
    assert used <= known
    for query in queries:
        for name, selector in re.findall(r"\b(pagecache_\w+)\{([^}]*)\}", query):
            labels = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector))
            assert labels <= set(declarations.find(name).labels), (name, labels)


def test_the_dashboard_is_well_formed() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))
    places: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        grid = panel["gridPos"]
        assert panel["description"] and grid["x"] + grid["w"] <= 24
        cells = {
            (x, y)
            for x in range(grid["x"], grid["x"] + grid["w"])
            for y in range(grid["y"], grid["y"] + grid["h"])
        }
        assert not cells & places, panel["title"]
        places |= cells
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    assert variables == {"datasource", "model"}


@needs_promtool
def test_promtool_likes_the_metrics() -> None:
    prometheus_client = pytest.importorskip("prometheus_client")
    from pagecache_bpf.metrics.exporter import Collector

    for source in (snapshot, lambda: snapshot(0)):
        registry = prometheus_client.CollectorRegistry()
        registry.register(Collector(source=source))
        text = prometheus_client.generate_latest(registry).decode()
        done = promtool("check", "metrics", text=text)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@needs_promtool
def test_promtool_likes_the_alerts(tmp_path: Path) -> None:
    done = promtool("check", "rules", ALERTS)
    assert done.returncode == 0, done.stderr
    ended = 'pagecache_policy_up{policy="maio",engine="agent",instance="n"}'
    wanted = 'pagecache_accessed_bytes_total{model="m",instance="n",result="%s"}'
    test = tmp_path / "test.yml"
    test.write_text(
        f"""\
rule_files: ["{ALERTS}"]
evaluation_interval: 1m
tests:
  - interval: 1m
    input_series:
      - {{series: '{ended}', values: "1 1 0x9"}}
      - {{series: '{wanted % "hit"}', values: "0+10x20"}}
      - {{series: '{wanted % "miss"}', values: "0+90x20"}}
    alert_rule_test:
      - {{eval_time: 1m, alertname: PagecachePolicyEnded}}
      - eval_time: 3m
        alertname: PagecachePolicyEnded
        exp_alerts:
          - exp_labels: {{severity: warning, policy: maio, engine: agent, instance: n}}
            exp_annotations:
              summary: The policy maio on n has ended by itself
              description: Models load at the kernel's own speed. `pagecache-bpf status` says why.
      - eval_time: 15m
        alertname: PagecacheLowHitRatio
        exp_alerts:
          - exp_labels: {{severity: info, model: m, instance: n}}
            exp_annotations: {{summary: Less than half of m is there when it is wanted}}
"""
    )
    done = promtool("test", "rules", test)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_promtool_likes_the_documented_configuration(tmp_path: Path) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", MONITORING.read_text(), re.S)
    assert len(blocks) == 2
    for name in ("node-ca.crt", "prometheus.crt", "prometheus.key"):
        (tmp_path / name).write_text("")
    for block in blocks:
        config = tmp_path / "prometheus.yml"
        config.write_text(block)
        done = promtool("check", "config", "--syntax-only", config)
        assert done.returncode == 0, done.stderr
