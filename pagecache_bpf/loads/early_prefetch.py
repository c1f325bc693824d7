# SPDX-License-Identifier: Apache-2.0
"""Reads the files of a load from its beginning on, while their reader still starts.

An engine imports its framework for seconds before it opens its weights, and the device has nothing
to do meanwhile (FAST '26, observation 1 and Fig. 8: I/O is not hidden under the framework's
initialization).  What serves the load follows the reader; this does not wait for it.
"""

from __future__ import annotations

import logging
import threading

from pagecache_bpf.errors import PagecacheError
from pagecache_bpf.loads.request import LoadRequest

_log = logging.getLogger(__name__)


class EarlyPrefetch:
    """A thread that reads the files of a load in their order, up to its budget.

    Args:
        request: what was asked for; without a budget half of the memory that is free is one.

    Attributes:
        read_bytes: bytes that it has read of the files so far, those that were cached before too.
    """

    def __init__(self, request: LoadRequest) -> None:
        self.read_bytes = 0
        self._request = request
        self._over = threading.Event()
        self._thread = threading.Thread(
            target=self._run, name="pagecache-bpf early prefetch", daemon=True
        )

    def start(self) -> None:
        """Begin reading.

        Raises:
            RuntimeError: no thread can be started.
        """
        self._thread.start()

    def end(self) -> None:
        """Have it read no more, and wait for what it is reading."""
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        """Read one file after the other; what cannot be read is left to the load's reader."""
        from pagecache_bpf.loads import read_once

        request = self._request
        try:
            for path, parts in read_once.wanted(request.model.files, None, request.budget):
                if self._over.is_set():
                    return
                self.read_bytes += read_once.read(path, parts, request.node, self._over)
        except (PagecacheError, OSError, RuntimeError):
            _log.debug("%s is not read early", request.model.name, exc_info=True)
