# SPDX-License-Identifier: Apache-2.0
"""Rounds of attaching, tagging, reading and detaching leave the agent as it was."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pagecache_bpf.policy import catalog
from pagecache_bpf.policy.agent_device import AgentDevice
from tests.native.controller import AGENT, serving
from tests.vm.kernel import make_file

pytestmark = pytest.mark.native

#: One kept buffer for the verifier's log would be 16 MiB, and each round has two objects.
MOST_BYTES = 4 << 20


def anonymous_bytes(pid: int) -> int:
    """Return the anonymous memory of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("RssAnon:"))
    return int(line.split()[1]) << 10


def test_attaching_again_and_again_takes_no_memory(tmp_path: Path) -> None:
    files = [make_file(tmp_path / f"m-{shard}-of-4.safetensors", 512) for shard in range(1, 5)]
    info = catalog.find("noop")
    built = catalog.agent_object(info)

    def one_round(root: AgentDevice) -> None:
        root.attach(info, built, {}, {})
        for path in files:
            fd = os.open(path, os.O_RDONLY)
            try:
                root.tag(fd, policy="noop", model="m", path=str(path))
            finally:
                os.close(fd)
            path.read_bytes()
        assert root.request("stats")["models"][0]["files"] == len(files)
        root.detach("noop")

    with serving(tmp_path / "run", AGENT) as controller, controller.root() as root:
        for _ in range(3):
            one_round(root)
        pid = controller.process.pid
        before = (
            anonymous_bytes(pid),
            controller.descriptors(),
            len(os.listdir(f"/proc/{pid}/task")),
        )
        for _ in range(8):
            one_round(root)
        after = anonymous_bytes(pid), controller.descriptors(), len(os.listdir(f"/proc/{pid}/task"))
    assert after[0] - before[0] < MOST_BYTES
    assert after[1:] == before[1:]
