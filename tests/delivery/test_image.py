# SPDX-License-Identifier: Apache-2.0
"""The image as docs/install.md and compose.yaml start it; a user in another container is served."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from benchmarks.cachestat import drop
from tests.delivery.conftest import MODEL, on_a_disk, only, write_down
from tests.delivery.podman import IMAGE, RUN, Podman, as_documented, why_not
from tests.unit.command import ROOT
from tools import dist

NAME = "pagecache-bpf-of-a-test"
NOBODY = "65534"
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


def as_composed() -> list[str]:
    """The agent of compose.yaml, as podman's options."""
    composed = yaml.safe_load((ROOT / "packaging/container/compose.yaml").read_text())
    agent = composed["services"]["agent"]
    options = ["--pid", agent["pid"], "--cgroupns", agent["cgroup"]]
    options += [f"--cap-drop={name}" for name in agent["cap_drop"]]
    options += [f"--cap-add={name}" for name in agent["cap_add"]]
    options += [f"--security-opt={text.replace(':', '=')}" for text in agent["security_opt"]]
    for volume in agent["volumes"]:
        if "MODELS" not in volume:
            options += ["-v", volume]
    return options


@pytest.mark.parametrize("options", [as_documented, as_composed])
def test_a_user_in_another_container_is_served(
    podman: Podman, options: Callable[[], list[str]], tmp_path: Path
) -> None:
    shared = tmp_path / "run"
    shared.mkdir()
    own = [f"{shared}:{RUN}" if word == f"{RUN}:{RUN}" else word for word in options()]
    podman("run", "-d", "--name", NAME, *own, IMAGE)
    podman.follow(NAME, "listening")
    with on_a_disk() as place:
        model = place / MODEL
        os.sync()
        drop([model])
        told = podman(
            *("run", "--rm", "--user", NOBODY, "-v", f"{shared}:{RUN}"),
            *("-v", f"{place}:/models:ro", "--entrypoint", "/opt/pagecache-bpf/bin/python"),
            *(IMAGE, "-c", LOAD, f"/models/{MODEL}"),
        )
        size = model.stat().st_size
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
