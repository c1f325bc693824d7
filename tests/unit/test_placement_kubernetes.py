# SPDX-License-Identifier: Apache-2.0
"""What talks to a cluster, over real HTTP: extender, labels, gates, prewarming.

The API server is a small one of this file that does what RFC 7386 and RFC 6902 say to Node and Pod
objects, which kubernetes-validate checks; a real one is not needed to see what we send.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest

import pagecache_bpf
from pagecache_bpf.cli.verbs import kube_extender
from pagecache_bpf.errors import PagecacheError, PrivilegeError
from pagecache_bpf.metrics.exporter import Address, Collector, Exporter
from pagecache_bpf.placement.content_identity import content_of
from pagecache_bpf.placement.extender_server import ExtenderServer, ScorePoller
from pagecache_bpf.placement.kubernetes_api import KubernetesApi
from pagecache_bpf.placement.labels import LabelChange, LabelPlan, label_key
from pagecache_bpf.placement.load_score import NodeScores
from pagecache_bpf.placement.node_agent import NodeAgent
from pagecache_bpf.placement.node_labels import EXPIRES, NodePatch, sweep
from pagecache_bpf.placement.node_watch import NodeWatch
from pagecache_bpf.placement.prewarm import asked_for, plan_prewarm
from pagecache_bpf.placement.warm_gates import GATE, MIN, WAIT, WANTED, run_gates
from pagecache_bpf.weights.models import resolve
from tests.unit.command import COMMAND, ROOT, environment
from tests.unit.snapshots import snapshot
from tests.unit.test_placement_score import SPEEDS, cold, kernel_says, scores

__all__ = ["cold"]

CONTENT = scores().models[0].content


class _Api(BaseHTTPRequestHandler):
    """GET and PATCH of the objects in `objects`, by path; lists by prefix."""

    objects: dict[str, dict[str, Any]]
    writes: list[str]
    status = 200

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path in self.objects:
            self._answer(self.objects[path])
        elif path == "/api/v1/nodes":
            self._answer({"items": self._below("/api/v1/nodes/")})
        else:
            self._answer({"items": self._below("/api/v1/namespaces/")})

    def _below(self, prefix: str) -> list[dict[str, Any]]:
        return [item for path, item in self.objects.items() if path.startswith(prefix)]

    def do_PATCH(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        item = self.objects[self.path]
        if self.headers["Content-Type"] == "application/merge-patch+json":
            merge(item, body)
        else:
            test, remove = body
            gates = item["spec"]["schedulingGates"]
            at = int(remove["path"].rpartition("/")[2])
            assert test["op"] == "test" and gates[at]["name"] == test["value"]
            del gates[at]
        self.writes.append(self.path)
        self._answer(item)

    def _answer(self, data: Any) -> None:
        body = json.dumps(data if self.status == 200 else {"message": "not you"}).encode()
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


def merge(target: dict[str, Any], patch: dict[str, Any]) -> None:
    """Apply a merge patch (RFC 7386)."""
    for key, value in patch.items():
        if value is None:
            target.pop(key, None)
        elif isinstance(value, dict):
            merge(target.setdefault(key, {}), value)
        else:
            target[key] = value


@pytest.fixture
def api() -> Iterator[tuple[KubernetesApi, type[_Api]]]:
    """Nodes n1 and n2, and a gated pod."""
    handler = type("Handler", (_Api,), {"objects": {}, "writes": [], "status": 200})
    for name in ("n1", "n2"):
        handler.objects[f"/api/v1/nodes/{name}"] = {  # type: ignore[attr-defined]
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": name, "labels": {"kubernetes.io/os": "linux"}},
        }
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield KubernetesApi(f"http://127.0.0.1:{server.server_address[1]}"), handler
    server.shutdown()
    server.server_close()


def test_labels_are_patched_and_swept(api: tuple[KubernetesApi, type[_Api]]) -> None:
    client, server = api
    now = 1_796_000_000.0
    for name, ends in (("n1", now - 1), ("n2", now + 600)):
        node = NodePatch(client, name)
        node.publish(LabelChange({label_key("a"): "70", label_key("b"): "10"}, (), ends))
        node.publish(LabelChange({label_key("a"): "80"}, (label_key("b"),), ends))
        assert node.read()[0] == {"kubernetes.io/os": "linux", label_key("a"): "80"}
    for item in server.objects.values():
        kubernetes_validate.validate(item, kubernetes_validate.latest_version(), strict=True)
    assert sweep(client, now) == ["n1"]
    metadata = server.objects["/api/v1/nodes/n1"]["metadata"]
    assert metadata["labels"] == {"kubernetes.io/os": "linux"}
    assert EXPIRES not in metadata["annotations"]
    assert label_key("a") in server.objects["/api/v1/nodes/n2"]["metadata"]["labels"]
    assert sweep(client, now) == []


def test_a_server_that_refuses_or_is_gone(api: tuple[KubernetesApi, type[_Api]]) -> None:
    client, server = api
    server.status = 403
    with pytest.raises(PrivilegeError, match="not you"):
        NodePatch(client, "n1").read()
    server.status = 500
    with pytest.raises(PagecacheError, match="500"):
        NodePatch(client, "n1").read()
    with pytest.raises(PagecacheError, match="failed"):
        NodePatch(KubernetesApi("http://127.0.0.1:1"), "n1").read()


def pod(age: float, now: float, **annotations: str) -> dict[str, Any]:
    """A pod behind our gate and another one."""
    created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now - age))
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": "qwen-0",
            "namespace": "llm",
            "creationTimestamp": created,
            "labels": {"pagecache-bpf.io/warm-first": "true"},
            "annotations": {f"pagecache-bpf.io/{key}": value for key, value in annotations.items()},
        },
        "spec": {
            "containers": [{"name": "server", "image": "server"}],
            "schedulingGates": [{"name": "other"}, {"name": GATE}],
        },
    }


def cached(share: float, node: str = "n1", budget: int = 1 << 40) -> NodeScores:
    """A node with a share of the model cached."""
    model = scores().models[0]
    known = replace(model, resident_bytes=int(model.bytes * share))
    return scores(node=node, models=(known,), free_budget_bytes=budget, running=())


def test_gated_pods_wait_for_their_model(api: tuple[KubernetesApi, type[_Api]]) -> None:
    client, server = api
    now, path = time.time(), "/api/v1/namespaces/llm/pods/qwen-0"
    server.objects[path] = pod(10, now, model="qwen")
    kubernetes_validate.validate(
        server.objects[path], kubernetes_validate.latest_version(), strict=True
    )
    nodes = [cached(0.1, "n1"), cached(0.3, "n2")]
    assert run_gates(client, nodes, now) == []
    annotations = server.objects["/api/v1/nodes/n2"]["metadata"]["annotations"]
    assert annotations == {WANTED: CONTENT}  # the warmer one is asked to bring it in
    assert asked_for(annotations) == [CONTENT]
    written = len(server.writes)
    assert run_gates(client, nodes, now) == [] and len(server.writes) == written
    assert run_gates(client, [cached(MIN + 0.01, "n2")], now) == ["llm/qwen-0"]
    assert server.objects[path]["spec"]["schedulingGates"] == [{"name": "other"}]
    assert annotations == {}
    assert run_gates(client, nodes, now) == []


@pytest.mark.parametrize("model", ["qwen", "nobody-has-it", ""])
def test_no_pod_waits_for_ever(api: tuple[KubernetesApi, type[_Api]], model: str) -> None:
    client, server = api
    now, path = time.time(), "/api/v1/namespaces/llm/pods/qwen-0"
    server.objects[path] = pod(WAIT + 2 if model == "qwen" else 0, now, model=model)
    assert run_gates(client, [cached(0.1)], now) == ["llm/qwen-0"]


def test_prewarming_keeps_to_the_budget() -> None:
    assert [model.model for model in plan_prewarm(["qwen"], cached(0.5)).read] == ["qwen"]
    assert plan_prewarm(["qwen"], cached(1.0)).read == ()
    tight = plan_prewarm([CONTENT, "none"], cached(0.5), budget=(1 << 29) - 1)
    assert tight.read == () and len(tight.left) == 2
    busy = plan_prewarm(["qwen"], replace(cached(0.5), running=("other",)))
    assert busy.read == () and "waits" in busy.left[0]


def test_an_annotation_brings_a_model_in(api: tuple[KubernetesApi, type[_Api]], cold: Path) -> None:
    """From the annotation to the page cache, by cachestat; then its label is published."""
    client, server = api
    content = content_of(resolve(cold))
    node = NodePatch(client, "n1")
    server.objects["/api/v1/nodes/n1"]["metadata"]["annotations"] = {
        "pagecache-bpf.io/prewarm": f"not-here, {content}"
    }
    said: list[str] = []
    plan = LabelPlan("n1")
    agent = NodeAgent(
        NodeWatch([cold], speeds=SPEEDS, node="n1"),
        plan,
        publisher=node,
        node=node,
        prefetch=lambda model: pagecache_bpf.prefetch(model.root, budget=model.size),
        budget=1 << 30,
        warn=said.append,
    )
    size = sum(path.stat().st_size for path in cold.iterdir())
    assert kernel_says(cold) < size
    agent.round(0.0)
    agent.wait_for_prewarming(60)
    deadline = time.monotonic() + 60
    while kernel_says(cold) < size and time.monotonic() < deadline:
        time.sleep(0.1)  # with a controller, it reads for us
    assert kernel_says(cold) == size
    assert any("not-here is not one of this node's models" in text for text in said)
    fresh = NodeAgent(NodeWatch([cold], speeds=SPEEDS), plan, publisher=node, node=node)
    fresh.round(plan.phase + 60)
    labels, annotations = node.read()
    assert labels[label_key(content)] == "90" and EXPIRES in annotations
    server.status = 500
    fresh.round(plan.phase + 1200)  # fails, and is no error of ours
    server.status = 200
    fresh.round(plan.phase + 1260)
    assert node.read()[0][label_key(content)] == "90"


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[NodeScores], str]]:
    """Starts exporters of given scores; returns their URLs."""
    pytest.importorskip("prometheus_client", reason="prometheus_client is not installed")
    monkeypatch.setattr(Collector.__init__, "__defaults__", (lambda text: None, snapshot))
    running: list[Exporter] = []

    def start(told: NodeScores) -> str:
        exporter = Exporter(Address("127.0.0.1", 0), scores=lambda: told)
        running.append(exporter)
        return exporter.url.removesuffix("/metrics")

    yield start
    for exporter in running:
        exporter.close()


def post(port: int, body: bytes, path: str = "/prioritize") -> Any:
    """Post as kube-scheduler does."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", data=body, headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def args(names: list[str] | None, **changes: Any) -> dict[str, Any]:
    """ExtenderArgs as Go encodes them: members by their Go names, what is nil as null."""
    annotated = {"metadata": {"name": "p", "annotations": {"pagecache-bpf.io/model": CONTENT}}}
    return {"Pod": annotated, "Nodes": None, "NodeNames": names, **changes}


