# SPDX-License-Identifier: Apache-2.0
"""The PID namespace of this process: whether the kernel and it call processes by the same numbers.

Events of the kernel's have numbers of the first namespace; in another one, such as a container's,
they cannot be looked up in procfs.
"""

from __future__ import annotations

from pagecache_bpf.kernel.kernelfs import LIVE

_FIRST_INODE = 0xEFFFFFFC


def constants(prefix: str) -> dict[str, int]:
    """Return what BPF programs need to know a process by the number that it has here.

    Args:
        prefix: what the names of the programs' variables begin with.

    Returns:
        The variables PREFIX_pidns_dev and PREFIX_pidns_ino: device and inode number of the
        namespace, as bpf_get_ns_current_pid_tgid() takes them.

    Raises:
        OSError: procfs does not tell.
    """
    namespace = LIVE.stat("/proc/self/ns/pid")
    return {f"{prefix}_pidns_dev": namespace.st_dev, f"{prefix}_pidns_ino": namespace.st_ino}


def is_first() -> bool:
    """Tell whether this process is in the machine's first PID namespace.

    Returns:
        False in any other one, as in most containers, and where procfs does not tell.

    Source: PROC_PID_INIT_INO in include/linux/proc_ns.h.
    """
    try:
        return LIVE.stat("/proc/self/ns/pid").st_ino == _FIRST_INODE
    except OSError:
        return False
