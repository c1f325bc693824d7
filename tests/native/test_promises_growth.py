# SPDX-License-Identifier: Apache-2.0
"""Rounds of attaching, tagging, reading and detaching leave the agent as it was."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import pytest

from pagecache_bpf.kernel import libbpf
from pagecache_bpf.kernel.file_pages import PAGE_SIZE
from pagecache_bpf.policy import catalog
from pagecache_bpf.policy.agent_device import AgentDevice
from tests.native.controller import AGENT, serving
from tests.vm.kernel import make_file, wait_for

pytestmark = pytest.mark.native

#: One kept buffer for the verifier's log would be 16 MiB, and each round has two objects.
MOST_BYTES = 4 << 20


def anonymous_bytes(pid: int) -> int:
    """Return the anonymous memory of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("RssAnon:"))
    return int(line.split()[1]) << 10


def tasks(pid: int) -> int:
    """Return how many threads a process has."""
    return len(os.listdir(f"/proc/{pid}/task"))


#: Instructions that the verifier may look at for one program; 200,000 take 0.3 s.
MOST_VERIFIED = 80_000


def verified_instructions() -> dict[str, int]:
    """Return how many instructions the verifier looked at, by the number of the program."""
    found = {}
    for info in Path("/proc/self/fdinfo").iterdir():
        with suppress(FileNotFoundError):  # that of the listing itself
            lines = [line.partition(":\t") for line in info.read_text().splitlines()]
            fields = {name: value for name, _, value in lines}
            if "verified_insns" in fields:
                found[fields["prog_id"]] = int(fields["verified_insns"])
    return found


def test_attaching_a_policy_is_quick() -> None:
    """Nearly all of the time goes to the verifier, and that is known without a clock."""
    namespace = os.stat("/proc/self/ns/pid")
    constants = {
        "agent_page_shift": PAGE_SIZE.bit_length() - 1,
        "agent_pidns_dev": namespace.st_dev,
        "agent_pidns_ino": namespace.st_ino,
    }
    for name in catalog.names():
        before = verified_instructions()
        built = catalog.agent_object(catalog.find(name))
        with libbpf.Messages(), libbpf.Object(built, name) as opened:
            opened.set_constants(constants)
            opened.load()
            counts = verified_instructions()
        ours = [count for program, count in counts.items() if program not in before]
        assert ours and max(ours) < MOST_VERIFIED, (name, sorted(ours))


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
        memory, descriptors, threads = anonymous_bytes(pid), controller.descriptors(), tasks(pid)
        for _ in range(8):
            one_round(root)
        assert anonymous_bytes(pid) - memory < MOST_BYTES
        # A helper process that is ending may hold some for a moment, before or after the rounds.
        wait_for(lambda: controller.descriptors() <= descriptors, "the descriptors to be closed")
        wait_for(lambda: tasks(pid) <= threads, "the threads to end")
