# SPDX-License-Identifier: Apache-2.0
"""The chart as Helm installs it, and pods that land by the scheduler's extender."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pagecache_bpf.kernel.cachestat import cachestat
from pagecache_bpf.kernel.file_pages import PAGE_SIZE
from pagecache_bpf.placement.content_identity import content_of
from pagecache_bpf.placement.extender import MODEL_ANNOTATION
from pagecache_bpf.placement.labels import label_key
from pagecache_bpf.weights.models import resolve
from tests.cluster.conftest import MODELS, NAMES, NAMESPACE
from tests.cluster.helm import helm, typed
from tests.cluster.machine import NODE, Machine
from tests.cluster.second_node import (
    SIMULATED,
    Placed,
    ask,
    extender_ready,
    second_node,
    some,
)
from tests.cluster.simulated import lands
from tests.cluster.test_daemonset import rolled_out
from tests.unit.command import ROOT

DOCUMENT = (ROOT / "docs/cluster.md").read_text()
#: Both nodes are told that they are alike: what is cached is then all that differs.
SPEEDS = {"device": "1GB", "host-to-device": "8GB"}
FEATURES = Path("/etc/kubernetes/node-feature-discovery/features.d/pagecache-bpf")


def documented_helm() -> str:
    """What docs/cluster.md says that installs it, on one line."""
    block = re.search(r"```sh\n(helm upgrade .*?)```", DOCUMENT, re.S)
    assert block
    return block[1].replace("\\\n", " ").strip()


@pytest.fixture(scope="module")
def chart(cluster: Machine) -> Iterator[Machine]:
    """The release of docs/kubernetes.md, with what docs/cluster.md changes; gone afterwards."""
    lines = (ROOT / "docs/kubernetes.md").read_text().splitlines()
    (install,) = (line for line in lines if line.startswith("    helm install"))
    typed(install)
    rolled_out(cluster)
    typed(documented_helm())
    rolled_out(cluster)
    rolled_out(cluster, "pagecache-bpf-node")
    yield cluster
    helm("uninstall", NAMESPACE, name="pagecache-bpf", wait="watcher", timeout=120)
    kinds = "daemonsets,deployments,services,configmaps,serviceaccounts,networkpolicies"
    left = json.loads(cluster.kubectl("get", kinds, "-n", NAMESPACE, "-o", "json"))["items"]
    names = {item["metadata"]["name"] for item in left}
    assert not {name for name in names if "pagecache" in name}, names
    roles = cluster.kubectl("get", "clusterroles,clusterrolebindings", "-o", "name")
    assert "pagecache" not in roles
    cluster.kubectl("delete", "namespace", NAMESPACE, "--timeout=120s")


def test_helm_installs_and_the_node_writes_what_node_feature_discovery_reads(
    chart: Machine, models: Path
) -> None:
    """The file is there, for a model that is cached; without any right at the API server."""
    (models / "llama" / "model.safetensors").read_bytes()
    words = ("-n", NAMESPACE, "get", "ds/pagecache-bpf-node", "-o", "json")
    spec = json.loads(chart.kubectl(*words))["spec"]["template"]["spec"]
    assert spec["automountServiceAccountToken"] is False
    content = content_of(resolve(models / "llama"))

    def written() -> str:
        first, *labels = FEATURES.read_text().splitlines()
        assert labels == [f"{label_key(content)}=90"], labels  # not the model that was dropped
        return first

    # It is written once a minute at most, and what was there before may be of another model.
    first = chart.wait("the file is written", written, 180)
    assert re.fullmatch(r"# \+expiry-time=\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", first)


@pytest.fixture(scope="module")
def placed(chart: Machine) -> Iterator[Placed]:
    """The same release with extender and prewarming, and a second node; both nodes are alike."""
    sets = {
        "placement.labels": "api",
        "placement.prewarm": "true",
        "placement.deviceSpeed": SPEEDS["device"],
        "placement.hostToDeviceSpeed": SPEEDS["host-to-device"],
        "placement.extender.enabled": "true",
        "placement.extender.gates": "true",
    }
    given = [f"--set {name}={value}" for name, value in sets.items()]
    typed(f"{documented_helm()} {' '.join(given)}")
    rolled_out(chart)
    rolled_out(chart, "pagecache-bpf-node")
    options = [f"--{name}-speed={value}" for name, value in SPEEDS.items()]
    with second_node(chart, options) as made:
        told_of = documented_scheduler(extender_url(chart))
        chart.schedule("warm-scheduler", "warm", **told_of)
        try:
            yield made
        finally:
            chart.end("warm-scheduler")


def documented_scheduler(url: str) -> dict[str, Any]:
    """What docs/cluster.md has the scheduler told, with the extender's address."""
    block = re.search(r"```yaml\n(apiVersion: kubescheduler.*?)```", DOCUMENT, re.S)
    assert block
    config: dict[str, Any] = yaml.safe_load(block[1])
    (extender,) = config["extenders"]
    return {
        "extenders": [{**extender, "urlPrefix": url}],
        "percentageOfNodesToScore": config["percentageOfNodesToScore"],
    }


def extender_url(cluster: Machine) -> str:
    """Where the scheduler reaches the extender: by the address of its service."""
    service = cluster.get("service", "pagecache-bpf-extender", NAMESPACE)
    return f"http://{service['spec']['clusterIP']}:8787"


def told(placed: Placed) -> dict[tuple[str, str], float]:
    """What the extender knows: node and content to the share that is cached."""
    service = placed.cluster.get("service", "pagecache-bpf-extender", NAMESPACE)["spec"][
        "clusterIP"
    ]
    nodes = json.loads(ask(f"http://{service}:8787/scores"))
    return {
        (node["node"], model["content"]): round(model["fraction"], 1)
        for node in nodes
        for model in node["models"]
    }


