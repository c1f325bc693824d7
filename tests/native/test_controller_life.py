# SPDX-License-Identifier: Apache-2.0
"""The controller's life: one at a time, the end, a kill, its configuration, its manager."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from pagecache_bpf.errors import PagecacheError, UnsupportedError
from pagecache_bpf.ipc.public_client import PublicClient
from tests.native.controller import AGENT, Controller, load, serving, start, tagged
from tests.native.test_export import exporter, scrape
from tests.unit.command import run
from tests.vm.kernel import make_file, wait_for

pytestmark = pytest.mark.native

PAGES = 1021


@pytest.fixture
def controller(tmp_path: Path) -> Iterator[Controller]:
    with serving(tmp_path / "run", AGENT) as found:
        yield found


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Two cold shards."""
    return [make_file(tmp_path / f"{name}.safetensors", PAGES) for name in ("a", "b")]


def test_one_at_a_time(controller: Controller, files: list[Path]) -> None:
    second = start(controller.directory, AGENT)
    assert second.wait(20) == 1
    text = (controller.directory / "stderr").read_text()
    assert "another controller runs already" in text
    assert f"process {controller.process.pid}" in text
    # What attach wants is done by the one that runs.
    assert controller.run("attach", "noop", "--engine", "agent", files[0]).code == 0
    with controller.root() as root:
        assert root.pid == controller.process.pid
    with controller.client() as client:
        assert client.hello()["pid"] == controller.process.pid