def test_the_scheduler_gets_points(nodes: Callable[[NodeScores], str]) -> None:
    urls = [nodes(cached(1.0, "warm")), nodes(cached(0.5, "half")), nodes(cached(0.0, "cold"))]
    poller = ScorePoller(lambda: [*urls, "http://127.0.0.1:1"])
    assert poller.round() == 3
    known = {name: poller.scores_of(name) for name in ("warm", "half", "cold")}
    seconds = {name: told.models[0].seconds for name, told in known.items() if told}
    best = min(value for value in seconds.values() if value)
    exact = {name: int(10 * best / value) for name, value in seconds.items() if value}
    assert exact["warm"] == 10 > exact["half"] > 0
    names = ["cold", "dead", "warm", "half"]
    wanted = [{"Host": name, "Score": exact.get(name, exact["cold"])} for name in names]
    with ExtenderServer("127.0.0.1", 0, poller) as server:
        assert post(server.port, json.dumps(args(names)).encode()) == wanted
        whole = {"items": [{"metadata": {"name": name}} for name in names]}
        given = args(None, Nodes=whole)
        assert post(server.port, json.dumps(given).encode()) == wanted
        lower = {key.lower(): value for key, value in args(names).items()}
        assert post(server.port, json.dumps(lower).encode()) == wanted
        # A pod that names no model, or one that nobody has: no node is preferred.
        for annotations in (None, {}, {"pagecache-bpf.io/model": "other-model"}):
            plain = args(names, Pod={"metadata": {"annotations": annotations}})
            points = {
                priority["Score"] for priority in post(server.port, json.dumps(plain).encode())
            }
            assert points == {0}
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/scores", timeout=60) as said:
            assert len(json.load(said)) == 3


