# SPDX-License-Identifier: Apache-2.0
"""What a process inherits from whoever starts it, and puts back to the machine's defaults.

The agent is started by whatever asks first: often a worker of an inference server that is pinned
to some CPUs, bound to a NUMA node and niced.  None of that is meant for the agent, which serves
the whole machine.  The environment is the starter's business: see policy.agent_device.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import signal
from collections.abc import Callable

from pagecache_bpf.kernel.kernelfs import LIVE

#: Most CPUs that a kernel is built for (CONFIG_NR_CPUS); the kernel takes those that are there.
_MOST_CPUS = 8192
_MPOL_DEFAULT = 0  # include/uapi/linux/mempolicy.h
_SET_MEMPOLICY = {"x86_64": 238, "aarch64": 237}
_LIMITS = {
    "address space": resource.RLIMIT_AS,
    "CPU time": resource.RLIMIT_CPU,
    "data": resource.RLIMIT_DATA,
    "file size": resource.RLIMIT_FSIZE,
    "locked memory": resource.RLIMIT_MEMLOCK,
    "processes": resource.RLIMIT_NPROC,
}


def reset() -> list[str]:
    """Put this process's scheduling, memory policy, limits, signals and file mode mask back.

    CPUs are those of its cgroup afterwards.

    Returns:
        Sentences about what could not be put back.
    """
    steps: dict[str, Callable[[], object]] = {
        "the signals that are blocked": lambda: signal.pthread_sigmask(signal.SIG_SETMASK, ()),
        "the CPUs it may run on": lambda: os.sched_setaffinity(0, range(_MOST_CPUS)),
        "its scheduling class": lambda: os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0)),
        "its priority": lambda: os.setpriority(os.PRIO_PROCESS, 0, 0),
        "its memory policy": _default_memory_policy,
        "its place among the victims of a lack of memory": lambda: LIVE.path(
            "/proc/self/oom_score_adj"
        ).write_text("0"),
        "its file mode mask": lambda: os.umask(0o077),
    }
    for name, limit in _LIMITS.items():
        steps[f"its limit of {name}"] = lambda limit=limit: _unlimited(limit)  # type: ignore[misc]
    failed = []
    for attribute, step in steps.items():
        try:
            step()
        except (OSError, ValueError) as error:
            failed.append(f"{attribute} is that of whoever started it: {error}")
    return failed


def _unlimited(limit: int) -> None:
    """Lift a limit as far as it goes.  Raises ValueError if that is not all the way."""
    _, most = resource.getrlimit(limit)
    resource.setrlimit(limit, (most, most))
    if most != resource.RLIM_INFINITY:
        resource.setrlimit(limit, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def _default_memory_policy() -> None:
    """Allocate on the node that this process runs on.  Raises OSError."""
    number = _SET_MEMPOLICY.get(platform.machine())
    if number is None:
        raise OSError(f"set_mempolicy(2) has no known number on {platform.machine()}")
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(ctypes.c_long(number), ctypes.c_long(_MPOL_DEFAULT), None, ctypes.c_long(0)):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
