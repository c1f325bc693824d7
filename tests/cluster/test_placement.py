# SPDX-License-Identifier: Apache-2.0
"""Pods land where their model is warm, by labels; without these, as ever.

node1 is this machine.  node2 is simulated (simulated.py): it has no kubelet, but models of its own,
and real processes of ours tell what of them is in the page cache.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.cachestat import drop
from pagecache_bpf.placement.content_identity import content_of
from pagecache_bpf.placement.labels import LabelChange, label_key
from pagecache_bpf.placement.node_labels import EXPIRES, NodePatch, sweep
from pagecache_bpf.weights.models import resolve
from tests.cluster.conftest import MODELS, NAMES, NAMESPACE, pod
from tests.cluster.images import PAUSE
from tests.cluster.machine import ADDRESS, NODE, Machine
from tests.cluster.private import STATE
from tests.cluster.simulated import lands, simulated
from tests.cluster.test_daemonset import removed, rolled_out
from tests.unit.command import COMMAND, ROOT, environment

SIMULATED = "node2"
PORT = 9744
PODS = 6
DOCUMENT = (ROOT / "docs/cluster.md").read_text()


@dataclass
class Placed:
    """A cluster with placement, and what its models are called."""

    cluster: Machine
    contents: dict[str, str]
    other: Path

    def warm(self, name: str, place: Path) -> None:
        """Have a model in the page cache of one node and not in that of the other."""
        drop([path / name / "model.safetensors" for path in (MODELS, self.other)])
        (place / name / "model.safetensors").read_bytes()

    def labels(self, node: str) -> dict[str, str]:
        """Our labels of a node, by content."""
        found = self.cluster.get("node", node)["metadata"]["labels"]
        return {key[17:]: value for key, value in found.items() if key.startswith("pagecache-bpf")}


@pytest.fixture(scope="module")
def placed(cluster: Machine) -> Iterator[Placed]:
    """The plain manifests as they are, and node2 with an exporter and a publisher of labels."""
    other = STATE / "models-of-node2"
    shutil.copytree(MODELS, other)
    subprocess.run(["sync"], check=True)
    contents = {name: content_of(resolve(MODELS / name)) for name in NAMES}
    cluster.kubectl("create", "namespace", NAMESPACE)
    started: list[subprocess.Popen[bytes]] = []
    try:
        for file in ("pagecache-bpf.yaml", "placement.yaml"):
            cluster.kubectl("apply", "-f", str(ROOT / "packaging/kubernetes" / file))
        # node2 is not behind the service: the extender is told of its exporter.
        words = [
            {"op": "add", "path": f"{_ARGS}/-", "value": f"--exporter=http://{ADDRESS}:{PORT}"}
        ]
        cluster.kubectl(
            *("-n", NAMESPACE, "patch", "deployment", "pagecache-bpf-extender"),
            *("--type=json", "-p", json.dumps(words)),
        )
        rolled_out(cluster)
        rolled_out(cluster, "pagecache-bpf-node")
        extender_ready(cluster)
        with simulated(cluster, [SIMULATED]):
            listen = ("--listen", f"{ADDRESS}:{PORT}", "--allow-remote")
            started.append(on_node2("export", *listen, "--model", str(other)))
            yield Placed(cluster, contents, other)
    finally:
        for process in started:
            process.terminate()
            process.wait(timeout=60)
        removed(cluster)


_ARGS = "/spec/template/spec/containers/0/args"


def extender_ready(cluster: Machine) -> None:
    """Wait until the extender answers."""
    words = ("rollout", "status", "deployment/pagecache-bpf-extender", "--timeout=90s")
    cluster.kubectl("-n", NAMESPACE, *words)


def on_node2(*words: str) -> subprocess.Popen[bytes]:
    """Start one of our commands as a process of node2."""
    with (STATE / f"node2-{words[0]}.log").open("ab") as log:
        return subprocess.Popen(
            [*COMMAND, *words],
            stdout=log,
            stderr=log,
            cwd=ROOT,
            env=environment(NODE_NAME=SIMULATED),
        )


def tiny(name: str, **changes: Any) -> dict[str, Any]:
    """A pod that does nothing."""
    annotations = changes.pop("annotations", {})
    made = pod(name, spec={"container": {"image": PAUSE}, **changes}, annotations=annotations)
    del made["spec"]["containers"][0]["command"]
    return made


def documented_affinity(content: str) -> dict[str, Any]:
    """The affinity of docs/cluster.md, for a model."""
    block = re.search(r"```yaml\n(affinity:\n.*?)```", DOCUMENT, re.S)
    assert block
    text = re.sub(r"pagecache-bpf\.io/[0-9a-f]{16}", label_key(content), block[1])
    found: dict[str, Any] = yaml.safe_load(text)["affinity"]
    return found


def some(name: str, **changes: Any) -> list[dict[str, Any]]:
    """Several such pods."""
    return [tiny(f"{name}-{number}", **changes) for number in range(PODS)]


def test_pods_land_by_labels(placed: Placed) -> None:
    """The DaemonSet labels node1, a process of ours node2; both at their own time."""
    cluster, contents = placed.cluster, placed.contents
    placed.warm("llama", MODELS)
    placed.warm("qwen", placed.other)
    # Without a wish they go to the empty node.
    assert set(lands(cluster, *some("plain"))) == {SIMULATED}
    with kubectl_proxy(cluster) as url:
        publisher = on_node2("kube-node", "--labels=api", f"--api={url}", str(placed.other))
        try:
            # A look is 15 s old at most, and no node writes twice in a minute.
            wanted = {
                NODE: {contents["llama"]: "90"},
                SIMULATED: {contents["qwen"]: "90"},
            }
            cluster.wait(
                "both nodes are labelled",
                lambda: {node: placed.labels(node) for node in wanted} == wanted,
                240,
            )
        finally:
            publisher.terminate()
            assert publisher.wait(timeout=60) == 0
    for name, node in (("llama", NODE), ("qwen", SIMULATED)):
        affinity = documented_affinity(contents[name])
        assert lands(cluster, *some(name, affinity=affinity)) == [node] * PODS


@contextmanager
def kubectl_proxy(cluster: Machine) -> Iterator[str]:
    """What `--api` is for: the API server without a token, while the block runs."""
    url = "http://127.0.0.1:8001"
    cluster.run(
        *("kubectl-proxy", "kubectl", "--kubeconfig", f"{STATE}/admin.conf"),
        *("proxy", "--port=8001"),
    )
    try:
        cluster.wait("kubectl proxy serves", lambda: ask(f"{url}/readyz"))
        yield url
    finally:
        cluster.end("kubectl-proxy")


def ask(url: str) -> str:
    """Get a page; an error's code is an AssertionError."""
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return str(answer.read().decode())
    except urllib.error.HTTPError as error:
        raise AssertionError(f"{url}: {error.code}") from error