def test_scores_that_are_old_are_none(nodes: Callable[[NodeScores], str]) -> None:
    """A node that looks no more, and one that has died after it told: both count as cold."""
    urls = [
        nodes(replace(cached(1.0, "stuck"), age_ns=61 * 10**9)),
        nodes(cached(0.5, "half")),
    ]
    poller = ScorePoller(lambda: urls)
    poller.round()
    assert poller.scores_of("stuck") is None and poller.scores_of("half") is not None
    urls[:] = ["http://127.0.0.1:1"]
    assert poller.round() == 0
    assert poller.scores_of("half") is not None  # its last answer, until it is too old
    impatient = ScorePoller(lambda: urls, stale=0.0)
    assert impatient.scores_of("half") is None


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"{", b"[]", b"3", b'{"Pod": {}}', b'{"Pod": {}, "NodeNames": 7}', b"[" * 100_000),
        json.dumps(args([None])).encode(),  # type: ignore[list-item]
    ],
)
def test_what_is_no_request_is_refused(body: bytes) -> None:
    with ExtenderServer("127.0.0.1", 0, ScorePoller(lambda: [])) as server:
        with pytest.raises(urllib.error.HTTPError) as caught:
            post(server.port, body)
        assert caught.value.code == 400
        assert post(server.port, json.dumps(args(["a"])).encode()) == [{"Host": "a", "Score": 0}]


