# SPDX-License-Identifier: Apache-2.0
"""Models that are read in containers: governed by root's policy, and by clients of the controller.

Either the readers of a container are served, and what is read ahead is charged to the container, or
the command says why not.  The readers are busybox' dd, and load() of this package in the container.
What was seen of each environment is a row of the table of docs/filesystems.md (table.py).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pagecache_bpf.kernel.file_pages import PAGE_SIZE
from tests.containers import containerd, rootless
from tests.containers.boxes import (
    LAYER,
    MODEL,
    MOUNTED,
    Box,
    Podman,
    make_model,
    why_not,
)
from tests.containers.table import CLIENT, note
from tests.native.controller import serving
from tests.native.filesystems import cached, make_cold
from tests.native.readahead import usual_readahead
from tests.native.test_agent import idle
from tests.observing import counted_since_tag
from tests.unit.command import done, run
from tests.vm.kernel import wait_for

_WHY_NOT = why_not()
pytestmark = pytest.mark.skipif(bool(_WHY_NOT), reason=_WHY_NOT)

LIMIT = 256 << 20
#: Bytes that are read ahead at least; how many are in time depends on who else is busy here.
LEAST = 4 << 20


@dataclass(frozen=True)
class Environment:
    """How a container is run, and where it finds the model.

    options: of what runs it; layer: whether the model is in its image, else in a directory of the
    host; by: what runs it.
    """

    options: tuple[str, ...] = ()
    layer: bool = False
    by: str = "podman"

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
    "containerd": Environment(by="containerd"),
    "containerd, image layer": Environment(layer=True, by="containerd"),
    "containerd, memory limit": Environment(
        ("--memory-limit", str(LIMIT)), layer=True, by="containerd"
    ),
}


@pytest.fixture(scope="module")
def podman(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Podman]:
    made = Podman(tmp_path_factory.mktemp("podman"))
    try:
        made.make_image()
        if reason := made.why_not(()):
            pytest.skip(f"podman runs no container here: {reason}")
        yield made
    finally:
        made.unmount()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of this machine with a model that anybody may read."""
    place = tmp_path_factory.mktemp("models")
    for directory in (place, place.parent):
        directory.chmod(0o755)
    make_model(place)
    return place


@contextmanager
def short_place() -> Iterator[Path]:
    """A directory with a short path, as sockets want it, that every user gets to."""
    with tempfile.TemporaryDirectory(prefix="pagecache-bpf-", dir="/var/tmp") as name:
        os.chmod(name, 0o755)
        yield Path(name)


@pytest.fixture(scope="module")
def other(podman: Podman) -> Iterator[Callable[[], containerd.Containerd]]:
    """containerd with podman's image, which is started at the first call."""
    with short_place() as place:
        started: list[containerd.Containerd] = []
        running = containerd.containerd(place)

        def get() -> containerd.Containerd:
            if not started:
                started.append(running.__enter__())
                started[0].take_image(podman)
            return started[0]

        try:
            yield get
        finally:
            if started:
                running.__exit__(None, None, None)


@pytest.fixture(scope="module", params=ENVIRONMENTS, ids=lambda name: name.replace(" ", "_"))
def named(request: pytest.FixtureRequest) -> str:
    """The name of an environment."""
    found: str = request.param
    return found


@pytest.fixture(scope="module")
def environment(
    named: str, podman: Podman, other: Callable[[], containerd.Containerd]
) -> Environment:
    """One that can be made here; tried once for all tests in it."""
    found = ENVIRONMENTS[named]
    if found.by == "containerd":
        reason = containerd.why_not() or other().why_not(found.options)
    else:
        reason = podman.why_not(found.options)
    if reason:
        pytest.skip(reason)
    return found


@pytest.fixture
def engine(
    environment: Environment, podman: Podman, other: Callable[[], containerd.Containerd]
) -> Podman | containerd.Containerd:
    """What runs containers of the environment."""
    return other() if environment.by == "containerd" else podman


