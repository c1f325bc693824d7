# SPDX-License-Identifier: Apache-2.0
"""Programs of classic BPF, of which filters of sockets and of system calls (seccomp) are made.

It packs instructions; what a filter lets through is decided where one is made.

Source: Documentation/networking/filter.rst and Documentation/userspace-api/seccomp_filter.rst.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

#: Codes of the instructions that are used: load a word at k, compare it with k, and return k.
LOAD, EQUAL, AT_LEAST, HAS_BITS, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06


class Instruction(ctypes.Structure):
    """struct sock_filter of include/uapi/linux/filter.h.

    Its members are a code, how far to jump if the test is true and if it is not, and the operand.
    """

    _fields_ = (
        *(("code", ctypes.c_ushort), ("jt", ctypes.c_ubyte)),
        *(("jf", ctypes.c_ubyte), ("k", ctypes.c_uint)),
    )


class FilterProgram(ctypes.Structure):
    """struct sock_fprog; keeps its instructions alive."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.POINTER(Instruction)))

    @classmethod
    def of(cls, instructions: Sequence[tuple[int, int, int, int]]) -> FilterProgram:
        """Make a program, which keeps its instructions alive.

        Args:
            instructions: code, jump if true, jump if false and operand of each, as Instruction has
                them.

        Returns:
            The program.
        """
        code = (Instruction * len(instructions))(
            *(Instruction(*members) for members in instructions)
        )
        return cls(len(instructions), code)
