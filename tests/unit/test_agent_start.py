# SPDX-License-Identifier: Apache-2.0
"""How an agent is started and connected to; it takes over nothing that is not meant for it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pagecache_bpf.errors import PagecacheError
from pagecache_bpf.policy import agent_device
from pagecache_bpf.policy.agent_device import environment
from tests.unit.command import ROOT

INHERIT = """
import json, os, resource, signal, sys
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
os.setpriority(os.PRIO_PROCESS, 0, 5)
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
os.umask(0)
before = os.sched_getaffinity(0)
from pagecache_bpf.controller.inherited import reset
failed = reset()
print(json.dumps([len(before), len(os.sched_getaffinity(0)), os.getpriority(os.PRIO_PROCESS, 0),
                  [int(blocked) for blocked in signal.pthread_sigmask(signal.SIG_BLOCK, ())],
                  os.umask(0), failed]))
"""


def test_scheduling_signals_and_mask_are_the_machines_again() -> None:
    done = subprocess.run(
        [sys.executable, "-c", INHERIT], capture_output=True, text=True, cwd=ROOT, check=True
    )
    before, cpus, priority, blocked, mask, failed = json.loads(done.stdout)
    assert before == 1 and cpus == len(os.sched_getaffinity(0))
    assert (blocked, mask) == ([], 0o077)
    # Without the right to it, a priority cannot be raised again, and that is said.
    assert priority == 0 or any("priority" in sentence for sentence in failed)
    assert all("limit" in sentence or "priority" in sentence for sentence in failed)


def test_of_the_environment_only_what_leads_to_python_and_to_us() -> None:
    own = {
        **{"PATH": "/bin", "PYTHONPATH": "/x", "LC_ALL": "C", "PAGECACHE_BPF_RUN_DIR": "/r"},
        **{"LD_PRELOAD": "libjemalloc.so", "OMP_NUM_THREADS": "1", "VLLM_PLUGINS": ""},
    }
    assert environment(own).keys() == {"PATH", "PYTHONPATH", "LC_ALL", "PAGECACHE_BPF_RUN_DIR"}


class Ending:
    """Agents that are about to end, and then one that stays: each connection is another's."""

    def __init__(self, path: Path, ending: int) -> None:
        self.started = 0
        self.path, self._ending = path, ending
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def start(self, check: object = None) -> None:
        """In the place of agent_device.start()."""
        self.started += 1

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                if not connection.recv(1 << 16):
                    continue  # only looked whether somebody answers
                if self._ending:
                    self._ending -= 1
                    continue
                connection.sendall(b'{"v": 1, "ok": {"exits": []}}\n')
                connection.recv(1)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()


@pytest.mark.parametrize("ending", [0, 1, 2])
def test_an_agent_that_is_about_to_end_is_not_taken(
    ending: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`attach` meets one that has just lost its last policy: it starts another one."""
    agents = Ending(tmp_path / "agent.sock", ending)
    monkeypatch.setattr(agent_device, "start", agents.start)
    monkeypatch.setattr(agent_device.is_running, "__defaults__", (agents.path,))
    monkeypatch.setattr(agent_device.connect, "__defaults__", (agents.path,))
    try:
        with agent_device.connect_started():
            assert agents.started == ending + 1
    finally:
        agents.close()


def test_agents_that_do_not_stay_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    agents = Ending(tmp_path / "agent.sock", 100)
    monkeypatch.setattr(agent_device, "start", agents.start)
    monkeypatch.setattr(agent_device.is_running, "__defaults__", (agents.path,))
    monkeypatch.setattr(agent_device.connect, "__defaults__", (agents.path,))
    try:
        assert agent_device.connect() is None
        with pytest.raises(PagecacheError, match="the agent did not stay"):
            agent_device.connect_started()
    finally:
        agents.close()


def test_a_long_log_becomes_the_previous_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "agent.log"
    monkeypatch.setattr(agent_device, "LOG", log)
    for text, before in ((b"one", b""), (b"x" * (1 << 20), b"one"), (b"two", None)):
        with agent_device._open_log() as file:
            file.write(text)
        assert log.read_bytes() == (text if before is None else before + text)
    assert (tmp_path / "agent.log.1").read_bytes() == b"one" + b"x" * (1 << 20)