def test_expired_labels_are_swept_and_change_only_where_pods_land(placed: Placed) -> None:
    """node3's agent has died: the extender of the manifests takes its labels away."""
    cluster, content = placed.cluster, "0123456789abcdef"
    affinity = documented_affinity(content)
    with simulated(cluster, ["node3"]):
        patch = NodePatch(cluster.api, "node3")
        patch.publish(LabelChange({label_key(content): "90"}, (), time.time() + 3600))
        assert lands(cluster, *some("live", affinity=affinity)) == ["node3"] * PODS
        assert sweep(cluster.api, time.time()) == []
        patch.publish(LabelChange({label_key(content): "90"}, (), time.time() - 1))
        cluster.wait("the labels are swept", lambda: not placed.labels("node3"))
        assert EXPIRES not in cluster.get("node", "node3")["metadata"].get("annotations", {})
        # Nobody has the label any more, and all pods land as others do.
        assert NODE not in lands(cluster, *some("expired", affinity=affinity))


def test_this_release_has_no_scheduling_gates(placed: Placed) -> None:
    """They came with 1.26: here the field is dropped, and such a pod is scheduled like any other.

    Gates are tested against the schemas of the API only (tests/unit).
    """
    gated = tiny("gated", schedulingGates=[{"name": "pagecache-bpf.io/warm"}])
    with pytest.raises(AssertionError, match="schedulingGates"):
        placed.cluster.apply(gated)  # kubectl itself refuses what the server does not know
