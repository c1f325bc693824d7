# SPDX-License-Identifier: Apache-2.0
"""Takes system calls from a process for good: those that one which reads open files never needs.

Without them whoever takes the process over through a file that it reads can start nothing, reach no
network and no other process, and write to no file; what it has of the kernel is smaller.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform

from pagecache_bpf.kernel.classic_bpf import AT_LEAST, EQUAL, HAS_BITS, LOAD, RETURN, FilterProgram
from pagecache_bpf.kernel.kernelfs import LIVE, KernelFS

#: Numbers on x86_64 and aarch64 (there is no such call there: -1); include/uapi/asm*/unistd.h.
DENIED = {
    "accept": (43, 202),
    "accept4": (288, 242),
    "add_key": (248, 217),
    "bind": (49, 200),
    "bpf": (321, 280),
    "chmod": (90, -1),
    "chown": (92, -1),
    "chroot": (161, 51),
    "clone": (56, 220),
    "clone3": (435, 435),
    "connect": (42, 203),
    "creat": (85, -1),
    "delete_module": (176, 106),
    "execve": (59, 221),
    "execveat": (322, 281),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "fchownat": (260, 54),
    "finit_module": (313, 273),
    "fork": (57, -1),
    "fsopen": (430, 430),
    "init_module": (175, 105),
    "io_uring_setup": (425, 425),
    "kexec_load": (246, 104),
    "keyctl": (250, 219),
    "kill": (62, 129),
    "link": (86, -1),
    "linkat": (265, 37),
    "listen": (50, 201),
    "mkdir": (83, -1),
    "mkdirat": (258, 34),
    "mknod": (133, -1),
    "mknodat": (259, 33),
    "mount": (165, 40),
    "move_mount": (429, 429),
    "open": (2, -1),
    "open_by_handle_at": (304, 265),
    "open_tree": (428, 428),
    "openat2": (437, 437),
    "perf_event_open": (298, 241),
    "personality": (135, 92),
    "pidfd_getfd": (438, 438),
    "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424),
    "pivot_root": (155, 41),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "ptrace": (101, 117),
    "reboot": (169, 142),
    "rename": (82, -1),
    "renameat": (264, 38),
    "renameat2": (316, 276),
    "request_key": (249, 218),
    "rmdir": (84, -1),
    "rt_sigqueueinfo": (129, 138),
    "setns": (308, 268),
    "shmat": (30, 196),
    "shmget": (29, 194),
    "socket": (41, 198),
    "swapon": (167, 224),
    "symlink": (88, -1),
    "symlinkat": (266, 36),
    "tgkill": (234, 131),
    "tkill": (200, 130),
    "truncate": (76, 45),
    "umount2": (166, 39),
    "unlink": (87, -1),
    "unlinkat": (263, 35),
    "unshare": (272, 97),
    "userfaultfd": (323, 282),
    "vfork": (58, -1),
}
_OPENAT = (257, 56)
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # include/uapi/linux/audit.h
_ACTIONS = "/proc/sys/kernel/seccomp/actions_avail"
_X32 = 0x40000000
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_NUMBER_OFFSET, _ARCH_OFFSET, _OPENAT_FLAGS_OFFSET = 0, 4, 32  # struct seccomp_data
_ALLOW, _KILL, _REFUSE = 0x7FFF0000, 0x80000000, 0x00050000 | errno.EPERM
_PR_SET_SECCOMP, _MODE_FILTER = 22, 2


def available(machine: str | None = None, kernel: KernelFS = LIVE) -> bool:
    """Tell whether deny() can do its work: the kernel has filters, and the machine is known here.

    Args:
        machine: as platform.machine() says it; None: this one.
        kernel: where the kernel's list of what filters can do is looked for
            (CONFIG_SECCOMP_FILTER).

    Returns:
        True if both are so.
    """
    return (machine or platform.machine()) in _MACHINES and kernel.exists(_ACTIONS)


def instructions(machine: str) -> list[tuple[int, int, int, int]]:
    """Return the filter for a machine: what is denied fails with EPERM, and so does writing.

    Args:
        machine: as platform.machine() says it.

    Raises:
        KeyError: the numbers of its system calls are not known here.
    """
    column, audit = _MACHINES[machine]
    numbers = sorted(pair[column] for pair in DENIED.values() if pair[column] >= 0)
    # The end: refuse, allow, kill; every jump goes forward to one of them.
    count = len(numbers)
    found = [
        (LOAD, 0, 0, _ARCH_OFFSET),
        (EQUAL, 1, 0, audit),
        (RETURN, 0, 0, _KILL),
        (LOAD, 0, 0, _NUMBER_OFFSET),
        (AT_LEAST, 0, 1, _X32),
        (RETURN, 0, 0, _KILL),
    ]
    for index, number in enumerate(numbers):
        found.append((EQUAL, count - index + 2, 0, number))
    return [
        *found,
        (EQUAL, 0, 3, _OPENAT[column]),
        (LOAD, 0, 0, _OPENAT_FLAGS_OFFSET),
        (HAS_BITS, 0, 1, _WRITING),
        (RETURN, 0, 0, _REFUSE),
        (RETURN, 0, 0, _ALLOW),
    ]


def deny() -> bool:
    """Take the calls from this thread and those that it starts; there is no way back.

    no_new_privs has to be set, or it takes CAP_SYS_ADMIN.

    Returns:
        False where it cannot be done: a kernel without filters, or another kind of machine.
    """
    try:
        program = FilterProgram.of(instructions(platform.machine()))
    except KeyError:
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    return not libc.prctl(_PR_SET_SECCOMP, _MODE_FILTER, ctypes.byref(program), 0, 0)
