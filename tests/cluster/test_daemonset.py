# SPDX-License-Identifier: Apache-2.0
"""The agent as a DaemonSet, by docs/kubernetes.md's own commands, and pods that load beside it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pagecache_bpf.kernel.cachestat import cachestat
from pagecache_bpf.kernel.file_pages import PAGE_SIZE
from tests.cluster.conftest import MODELS, NAMESPACE, chart, finished, keep, pod
from tests.cluster.machine import Machine, ready
from tests.delivery.test_documents import typed
from tests.delivery.test_image import LOAD
from tests.unit.command import ROOT

DOCUMENT = ROOT / "docs/kubernetes.md"
PYTHON = "/opt/pagecache-bpf/bin/python"


@pytest.fixture
def installed(cluster: Machine) -> Iterator[Machine]:
    """What docs/kubernetes.md says without Helm, word by word."""
    lines = typed("docs/kubernetes.md", "Install")
    commands = [line for line in lines if line.startswith("kubectl") and "monitoring" not in line]
    assert [line.split()[1] for line in commands] == ["create", "apply", "label"]
    for line in commands:
        words = [str(ROOT / word) if word.endswith(".yaml") else word for word in line.split()[1:]]
        cluster.kubectl(*words)
    rolled_out(cluster)
    yield cluster
    removed(cluster)


def rolled_out(cluster: Machine, name: str = "pagecache-bpf") -> None:
    """Wait until the DaemonSet is ready on the node."""
    words = ("-n", NAMESPACE, "rollout", "status", f"ds/{name}", "--timeout=180s")
    try:
        cluster.kubectl(*words)
    except AssertionError as error:
        told = cluster.kubectl("-n", NAMESPACE, "describe", "pods", check=False)
        log = cluster.kubectl("-n", NAMESPACE, "logs", f"ds/{name}", "-c", "agent", check=False)
        raise AssertionError(f"{error}\n{told}\n{log}") from error


def removed(cluster: Machine) -> None:
    """Take everything of ours away, as a user does, and wait for it."""
    cluster.kubectl("delete", "namespace", NAMESPACE, "--timeout=120s")


def agent_log(cluster: Machine, name: str = "pagecache-bpf") -> str:
    """What docs/kubernetes.md says to look at."""
    return cluster.kubectl("-n", NAMESPACE, "logs", f"ds/{name}", "-c", "agent")


def in_agent(cluster: Machine, *words: str) -> Any:
    """Run a command of ours beside the agent; returns its JSON."""
    command = ("pagecache-bpf", "--json", *words)
    return json.loads(
        cluster.kubectl("-n", NAMESPACE, "exec", "ds/pagecache-bpf", "-c", "agent", "--", *command)
    )


def governed(cluster: Machine) -> set[tuple[str, str, bool]]:
    """Model, policy and whether that is attached, of each tagged file."""
    tags = in_agent(cluster, "tags")["tags"]
    return {(Path(tag["path"]).parent.name, tag["policy"], tag["active"]) for tag in tags}


def pods_of_agent(cluster: Machine) -> set[str]:
    """The pods that there are, by what no two have in common."""
    return {pod["metadata"]["uid"] for pod in cluster.get("pods", namespace=NAMESPACE)["items"]}


def reader(name: str, model: str) -> dict[str, Any]:
    """A pod that loads a model through the socket: no root, no right, as the document says."""
    block = re.search(r"```yaml\n(spec:\n  containers:.*?)```", DOCUMENT.read_text(), re.S)
    assert block
    documented = yaml.safe_load(block[1])["spec"]
    mounts = documented["containers"][0]["volumeMounts"]
    return pod(
        name,
        *(PYTHON, "-c", LOAD, f"/models/{model}/model.safetensors"),
        spec={
            "container": {
                "env": documented["containers"][0]["env"],
                "volumeMounts": [*mounts, {"name": "models", "mountPath": "/models"}],
                "securityContext": {
                    "runAsUser": 1000,
                    "runAsNonRoot": True,
                    "allowPrivilegeEscalation": False,
                    "capabilities": {"drop": ["ALL"]},
                },
                "resources": {"limits": {"memory": "512Mi"}},
            },
            "volumes": [
                *documented["volumes"],
                {"name": "models", "hostPath": {"path": str(MODELS), "type": "Directory"}},
            ],
        },
    )


def cached(path: Path) -> int:
    """Bytes of a file in the page cache, by cachestat(2)."""
    with path.open("rb") as file:
        return cachestat(file.fileno()).cached * PAGE_SIZE


def test_a_pod_without_root_is_served(installed: Machine, models: Path) -> None:
    file = models / "llama" / "model.safetensors"
    size = file.stat().st_size
    assert cached(file) == 0
    installed.apply(reader("reader", "llama"))
    answer = json.loads(finished(installed, "reader"))
    log = agent_log(installed)
    keep("agent", log)
    assert "Traceback" not in log
    keep("reader", json.dumps(answer, indent=1))
    report = answer["report"]
    assert answer["size"] == report["bytes"] == size
    assert (report["via"], report["engine"]) == ("controller", "agent"), report
    assert report["prefetched_bytes"] > size // 2, report
    installed.kubectl("delete", "pod", "reader")
    # Both containers are ready, and the exporter answers at the service's name.
    metrics = installed.kubectl(
        *("-n", NAMESPACE, "exec", "ds/pagecache-bpf", "-c", "exporter", "--", PYTHON, "-c"),
        "import urllib.request as r; print(r.urlopen("
        "'http://pagecache-bpf.pagecache-bpf.svc.cluster.local:9743/metrics').read().decode())",
    )
    assert "pagecache_" in metrics


def test_an_upgrade_loses_no_policy(cluster: Machine, models: Path) -> None:
    config = (
        'persist = true\n[socket]\nmode = "0666"\n'
        '[[model]]\npath = "/models/llama"\npolicy = "sequential"\n'
    )
    values = {"modelPaths": [str(MODELS)], "config": config}
    cluster.kubectl("create", "namespace", NAMESPACE)
    cluster.kubectl("apply", "-f", "-", given="\n---\n".join(chart(**values)))
    rolled_out(cluster)
    try:
        # One model is in the configuration; the other is given to a policy by hand.
        in_agent(cluster, "tag", "--policy", "sequential", f"{MODELS}/qwen")
        before, first = governed(cluster), pods_of_agent(cluster)
        assert {model for model, policy, active in before if active} == {"llama", "qwen"}
        changed = chart(**values, podAnnotations={"upgrade": "2"})
        cluster.kubectl("apply", "-f", "-", given="\n---\n".join(changed))
        rolled_out(cluster)
        assert not first & pods_of_agent(cluster)
        assert governed(cluster) == before
        status = in_agent(cluster, "status")
        keep("status-after-the-upgrade", json.dumps(status, indent=1))
        policies = {policy["name"]: policy for policy in status["policies"]}
        assert policies["sequential"]["state"] == "attached"
    finally:
        removed(cluster)


def test_a_node_without_the_kernel_says_why_and_stays_ready(cluster: Machine, models: Path) -> None:
    """The kernel is the same one: an empty directory hides its types (BTF) from the agent."""
    cluster.kubectl("create", "namespace", NAMESPACE)
    try:
        documents = [yaml.safe_load(text) for text in chart()]
        (daemon,) = (document for document in documents if document["kind"] == "DaemonSet")
        spec = daemon["spec"]["template"]["spec"]
        spec["volumes"].append({"name": "hidden", "emptyDir": {}})
        for container in spec["containers"]:
            mount = {"name": "hidden", "mountPath": "/sys/kernel/btf"}
            container["volumeMounts"].append(mount)
        cluster.apply(*documents)
        rolled_out(cluster)
        log = agent_log(cluster)
        keep("agent-without-the-kernel", log)
        assert "this node lacks what both engines need" in log
        cluster.apply(reader("reader", "qwen"))
        answer = json.loads(finished(cluster, "reader"))
        assert answer["size"] == answer["report"]["bytes"]
        assert answer["report"]["via"] != "controller", answer
        cluster.kubectl("delete", "pod", "reader")
        (one,) = cluster.get("pods", namespace=NAMESPACE)["items"]
        assert ready(one)
        assert [told["restartCount"] for told in one["status"]["containerStatuses"]] == [0, 0]
    finally:
        removed(cluster)
