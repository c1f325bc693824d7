# SPDX-License-Identifier: Apache-2.0
"""What a container has and lacks: the table behind `pagecache-bpf doctor --container`.

A container takes one of two parts: the agent runs in it, or models are loaded in it, by an agent
that runs elsewhere on the machine.  The second takes one directory and no right at all.
"""

from __future__ import annotations

import os
import re
import socket
from dataclasses import replace

from pagecache_bpf._run_dir import socket_path
from pagecache_bpf.explain.features import OF_CONTAINERS, Feature, Machine

#: The parts that a container can take.
AGENT, CLIENT = "agent", "client"
ROLES = (AGENT, CLIENT)
#: All that the agent is given: its number, and what does not work without it.
#: packaging/container/compose.yaml and the systemd unit give these (tests/unit/test_container.py).
CAPABILITIES = {
    "SYS_ADMIN": (21, "the files that the kernel's events name are not found, no policy attaches"),
    "BPF": (39, "no program is loaded: no policy, no counts"),
    "PERFMON": (38, "no program is attached: no policy, no counts"),
    "DAC_READ_SEARCH": (2, "models that root may not read are refused"),
    "DAC_OVERRIDE": (
        1,
        "what is read ahead is charged to the agent, not to the reader's container",
    ),
    "SYS_PTRACE": (19, "paths below /proc/PID/root, and what other containers have mounted"),
    "NET_ADMIN": (12, "that processes end is noticed late, and how long readers wait is not told"),
    "CHOWN": (0, "the socket stays root's: no other group can use it"),
    "FOWNER": (3, "the mode of the socket stays root's"),
    "SYS_NICE": (23, "memory is not taken from the NUMA node that a reader asks for"),
}
#: Without them there is no agent; without the others it does less.
NEEDED = frozenset({"SYS_ADMIN", "BPF", "PERFMON"})
_SHOWN_BY = ("/run/.containerenv", "/.dockerenv")
_INITIAL_PIDS = 0xEFFFFFFC  # PROC_PID_INIT_INO of include/linux/proc_ns.h


def probe(machine: Machine | None = None) -> list[Feature]:
    """Ask for everything that the agent or a client needs in a container.

    Args:
        machine: what is asked; by default the container that this process is in.

    Returns:
        A row for each thing; `engines` has the roles that do not work without it.
    """
    m = machine or Machine()
    rows = [_container(m), *(_capability(m, name) for name in CAPABILITIES)]
    rows += [ask(m) for ask in (_user, _seccomp, _processes, _groups)]
    rows += [
        replace(ask(m), engines=(AGENT,) if needed else ()) for ask, needed in OF_CONTAINERS.items()
    ]
    return [*rows, _socket(m)]


def _container(m: Machine) -> Feature:
    found = next((path for path in _SHOWN_BY if m.fs.exists(path)), "")
    if not found and os.environ.get("KUBERNETES_SERVICE_HOST"):
        found = "KUBERNETES_SERVICE_HOST"
    text = f"by {found}" if found else "nothing shows that this is one"
    return Feature("a container", True if found else None, text, "")


def _capability(m: Machine, name: str) -> Feature:
    bit, lost = CAPABILITIES[name]
    there = bool(m.capabilities >> bit & 1)
    roles = (AGENT,) if name in NEEDED else ()
    found = "given" if there else "not given"
    fix = "" if there else f"Run the container with --cap-add {name}"
    return Feature(f"CAP_{name}", there, found, lost, fix, roles)


def _user(m: Machine) -> Feature:
    lost = "capabilities count for nothing on the machine: no program is loaded"
    name, roles = "the machine's root", (AGENT,)
    mapping = (m.fs.read("/proc/self/uid_map") or "").split()
    if mapping and mapping != ["0", "0", "4294967295"]:
        fix = "Run it without --uidmap and --userns, and not by a rootless engine"
        return Feature(name, False, "a user namespace of its own", lost, fix, roles)
    if m.euid != 0:
        return Feature(name, False, f"user {m.euid}", lost, "Run it with --user 0", roles)
    return Feature(name, True, "user 0 of the first user namespace", lost, "", roles)


def _seccomp(m: Machine) -> Feature:
    name, lost = "no seccomp profile", "bpf(2) and cachestat(2), which most profiles refuse"
    found = re.search(r"^Seccomp:\s*(\d)", m.fs.read("/proc/self/status") or "", re.M)
    if found and found[1] != "0":
        fix = "Run it with --security-opt seccomp=unconfined, or allow bpf and cachestat"
        return Feature(name, None, "there is one; whether it refuses them is not known", lost, fix)
    return Feature(name, True, "none", lost)


def _processes(m: Machine) -> Feature:
    name = "the machine's process numbers"
    lost = "readers' control groups: what is read ahead is charged to the agent's container"
    try:
        number = m.fs.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return Feature(name, None, "procfs does not tell", lost, "Run it with --pid host")
    if number != _INITIAL_PIDS:
        return Feature(name, False, "a PID namespace of its own", lost, "Run it with --pid host")
    return Feature(name, True, "the first PID namespace", lost)


def _groups(m: Machine) -> Feature:
    name = "the machine's control groups"
    lost = "readers' control groups: what is read ahead is charged to the agent's container"
    fix = "Run it with --cgroupns host -v /sys/fs/cgroup:/sys/fs/cgroup"
    place = m.fs.path("/sys/fs/cgroup")
    if not place.is_dir():
        return Feature(name, False, "/sys/fs/cgroup is missing", lost, fix)
    if not os.access(place, os.W_OK):
        return Feature(name, False, "/sys/fs/cgroup cannot be written", lost, fix)
    own = [line.split(":", 2)[-1] for line in (m.fs.read("/proc/self/cgroup") or "").splitlines()]
    if own and all(path == "/" for path in own) and m.fs.exists(_SHOWN_BY[0]):
        return Feature(name, False, "a cgroup namespace of its own", lost, fix)
    return Feature(name, True, "/sys/fs/cgroup, to be written", lost)


def _socket(m: Machine) -> Feature:
    name, roles = "the agent's socket", (CLIENT,)
    path = socket_path()
    lost = "load() and `run` in this container read as without us"
    fix = "Run both containers with -v /run/pagecache-bpf:/run/pagecache-bpf"
    if not m.fs.exists(str(path)):
        return Feature(name, False, f"{path} is missing", lost, fix, roles)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as own:
        own.settimeout(2)
        try:
            own.connect(str(m.fs.path(str(path))))
        except OSError as error:
            found = f"{path}: {error.strerror or error}"
            fix = "Start the agent; its configuration says who may use the socket ([socket] mode)"
            return Feature(name, False, found, lost, fix, roles)
    return Feature(name, True, f"{path} answers", lost, "", roles)


def lacking(features: list[Feature]) -> dict[str, list[Feature]]:
    """Return what each part needs and this container does not have.

    Args:
        features: what probe() returned.

    Returns:
        The missing features by role.
    """
    missing = [feature for feature in features if feature.ok is False]
    return {role: [feature for feature in missing if role in feature.engines] for role in ROLES}
