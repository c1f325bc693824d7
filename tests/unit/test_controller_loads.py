# SPDX-License-Identifier: Apache-2.0
"""Loads through the public socket, with a fake for the kernel's side only.

Real sockets, descriptors, processes and headers; what is faked is the attaching of policies and
the tagging of files.  Each test is of a hole of the security review, or of who may see what.
"""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from pagecache_bpf.controller import load_ledger, load_templates
from pagecache_bpf.controller.admission import Budgets
from pagecache_bpf.controller.client_files import ClientFile
from pagecache_bpf.controller.config import Config, ModelSection
from pagecache_bpf.controller.engine_control import AGENT, STRUCT_OPS, PlacedTag
from pagecache_bpf.controller.inspectors import Inspectors
from pagecache_bpf.controller.load_ledger import LoadLedger, label
from pagecache_bpf.controller.public_service import PublicService
from pagecache_bpf.controller.resolved_config import ResolvedConfig
from pagecache_bpf.errors import PagecacheError, PrivilegeError, UsageError
from pagecache_bpf.ipc import peer as peers
from pagecache_bpf.ipc.public_client import PublicClient
from pagecache_bpf.ipc.server import Server
from pagecache_bpf.weights.models import NAME_BYTES, check_name
from tests.unit.test_controller_inspectors import weights
from tests.unit.test_file_key import SWAPS, at_once
from tests.vm.kernel import wait_for

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="a process of another user takes root")


class Kernel:
    """Policies and tags, in place of the kernel's."""

    def __init__(self) -> None:
        self.tags: dict[bytes, tuple[str, str]] = {}  # with policy and model
        self.policies: dict[str, str] = {}
        self.engine = AGENT
        self.service = SimpleNamespace(ignore=lambda pid: None)

    def expected(self, wanted: str) -> tuple[str, str]:
        return AGENT, ""

    def attached(self) -> dict[str, str]:
        return dict(self.policies)

    def ensure(
        self,
        policy: str,
        knobs: Mapping[str, int] | None = None,
        wanted: str = "auto",
        sizes: Mapping[str, int] | None = None,
    ) -> tuple[str, str]:
        self.policies[policy] = self.engine
        return self.engine, ""

    def governors(self, files: Sequence[ClientFile]) -> dict[bytes, str]:
        return {file.key: self.tags[file.key][0] for file in files if file.key in self.tags}

    def governor_of(self, file: ClientFile) -> str | None:
        return self.governors([file]).get(file.key)

    def tag(self, fd: int, file: ClientFile, policy: str, engine: str, model: str) -> PlacedTag:
        self.tags[file.key] = (policy, model)
        return PlacedTag(engine, policy, file.key)

    def locate(
        self, placed: Mapping[bytes, PlacedTag], files: Sequence[ClientFile]
    ) -> dict[bytes, PlacedTag]:
        return dict(placed)

    def untag(self, placed: PlacedTag) -> None:
        self.tags.pop(placed.key, None)

    def tag_keys(self, policy: str, engine: str, files: Sequence[ClientFile]) -> dict[int, bytes]:
        return {number: file.key for number, file in enumerate(files) if file.key in self.tags}

    def settle(self, seconds: float) -> None:
        pass

    def observed(self, model: str) -> dict[str, int] | None:
        return self.observed_by_model().get(model)

    def observed_by_model(self) -> dict[str, dict[str, int]]:
        return {"roots": {"read_bytes": 1000}}


class Given:
    """What template_maps is asked to do: names of models, with how many files they cover."""

    def __init__(self) -> None:
        self.models: dict[str, int] = {}
        self.removed: list[str] = []

    def add(self, maps: object, name: str, template: Any, identities: Mapping[int, Any]) -> None:
        assert name not in self.models, "a template of another was replaced"
        self.models[name] = len(identities)

    def remove(self, maps: object, name: str) -> None:
        del self.models[name]
        self.removed.append(name)


