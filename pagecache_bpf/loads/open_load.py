# SPDX-License-Identifier: Apache-2.0
"""A load from its start, which costs the caller nothing, to its end.

What serves a load is started in a thread: until it is ready, the weights are read at the kernel's
own speed.  Only what cannot be made up for is done before load() returns: looking at what is in
the page cache already, which is what the end leaves there.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pagecache_bpf.errors import PagecacheError
from pagecache_bpf.loads.arguments import guarded
from pagecache_bpf.loads.begin import VARIABLE, UnservedLoad, begin
from pagecache_bpf.loads.report import NONE, Report
from pagecache_bpf.loads.request import LoadOver, LoadRequest, ServedLoad, Starting
from pagecache_bpf.loads.residency_snapshot import Snapshot, resident_of

#: For the look at the page cache before load() returns, in seconds; it goes on beside the reader.
#: What that has brought in where it was not seen in time counts as cached before, and stays.
SNAPSHOT_SECONDS = 0.001

if TYPE_CHECKING:
    from pagecache_bpf.loads.early_prefetch import EarlyPrefetch
    from pagecache_bpf.loads.recording import LoadRecording

_STARTING = "what serves it is being started"
_OVER = "it was over before anything was ready to serve it"
_log = logging.getLogger(__name__)


class OpenLoad:
    """What serves the loads of one set of files in this process: loads of the same files share it.

    Threads may share it.  In a child of fork() it is inert.

    Attributes:
        request: what its first caller asked for.
        ready: set when it is served, or known that it will not be.
        finished: set when its end is over.
        users: loads that share it; belongs to the registry of loads.
        keep: whether one of them wants the pages kept; belongs to the registry, too.
    """

    def __init__(
        self, request: LoadRequest, why: str = "", earlier: OpenLoad | None = None
    ) -> None:
        """Keep what is asked for; start() begins the load.

        Args:
            request: what is asked for.
            why: why nothing can serve it; empty: something may.
            earlier: a load of the same files whose end is under way.
        """
        self.request = request
        self.users, self.keep = 1, False
        self.ready, self.finished = threading.Event(), threading.Event()
        self._pid = os.getpid()
        self._begun = time.monotonic()
        self._lock = threading.Lock()  # of the state; held for moments only
        self._turn = threading.Lock()  # of what serves it: one call at a time
        self._starting = Starting()
        self._served: ServedLoad | None = None
        self._finishing = False
        self._last = request.blank(NONE, "none", why or _STARTING)
        self._earlier = earlier
        self._is_started = False
        self._snapshot: Snapshot | None = None
        self._recording: LoadRecording | None = None
        self._early: EarlyPrefetch | None = None
        self._recorded: Callable[[Report], Report] = lambda report: report
        if why:
            self._served = UnservedLoad(self._last)
            self.ready.set()
            return
        self._snapshot = Snapshot(request.model.files, look=False)
        # Not a daemon: what it has begun has to be taken back before this process ends.
        self._thread = threading.Thread(target=self._run, name="pagecache-bpf load", daemon=False)

    @property
    def files(self) -> tuple[Path, ...]:
        """The files of the load."""
        return self.request.model.files

    @property
    def served(self) -> ServedLoad | None:
        """What serves it; None while that is being started."""
        return self._served

    def start(self) -> None:
        """Begin it, unless whoever shares it has begun it.

        What is in the page cache already has been looked at when this returns, unless that takes
        longer than SNAPSHOT_SECONDS.  A load that is recorded waits for its recorder.
        """
        snapshot = self._snapshot
        if snapshot is None:
            return
        with self._lock:
            first, self._is_started = not self._is_started, True
        if not first:
            return
        self._record()
        if self._earlier is None:  # else what that has brought in is not taken for what was there
            guarded(lambda: snapshot.begin(SNAPSHOT_SECONDS), None)
        try:
            self._thread.start()
        except RuntimeError as error:  # no thread can be started
            self._nothing(str(error))

    def _record(self) -> None:
        """Begin the recording that was asked for; without one the load goes on."""
        request = self.request
        if request.record is None:
            return
        from pagecache_bpf.loads.recording import LoadRecording

        try:
            self._recording = LoadRecording(
                request.model, request.record, request.device_limit, request.template
            )
        except (PagecacheError, OSError) as error:
            self._without_recording(error)

    def _without_recording(self, error: Exception) -> None:
        """Have every report say why there is no recording."""
        note = f"there is no recording: {error}"
        self._recorded = lambda report: replace(report, notes=(*report.notes, note))

    def _end_recording(self, last: Report) -> None:
        """Have the recording written, if one is made, and every report name its file."""
        recording, self._recording = self._recording, None
        if recording is None:
            return
        recording.tell(last.policy, last.engine)
        try:
            recording.end()
        except (PagecacheError, OSError) as error:
            self._without_recording(error)
            return
        self._recorded = lambda report: replace(report, recording=str(recording.output))

    def _nothing(self, why: str) -> None:
        """Note that nothing will serve the load, and why."""
        with self._lock:
            self._served = UnservedLoad(self.request.blank(NONE, "none", why))
        self.ready.set()

    # --- its thread ---

    def _run(self) -> None:
        """Start what serves the load, in the load's own thread; what comes too late is ended."""
        served: ServedLoad | None = None
        try:
            served = self._serve()
        except LoadOver:
            _log.debug("the load of %s was over before it was served", self.request.model.name)
        except Exception as error:  # a bug of ours must not end a server
            _log.debug("the load of %s is not served", self.request.model.name, exc_info=True)
            why = f"unexpected {type(error).__name__}: {error}"
            served = UnservedLoad(self.request.blank(NONE, "none", why))
        self._starting.done()
        first = self._last if served is None else guarded(served.report, self._last)
        with self._lock:
            if not self._finishing:
                self._served, self._last, served = served, first, None
        if self._recording is not None:  # should this process be killed, it is known
            self._recording.tell(first.policy, first.engine)
        self.ready.set()
        if served is not None:  # it came too late
            guarded(lambda served=served: served.finish(keep=True), None)  # type: ignore[misc]

    def _serve(self) -> ServedLoad:
        """Look at the page cache, wait for an earlier load of the files to end, and begin."""
        assert self._snapshot is not None
        earlier, self._earlier = self._earlier, None
        self._snapshot.take(earlier._snapshot if earlier is not None else None)
        if earlier is not None:  # its policy may be about to be detached
            earlier.finished.wait()
        self._starting.check()
        if self.request.prefetch and os.environ.get(VARIABLE) != "off":
            self._begin_early()
        return begin(self.request, self._snapshot, self._starting)

    def _begin_early(self) -> None:
        """Begin to read the files before their reader does; without that the load goes on.

        Only now: what it brings in must not be taken for what was in the page cache before.
        """
        from pagecache_bpf.loads.early_prefetch import EarlyPrefetch

        early = EarlyPrefetch(self.request)
        with self._lock:
            if self._finishing:
                return
            guarded(early.start, None)
            self._early = early

    # --- for those who share it ---

    def wait(self, timeout: float | None) -> bool:
        """Have it served at once, and wait until it is, or known not to be.

        Args:
            timeout: seconds to wait at most; None: as long as it takes.

        Returns:
            Whether it is.
        """
        self._starting.hurry()
        return self.ready.wait(timeout)

    def report(self) -> Report:
        """Tell how the load goes.  Never raises.

        Returns:
            The report; the last one that is known where what serves the load cannot be asked: after
            its end, in a child of fork(), or when the question fails.
        """
        if self._pid != os.getpid() or self._finishing:
            return self._completed(self._last)
        served = self._served
        if served is None:
            return self._completed(self._unserved(_STARTING))
        with self._turn:
            if not self._finishing:
                self._last = guarded(served.report, self._last)
            return self._completed(self._last)

    def _completed(self, report: Report) -> Report:
        """Add what this load knows by itself to what is told by whatever serves it."""
        early = None if self._early is None else self._early.read_bytes
        return self._recorded(replace(report, early_bytes=early))

    def finish(self, keep: bool) -> None:
        """End the load; to be called once.  Never raises.

        Args:
            keep: leave its pages in the page cache; otherwise those go that were not there before
                it.
        """
        with self._lock:
            self._finishing = True
            served = self._served
        if self._early is not None:  # before its pages are dropped
            guarded(self._early.end, None)
        if served is None:
            self._starting.cancel()
            last = guarded(lambda: self._give_up(keep), self._last)
        else:
            with self._turn:
                last = guarded(lambda: served.finish(keep), guarded(served.report, self._last))
            if isinstance(served, UnservedLoad) and not keep:
                last = guarded(lambda: self._drop_early(last), last)
        self._last = last if last.done else replace(last, done=True)
        guarded(lambda: self._end_recording(last), None)
        if self._snapshot is not None:
            self._snapshot.close()
        self.finished.set()

    def _drop_early(self, last: Report) -> Report:
        """Drop what was read early where nothing serves the load that would drop it."""
        if self._early is None or self._snapshot is None:
            return last
        return replace(last, evicted_bytes=self._snapshot.drop_rest())

    def forget(self) -> None:
        """Close what a child of fork() has of the load, without waiting for locks.

        Threads that are gone in the child may have held them.
        """
        self._starting.forget()
        with suppress(Exception):
            if self._served is not None:
                self._served.forget()
        with suppress(Exception):
            if self._snapshot is not None:
                self._snapshot.close()
        with suppress(Exception):
            if self._recording is not None:
                self._recording.forget()

    def _give_up(self, keep: bool) -> Report:
        """End the load before anything has served it, and drop what its readers have brought in."""
        dropped: int | None = 0
        if not keep and self._snapshot is not None and self._snapshot.taken.is_set():
            dropped = self._snapshot.drop_rest()
        return replace(self._unserved(_OVER), done=True, evicted_bytes=dropped)

    def _unserved(self, why: str) -> Report:
        """Report what is known of the load while nothing serves it."""
        snapshot = self._snapshot
        known = snapshot is not None and snapshot.taken.is_set() and snapshot.known
        return replace(
            self.request.blank(NONE, "none", why),
            seconds=time.monotonic() - self._begun,
            resident_before_bytes=snapshot.resident if snapshot is not None and known else None,
            resident_bytes=guarded(lambda: resident_of(self.files), None),
        )
