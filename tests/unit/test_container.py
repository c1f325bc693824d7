# SPDX-License-Identifier: Apache-2.0
"""What a container needs for the agent or a client: one list for documents, image and unit."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import pytest
import yaml

from pagecache_bpf.explain import container
from pagecache_bpf.explain.features import Machine
from pagecache_bpf.kernel.kernelfs import KernelFS
from tests.unit.command import ROOT, run

EVERYTHING = sum(1 << bit for bit, _ in container.CAPABILITIES.values())


def machine(root: Path, capabilities: int = EVERYTHING, uid_map: str = "0 0 4294967295") -> Machine:
    """A container's files below a directory, as the agent needs them."""
    own = root / "proc" / "self"
    own.mkdir(parents=True, exist_ok=True)
    (own / "status").write_text(f"CapEff:\t{capabilities:016x}\nSeccomp:\t0\n")
    (own / "uid_map").write_text(uid_map + "\n")
    (root / "sys" / "fs" / "cgroup").mkdir(parents=True, exist_ok=True)
    return Machine(fs=KernelFS(root), euid=0)


def lacking(m: Machine) -> dict[str, list[str]]:
    found = container.lacking(container.probe(m))
    return {role: [row.name for row in rows] for role, rows in found.items()}


def test_what_is_given_is_the_list() -> None:
    """The compose file has exactly these capabilities, the unit these and what the module takes."""
    compose = yaml.safe_load((ROOT / "packaging/container/compose.yaml").read_text())
    assert sorted(compose["services"]["agent"]["cap_add"]) == sorted(container.CAPABILITIES)
    unit = (ROOT / "packaging/systemd/pagecache-bpf.service").read_text()
    (bounds,) = re.findall(r"^CapabilityBoundingSet=(.*)$", unit, re.M)
    assert {f"CAP_{name}" for name in container.CAPABILITIES} <= set(bounds.split())
    documented = (ROOT / "docs/install.md").read_text()
    for name, (_, lost) in container.CAPABILITIES.items():
        assert f"| `{name}` | {lost} |" in documented


def test_a_capability_that_is_missing_is_named(tmp_path: Path) -> None:
    assert "CAP_BPF" not in lacking(machine(tmp_path))["agent"]
    for name, (bit, lost) in container.CAPABILITIES.items():
        rows = container.probe(machine(tmp_path, EVERYTHING & ~(1 << bit)))
        (row,) = (row for row in rows if row.name == f"CAP_{name}")
        assert (row.ok, row.lost) == (False, lost) and f"--cap-add {name}" in row.fix
        assert (row in container.lacking(rows)["agent"]) == (name in container.NEEDED)


def test_a_user_namespace_is_no_root(tmp_path: Path) -> None:
    found = lacking(machine(tmp_path, uid_map="0 100000 65536"))
    assert "the machine's root" in found["agent"]


def test_a_client_needs_the_socket_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "control.sock"
    monkeypatch.setattr(container, "socket_path", lambda: Path("/control.sock"))
    m = machine(tmp_path, 0)
    assert lacking(m)["client"] == ["the agent's socket"]
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        listening.bind(str(path))
        listening.listen()
        assert lacking(m)["client"] == []


def test_the_command_says_so(tmp_path: Path) -> None:
    told = run("doctor", "--container", "--json", env={"PAGECACHE_BPF_SOCKET": str(tmp_path / "x")})
    assert set(told.data["engines"]) == {"agent", "client"}
    assert told.data["engines"]["client"] == ["the agent's socket"]
    shown = run("doctor", "--container", env={"PAGECACHE_BPF_SOCKET": str(tmp_path / "x")})
    assert "in this container: client  not here: the agent's socket" in shown.out
