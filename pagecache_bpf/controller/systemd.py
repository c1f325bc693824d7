# SPDX-License-Identifier: Apache-2.0
"""Tells systemd how the service is doing (sd_notify(3)); does nothing where nobody listens."""

from __future__ import annotations

import logging
import os
import socket
import time

_log = logging.getLogger(__name__)


def notify(*lines: str) -> bool:
    """Send lines to the service manager.

    Args:
        *lines: NAME=VALUE.

    Returns:
        False: there is none, or it is gone.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.connect(address.replace("@", "\0", 1) if address[0] == "@" else address)
            sock.sendall("\n".join(lines).encode())
    except OSError as error:
        _log.warning("the service manager was not told: %s", error)
        return False
    return True


def reloading() -> bool:
    """Tell the service manager that the configuration is being read again; READY=1 has to follow.

    Returns:
        False: there is none, or it is gone.
    """
    return notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")


def watchdog_seconds() -> float | None:
    """Return how often the service manager wants to hear of us.

    Returns:
        Seconds; None: it does not.
    """
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    return int(microseconds) / 2e6 if microseconds.isdigit() and int(microseconds) else None
