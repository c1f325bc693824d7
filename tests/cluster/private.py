# SPDX-License-Identifier: Apache-2.0
"""What keeps a cluster of a test apart from the machine that it runs on.

`make test-cluster` gives the tests a network and a table of mounts of their own (unshare), so ports
are free, bridges and rules of iptables vanish with the last process, and what is mounted here is
seen by nobody else.  Nothing of the machine but its kernel and its page cache is shared.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

from tests.unit.command import ROOT

BUILT = ROOT / "build" / "cluster"
#: What the cluster keeps, logs included; made anew each time.
STATE = ROOT / "build" / "test" / "cluster"
#: The pods' memory cgroups, and all others, lie below this one.
CGROUP = "pagecache-bpf-cluster"
CGROUPS = Path("/sys/fs/cgroup")
#: kubelet sets these for the whole kernel; it gets files that say they are set.
_SYSCTLS = {
    "vm/overcommit_memory": 1,
    "vm/panic_on_oom": 0,
    "kernel/panic": 10,
    "kernel/panic_on_oops": 1,
    "kernel/keys/root_maxkeys": 1000000,
    "kernel/keys/root_maxbytes": 25000000,
}


def why_not() -> str:
    """Return why no cluster can be run here; empty where it can."""
    if os.geteuid() != 0:
        return "needs root (a cluster of its own)"
    if not _is_separate():
        return "needs a network and mounts of its own: run `make test-cluster`"
    if not (BUILT / "bin" / "kubectl").exists():
        return "needs a Kubernetes in build/cluster: run `make test-cluster`"
    missing = [name for name in ("ip", "iptables", "openssl") if shutil.which(name) is None]
    return f"needs {' and '.join(missing)}" if missing else ""


def _is_separate() -> bool:
    """Tell whether this process has a network and mounts that its parent has not."""
    own, parent = Path("/proc/self/ns"), Path(f"/proc/{os.getppid()}/ns")
    try:
        return all((own / kind).readlink() != (parent / kind).readlink() for kind in ("net", "mnt"))
    except OSError:
        return False


def separate() -> None:
    """Mount what the programs of a cluster share with those of the machine otherwise."""
    shutil.rmtree(STATE, ignore_errors=True)
    STATE.mkdir(parents=True)
    _run("mount", "-t", "tmpfs", "tmpfs", "/run")
    _run("mount", "-t", "tmpfs", "tmpfs", "/var/log")
    _run("mount", "-t", "bpf", "bpf", "/sys/fs/bpf")
    for name in ("etc-changed", "etc-work"):
        (STATE / name).mkdir()
    changed = f"lowerdir=/etc,upperdir={STATE}/etc-changed,workdir={STATE}/etc-work"
    _run("mount", "-t", "overlay", "overlay", "-o", changed, "/etc")
    Path("/run/sysctl").mkdir()
    for name, value in _SYSCTLS.items():
        told = Path("/run/sysctl", name.replace("/", "."))
        told.write_text(f"{value}\n")
        if Path("/proc/sys", name).exists():
            _run("mount", "--bind", str(told), f"/proc/sys/{name}")
    _run("ip", "link", "set", "lo", "up")
    for hierarchy in CGROUPS.iterdir():
        (hierarchy / CGROUP).mkdir(exist_ok=True)
        for name in ("cpuset.cpus", "cpuset.mems"):
            if (hierarchy / name).exists():
                (hierarchy / CGROUP / name).write_text((hierarchy / name).read_text())


def end_all() -> None:
    """End whatever still runs with these mounts, and in the cluster's cgroups; remove those."""
    assert _is_separate()  # of the machine's own processes none would be left
    for _ in range(50):
        left = _processes()
        for number in left:
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        for number in left:
            with suppress(ChildProcessError):
                os.waitpid(number, os.WNOHANG)
        if not left:
            break
    for top in CGROUPS.glob(f"*/{CGROUP}"):
        for path, _, _ in os.walk(top, topdown=False):
            with suppress(OSError):
                os.rmdir(path)


def _processes() -> list[int]:
    own, mounts = {os.getpid(), os.getppid()}, os.readlink("/proc/self/ns/mnt")
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            number = int(entry.name)
            inside = f":/{CGROUP}/" in (entry / "cgroup").read_text()
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            ours = inside or os.readlink(entry / "ns" / "mnt") == mounts
            if ours and state != "Z" and number not in own:
                found.append(number)
    return found


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, (command, done.stderr)
