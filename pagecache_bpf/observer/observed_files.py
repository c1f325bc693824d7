# SPDX-License-Identifier: Apache-2.0
"""The files that the agent's process has observed, whichever engine their policy runs on.

Holds the one observer of the process, and starts it with the first file.  Knows no policy and no
engine beyond their names.
"""

from __future__ import annotations

import time
from typing import Any

from pagecache_bpf.errors import PagecacheError
from pagecache_bpf.kernel.process_tree import is_alive
from pagecache_bpf.observer.observer import Observer
from pagecache_bpf.policy.observing import VARIABLE, wanted


class ObservedFiles:
    """An observer that starts with its first file.

    Policies work without one, so nothing here raises because the kernel lacks what an observer
    needs: stats() says why there is none.
    """

    def __init__(self) -> None:
        self._observer: Observer | None = None
        self._blind = ""  # why there is no observer
        self._own: set[int] = set()
        self._policy_of: dict[bytes, str] = {}

    @property
    def active(self) -> bool:
        """Whether a file is observed."""
        return bool(self._policy_of)

    def add(self, key: bytes, fd: int, policy: str, model: str, path: str, engine: str) -> None:
        """Count what the readers of an open file find; where that cannot be, stats() says why.

        Args:
            key: the file's key, of kernel.file_key.
            fd: the open file.
            policy: the policy that governs it.
            model: the model that it is part of.
            path: leads to it again, for its residency.
            engine: the engine that the policy runs on.
        """
        if not wanted():
            self._blind = f"{VARIABLE} is off"
            return
        try:
            self._started().tag(fd, model, path=path, policy=policy, engine=engine)
            self._policy_of[key] = policy
        except (PagecacheError, OSError) as error:
            self._blind = str(error)

    def prepare(self) -> None:
        """Start the observer before its first file comes, which takes a quarter of a second."""
        if wanted():
            try:
                self._started()
            except (PagecacheError, OSError) as error:
                self._blind = str(error)

    def _started(self) -> Observer:
        """Return the observer, started if it is not yet."""
        if self._observer is None:
            self._observer = Observer()
            for pid in self._own:
                self._observer.own(pid)
        return self._observer

    def forget(self, key: bytes) -> None:
        """Count a file no more; one that was not added is passed over.

        Args:
            key: the file's key, as add() was given it.
        """
        if self._policy_of.pop(key, None) is not None and self._observer:
            self._observer.untag(key)

    def forget_policy(self, policy: str) -> None:
        """Count the files no more that a policy governed.

        Args:
            policy: its name.
        """
        for key in [key for key, name in self._policy_of.items() if name == policy]:
            self.forget(key)

    def own(self, pid: int) -> None:
        """Take what a process reads as prefetched, and as no access of a reader's.

        An observer that is made later is told of it, too.

        Args:
            pid: the process, of this project: an agent, a worker, a recorder.
        """
        self._own = {process for process in self._own if is_alive(process)} | {pid}
        if self._observer:
            self._observer.own(pid)

    def counters(self) -> dict[str, dict[str, int]]:
        """Read what was counted for each model.

        Returns:
            Counters by name, by the model's name; nothing without an observer.
        """
        return self._observer.counters() if self._observer else {}

    def stats(self) -> dict[str, Any]:
        """Take a snapshot of what readers have found.

        Returns:
            What pagecache_bpf.observer describes; without an observer its level is "off", and
            `missing` says why.
        """
        if self._observer:
            return self._observer.snapshot()
        return {
            "time_ns": time.time_ns(),
            "level": "off",
            "missing": [self._blind] if self._blind else [],
            "uncounted": [],
            "backend": "",
            "lost_events": 0,
            "models": [],
        }

    def close(self) -> None:
        """End the observer, if there is one."""
        if self._observer:
            self._observer.close()
            self._observer = None
        self._policy_of.clear()