class Running:
    """The public socket in a thread."""

    def __init__(self, directory: Path, budgets: Budgets) -> None:
        self.kernel = Kernel()
        self.inspectors = Inspectors()
        self.inspectors.prepare()
        self.ledger = LoadLedger(self.kernel, budgets, self.inspectors)  # type: ignore[arg-type]
        self.path = directory / "sock"
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(self.path))
        self._stop = threading.Event()
        self.server = Server()
        settings = ResolvedConfig(Config(policies=("maio", "sequential"), engine="agent"))
        self.public = PublicService(
            self.ledger, settings, lambda connection: self.server.call(connection.close)
        )
        self.server.listen(listener, self.public)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            self.server.step(0.05)
            if self.public.wants_tick():
                self.server.queues.submit("loads", self.public.tick, must_run=True)
        self.server.close()

    def client(self) -> PublicClient:
        return PublicClient(self.path, 60)

    def stop(self) -> None:
        self._stop.set()
        self.server.wake()
        self._thread.join(30)
        assert self.server.cleanups.wait_idle(60)  # what is left of connections goes there
        self.public.close()
        self.inspectors.close()
        assert self.ledger.loads == {} and self.kernel.tags == {}


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> Given:
    from pagecache_bpf.templates import template_maps

    found = Given()
    monkeypatch.setattr(template_maps, "add", found.add)
    monkeypatch.setattr(template_maps, "remove", found.remove)
    monkeypatch.setattr(
        load_templates.LoadTemplates, "_maps", lambda self, policy, engine: nullcontext({})
    )
    return found


@pytest.fixture
def running(tmp_path: Path, given: Given) -> Iterator[Running]:
    found = Running(tmp_path, Budgets())
    yield found
    found.stop()


def opened(path: Path) -> int:
    """How many descriptors of a file this process, the controller's, has."""
    links = []
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            links.append(os.readlink(entry))
    return links.count(str(path))


@pytest.mark.parametrize("swap", [name for name in SWAPS if name != "nothing"])
def test_s1_s2_s3_swaps_between_the_requests(
    running: Running, given: Given, tmp_path: Path, swap: str, become: Callable[[int], None]
) -> None:
    """Its template is of the file that was passed, whatever has its name by now."""
    become(65533)
    path = tmp_path / "w.safetensors"
    fd = weights(path)
    os.mkfifo(tmp_path / "config.json")
    os.mkfifo(tmp_path / "model.safetensors.index.json")
    with at_once(), running.client() as client:
        client.request("files", (fd,))
        path.rename(tmp_path / "kept")
        effect = SWAPS[swap](path)
        report = client.request("open_load", model="m")
        assert (report["policy"], report["template"], report["template_why"]) == (
            *("maio", "derived", ""),
        )
        assert report["bytes"] == (tmp_path / "kept").stat().st_size
        assert given.models == {"m@65533": 1}
        assert client.load_report(report["load"])["resident_bytes"] > 0
        assert client.done(report["load"])["state"] == "done"
        assert given.models == {}
        wait_for(lambda: opened(tmp_path / "kept") == 1, "every descriptor but ours to be closed")
        del effect
    os.close(fd)


def test_s7_more_than_1024_descriptors_and_the_end_of_a_process(
    running: Running, tmp_path: Path
) -> None:
    fd = weights(tmp_path / "w.safetensors")
    with running.client() as hoarder:
        for _ in range(20):
            hoarder.request("files", [fd] * 64)
        child = os.fork()
        if not child:
            try:
                client = running.client()
                client.open_load([fd], model="m")
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        wait_for(lambda: running.ledger.loads == {}, "the load to end with its process")
        assert running.public.watch.add(os.getpid())
        running.public.watch.remove(os.getpid())
    os.close(fd)


class Lent:
    """A session, in place of the module's."""

    every: ClassVar[list[Lent]] = []

    def __init__(self) -> None:
        self.files: list[int] = []
        self.is_open = True
        self.every.append(self)

    def lend(self, fd: int) -> None:
        self.files.append(os.fstat(fd).st_ino)

    def close(self) -> None:
        self.is_open = False


