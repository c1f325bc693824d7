# SPDX-License-Identifier: Apache-2.0
"""The image as docs/install.md and compose.yaml start it; a user in another container is served."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.cachestat import drop
from tests.delivery.conftest import MODEL, on_a_disk, only, write_down
from tests.delivery.podman import IMAGE, RUN, Podman, as_documented, why_not
from tests.podman import ulimits
from tests.unit.command import ROOT
from tools import dist

NAME = "pagecache-bpf-of-a-test"
NOBODY = "65534"
PYTHON = "/opt/pagecache-bpf/bin/python"
LOAD = """
import json, sys
import pagecache_bpf as pc

with pc.load(sys.argv[1]) as load:
    assert load.ready(120)
    size = len(open(sys.argv[1], "rb").read())
print(json.dumps({"size": size, "report": load.report().as_json()}))
"""


@pytest.fixture
def podman() -> Iterator[Podman]:
    """podman with the image of build/dist; the containers of a test are ended with it."""
    if reason := why_not():
        pytest.skip(reason)
    image = only(f"pagecache-bpf-image-{dist.version()}.tar")
    # podman takes a short path only.
    with tempfile.TemporaryDirectory(prefix="podman.", dir="/tmp") as place:
        made = Podman(Path(place))
        made("load", "-q", "-i", str(image))
        try:
            yield made
        finally:
            made("rm", "-f", "-t", "20", NAME, check=False)
            made("rmi", "-f", IMAGE, check=False)


def test_a_user_in_another_container_is_served(podman: Podman, tmp_path: Path) -> None:
    shared = tmp_path / "run"
    shared.mkdir()
    own = [f"{shared}:{RUN}" if word == f"{RUN}:{RUN}" else word for word in as_documented()]
    podman("run", "-d", "--name", NAME, *own, IMAGE)
    podman.follow(NAME, "listening")
    with on_a_disk() as place:
        model = place / MODEL
        os.sync()
        drop([model])
        told = podman(
            *("run", "--rm", "--user", NOBODY, "-v", f"{shared}:{RUN}"),
            *("-v", f"{place}:/models:ro", "--entrypoint", PYTHON),
            *(IMAGE, "-c", LOAD, f"/models/{MODEL}"),
        )
        assert_served(told, model.stat().st_size)


def composed(shared: Path) -> dict[str, Any]:
    """compose.yaml with what a test has to change.

    Its server is a client of ours, in the same image: the one that it names is of a registry.
    """
    text = (ROOT / "packaging/container/compose.yaml").read_text()
    assert text.count(f"- {RUN}:{RUN}") == 2
    composed: dict[str, Any] = yaml.safe_load(text.replace(f"- {RUN}:", f"- {shared}:"))
    services = composed["services"]
    services["agent"] |= {"container_name": NAME, "ulimits": ulimits()}
    server = services["server"]
    assert server["command"][:1] == ["--model"]
    server |= {"container_name": f"{NAME}-server", "image": IMAGE, "user": NOBODY}
    server |= {"entrypoint": [PYTHON], "ulimits": ulimits()}
    server["command"] = ["-c", LOAD, server["command"][1]]
    for service in services.values():
        service["network_mode"] = "host"  # as Podman() does
        service.pop("ports", None)
    return composed


def test_the_compose_file_serves_its_server(podman: Podman, tmp_path: Path) -> None:
    """podman-compose starts it, with the least capabilities that it names."""
    shared = tmp_path / "run"
    shared.mkdir()
    with on_a_disk() as place:
        file = tmp_path / "compose.yaml"
        file.write_text(yaml.safe_dump(composed(shared)))
        model = place / MODEL
        environment = {**os.environ, "MODELS": str(place), "MODEL": str(model)}
        compose = [sys.executable, "-m", "podman_compose", "-f", str(file), "--no-ansi"]
        compose += ["--in-pod", "false", "-p", "of-a-test"]
        compose.append(f"--podman-args={shlex.join(podman.command[1:])}")

        def run(*words: str) -> None:
            done = subprocess.run(
                [*compose, *words], env=environment, capture_output=True, text=True, timeout=120
            )
            assert done.returncode == 0, done.stdout + done.stderr

        try:
            run("up", "-d", "agent")
            podman.follow(NAME, "listening")
            os.sync()
            drop([model])
            run("up", "-d", "server")
            podman("wait", f"{NAME}-server")
            told = podman("logs", f"{NAME}-server")
        finally:
            run("down", "-t", "20")
        assert_served(told, model.stat().st_size)


def assert_served(told: str, size: int) -> None:
    """Compare what a client in a container says with what the model has."""
    answer = json.loads(told)
    assert answer["size"] == size
    report = answer["report"]
    assert (report["via"], report["engine"]) == ("controller", "agent"), report
    assert report["bytes"] == size and report["prefetched_bytes"] > 0, report


def test_a_command_of_the_image_runs_as_any_user_without_rights(podman: Podman) -> None:
    words = ("--rm", "--user", NOBODY, "--cap-drop", "all", "--read-only", IMAGE)
    listed = json.loads(podman("run", *words, "policy", "list", "--json"))
    assert any(policy["name"] == "sequential" for policy in listed["policies"])
    (told,) = json.loads(podman("image", "inspect", IMAGE))
    assert told["Labels"]["org.opencontainers.image.version"] == dist.version()
    write_down("bytes of the image, unpacked", told["Size"])
