# SPDX-License-Identifier: Apache-2.0
"""Models that are read in containers: governed by root's policy, and by clients of the controller.

Either the readers of a container are served, and what is read ahead is charged to the container, or
the command says why not.  The readers are busybox' dd, and load() of this package in the container.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pagecache_bpf.kernel.file_pages import PAGE_SIZE
from tests.containers.boxes import (
    LAYER,
    MODEL,
    MOUNTED,
    Box,
    Podman,
    make_model,
    why_not,
)
from tests.native.controller import serving
from tests.native.filesystems import cached, make_cold
from tests.native.readahead import usual_readahead
from tests.native.test_agent import idle
from tests.observing import counted_since_tag
from tests.unit.command import run
from tests.vm.kernel import wait_for

_WHY_NOT = why_not()
pytestmark = pytest.mark.skipif(bool(_WHY_NOT), reason=_WHY_NOT)

LIMIT = 256 << 20
#: Bytes that are read ahead at least; how many are in time depends on who else is busy here.
LEAST = 4 << 20


@dataclass(frozen=True)
class Environment:
    """How a container is run, and where it finds the model.

    options: of `podman run`; layer: whether the model is in its image, else in a directory of the
    host; private_ids: whether its users are others on the host.
    """

    options: tuple[str, ...] = ()
    layer: bool = False

    @property
    def path(self) -> Path:
        """Where the model is in the container."""
        return (LAYER if self.layer else MOUNTED) / MODEL


IDS = ("--uidmap", "0:100000:65536", "--gidmap", "0:100000:65536")
ENVIRONMENTS = {
    "bind mount": Environment(),
    "image layer": Environment(layer=True),
    "user 65534": Environment(("--user", "65534")),
    "user 65534, image layer": Environment(("--user", "65534"), layer=True),
    "user namespace": Environment(IDS),
    "user namespace, image layer": Environment(IDS, layer=True),
    "memory limit": Environment(("--memory", str(LIMIT))),
    "memory limit, image layer": Environment(("--memory", str(LIMIT)), layer=True),
    "one CPU": Environment(("--cpuset-cpus", "0")),
    "read-only root": Environment(("--read-only",), layer=True),
    "few processes": Environment(("--pids-limit", "20"), layer=True),
}


@pytest.fixture(scope="module")
def podman(tmp_path_factory: pytest.TempPathFactory) -> Podman:
    made = Podman(tmp_path_factory.mktemp("podman"))
    made.make_image()
    if reason := made.why_not(()):
        pytest.skip(f"podman runs no container here: {reason}")
    return made


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of this machine with a model that anybody may read."""
    place = tmp_path_factory.mktemp("models")
    for directory in (place, place.parent):
        directory.chmod(0o755)
    make_model(place)
    return place


@pytest.fixture(
    scope="module",
    params=ENVIRONMENTS.values(),
    ids=[name.replace(" ", "_") for name in ENVIRONMENTS],
)
def environment(request: pytest.FixtureRequest, podman: Podman) -> Environment:
    """One that podman can make here; tried once for all tests in it."""
    found: Environment = request.param
    if reason := podman.why_not(found.options):
        pytest.skip(reason)
    return found


@pytest.fixture
def box(podman: Podman, models: Path, environment: Environment) -> Iterator[Box]:
    """A container of the environment, in which the model is cold, on a disk of the usual window."""
    with podman.box(*environment.options, mounts={models: MOUNTED}) as made:
        on_host = podman.layer_file(made) if environment.layer else models / MODEL
        with usual_readahead(on_host):
            make_cold(on_host)
            yield made


def test_root_of_the_host_attaches(
    podman: Podman, models: Path, environment: Environment, box: Box
) -> None:
    """By the path below /proc/PID/root, or the one of the mounted directory."""
    path = box.inside(environment.path) if environment.layer else models / MODEL
    before = box.charged()
    attached = run("attach", "sequential", "--engine", "agent", "--model", "boxed", path)
    assert (attached.code, attached.err) == (0, "")
    try:
        box.read(environment.path)
        idle()
        found = counted_since_tag("boxed")["counters"]
        on_host = podman.layer_file(box) if environment.layer else models / MODEL
        pages = -(-on_host.stat().st_size // PAGE_SIZE)
        assert found["read_bytes"] == pages * PAGE_SIZE and cached(on_host) == pages
        assert found["prefetched_bytes"] > LEAST
        # What was read ahead of the container's reader is the container's.
        assert box.charged() - before > 0.9 * found["read_bytes"]
    finally:
        assert run("detach", "--all").code == 0


LOAD = """
import json, sys, time, pagecache_bpf as pc
with pc.load(sys.argv[1]) as load:
    until = time.monotonic() + 30
    while load.report().policy is None and time.monotonic() < until:
        time.sleep(0.01)  # a load of so few bytes would be over before it is served
    with open(sys.argv[1], "rb", buffering=0) as file:
        while file.read(128 << 10):
            pass
report = load.report()
print(json.dumps({"uid": __import__("os").getuid(), "text": str(report), "policy": report.policy,
                  "engine": report.engine, "prefetched": report.prefetched_bytes}))
"""


def test_a_client_loads_through_the_controller(
    models: Path, environment: Environment, podman: Podman, tmp_path: Path
) -> None:
    """It has no privilege and no process number of the host's: only the socket."""
    config = '[loads]\nengine = "agent"\npolicies = ["sequential"]\n'
    directory = tmp_path / "serve"
    with serving(directory, config) as controller:
        controller.await_warm()
        mounts = {models: MOUNTED, directory: Path("/run/pagecache-bpf")}
        with podman.box(*environment.options, mounts=mounts) as box:
            on_host = podman.layer_file(box) if environment.layer else models / MODEL
            with usual_readahead(on_host):
                make_cold(on_host)
                told = json.loads(box.python(LOAD, str(environment.path)))
                assert (told["policy"], told["engine"]) == ("sequential", "agent"), told["text"]
                assert told["prefetched"] > LEAST, told["text"]
                # Its pages were the container's, until they went with the end of the load.
                assert box.charged(most=True) > 0.9 * on_host.stat().st_size
                wait_for(lambda: not cached(on_host), "the cache to be clean")


def test_a_controller_without_the_hosts_process_numbers(
    models: Path, podman: Podman, tmp_path: Path
) -> None:
    """It runs in a container of its own, without --pid host, and serves a client in another one."""
    directory = tmp_path / "serve"
    directory.mkdir(mode=0o755)
    config = '[loads]\nengine = "agent"\npolicies = ["sequential"]\n[socket]\nmode = "0666"\n'
    (directory / "config.toml").write_text(config)
    mounts = {models: MOUNTED, directory: Path("/run/pagecache-bpf")}
    with podman.box("--privileged", mounts=mounts) as server, podman.box(mounts=mounts) as client:
        server.start("serve", "--config", "/run/pagecache-bpf/config.toml")
        wait_for((directory / "control.sock").exists, "the controller to answer", 60)
        with usual_readahead(models / MODEL):
            make_cold(models / MODEL)
            told = json.loads(client.python(LOAD, str(MOUNTED / MODEL)))
            assert (told["policy"], told["engine"]) == ("sequential", "agent"), told["text"]
            assert told["prefetched"] > LEAST, told["text"]
            wait_for(lambda: not cached(models / MODEL), "the cache to be clean")