def test_an_agent_on_demand_is_named(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    env = {"PAGECACHE_BPF_RUN_DIR": str(directory)}
    assert run("attach", "noop", "--engine", "agent", env=env).code == 0
    assert start(directory, AGENT).wait(20) == 1
    assert "pagecache-bpf detach --all" in (directory / "stderr").read_text()
    assert not (directory / "control.sock").exists()
    assert run("detach", "--all", env=env).code == 0
    # It ends a moment later, which `serve` waits for instead of advising what was just done.
    with serving(directory, AGENT) as controller:
        assert controller.run("clients", "list").code == 0
    for words in (("clients", "list"), ("reload",)):
        told = run(*words, env=env)
        assert told.code == 1 and "no controller runs" in told.err, told.err


def test_nothing_is_left_behind(tmp_path: Path, files: list[Path]) -> None:
    directory = tmp_path / "run"
    with serving(directory, AGENT) as controller:
        assert controller.run("attach", "noop", "--engine", "agent", files[0]).code == 0
        assert controller.stop() == 0
    names = {path.name for path in directory.iterdir()}
    # Besides the test's own files: locks, how policies ended, and how deep queues should be.
    told = {"agent.lock", "change.lock", "depths.json", "exits.json"}
    assert names <= told | {"config.toml", "stderr"}
    with serving(directory, AGENT) as controller:
        assert tagged(controller) == []


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_what_persists_is_taken_up_again(
    tmp_path: Path, files: list[Path], how: signal.Signals
) -> None:
    directory = tmp_path / "run"
    with serving(directory, AGENT, "--persist") as controller:
        words = ("attach", "sequential", "--engine", "agent", "--knob", "max_window_mib=8")
        assert controller.run(*words, *files).code == 0
        with controller.client() as client:  # a load is not: its process would have to ask again
            load(client, [make_file(tmp_path / "c.safetensors", 3)])
            files[1].unlink()
            make_file(files[1], 5)
            controller.process.send_signal(how)
            controller.process.wait(20)
    with serving(directory, AGENT, "--persist") as controller:
        assert tagged(controller) == [(str(files[0]), "sequential")]
        (sentence,) = controller.ready["failed"]
        assert "another file has its name now" in sentence
        (policy,) = controller.run("status", "--json").data["policies"]
        assert policy["knobs"]["max_window_mib"] == 8
        assert controller.run("detach", "--all").code == 0
    with serving(directory, AGENT, "--persist") as controller:
        assert tagged(controller) == [] and controller.ready["policies"] == {}


def test_the_configuration_is_read_again(tmp_path: Path, files: list[Path]) -> None:
    def text(path: Path) -> str:
        listen = f'[socket]\nmode = "0600"\nlisten = "{directory}/control.sock"\n'
        model = f'[[model]]\npath = "{path}"\npolicy = "sequential"\nbudget = "16MiB"\n'
        return f"{listen}{AGENT}{model}"

    directory = tmp_path / "run"
    with serving(directory, text(files[0])) as controller:
        assert controller.ready["policies"] == {"sequential": "agent"}
        assert tagged(controller) == [(str(files[0]), "sequential")]
        config = directory / "config.toml"
        config.write_text("nonsense = 1\n")
        controller.process.send_signal(signal.SIGHUP)
        wait_for(
            lambda: "the old configuration stays" in (directory / "stderr").read_text(),
            "the mistake to be told",
        )
        assert tagged(controller) == [(str(files[0]), "sequential")]
        config.write_text(text(files[1]))
        controller.process.send_signal(signal.SIGHUP)
        wait_for(
            lambda: tagged(controller) == [(str(files[1]), "sequential")],
            "the other model to be tagged",
        )
        with controller.client() as client:  # by its file, whatever the client calls it
            report = load(client, files[1:], model="another-name")
            assert (report["model"], report["budget_bytes"]) == ("b.safetensors", 16 << 20)
        # The command does the same, and tells what came of it.
        config.write_text("nonsense = 1\n")
        refused = controller.run("reload")
        assert refused.code == 2 and "nonsense" in refused.err
        config.write_text(text(files[0]))
        assert controller.run("reload", "--json").data["failed"] == []
        assert tagged(controller) == [(str(files[0]), "sequential")]


def test_clients_are_listed_and_hung_up_on(controller: Controller, files: list[Path]) -> None:
    """By the commands; the loads of a client that is hung up on end."""

    def clients() -> list[dict[str, object]]:
        found = controller.run("clients", "list", "--json").data["clients"]
        return [client for client in found if client["socket"] == "public"]

    with controller.client() as client:
        report = load(client, files)
        (row,) = clients()
        assert (row["pid"], row["uid"], row["root"]) == (os.getpid(), 0, True)
        assert (row["loads"], row["waiting_files"]) == (1, 0)
        assert len(tagged(controller)) == len(files)
        done = controller.run("clients", "kick", str(row["id"]), "--json")
        assert done.data == {"kicked": row["id"]}
        with pytest.raises(PagecacheError, match="does not answer"):
            client.load_report(report["load"])
    wait_for(lambda: not tagged(controller) and not clients(), "its load and its place to go")
    again = controller.run("clients", "kick", str(row["id"]))
    assert again.code == 2 and f"there is no client {row['id']}" in again.err


def test_the_controllers_own_metrics(
    controller: Controller, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What clients list tells is scraped, too: connections, queues, refusals, helpers."""
    monkeypatch.setenv("PAGECACHE_BPF_RUN_DIR", str(controller.directory))
    prefix = "pagecache_controller_"
    with socket.socket(socket.AF_UNIX) as rude:
        rude.connect(str(controller.socket))
        rude.sendall(b"x" * 100_000)  # longer than any request
        assert b"has to be shorter" in rude.recv(4096)
    with controller.client() as client:
        load(client, files)
        with exporter() as address:
            found = scrape(address)
    assert found[f"{prefix}connections", ()] == 2  # the exporter's, too
    assert found[f"{prefix}accepted_connections_total", ()] >= 3
    assert found[f"{prefix}refusals_total", (("reason", "bad framing"),)] == 1
    assert found[f"{prefix}inspectors_filtered", ()] == 1
    # Of the others there are samples, whatever their number.
    for name in ("requests_waiting", "requests_running", "thread_failures_total", "loads_waiting"):
        assert found[f"{prefix}{name}", ()] >= 0
    for name in ("prefetch_queued_bytes", "inspectors", "inspectors_started_total"):
        assert found[f"{prefix}{name}", ()] >= 0


def test_the_service_manager_is_told(tmp_path: Path) -> None:
    address = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(address)
        manager.settimeout(20)
        told = ""

        def expect(what: str) -> None:
            nonlocal told
            while what not in told:
                told += manager.recv(4096).decode() + "\n"

        env = {"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "400000"}
        with serving(tmp_path / "run", AGENT, **env) as controller:
            expect("READY=1")
            expect("WATCHDOG=1")
            told = ""
            controller.process.send_signal(signal.SIGHUP)
            expect("RELOADING=1\nMONOTONIC_USEC=")
            expect("READY=1")
            assert controller.stop() == 0
            expect("STOPPING=1")


def test_a_bad_configuration_is_a_usage_error(tmp_path: Path) -> None:
    process = start(tmp_path / "run", "persist = 1\n")
    assert process.wait(20) == 2
    assert "line 1: persist" in (tmp_path / "run" / "stderr").read_text()
    process = start(tmp_path / "run", '[socket]\ngroup = "nosuchgroup"\n')
    assert process.wait(20) == 2
    text = (tmp_path / "run" / "stderr").read_text()
    assert "there is no group nosuchgroup" in text and "Traceback" not in text
    assert not (tmp_path / "run" / "control.sock").exists()


def test_without_a_controller_the_client_is_told(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="no controller runs"):
        PublicClient(tmp_path / "control.sock")
