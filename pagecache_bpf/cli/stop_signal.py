# SPDX-License-Identifier: Apache-2.0
"""Commands that run until Ctrl-C or SIGTERM, which is their normal end."""

from __future__ import annotations

import os
import select
import signal


class StopSignal:
    """Takes SIGTERM and SIGINT from when it is made."""

    def __init__(self) -> None:
        """Install the handlers: of a pipe, as one that takes a lock may meet its own thread."""
        self._told, tell = os.pipe2(os.O_CLOEXEC)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: os.write(tell, b"\0"))

    def wait(self, seconds: float) -> bool:
        """Wait for a signal.

        Args:
            seconds: at most.

        Returns:
            Whether one has come.
        """
        return bool(select.select([self._told], [], [], seconds)[0])
