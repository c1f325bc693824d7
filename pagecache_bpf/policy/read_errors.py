# SPDX-License-Identifier: Apache-2.0
"""What reads of engine agent failed of, for people."""

from __future__ import annotations

import errno
import os

#: Where the system's own words would mislead.
_MEANINGS = {
    errno.ECHILD: "the process that read had ended, and another was started",
    errno.ESTALE: "another file has the name now",
    errno.ENOENT: "no file has the name now",
}


def meaning(code: int) -> str:
    """Say in words why reads failed.

    Args:
        code: the errno that PolicyStats.read_errors counts.

    Returns:
        A part of a sentence for people.
    """
    return _MEANINGS.get(code) or os.strerror(code)
