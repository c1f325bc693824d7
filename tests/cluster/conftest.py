# SPDX-License-Identifier: Apache-2.0
"""One cluster for all tests here, with our image on its node and models below /models."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from _pytest.runner import runtestprotocol

from benchmarks.cachestat import drop
from tests.cluster.machine import Machine
from tests.cluster.private import STATE, end_all, separate, why_not
from tests.delivery.podman import IMAGE
from tests.native.readahead import usual_readahead
from tests.unit.command import ROOT
from tests.unit.weights import safetensors
from tools import dist

#: Where the plain manifests have the models of a node.
MODELS = Path("/models")
NAMES = ("llama", "qwen")
NAMESPACE = "pagecache-bpf"
#: Rows of 1 KiB in each of four tensors of a model.
ROWS = 12 << 10


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool:
    """Once, whatever the kernel reclaims (tests/conftest.py): a second time is another cluster."""
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    runtestprotocol(item, nextitem=nextitem)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


@pytest.fixture(scope="session")
def cluster() -> Iterator[Machine]:
    """A cluster with one node, which has the image of build/dist."""
    if reason := why_not():
        pytest.skip(reason)
    image = dist.OUT / f"pagecache-bpf-image-{dist.version()}.tar"
    if not image.exists():
        pytest.skip(f"there is no build/dist/{image.name}: run `make test-cluster`")
    separate()
    made, own = Machine(), not MODELS.exists()
    make_models(STATE / "models")
    MODELS.mkdir(exist_ok=True)
    subprocess.run(["mount", "--bind", str(STATE / "models"), str(MODELS)], check=True)
    try:
        with usual_readahead(STATE / "models" / "llama" / "model.safetensors"):
            made.start()
            made.import_image(image)
            yield made
    finally:
        made.stop()
        end_all()
        subprocess.run(["umount", "--lazy", str(MODELS)], check=True)
        if own:
            with contextlib.suppress(OSError):
                MODELS.rmdir()


@pytest.fixture
def models(cluster: Machine) -> Path:
    """The models of the node, none of them in the page cache."""
    os.sync()
    drop(sorted(MODELS.glob("*/*.safetensors")))
    return MODELS


def make_models(place: Path) -> None:
    """Write the models of a node."""
    for name in NAMES:
        (place / name).mkdir(parents=True)
        tensors = {f"{name}.{part}": (ROWS, 512) for part in range(4)}
        safetensors(place / name / "model.safetensors", tensors)


def chart(**values: Any) -> list[str]:
    """Render the chart with Helm's own code: the documents."""
    code = "import json, sys; from tools import chart; given = json.load(sys.stdin); "
    code += "print(json.dumps(chart.render(given)))"
    done = subprocess.run(
        [str(dist.VENV / "bin" / "python"), "-c", code],
        input=json.dumps(values),
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout).values())


def pod(
    name: str, *words: str, spec: Mapping[str, Any] | None = None, **metadata: Any
) -> dict[str, Any]:
    """A pod of our image that runs a command once."""
    container = {
        "name": "server",
        "image": IMAGE,
        "imagePullPolicy": "Never",
        "command": list(words),
        **dict((spec or {}).get("container", {})),
    }
    more = {key: value for key, value in (spec or {}).items() if key != "container"}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": "default", **metadata},
        "spec": {
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": 1,
            "containers": [container],
            **more,
        },
    }


def finished(cluster: Machine, name: str) -> str:
    """Wait for the end of a pod; returns its output."""

    def ended() -> str:
        phase = str(cluster.get("pod", name)["status"]["phase"])
        return phase if phase in ("Succeeded", "Failed") else ""

    phase = cluster.wait(f"pod {name} has ended", ended)
    text = cluster.kubectl("logs", name)
    assert phase == "Succeeded", text
    return text


def keep(name: str, text: str) -> None:
    """Keep a log: build/test/cluster/NAME.txt."""
    (STATE / f"{name}.txt").write_text(text)