def test_files_are_lent_in_order_for_as_long_as_a_load_lasts(
    running: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the module; engine agent opens them itself, and one file has no next one."""
    monkeypatch.setattr(load_ledger, "Session", Lent)
    monkeypatch.setattr(Lent, "every", [])
    names = ("c", "a", "b")  # as the client passes them: that is its loader's order
    fds = [weights(tmp_path / f"{name}.safetensors") for name in names]
    with running.client() as client:
        client.done(client.open_load(fds, model="m")["load"])
        assert Lent.every == []
        running.kernel.engine = STRUCT_OPS
        client.done(client.open_load(fds[:1], model="m")["load"])
        assert Lent.every == []
        report = client.open_load(fds, model="m")
        (session,) = Lent.every
        assert session.files == [os.fstat(fd).st_ino for fd in fds] and session.is_open
        client.done(report["load"])
        assert not session.is_open
        client.open_load(fds, model="m")
        assert Lent.every[1].is_open
    wait_for(lambda: not Lent.every[1].is_open, "the session to end with its client")
    for fd in fds:
        os.close(fd)


def test_s10_a_name_is_a_users_own(
    running: Running, tmp_path: Path, become: Callable[[int], None]
) -> None:
    fd = weights(tmp_path / "w.safetensors")
    for uid, name in ((1234, "roots@1234"), (1235, "roots@1235")):
        become(uid)
        with running.client() as client:
            report = client.open_load([fd], model="roots")
            assert report["model"] == name and report["counters"] is None
            assert set(running.kernel.tags.values()) == {("maio", name)}
            client.close(report["load"])
    become(1236)
    with running.client() as client:
        claimed = client.open_load([fd], model="roots@1234")
        assert claimed["model"] == "roots@1234@1236"
    os.close(fd)


@pytest.mark.parametrize("model", ["m", "x" * 63, "org/name"])
@pytest.mark.parametrize("uid", [1, 4_294_967_294])
def test_s10_labels_are_names(model: str, uid: int) -> None:
    assert label(model, (0, True)) == model
    for owner in ((uid, False), (0, False)):
        found = label(model, owner)
        assert len(found) <= NAME_BYTES and found.endswith(f"@{owner[0]}")
        check_name(found)


def test_s11_a_second_load_of_a_name_with_other_files_is_told(
    running: Running, given: Given, tmp_path: Path
) -> None:
    first, second = weights(tmp_path / "a.safetensors"), weights(tmp_path / "b.safetensors", 5)
    with running.client() as client:
        one = client.open_load([first], model="m")
        other = client.open_load([second], model="m")
        assert (one["template"], other["template"]) == ("derived", None)
        assert "another load of m is open, with other files" in other["template_why"]
        again = client.open_load([first], model="m")
        client.close(one["load"])
        assert given.models == {"m": 1}
        client.close(again["load"])
        assert given.models == {} and given.removed == ["m"]
    os.close(first)
    os.close(second)


def test_ranks_share_the_template_of_their_model(
    running: Running, given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Headers are read for the first of them, whose template stays until the last has gone."""
    jobs: list[str] = []
    run = running.inspectors.run

    def count(owner: Any, gid: int, job: str, *args: Any, **arguments: Any) -> Any:
        jobs.append(job)
        return run(owner, gid, job, *args, **arguments)

    monkeypatch.setattr(running.inspectors, "run", count)
    fd = weights(tmp_path / "w.safetensors")
    with running.client() as first, running.client() as second:
        one = first.open_load([fd], model="m")
        other = second.open_load([fd], model="m")
        assert [load["template"] for load in (one, other)] == ["derived", "derived"]
        assert jobs.count("derive") == 1
        first.close(one["load"])
        assert given.models == {"m": 1}
        second.close(other["load"])
        assert given.models == {}
        again = second.open_load([fd], model="m")
        assert again["template"] == "derived" and jobs.count("derive") == 2
    os.close(fd)


def test_s15_a_configured_model_is_served_as_such_whatever_a_client_calls_it(
    running: Running, tmp_path: Path, become: Callable[[int], None]
) -> None:
    """By what the files are: another name for them is no way out, its name no way in."""
    path, other = tmp_path / "w.safetensors", tmp_path / "other.safetensors"
    for file in (path, other):
        os.close(weights(file))
    model = ModelSection(str(path), "configured", budget=1 << 30)
    running.public.settings = ResolvedConfig(
        Config(policies=("maio",), engine="agent", models=(model,))
    )
    running.ledger.budgets.models = running.public.settings.budgets
    link = tmp_path / "link.safetensors"
    os.link(path, link)
    become(1234)
    with running.client() as client:
        for file, asked, name in ((link, "mine", "configured"), (other, "configured", None)):
            fd = os.open(file, os.O_RDONLY)
            report = client.open_load([fd], model=asked)
            os.close(fd)
            assert report["model"] == (name or "configured@1234")
            assert report["budget_bytes"] == (1 << 30 if name else None)
            client.close(report["load"])


def test_s13_root_of_a_container_sees_its_own_loads_only(
    running: Running, tmp_path: Path, become: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    fd = weights(tmp_path / "w.safetensors")
    become(1234)
    with running.client() as client:
        client.open_load([fd], model="m")
        monkeypatch.setattr(peers.Peer, "_is_native", lambda self: False)
        become(0)
        with running.client() as contained:
            assert contained.status()["loads"] == []
            assert contained.open_load([fd], model="m")["model"] == "m@0"
            assert [load["model"] for load in contained.status()["loads"]] == ["m@0"]
        monkeypatch.undo()
    os.close(fd)


def test_the_load_of_another_connection_is_not_known(
    running: Running, tmp_path: Path, become: Callable[[int], None]
) -> None:
    fd = weights(tmp_path / "w.safetensors")
    become(1234)
    with running.client() as owner, running.client() as other:
        load = owner.open_load([fd], model="m")["load"]
        for call in (other.load_report, other.done, other.close):
            with pytest.raises(PrivilegeError, match="there is no such load"):
                call(load)
        assert owner.load_report(load)["state"] == "open"
    os.close(fd)


def test_open_loads_of_a_user_are_bounded(
    running: Running,
    tmp_path: Path,
    become: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pagecache_bpf.controller.client_sessions.LOADS_PER_USER", 2)
    fd = weights(tmp_path / "w.safetensors")
    become(1234)
    with running.client() as client:
        for _ in range(2):
            client.open_load([fd], model="m")
        with pytest.raises(UsageError, match="2 open loads"):
            client.open_load([fd], model="m")
        become(1235)
        with running.client() as other:
            other.open_load([fd], model="m")
    os.close(fd)


def test_a_user_has_a_share_of_the_budget(tmp_path: Path, given: Given) -> None:
    """An 8 TB file with nothing in it takes what one user may have, and no more."""
    fd = weights(tmp_path / "w.safetensors")
    running = Running(tmp_path, Budgets(total=10 << 30, per_user=6 << 30))
    clients: list[PublicClient] = []  # a load ends with its connection
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("pagecache_bpf.controller.load_ledger.headroom", lambda pid: None)
            for uid, granted in ((1234, 6 << 30), (1235, 4 << 30)):
                patch.setattr(peers, "credentials", lambda sock, uid=uid: (os.getpid(), uid, uid))
                clients.append(client := running.client())
                sparse = tmp_path / f"sparse-{uid}"
                sparse.touch()
                os.truncate(sparse, 8 << 40)
                with sparse.open("rb") as file:
                    report = client.open_load([file.fileno()], model="big", policy="sequential")
                assert report["budget_bytes"] == granted
            with pytest.raises(PagecacheError, match="was not admitted"):
                client.open_load([fd], model="more", policy="sequential")
    finally:
        for client in clients:
            client.disconnect()
        os.close(fd)
        running.stop()


def test_s16_the_servers_thread_waits_for_no_load(
    running: Running, tmp_path: Path, become: Callable[[int], None]
) -> None:
    """A load is being placed, which takes its time, and another is judged: others are answered."""
    fd = weights(tmp_path / "w.safetensors")
    become(1234)
    with running.client() as client:
        client.request("files", (fd,))
        with running.ledger._lock:
            client._socket.sendall(b'{"v": 1, "op": "open_load", "model": "m"}\n')
            wait_for(running.server.queues.running, "the load to be judged", 60)
            become(1235)
            with running.client() as other:
                assert other.hello()["protocol"] == 1
                assert other.residency(fd)["governed"] is False
            # What the server's own thread asks about a connection does not wait either.
            assert [running.public.may_end(found) for found in running.server.connections]
        assert json.loads(client._line())["ok"]["state"] == "open"
    os.close(fd)
