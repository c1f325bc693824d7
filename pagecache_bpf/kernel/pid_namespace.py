# SPDX-License-Identifier: Apache-2.0
"""The PID namespace of this process: whether the kernel and it call processes by the same numbers.

Events of the kernel's have numbers of the first namespace; in another one, such as a container's,
they cannot be looked up in procfs.
"""

from __future__ import annotations

import os

_FIRST_INODE = 0xEFFFFFFC


def is_first() -> bool:
    """Tell whether this process is in the machine's first PID namespace.

    Returns:
        False in any other one, as in most containers, and where procfs does not tell.

    Source: PROC_PID_INIT_INO in include/linux/proc_ns.h.
    """
    try:
        return os.stat("/proc/self/ns/pid").st_ino == _FIRST_INODE
    except OSError:
        return False
