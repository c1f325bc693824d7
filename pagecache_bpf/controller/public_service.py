# SPDX-License-Identifier: Apache-2.0
"""The operations of the public socket, which any user may call.

Whoever asks is known by uid and pid, and may do what the descriptors that came along prove; a
load belongs to the connection that opened it.
"""

from __future__ import annotations

import logging
import os
import resource
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pagecache_bpf
from pagecache_bpf.controller.admission import Decision, refusal
from pagecache_bpf.controller.cache_rights import CacheRights
from pagecache_bpf.controller.client_files import (
    ClientFile,
    check_descriptor,
    mounts_for,
    page_range,
    template_of,
)
from pagecache_bpf.controller.client_sessions import (
    ClientSession,
    WaitingLoad,
    check_loads,
    check_room,
    connections_for,
)
from pagecache_bpf.controller.load_ledger import ClientLoad, LoadLedger, headroom
from pagecache_bpf.controller.load_templates import Asker
from pagecache_bpf.controller.model_tagger import knobs_for
from pagecache_bpf.controller.prefetch_queues import PrefetchQueues, foreign_cgroup
from pagecache_bpf.controller.processes import ProcessWatch
from pagecache_bpf.controller.resolved_config import ResolvedConfig
from pagecache_bpf.errors import PagecacheError, PrivilegeError, UsageError
from pagecache_bpf.ipc import public_protocol, wire
from pagecache_bpf.ipc.server import Connection, close_all
from pagecache_bpf.kernel.cachestat import cached_pages
from pagecache_bpf.kernel.file_pages import PAGE_SIZE
from pagecache_bpf.weights.models import check_name

_log = logging.getLogger(__name__)


