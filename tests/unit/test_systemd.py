# SPDX-License-Identifier: Apache-2.0
"""What the service manager is told, by a socket such as it has."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pagecache_bpf.controller import systemd


@pytest.fixture(params=["path", "abstract"])
def manager(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[socket.socket]:
    """The service manager's end."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        name = str(tmp_path / "notify") if request.param == "path" else f"@pcb-{os.getpid()}"
        sock.bind(name.replace("@", "\0", 1) if request.param == "abstract" else name)
        sock.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        yield sock


def test_lines_arrive_as_one_message(manager: socket.socket) -> None:
    assert systemd.notify("READY=1", "STATUS=2 loads")
    assert manager.recv(100) == b"READY=1\nSTATUS=2 loads"


def test_a_reload_has_the_time_of_its_begin(manager: socket.socket) -> None:
    before = time.monotonic_ns() // 1000
    assert systemd.reloading()
    state, _, stamp = manager.recv(100).decode().partition("\nMONOTONIC_USEC=")
    assert state == "RELOADING=1"
    assert before <= int(stamp) <= time.monotonic_ns() // 1000


@pytest.mark.parametrize("address", ["", "relative", "/no/such/socket", "vsock:2:1"])
def test_without_a_manager_nothing_happens(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    assert not systemd.notify("READY=1")


@pytest.mark.parametrize(
    ("text", "pid", "seconds"),
    [
        ("30000000", None, 15.0),  # half of it, as sd_watchdog_enabled(3) advises
        ("30000000", "own", 15.0),
        ("30000000", "1", None),  # another process is meant
        ("0", None, None),
        ("", None, None),
        ("soon", None, None),
    ],
)
def test_how_often_the_watchdog_wants_to_hear(
    monkeypatch: pytest.MonkeyPatch, text: str, pid: str | None, seconds: float | None
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", text)
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    if pid is not None:
        monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()) if pid == "own" else pid)
    assert systemd.watchdog_seconds() == seconds