def test_other_paths_and_bodies_without_end_are_refused() -> None:
    with ExtenderServer("127.0.0.1", 0, ScorePoller(lambda: [])) as server:
        with pytest.raises(urllib.error.HTTPError) as caught:
            post(server.port, b"{}", "/filter")
        assert caught.value.code == 404
        request = urllib.request.Request(
            f"http://127.0.0.1:{server.port}/prioritize",
            data=b"{}",
            headers={"Content-Length": str(1 << 40)},
        )
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request, timeout=60)
        assert caught.value.code == 413


def started(*words: str, **changes: str) -> subprocess.Popen[str]:
    """A command that runs until it is told to stop."""
    return subprocess.Popen(
        [*COMMAND, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(**changes),
        cwd=ROOT,
    )


def read_json(process: subprocess.Popen[str]) -> Any:
    """The document that a command prints when it is ready."""
    assert process.stdout
    text = ""
    for line in process.stdout:
        text += line
        if line == "}\n":
            return json.loads(text)
    raise AssertionError(process.stderr.read() if process.stderr else "")


def test_the_commands(nodes: Callable[[NodeScores], str], cold: Path, tmp_path: Path) -> None:
    url = nodes(cached(1.0, "warm"))
    with started("--json", "kube-extender", "--listen", "127.0.0.1:0", "--exporter", url) as one:
        told = read_json(one)
        port = int(told["listen"].rpartition(":")[2])
        assert told["nodes"] == 1
        assert post(port, json.dumps(args(["warm"])).encode()) == [{"Host": "warm", "Score": 10}]
        one.send_signal(signal.SIGTERM)
        assert one.wait(timeout=60) == 0
    features = tmp_path / "features.d"
    features.mkdir()
    for path in cold.iterdir():
        path.read_bytes()  # warm
    words = ["--json", "kube-node", "--nfd-directory", str(features), "--interval", "0.2"]
    words += ["--label-interval", "1", "--device-speed", "1GB", str(cold)]
    with started(*words, NODE_NAME="n1") as one:
        told = read_json(one)
        assert told == {"node": "n1", "labels": "nfd", "models": [content_of(resolve(cold))]}
        deadline = time.monotonic() + 60
        while not os.listdir(features) and time.monotonic() < deadline:
            time.sleep(0.1)
        text = (features / "pagecache-bpf").read_text()
        assert re.search(rf"^{re.escape(label_key(told['models'][0]))}=90$", text, re.M)
        one.send_signal(signal.SIGINT)
        assert one.wait(timeout=60) == 0


def test_exporters_are_asked_while_the_service_has_no_address(
    nodes: Callable[[NodeScores], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = nodes(cached(1.0, "warm"))

    def nobody(*args: object, **changes: object) -> list[object]:
        raise socket.gaierror("no such name")

    given = argparse.Namespace(
        service="pagecache-bpf.pagecache-bpf.svc:9743",
        exporter=[url],
        exporter_ca=None,
        interval=10.0,
        stale=60.0,
    )
    addresses = kube_extender._sources(given)
    monkeypatch.setattr("pagecache_bpf.placement.extender_server.socket.getaddrinfo", nobody)
    assert list(addresses()) == [url]


@pytest.mark.parametrize(
    "words",
    [
        ("kube-extender",),
        ("kube-extender", "--exporter", "node1:9743"),
        ("kube-extender", "--service", "name"),
        ("kube-extender", "--exporter", "http://node1:9743", "--listen", "0.0.0.0:0"),
        ("kube-extender", "--exporter", "http://node1:9743", "--interval", "0"),
        ("kube-node", "--labels", "nfd", "--interval", "-1", "/models"),
    ],
)
def test_wrong_use_is_told(words: tuple[str, ...]) -> None:
    with started(*words) as one:
        assert one.wait(timeout=60) == 2
        assert one.stderr and "error:" in one.stderr.read()


def test_without_a_cluster_that_is_told() -> None:
    with started("kube-node", "--labels", "api", "/models", KUBERNETES_SERVICE_HOST="") as one:
        assert one.wait(timeout=60) == 3
        assert one.stderr and "no Kubernetes API" in one.stderr.read()