class PublicService:
    """The handler of the public socket: what any user may ask of the controller.

    Args:
        ledger: the loads and budgets.
        settings: the configuration; replaced as a whole when it is read again.
        end: hangs up on a connection, from any thread.
    """

    line_bytes = public_protocol.LINE_BYTES
    fds_per_message = public_protocol.FDS_PER_MESSAGE
    idle_seconds = 120.0

    def __init__(
        self, ledger: LoadLedger, settings: ResolvedConfig, end: Callable[[Connection], None]
    ) -> None:
        self.settings = settings
        self.watch = ProcessWatch(self._process_ended)
        self._ledger = ledger
        self._end = end
        self._rights = CacheRights(ledger, lambda: self.settings)
        self._prefetch_queues = PrefetchQueues(ledger.engines.service.ignore)
        self._sessions: dict[Connection, ClientSession] = {}
        self._waiting: list[WaitingLoad] = []
        self._tick_wanted = False
        # Only ever held for a moment: the server's thread takes it, too.
        self._lock = threading.RLock()
        # Held while a load is judged, which waits for the ledger; taken before the other one.
        self._admission = threading.RLock()
        self._pending: set[WaitingLoad] = set()  # every load that is not open yet
        self.connections = connections_for(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        self.connections_per_user = self.connections // 4
        # files and open_load take the descriptors over; the others leave them.
        self._answers: dict[str, Callable[..., dict[str, Any]]] = {
            name: getattr(self, f"_{name}")
            for name in public_protocol.OPERATIONS
            if name not in ("files", "open_load")
        }

    def sweep(self) -> None:
        """End what users that have gone have left; may wait."""
        with self._lock:
            connected = {connection.owner for connection in self._sessions}
        self._prefetch_queues.sweep(connected)

    def close(self) -> None:
        """End every load."""
        self.watch.close()
        with self._lock:
            sessions = list(self._sessions.items())
        for connection, _ in sessions:
            self.gone(connection)
        self._prefetch_queues.close()

    def queue(self, connection: Connection) -> object:
        """Return the key of the queue for a connection's work: users share no threads.

        Args:
            connection: whose work it is.
        """
        return connection.owner

    def may_end(self, connection: Connection) -> bool:
        """Return whether a connection has neither a load nor files that wait for one.

        Args:
            connection: the one in question.
        """
        with self._lock:
            session = self._sessions.get(connection)
            return session is None or not (session.loads or session.files)

    def request(self, connection: Connection, line: bytes, fds: list[int]) -> bytes | None:
        """Check a request, carry it out, and answer it.

        Args:
            connection: who asks.
            line: the request.
            fds: the descriptors that came along; they are closed here or later.

        Returns:
            The answer; None: it comes later.

        Raises:
            PagecacheError: it is wrong, or cannot be done.
        """
        kept = False
        try:
            operation, arguments = public_protocol.check_request(line, len(fds))
            if operation == "files":
                kept = True  # also if it fails: they are closed there
                answer = self._files(connection, fds)
            elif operation == "open_load":
                kept = True
                return self._open_load(connection, arguments, fds)
            else:
                answer = self._answers[operation](connection, *fds, **arguments)
            return wire.encode_answer(answer)
        finally:
            if not kept:
                close_all(fds)

    def gone(self, connection: Connection) -> None:
        """End the loads of a connection that is over.

        Args:
            connection: the connection that was closed.
        """
        with self._lock:
            session = self._sessions.pop(connection, None)
            if session is None:
                return
            session.gone = True
            waiting = [load for load in self._waiting if load.connection is connection]
            self._waiting = [load for load in self._waiting if load.connection is not connection]
            for load_to_be in waiting:
                load_to_be.over = True
        close_all([fd for fd, _ in session.files])
        for load_to_be in waiting:
            self._close_pending(load_to_be)
        self._prefetch_queues.cancel(connection.number)
        for load in session.loads.values():
            _log.info("load %s of process %d ends with it", load.id, load.peer.pid)
            self._ledger.end(load)
        if session.watched:
            self.watch.remove(connection.pid)
        self.tick()

    def numbers(self) -> dict[str, int]:
        """Return how many loads wait, and bytes that are still to be prefetched."""
        waiting, queued = len(self._waiting), self._prefetch_queues.queued_bytes()
        return {"loads_waiting": waiting, "prefetch_bytes": queued}

    def sessions(self) -> dict[int, tuple[int, int]]:
        """Return for each connection, by its number, its waiting files and its open loads."""
        with self._lock:
            return {
                connection.number: (len(session.files), len(session.loads))
                for connection, session in self._sessions.items()
            }

    # --- operations; files and open_load take the descriptors over, the others do not ---

    def _hello(self, connection: Connection) -> dict[str, Any]:
        engine, why = self._ledger.engines.expected(self.settings.config.engine)
        return {
            "protocol": wire.VERSION,
            "version": pagecache_bpf.__version__,
            "pid": os.getpid(),
            "engines": ["struct_ops", "agent"] if engine == "struct_ops" else ["agent"],
            "why": why,
            "policies": self.settings.policies,
            "process_events": self.watch.how,
        }

    def _files(self, connection: Connection, fds: list[int]) -> dict[str, Any]:
        session = self._session(connection)
        try:
            mounts = mounts_for(connection)
            files = [check_descriptor(fd, mounts) for fd in fds]
            if any(not file.size for file in files):  # procfs, too
                raise UsageError("the files were refused", "one of them is empty")
            with self._lock:
                if len(session.files) + len(fds) > public_protocol.FILES_PER_LOAD:
                    most = public_protocol.FILES_PER_LOAD
                    raise UsageError("the files were refused", f"a load has at most {most} files")
                check_room(connection.owner, len(fds), self._sessions.items(), self._pending)
                if session.gone:
                    raise UsageError("the files were refused", "the connection is over")
                session.files += zip(fds, files, strict=True)
        except BaseException:
            close_all(fds)
            raise
        return {
            "files": len(session.files),
            "bytes": sum(file.size for _, file in session.files),
        }

    def _open_load(
        self, connection: Connection, arguments: dict[str, Any], fds: list[int]
    ) -> bytes | None:
        session = self._session(connection)
        try:
            if not session.files:
                raise UsageError("the load was not opened", "no files were passed before")
            check_name(arguments["model"])
            known = self.settings.policies
            policy = arguments.setdefault("policy", known[0] if known else "")
            self._check_number_of_loads(connection)
            if policy not in known and policy not in self._ledger.engines.attached():
                raise UsageError(
                    f"the policy {policy} cannot serve loads",
                    f"known are {', '.join(known)}" if known else "none is configured",
                    "Add it to loads.policies in the controller's configuration",
                )
        except BaseException:
            close_all(fds + [fd for fd, _ in self._taken(session)])
            raise
        until = time.monotonic() + arguments.get("wait", 0)
        with self._lock:
            waiting = WaitingLoad(connection, arguments, self._taken(session), fds, until)
            self._pending.add(waiting)
        try:
            self._ledger.release_untagged()
            admitted = self._admit(waiting)
        except BaseException:
            self._close_pending(waiting)
            raise
        return None if admitted is None else self._open(waiting, *admitted)

    def _admit(self, waiting: WaitingLoad) -> tuple[ClientLoad | None, Decision] | None:
        """Judge a load; None: it waits for room.

        Raises UsageError: its connection or its process is over.
        """
        connection, arguments = waiting.connection, waiting.arguments
        configured = self.settings.model_of(file.key for _, file in waiting.files)
        with self._admission:
            with self._lock:
                behind = bool(self._waiting) and self._waiting[0] is not waiting
            load, decision = self._ledger.admit(
                [file for _, file in waiting.files],
                model=configured.name if configured else arguments["model"],
                peer=connection.peer,
                configured=configured is not None,
                budget=arguments.get("budget"),
                keep=arguments.get("keep", False) or (configured.keep if configured else False),
                devices=arguments.get("devices", []),
                behind=behind,
            )
            may_wait = decision.kind == "queue" and time.monotonic() < waiting.until
            with self._lock:
                over = waiting.over or not connection.alive
                if load is None and may_wait and not over:
                    if waiting not in self._waiting:
                        self._waiting.append(waiting)
                    return None
                if waiting in self._waiting:
                    self._waiting.remove(waiting)
        if not over:
            return load, decision
        if load is not None:
            self._ledger.end(load)
        raise UsageError("the load was not opened", "its connection is over")

    def _open(self, waiting: WaitingLoad, load: ClientLoad | None, decision: Decision) -> bytes:
        """Open a load that was judged; the descriptors are closed here."""
        connection, arguments = waiting.connection, waiting.arguments
        session = self._session(connection)
        fds = {file.key: fd for fd, file in waiting.files}
        try:
            if load is None:
                raise refusal(arguments["model"], decision)
            if not self._watch(connection, session):
                raise UsageError("the load was not opened", "its process has ended")
            self._ledger.place(
                load,
                [fds[file.key] for file in load.files],
                arguments["policy"],
                knobs=knobs_for(arguments["policy"], self.settings),
                wanted=self.settings.config.engine,
                asker=Asker(
                    connection.owner,
                    connection.peer.gid,
                    template_of(waiting.fds, mounts_for(connection)),
                    lambda: connection.alive,
                ),
            )
            # Headers are read for it: after the load has looked at what was cached.
            load.told = self._rights.told(connection, waiting.files)
            with self._lock:
                if session.gone:
                    raise UsageError("the load was not opened", "its connection is over")
                session.loads[load.id] = load
            return wire.encode_answer(self._ledger.report(load))
        except BaseException:
            if load is not None:
                self._ledger.end(load)
            raise
        finally:
            self._close_pending(waiting)

    def _load_report(self, connection: Connection, load: str) -> dict[str, Any]:
        return self._ledger.report(self._load(connection, load))

    def _done(self, connection: Connection, load: str, keep: bool = False) -> dict[str, Any]:
        return self._finish(connection, load, drop=not keep)

    def _close(self, connection: Connection, load: str) -> dict[str, Any]:
        return self._finish(connection, load, drop=False)

    def _finish(self, connection: Connection, name: str, drop: bool) -> dict[str, Any]:
        load = self._load(connection, name)
        del self._session(connection).loads[name]
        self._ledger.end(load, drop and not load.keep)
        self.tick()
        return self._ledger.report(load)

    def _residency(
        self, connection: Connection, fd: int, offset: int = 0, length: int = 0
    ) -> dict[str, Any]:
        file = check_descriptor(fd, mounts_for(connection))
        start, stop = page_range(file, offset, length)
        cached = cached_pages(fd, start, stop - start) * PAGE_SIZE if stop > start else 0
        self._rights.check(connection, fd, file)  # which may read its header
        return {
            "bytes": stop - start,
            "resident_bytes": cached,
            "governed": self._ledger.engines.governor_of(file) is not None,
        }

    def _drop(
        self, connection: Connection, fd: int, offset: int = 0, length: int = 0
    ) -> dict[str, Any]:
        file = check_descriptor(fd, mounts_for(connection))
        self._rights.check(connection, fd, file)
        start, stop = page_range(file, offset, length)
        mine = set(self._session(connection).loads)
        if self._ledger.readers(file.key) - mine:
            return {"dropped_bytes": 0, "in_use": True}
        from pagecache_bpf.agent.read_threads import drop

        return {
            "dropped_bytes": drop(fd, start, stop - start) if stop > start else 0,
            "in_use": False,
        }

    def _prefetch(
        self, connection: Connection, fd: int, extents: Sequence[Sequence[int]], node: int = -1
    ) -> dict[str, Any]:
        file = check_descriptor(fd, mounts_for(connection))
        room = connection.peer.checked(headroom)
        cgroup = connection.peer.checked(foreign_cgroup)
        queued, refused = self._prefetch_queues.submit(
            connection.owner, connection.number, cgroup, fd, file, extents, node, room
        )
        if not connection.alive:  # gone() may have been before
            self._prefetch_queues.cancel(connection.number)
        return {"queued_bytes": queued, "refused_bytes": refused}

    def _topology(self, connection: Connection) -> dict[str, Any]:
        from pagecache_bpf import topology

        return {"topology": topology.read().as_json()}

    def _status(self, connection: Connection) -> dict[str, Any]:
        budgets = self._ledger.budgets
        counters = self._ledger.engines.observed_by_model()  # once: a user may have many loads
        loads = [
            {**self._ledger.report(load, counters), "uid": load.peer.uid, "pid": load.peer.pid}
            for load in list(self._ledger.loads.values())
            if connection.privileged or connection.owner == load.owner
        ]
        return {
            "loads": loads,
            "budget": {
                "total_bytes": budgets.total,
                "claimed_bytes": budgets.claimed,
                "headroom_bytes": connection.peer.checked(headroom),
            },
        }

    def wants_tick(self) -> bool:
        """Return whether tick() has something to do and nobody was told so yet; never waits."""
        with self._lock:
            wanted = bool(self._waiting) and not self._tick_wanted
            self._tick_wanted |= wanted
            return wanted

    def tick(self) -> None:
        """See whether loads that wait have room now, or have waited long enough; may wait."""
        with self._lock:
            self._tick_wanted = False
        while True:
            with self._admission:  # or another thread would judge the same one
                with self._lock:
                    now = time.monotonic()
                    due = [load for load in self._waiting if now >= load.until]
                    waiting = next(iter(due or self._waiting), None)
                if waiting is None:
                    return
                try:
                    admitted = self._admit(waiting)
                except PagecacheError as error:
                    self._give_up(waiting, error)
                    continue
            if admitted is None:
                return
            # What is left takes system calls on the user's files.
            try:
                waiting.connection.later(partial(self._open, waiting, *admitted))
            except PagecacheError as error:
                if admitted[0] is not None:
                    self._ledger.end(admitted[0])
                self._give_up(waiting, error)

    def _give_up(self, waiting: WaitingLoad, error: PagecacheError) -> None:
        """Answer a load that waited by an error."""
        with self._lock:
            if waiting in self._waiting:
                self._waiting.remove(waiting)
            over, waiting.over = waiting.over, True
        if not over:
            self._close_pending(waiting)
            waiting.connection.answer(wire.encode_error(error))

    def _session(self, connection: Connection) -> ClientSession:
        with self._lock:
            session = self._sessions.get(connection)
            if session is None:
                session = ClientSession(gone=not connection.alive)
                if connection.alive:  # or nobody would take it out again
                    self._sessions[connection] = session
            return session

    def _check_number_of_loads(self, connection: Connection) -> None:
        with self._lock:
            check_loads(connection, self._sessions.items())

    def _close_pending(self, waiting: WaitingLoad) -> None:
        """Let go of the descriptors that came for a load."""
        waiting.close()
        with self._lock:
            self._pending.discard(waiting)

    def _taken(self, session: ClientSession) -> list[tuple[int, ClientFile]]:
        """Take the files that wait; their descriptors are the caller's now."""
        with self._lock:
            files, session.files = session.files, []
        return files

    def _load(self, connection: Connection, name: str) -> ClientLoad:
        load = self._session(connection).loads.get(name)
        if load is None:  # of another connection: nobody is told that it exists
            raise PrivilegeError("there is no such load", "this connection has not opened it")
        return load

    def _watch(self, connection: Connection, session: ClientSession) -> bool:
        """Watch the process; False if it has ended."""
        if not session.watched:
            session.watched = self.watch.add(connection.pid, connection.peer.duplicate())
        return session.watched

    def _process_ended(self, pid: int) -> None:
        """End the loads of a process that has ended, even if a child still holds its connection."""
        with self._lock:
            over = [connection for connection in self._sessions if connection.pid == pid]
        for connection in over:
            self._end(connection)
