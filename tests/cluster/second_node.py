# SPDX-License-Identifier: Apache-2.0
"""A second, simulated node beside the real one, and pods that tell where they land.

node1 is this machine.  node2 is simulated (simulated.py): it has no kubelet, but models of its own,
and real processes of ours tell what of them is in the page cache.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cachestat import drop
from pagecache_bpf.placement.content_identity import content_of
from pagecache_bpf.weights.models import resolve
from tests.cluster.conftest import MODELS, NAMES, NAMESPACE, pod
from tests.cluster.images import PAUSE
from tests.cluster.machine import ADDRESS, NODE, Machine
from tests.cluster.private import STATE
from tests.cluster.simulated import simulated
from tests.cluster.test_daemonset import rolled_out
from tests.unit.command import COMMAND, ROOT, environment

SIMULATED = "node2"
PORT = 9744
EXPORTER = f"http://{ADDRESS}:{PORT}"
PODS = 6


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


@contextmanager
def second_node(cluster: Machine, speeds: Sequence[str] = ()) -> Iterator[Placed]:
    """Have node2, with an exporter that the extender of the manifests or the chart asks, too.

    Args:
        cluster: has the extender and the DaemonSet.
        speeds: options of the exporter: what is measured beside other tests is another thing on
            each node and at each time.
    """
    other = STATE / "models-of-node2"
    shutil.rmtree(other, ignore_errors=True)
    shutil.copytree(MODELS, other)
    subprocess.run(["sync"], check=True)
    contents = {name: content_of(resolve(MODELS / name)) for name in NAMES}
    # node2 is not behind the service: the extender is told of its exporter.  No pod runs there.
    words = [
        {"op": "add", "path": f"{_POD}/containers/0/args/-", "value": f"--exporter={EXPORTER}"},
        {"op": "add", "path": f"{_POD}/nodeSelector", "value": {"kubernetes.io/hostname": NODE}},
    ]
    cluster.kubectl(
        *("-n", NAMESPACE, "patch", "deployment", "pagecache-bpf-extender"),
        *("--type=json", "-p", json.dumps(words)),
    )
    rolled_out(cluster)
    extender_ready(cluster)
    with simulated(cluster, [SIMULATED]):
        listen = ("--listen", f"{ADDRESS}:{PORT}", "--allow-remote")
        exporter = on_node2("export", *listen, "--model", str(other), *speeds)
        try:
            yield Placed(cluster, contents, other)
        finally:
            exporter.terminate()
            exporter.wait(timeout=60)


_POD = "/spec/template/spec"


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


def some(name: str, **changes: Any) -> list[dict[str, Any]]:
    """Several such pods."""
    return [tiny(f"{name}-{number}", **changes) for number in range(PODS)]


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
