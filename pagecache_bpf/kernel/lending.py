# SPDX-License-Identifier: Apache-2.0
"""A load's files, lent to the module's policies for as long as the load lasts.

Engine struct_ops reads through the file that a reader has open.  What is lent can be read ahead
before its reader has opened it, on behalf of whoever reads the model's other files.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from types import TracebackType

from pagecache_bpf.errors import PagecacheError, UsageError
from pagecache_bpf.kernel.control_device import Device

_log = logging.getLogger(__name__)


class Session:
    """Files that are lent until close(), or until this process ends.  A context manager.

    That a file cannot be lent is no error: policies do without, as they do without a session.

    Attributes:
        files: how many are lent.
    """

    def __init__(self) -> None:
        """Begin a session; without the module, or the right to use it, nothing will be lent."""
        self.files = 0
        self._full = False
        self._device: Device | None = None
        with suppress(PagecacheError):
            self._device = Device()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def lend(self, fd: int) -> None:
        """Lend a file; files are lent in the order in which they are read.

        Args:
            fd: a tagged file, open for reading; it stays the caller's.
        """
        if self._device is None or self._full:
            return
        try:
            self._device.lend(fd)
        except UsageError as error:  # this one only
            _log.debug("%s", error)
        except PagecacheError as error:
            _log.debug("no more files are lent: %s", error)
            self._full = True
        else:
            self.files += 1

    def close(self) -> None:
        """Take all files back: what is queued for them is cancelled."""
        self.files = 0
        if self._device is not None:
            self._device.close()
