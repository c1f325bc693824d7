# SPDX-License-Identifier: Apache-2.0
"""A load served by this process's own threads, which takes no right but that of reading the files.

It makes reports of the window (unprivileged_window) and knows no policy.
"""

from __future__ import annotations

import time
from dataclasses import replace

from pagecache_bpf.loads.reader_progress import blocked_seconds
from pagecache_bpf.loads.report import UNPRIVILEGED, Report
from pagecache_bpf.loads.request import LoadRequest
from pagecache_bpf.loads.residency_snapshot import Snapshot, resident_of
from pagecache_bpf.loads.unprivileged_window import ReadaheadWindow

_CANNOT_TELL = (
    "the files belong to somebody else: what of them is in the page cache is not told, so nothing "
    "is dropped when the load is done"
)


class UnprivilegedLoad:
    """The window of this process's own threads, with the numbers of its load."""

    def __init__(self, request: LoadRequest, snapshot: Snapshot, why: str) -> None:
        """Start reading ahead.

        Args:
            request: what is asked for.
            snapshot: what of its files was cached before.
            why: why nothing better serves it.

        Raises:
            OSError: a file is gone.
        """
        self._request, self._why, self._snapshot = request, why, snapshot
        self._started = time.monotonic()
        self._stalled = blocked_seconds()
        self._notes: list[str] = []
        cpus: tuple[int, ...] = ()
        if request.node is not None:
            from pagecache_bpf import topology

            cpus = topology.read().cpus_of(request.node)
        self._window = ReadaheadWindow(
            request.model.files,
            self._snapshot,
            order=self._order(),
            budget=request.budget,
            cpus=cpus,
        )

    def _order(self) -> list[tuple[int, int, int]] | None:
        """Return the order of the template (index of the file, offset, length), if one is used."""
        request = self._request
        if request.template is None:
            return None
        from pathlib import Path

        from pagecache_bpf import templates
        from pagecache_bpf.errors import PagecacheError

        try:
            template = templates.read(Path(request.template))
            fit = templates.check(template, request.model)
            template = templates.require_fit(template, fit, request.template, partial=True)
        except PagecacheError as error:
            self._notes.append(f"the template is not used: {error}")
            return None
        numbers = {path: number for number, path in enumerate(request.model.files)}
        known = {at: numbers.get(Path(path).resolve()) for at, path in fit.paths.items()}
        order = []
        for extent in template.plain():
            number = known.get(int(extent["file"]))
            if number is not None:
                order.append((number, int(extent["offset"]), int(extent["length"])))
        return order

    def report(self) -> Report:
        """Tell how the load goes.

        Returns:
            The report; how much is in the page cache is None where this user may not know.
        """
        return self._read(resident_of(self._request.model.files) if self._snapshot.known else None)

    def finish(self, keep: bool) -> Report:
        """End the window.

        Args:
            keep: leave its pages in the page cache; otherwise those go that were not there before
                it.

        Returns:
            The last report.
        """
        self._window.stop()
        evicted = self._window.dropped_bytes
        dropped = 0 if keep else self._snapshot.drop_rest()
        if not keep and self._snapshot.known and self._snapshot.others():
            self._notes.append("another process is loading the same files: it will drop them")
        return replace(
            self.report(), done=True, evicted_bytes=None if dropped is None else evicted + dropped
        )

    def forget(self) -> None:
        """Do nothing: threads do not follow into a child of fork()."""

    def _read(self, resident: int | None) -> Report:
        """Make a report of the window's numbers."""
        stalled = blocked_seconds(self._window.thread_ids)
        known = self._snapshot.known
        return replace(
            self._request.blank(UNPRIVILEGED, "alone", self._why),
            policy=None,
            seconds=time.monotonic() - self._started,
            prefetched_bytes=self._window.prefetched_bytes,
            stall_seconds=None
            if stalled is None or self._stalled is None
            else max(0.0, stalled - self._stalled),
            resident_before_bytes=self._snapshot.resident if known else None,
            resident_bytes=resident,
            evicted_bytes=self._window.dropped_bytes,
            notes=(*self._notes, *([] if known else [_CANNOT_TELL]), *self._window.notes),
        )
