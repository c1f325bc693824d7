# SPDX-License-Identifier: Apache-2.0
"""Loads that wait for room in the budget, and whose connections or processes end meanwhile."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from pagecache_bpf.controller.admission import Budgets
from tests.unit.test_controller_inspectors import weights
from tests.unit.test_controller_loads import Given, Running, given, opened
from tests.vm.kernel import wait_for

__all__ = ["given"]  # a fixture
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="a process of another user takes root")
WAITS = b'{"v": 1, "op": "open_load", "model": "m", "wait": 3600}\n'


def two_files(directory: Path) -> tuple[Path, Path]:
    """Two files, for only one of which there is room in 100 MiB."""
    first, second = directory / "w.safetensors", directory / "other.safetensors"
    os.close(weights(first))
    second.touch()
    for path in (first, second):
        os.truncate(path, 80 << 20)
    return first, second


def test_s16_a_load_that_waits_for_room_and_whose_process_ends_is_told(
    tmp_path: Path, given: Given
) -> None:
    """Its child has the connection still; the server goes on, and nothing stays open."""
    running = Running(tmp_path, Budgets(total=100 << 20, rule="queue"))
    path, other = two_files(tmp_path)
    reader, writer = os.pipe()
    try:
        with running.client() as holder, path.open("rb") as file:
            load = holder.open_load([file.fileno()], model="first", policy="sequential")["load"]
            child = os.fork()
            if not child:
                with suppress(BaseException):
                    client = running.client()
                    with other.open("rb") as mine:
                        client.request("files", (mine.fileno(),))
                    client._socket.sendall(WAITS)
                    if not os.fork():
                        os.write(writer, client._line())
                os._exit(0)
            wait_for(lambda: running.public.numbers()["loads_waiting"], "the load to wait", 60)
            os.waitpid(child, 0)
            holder.close(load)
            assert "has ended" in os.read(reader, 1 << 16).decode()
            assert running.public.numbers()["loads_waiting"] == 0
            assert holder.hello()["protocol"] == 1
            wait_for(lambda: opened(other) == 0, "its files to be closed", 60)
    finally:
        os.close(reader)
        os.close(writer)
        running.stop()


def test_s16_a_load_that_waits_for_room_ends_with_its_connection(
    tmp_path: Path, given: Given
) -> None:
    running = Running(tmp_path, Budgets(total=100 << 20, rule="queue"))
    path, other = two_files(tmp_path)
    try:
        with running.client() as holder, path.open("rb") as file:
            holder.open_load([file.fileno()], model="first", policy="sequential")
            with running.client() as client, other.open("rb") as mine:
                client.request("files", (mine.fileno(),))
                client._socket.sendall(WAITS)
                wait_for(lambda: running.public.numbers()["loads_waiting"], "it to wait", 60)
            wait_for(lambda: not running.public.numbers()["loads_waiting"], "it to be over", 60)
            wait_for(lambda: opened(other) == 0, "its files to be closed", 60)
    finally:
        running.stop()


def test_s16_a_connection_that_ends_while_its_load_is_judged(
    tmp_path: Path, given: Given, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its load is not left waiting for nobody."""
    running = Running(tmp_path, Budgets(total=100 << 20, rule="queue"))
    path, other = two_files(tmp_path)
    admit, judged = running.ledger.admit, threading.Event()
    answers: list[Any] = []
    try:
        with running.client() as holder, path.open("rb") as first, other.open("rb") as second:
            holder.open_load([first.fileno()], model="first", policy="sequential")
            client = running.client()

            def judge(*args: Any, **arguments: Any) -> Any:
                found = admit(*args, **arguments)
                answers.append(found)
                client.disconnect()
                wait_for(lambda: len(running.public._sessions) == 1, "its end to be noticed", 60)
                judged.set()
                return found

            client.request("files", (second.fileno(),))
            monkeypatch.setattr(running.ledger, "admit", judge)
            client._socket.sendall(WAITS)
            assert judged.wait(60)
            wait_for(lambda: opened(other) == 1, "its files to be closed", 60)
            running.public.tick()
            assert len(answers) == 1  # it waits for no room: nobody judges it again
            assert running.public.numbers()["loads_waiting"] == 0
    finally:
        running.stop()
