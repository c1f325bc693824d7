# SPDX-License-Identifier: Apache-2.0
"""There is one controller of a run directory at a time: a lock says so."""

from __future__ import annotations

import fcntl
import os
import time

from pagecache_bpf._run_dir import RUN_DIR
from pagecache_bpf.errors import PagecacheError
from pagecache_bpf.ipc.client import answers
from pagecache_bpf.policy.agent_device import SOCKET, AgentDevice

LOCK = RUN_DIR / "agent.lock"
_WAIT_SECONDS = 30.0
_LOOK_SECONDS = 0.05


def take_lock() -> int:
    """Become the one controller of the run directory.

    Returns:
        The descriptor that holds the lock, until it is closed.

    Raises:
        PagecacheError: another one runs; it is named.
    """
    RUN_DIR.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = os.open(LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        other = os.pread(lock, 64, 0).decode(errors="replace").strip()
        os.close(lock)
        kind, _, pid = other.partition(" ")
        if kind == "serve":
            fix = "Talk to that one, or end it first (systemctl stop pagecache-bpf)"
        else:
            fix = "`pagecache-bpf detach --all` ends it with its policies"
        raise PagecacheError(
            "another controller runs already",
            f"process {pid or 'unknown'}"
            + ("" if kind == "serve" else ", started by `attach --engine agent`"),
            fix,
            "docs/troubleshooting.md#another-controller-runs-already",
        ) from None
    RUN_DIR.chmod(0o700)  # a `serve` before may have opened it
    return lock


def take_lock_for_serve() -> int:
    """Take the lock, and wait for an agent that has no policy any more: it ends a moment later.

    Returns:
        As take_lock().

    Raises:
        PagecacheError: another `serve` runs, or an agent with policies.
    """
    until = 0.0
    while True:
        try:
            return take_lock()
        except PagecacheError:
            if not until:
                if not _is_idle_agent():
                    raise
                until = time.monotonic() + _WAIT_SECONDS
            elif time.monotonic() > until or not LOCK.read_text().startswith("agent"):
                raise
        time.sleep(_LOOK_SECONDS)


def _is_idle_agent() -> bool:
    """Tell whether who has the lock is an agent without policies; one that ends is, too."""
    try:
        if not LOCK.read_text().startswith("agent"):
            return False
        with AgentDevice(SOCKET) as agent:
            return not agent.details()
    except (PagecacheError, OSError):
        return not answers(SOCKET)  # one that is stopped does not end


def take_lock_in_time() -> int:
    """Take the lock, and wait for a controller that has it and does not answer.

    It is about to end, or to answer.

    Returns:
        As take_lock().

    Raises:
        PagecacheError: another one answers, or does neither for too long.
    """
    until = time.monotonic() + _WAIT_SECONDS
    while True:
        try:
            return take_lock()
        except PagecacheError:
            if answers(SOCKET) or time.monotonic() > until:
                raise
        time.sleep(_LOOK_SECONDS)