def placed_by(placed: Placed, scheduler: str, name: str, content: str) -> set[str]:
    """Nodes on which pods of a model land by a scheduler."""
    annotations = {MODEL_ANNOTATION: content}
    pods = some(name, annotations=annotations, schedulerName=scheduler)
    return set(lands(placed.cluster, *pods))


@pytest.fixture
def apart(placed: Placed) -> Placed:
    """llama is cached on node1 only and qwen on node2 only, and the extender knows."""
    placed.warm("llama", MODELS)
    placed.warm("qwen", placed.other)
    contents = placed.contents
    wanted = {
        (node, contents[name]): float(name == warm)
        for node, warm in ((NODE, "llama"), (SIMULATED, "qwen"))
        for name in NAMES
    }

    def known() -> bool:
        found = told(placed)
        assert found == wanted, found
        return True

    placed.cluster.wait("the extender knows both nodes", known)
    return placed


def test_pods_land_by_the_extender(apart: Placed) -> None:
    # Without a model they go to the emptier node, by the same scheduler.
    assert set(lands(apart.cluster, *some("plain", schedulerName="warm"))) == {SIMULATED}
    for name, node in (("llama", NODE), ("qwen", SIMULATED)):
        assert placed_by(apart, "warm", name, apart.contents[name]) == {node}
    # By its name, too, and one that no node has like one that has no name.
    assert placed_by(apart, "warm", "by-name", "llama") == {NODE}
    assert placed_by(apart, "warm", "unknown", "0123456789abcdef") == {SIMULATED}


def test_without_an_answer_it_is_as_without_an_extender(apart: Placed) -> None:
    """Dead, and one that takes the request and says nothing: 200 ms a pod, by the document."""
    cluster, content = apart.cluster, apart.contents["llama"]
    scale = ("-n", NAMESPACE, "scale", "deployment/pagecache-bpf-extender")
    cluster.kubectl(*scale, "--replicas=0")
    gone = ("-n", NAMESPACE, "get", "endpoints/pagecache-bpf-extender", "-o", "json")
    cluster.wait("it is gone", lambda: not json.loads(cluster.kubectl(*gone)).get("subsets"))
    try:
        assert placed_by(apart, "warm", "dead", content) == {SIMULATED}
        with socket.create_server(("127.0.0.1", 0)) as silent:
            url = f"http://127.0.0.1:{silent.getsockname()[1]}"
            cluster.end("warm-scheduler")
            cluster.schedule("warm-scheduler", "warm", **documented_scheduler(url))
            assert placed_by(apart, "warm", "silent", content) == {SIMULATED}
            cluster.end("warm-scheduler")
    finally:
        cluster.kubectl(*scale, "--replicas=1")
        extender_ready(cluster)
    cluster.schedule("warm-scheduler", "warm", **documented_scheduler(extender_url(cluster)))
    contents = {(NODE, content): 1.0}.items()
    cluster.wait("the new one knows", lambda: contents <= told(apart).items())
    assert placed_by(apart, "warm", "back", content) == {NODE}


def test_an_annotation_brings_a_model_in_and_readyz_says_when(placed: Placed) -> None:
    """Typed as docs/cluster.md has it, but for the names of the pool, the model and the pod."""
    cluster, content = placed.cluster, placed.contents["qwen"]
    placed.warm("llama", MODELS)
    file = MODELS / "qwen" / "model.safetensors"
    daemon = "app.kubernetes.io/name=pagecache-bpf"
    listed = cluster.kubectl("-n", NAMESPACE, "get", "pods", "-l", daemon, "-o", "json")
    (name,) = (
        pod["metadata"]["name"]
        for pod in json.loads(listed)["items"]
        if pod["spec"].get("nodeName") == NODE
    )
    (line,) = re.findall(r"kubectl get --raw '(\S+)'", DOCUMENT)
    path = line.replace("POD", name).replace("93f0c2a1b7d45e68", content)

    def ready() -> Any:
        return "true" in cluster.kubectl("get", "--raw", path, check=False)

    assert cached(file) == 0
    assert not ready()
    cluster.kubectl("label", "node", NODE, "pool=h100")
    asks, ends = re.findall(r"kubectl annotate (nodes -l pool=h100 \S+)", DOCUMENT)
    cluster.kubectl("annotate", *asks.replace("93f0c2a1b7d45e68", content).split())
    try:
        cluster.wait("it says that it is ready", ready, 180)
        assert cached(file) >= 0.9 * file.stat().st_size
    finally:  # the node outlives the release, and the next one's agent would read the model again
        cluster.kubectl("annotate", *ends.split())
        cluster.kubectl("label", "node", NODE, "pool-")
    assert "pagecache-bpf.io/prewarm" not in cluster.get("node", NODE)["metadata"]["annotations"]


def cached(file: Path) -> int:
    """Bytes of a file in the page cache."""
    with file.open("rb") as opened:
        return cachestat(opened.fileno()).cached * PAGE_SIZE


def test_helm_rolls_back(chart: Machine, placed: Placed) -> None:
    """To the first revision, which had no placement: the rest is gone, the agent is there."""
    helm("rollback", NAMESPACE, name="pagecache-bpf", version=1, timeout=120)

    def names() -> list[str]:
        kinds = "daemonsets,deployments"
        found = json.loads(chart.kubectl("get", kinds, "-n", NAMESPACE, "-o", "json"))
        return [item["metadata"]["name"] for item in found["items"]]

    assert chart.wait("placement is gone", lambda: names() == ["pagecache-bpf"])
    revisions = helm("history", NAMESPACE, name="pagecache-bpf")
    assert [release["revision"] for release in revisions] == [1, 2, 3, 4]
