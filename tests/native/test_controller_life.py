# SPDX-License-Identifier: Apache-2.0
"""The controller's life: one at a time, the end, a kill, its configuration, its manager."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from pagecache_bpf.errors import UnsupportedError
from pagecache_bpf.ipc.public_client import PublicClient
from tests.native.controller import AGENT, Controller, load, serving, start, tagged
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
