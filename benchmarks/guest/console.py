# SPDX-License-Identifier: Apache-2.0
"""Find the lines of a kernel log that mean trouble: warnings, oopses, lockdep, stalls."""

from __future__ import annotations

import re
from collections.abc import Iterable

#: What the kernel prints when something of its own went wrong. Each alternative names its source.
_PROBLEM = re.compile(
    r"""
      \bWARNING:                                   # WARN_ON, lockdep, RCU usage
    | \bBUG:                                       # BUG_ON, KASAN, KFENCE, sleeping in atomic
    | \bkernel\ BUG\ at\b
    | \bOops\b
    | \bKernel\ panic\b
    | \bgeneral\ protection\ fault\b
    | \bUBSAN:
    | \bCall\ Trace:
    | possible\ (?:circular|recursive|irq)\ .*lock
    | \bINFO:\ (?:possible|suspicious|inconsistent|trying\ to\ register)
    | \bsuspicious\ RCU\ usage
    | \brcu:?.*\b(?:self-detected|detected)\ stalls?\b
    | \bblocked\ for\ more\ than\ \d+\ seconds
    | \bsoft\ lockup\b
    | \bhard\ LOCKUP\b
    | \bbad\ page\ state\b
    | \bmemory\ leak\b.*\bunreferenced\b
    """,
    re.VERBOSE | re.IGNORECASE,
)

#: Lines that match the above but say nothing about this project: the emulated machine's own.
_HARMLESS = re.compile(
    r"""
      unhandled\ rdmsr
    | spectre|mitigation|retbleed                  # "WARNING: Spectre v2 ..." of an old CPU model
    | No\ irq\ handler\ for\ vector
    """,
    re.VERBOSE | re.IGNORECASE,
)


def is_problem(line: str) -> bool:
    """Tell whether one line of a kernel log reports a defect."""
    return bool(_PROBLEM.search(line)) and not _HARMLESS.search(line)


def find_problems(lines: Iterable[str]) -> list[str]:
    """Return the lines that report a defect, stripped, in their order."""
    return [line.strip() for line in lines if is_problem(line)]


def problems_of(log: str, begun: str) -> list[str]:
    """Return the lines of a guest's whole log that its command has to answer for.

    What the emulated machine's own boot complains about is not the command's doing, but for a
    complaint after which lockdep says nothing more: then the command was not checked.

    Args:
        log: the console's text.
        begun: what it says when the command is about to start; the last time counts.

    Returns:
        The lines, stripped, in their order.
    """
    boot, _, after = log.rpartition(begun)
    unchecked = [line.strip() for line in boot.splitlines() if "Disabling lock debugging" in line]
    return unchecked + find_problems(after.splitlines())