@pytest.fixture
def box(
    engine: Podman | containerd.Containerd, models: Path, environment: Environment
) -> Iterator[Box]:
    """A container of the environment, in which the model is cold, on a disk of the usual window."""
    with engine.box(*environment.options, mounts={models: MOUNTED}) as made:
        on_host = engine.layer_file(made) if environment.layer else models / MODEL
        with usual_readahead(on_host):
            make_cold(on_host)
            yield made


class Host:
    """Runs commands of containers without one."""

    def execute(self, name: str, *words: str) -> str:
        busybox = shutil.which("busybox")
        assert busybox
        command = [word.replace("/busybox", busybox) for word in words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def shares(counted: dict[str, int], model: Path) -> tuple[float, float]:
    """Of a model what was read ahead, and of what was wanted what was there."""
    prefetched = counted["prefetched_bytes"] / model.stat().st_size
    return prefetched, counted["read_hit_bytes"] / counted["read_bytes"]


def test_a_reader_on_the_host(models: Path) -> None:
    """For comparison: the same model and reader, in no container."""
    path = models / MODEL
    box = Box(Host(), "host", os.getpid())
    with usual_readahead(path):
        make_cold(path)
        usual = box.read(path)
        make_cold(path)
        done("attach", "sequential", "--engine", "agent", "--model", "boxed", path)
        try:
            seconds = box.read(path)
            idle()
            found = counted_since_tag("boxed")["counters"]
        finally:
            done("detach", "--all")
    assert found["prefetched_bytes"] > LEAST
    note("host", *shares(found, path), None, usual, seconds)


def test_root_of_the_host_attaches(
    models: Path,
    named: str,
    environment: Environment,
    engine: Podman | containerd.Containerd,
    box: Box,
) -> None:
    """By the path below /proc/PID/root, or the one of the mounted directory."""
    path = box.inside(environment.path) if environment.layer else models / MODEL
    on_host = engine.layer_file(box) if environment.layer else models / MODEL
    usual = box.read(environment.path)
    make_cold(on_host)
    before = box.charged()
    attached = run("attach", "sequential", "--engine", "agent", "--model", "boxed", path)
    assert (attached.code, attached.err) == (0, "")
    try:
        seconds = box.read(environment.path)
        idle()
        found = counted_since_tag("boxed")["counters"]
        pages = -(-on_host.stat().st_size // PAGE_SIZE)
        assert found["read_bytes"] == pages * PAGE_SIZE and cached(on_host) == pages
        assert found["prefetched_bytes"] > LEAST
        # What was read ahead of the container's reader is the container's.
        charged = box.charged() - before
        assert charged > 0.9 * found["read_bytes"]
        share = charged / on_host.stat().st_size
        note(named, *shares(found, on_host), share, usual, seconds)
    finally:
        assert run("detach", "--all").code == 0


READ = """
import json, sys, time
def read(path):
    began = time.monotonic()
    with open(path, "rb", buffering=0) as file:
        while file.read(128 << 10):
            pass
    return time.monotonic() - began
"""
LOAD = f"""{READ}
import os, pagecache_bpf as pc
with pc.load(sys.argv[1]) as load:
    until = time.monotonic() + float(sys.argv[2])
    while load.report().policy is None and time.monotonic() < until:
        time.sleep(0.01)  # a load of so few bytes would be over before it is served
    seconds = read(sys.argv[1])
report = load.report()
print(json.dumps({{"uid": os.getuid(), "text": str(report), "policy": report.policy,
                   "engine": report.engine, "prefetched": report.prefetched_bytes,
                   "hit": report.hit_ratio, "seconds": seconds}}))
"""
CONFIG = '[loads]\nengine = "agent"\npolicies = ["sequential"]\n'


def load(box: Box, path: Path, on_host: Path, seconds: int = 30) -> dict[str, Any]:
    """Load a cold model in a container through the controller's socket, and return what it told.

    path, on_host: where the model is, there and here; seconds: for which it waits to be served
    before it reads.
    """
    make_cold(on_host)
    told: dict[str, Any] = json.loads(box.python(LOAD, str(path), str(seconds)))
    return told


def note_load(
    name: str, box: Box, path: Path, on_host: Path, told: dict[str, Any], charged: float | None
) -> None:
    """Write down what a load has told, beside the same reader without it."""
    make_cold(on_host)
    usual = float(box.python(f"{READ}\nprint(read(sys.argv[1]))", str(path)))
    share = (told["prefetched"] or 0) / on_host.stat().st_size
    note(name + CLIENT, share, told["hit"], charged, usual, told["seconds"])


def test_a_client_loads_through_the_controller(
    models: Path,
    named: str,
    environment: Environment,
    engine: Podman | containerd.Containerd,
    tmp_path: Path,
) -> None:
    """It has no privilege and no process number of the host's: only the socket."""
    directory = tmp_path / "serve"
    with serving(directory, CONFIG) as controller:
        controller.await_warm()
        mounts = {models: MOUNTED, directory: Path("/run/pagecache-bpf")}
        with engine.box(*environment.options, mounts=mounts) as box:
            on_host = engine.layer_file(box) if environment.layer else models / MODEL
            with usual_readahead(on_host):
                told = load(box, environment.path, on_host)
                assert (told["policy"], told["engine"]) == ("sequential", "agent"), told["text"]
                assert told["prefetched"] > LEAST, told["text"]
                # Its pages were the container's, until they went with the end of the load.
                charged = box.charged(most=True) / on_host.stat().st_size
                assert charged > 0.9
                wait_for(lambda: not cached(on_host), "the cache to be clean")
                note_load(named, box, environment.path, on_host, told, min(1.0, charged))


def test_a_client_in_a_rootless_container() -> None:
    """Served of what root has mounted; its overlay is its user's, which could make it hang."""
    if reason := rootless.why_not():
        pytest.skip(reason)
    with short_place() as place, serving(place / "serve", CONFIG) as controller:
        controller.await_warm()
        (place / "models").mkdir()
        mounted = make_model(place / "models")
        with rootless.rootless(place / "podman") as podman:
            podman.make_image()
            if reason := podman.why_not(()):
                pytest.skip(f"rootless podman runs no container here: {reason}")
            mounts = {mounted.parent: MOUNTED, place / "serve": Path("/run/pagecache-bpf")}
            with podman.box(mounts=mounts) as box:
                for path, on_host in ((MOUNTED, mounted), (LAYER, podman.layer_file(box))):
                    with usual_readahead(on_host):
                        told = load(box, path / MODEL, on_host, 30 if path == MOUNTED else 1)
                    assert told["uid"] == 0
                    if path == MOUNTED:
                        assert (told["policy"], told["engine"]) == ("sequential", "agent"), told
                        assert told["prefetched"] > LEAST, told["text"]
                        wait_for(lambda: not cached(mounted), "the cache to be clean")
                    else:
                        assert told["policy"] is None, told["text"]
                        assert "a file system that a user has mounted" in told["text"]
                    with usual_readahead(on_host):
                        note_load(
                            f"rootless, {'bind mount' if path == MOUNTED else 'image layer'}",
                            *(box, path / MODEL, on_host, told, None),
                        )


def test_a_controller_without_the_hosts_process_numbers(
    models: Path, podman: Podman, tmp_path: Path
) -> None:
    """It runs in a container of its own, without --pid host, and serves a client in another one."""
    directory = tmp_path / "serve"
    directory.mkdir(mode=0o755)
    (directory / "config.toml").write_text(f'{CONFIG}[socket]\nmode = "0666"\n')
    mounts = {models: MOUNTED, directory: Path("/run/pagecache-bpf")}
    with podman.box("--privileged", mounts=mounts) as server, podman.box(mounts=mounts) as client:
        server.start("serve", "--config", "/run/pagecache-bpf/config.toml")
        wait_for((directory / "control.sock").exists, "the controller to answer", 60)
        with usual_readahead(models / MODEL):
            told = load(client, MOUNTED / MODEL, models / MODEL)
            assert (told["policy"], told["engine"]) == ("sequential", "agent"), told["text"]
            assert told["prefetched"] > LEAST, told["text"]
            wait_for(lambda: not cached(models / MODEL), "the cache to be clean")
            name = "controller without the host's process numbers"
            note_load(name, client, MOUNTED / MODEL, models / MODEL, told, None)
