# SPDX-License-Identifier: Apache-2.0
"""The controller's process, in two forms.

`serve` runs until it is told to end, with a configuration and the public socket.  On demand
(`attach --engine agent`) it has the root socket only and ends with the last policy.  There is one
at a time: a lock in the run directory says so.
"""

from __future__ import annotations

import grp
import logging
import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from pagecache_bpf._run_dir import RUN_DIR
from pagecache_bpf.agent.service import Service
from pagecache_bpf.controller import config as configs
from pagecache_bpf.controller import node_hints, one_at_a_time, saved_state
from pagecache_bpf.controller.admission import Budgets
from pagecache_bpf.controller.config import Config
from pagecache_bpf.controller.engine_control import EngineControl, policy_info
from pagecache_bpf.controller.group_commit import GroupCommit
from pagecache_bpf.controller.inherited import reset
from pagecache_bpf.controller.inspectors import Inspectors
from pagecache_bpf.controller.listening import listen_on, make_open, raise_descriptors
from pagecache_bpf.controller.load_ledger import LoadLedger
from pagecache_bpf.controller.model_tagger import ModelTagger, knobs_for
from pagecache_bpf.controller.public_service import PublicService
from pagecache_bpf.controller.resolved_config import ResolvedConfig
from pagecache_bpf.controller.root_service import QUEUE, RootService
from pagecache_bpf.controller.systemd import notify, reloading
from pagecache_bpf.controller.watchdog import Watchdog
from pagecache_bpf.errors import PagecacheError, UsageError
from pagecache_bpf.ipc.server import Connection, Server
from pagecache_bpf.kernel import kmod
from pagecache_bpf.policy import exit_history
from pagecache_bpf.policy.agent_device import SOCKET as ROOT_SOCKET

DEFAULT_GROUP = "pagecache"
_TICK_SECONDS = 0.2
_IDLE_SECONDS = 5.0
_SWEEP_SECONDS = 10.0
_SWITCH_SECONDS = 0.0005
_STOP_SECONDS = 5.0  # for system calls on users' files to come back

_log = logging.getLogger(__name__)


class Daemon:
    """The parts of the controller, put together.

    Args:
        config: the configuration; None: one that runs on demand, without a public socket.
        persist: take policies and tags up again after a restart, whatever the configuration says.
    """

    def __init__(self, config: Config | None, persist: bool = False) -> None:
        self.config = config
        self.persist = persist or bool(config and config.persist)
        self._override = persist
        self._lock = threading.RLock()
        self._commit = GroupCommit(self._write_state)
        self._has_written = True  # there may be something of a controller before this one
        # Signal handlers set these and nothing else: the loop may hold any lock when one runs.
        self._stop = self._reload_wanted = False
        self.failed: list[str] = []  # of what was to be done at the start
        self.inherited: list[str] = []  # from whoever started it, and not put back
        self.service = Service(exit_history.PATH)
        self.engines = EngineControl(self.service, self._lock)
        self.inspectors = Inspectors(self.service.ignore)
        self.ledger = LoadLedger(self.engines, Budgets(), self.inspectors, self._save)
        self.server = Server(trust_containers=bool(config and config.trust_containers))
        self.server.queues.reserve(QUEUE)
        self.root = RootService(
            self.service,
            self._lock,
            self.ledger,
            facts=self._facts,
            clients=self.clients,
            health=self.health,
            kick=self.kick,
            reload=self.reload,
            changed=self._commit.soon,
        )
        self.public: PublicService | None = None
        self.tagger: ModelTagger | None = None
        self._listener: socket.socket | None = None

    # --- life ---

    def start(self) -> None:
        """Open the sockets and take up what there was.  Raises PagecacheError."""
        raise_descriptors()
        # Root's requests and the agent's own thread get their turn soon, however many work.
        sys.setswitchinterval(_SWITCH_SECONDS)
        listener = listen_on(ROOT_SOCKET, 0o600)
        self.server.listen(listener, self.root)
        if self.config is None:
            return
        settings = ResolvedConfig(self.config)
        self._budget(settings)
        saved_state.adopt_kernel(self.engines)
        node_hints.sweep()
        if self.persist:
            self.failed = saved_state.restore(self.service)
            for sentence in self.failed:
                _log.warning("%s", sentence)
        else:
            saved_state.forget()
        self.tagger = ModelTagger(self.engines, self.ledger)
        self.failed += self.tagger.apply(settings)
        self._save()
        path = Path(self.config.listen)
        if path.parent == RUN_DIR:
            RUN_DIR.chmod(0o711)  # others may reach the socket, and list nothing
        else:
            make_open(path.parent)
        self.inspectors.prepare()
        self._listener = listen_on(path, 0o600)
        self._open_to(self.config, self.config.listen)
        self._link(path)
        self.public = PublicService(self.ledger, settings, self._hang_up)
        self.server.listen(self._listener, self.public)
        self.server.queues.submit("warm-up", self._warm_up, must_run=True)

    def run(self) -> None:
        """Serve until stop(); on demand, until the last policy is gone and a moment longer."""
        last = swept = time.monotonic()
        watchdog = Watchdog(self.server.queues, QUEUE, self._lock)
        while not self._stop:
            self.server.step(_TICK_SECONDS)
            now = time.monotonic()
            if self._lock.acquire(blocking=False):
                try:
                    self.service.tick()
                finally:
                    self._lock.release()
            if self.public is not None:
                if self.public.wants_tick():  # not here: it waits for the ledger
                    self.server.queues.submit("loads", self.public.tick, must_run=True)
                if now >= swept + _SWEEP_SECONDS:
                    self.server.queues.submit("sweep", self._sweep, must_run=True)
                    swept = now
            if self._commit.due(now):
                self.server.queues.submit("state", self._commit.now, must_run=True)
            if self._reload_wanted:
                self._reload_wanted = False
                self.server.queues.submit(QUEUE, self._reload_and_tell)
            watchdog.tick(now)
            busy = self.service.agents or self.service.observed.active
            if busy:
                last = now
            # Whoever starts it asks a moment later; one that only looks whether it runs is no
            # reason to stay.
            idle = not busy and not self.server.connections
            if self.config is None and idle and now > max(last, self.root.asked) + _IDLE_SECONDS:
                return

    def _warm_up(self) -> None:
        """Import and load what the first load would wait for; nothing is attached."""
        if self.public is None:
            return
        settings = self.public.settings
        self.ledger.templates.warm_up()
        for policy in settings.policies[:1]:  # what loads get that ask for none
            try:
                wanted = settings.config.engine
                self.engines.prepare(policy, knobs_for(policy, settings), wanted)
            except (PagecacheError, OSError) as error:
                _log.warning("the policy %s was not loaded: %s", policy, error)

    def _sweep(self) -> None:
        """End what users that have gone have left; may wait."""
        if self.public is not None:
            self.public.sweep()
        self.inspectors.sweep()

    def stop(self) -> None:
        """Have run() return.  From any thread, and from signal handlers."""
        self._stop = True
        self.server.wake()

    def close(self) -> None:
        """Undo everything, but for what is to persist."""
        ROOT_SOCKET.unlink(missing_ok=True)
        if self.config is not None:
            Path(self.config.listen).unlink(missing_ok=True)
            usual = RUN_DIR / "control.sock"
            if usual.is_symlink():
                usual.unlink()
        self.server.close()
        self.server.queues.wait_idle(_STOP_SECONDS)
        self.server.cleanups.wait_idle(_STOP_SECONDS)
        if self.public is not None:
            self.public.close()
        self.inspectors.close()
        self._save()
        self.engines.close(keep=self.persist)
        if self.config is not None and not self.persist:
            saved_state.save_kernel({}, ())

    def describe(self) -> dict[str, Any]:
        """Return what `serve` prints when it is ready."""
        facts = self._facts()
        names = ("listen", "pid", "config", "persist", "process_events")
        return {
            **{name: facts[name] for name in names},
            "policies": self.engines.attached(),
            "failed": self.failed,
        }

    # --- configuration ---

    def reload(self) -> dict[str, Any]:
        """Read the configuration again; a bad one changes nothing.

        Returns:
            `failed`: a sentence for each thing of it that could not be done.

        Raises:
            UsageError: it is wrong, or no `serve` runs.
        """
        if self.config is None or self.public is None or self.tagger is None:
            raise UsageError("there is nothing to read again", "no `pagecache-bpf serve` runs")
        fresh = configs.load(self.config.source)
        if fresh.listen != self.config.listen:
            _log.warning("socket.listen changes with the next start")
        policy_info.cache_clear()  # one may have been built anew
        settings = ResolvedConfig(fresh)
        self._open_to(fresh, self.config.listen)
        fresh = replace(fresh, listen=self.config.listen)
        with self._lock:
            self.config = fresh
            self.persist = self._override or fresh.persist
            self._budget(settings)
            self.public.settings = settings
            failed = self.tagger.apply(settings)
        self._save()
        _log.info("the configuration was read again")
        return {"failed": failed}

    def hang_up_signal(self) -> None:
        """SIGHUP: have run() read the configuration again.  From signal handlers."""
        self._reload_wanted = True
        self.server.wake()

    def _reload_and_tell(self) -> None:
        """Read the configuration again, and tell the service manager."""
        reloading()
        try:
            self.reload()
        except PagecacheError as error:
            _log.error("the old configuration stays: %s", error)
        finally:
            notify("READY=1")

    # --- clients ---

    def clients(self) -> list[dict[str, Any]]:
        """Return who is connected, the longest first.  From any thread."""
        now = time.monotonic()
        sessions = self.public.sessions() if self.public is not None else {}
        found = []
        for connection in sorted(list(self.server.connections), key=lambda client: client.number):
            files, loads = sessions.get(connection.number, (0, 0))
            found.append(
                {
                    "id": connection.number,
                    "socket": "root" if connection.handler is self.root else "public",
                    "pid": connection.pid,
                    "uid": connection.uid,
                    "root": connection.privileged,
                    "seconds": now - connection.opened,
                    "idle_seconds": now - connection.used if connection.idle else 0.0,
                    "waiting_files": files,
                    "loads": loads,
                }
            )
        return found

    def health(self) -> dict[str, Any]:
        """Return how much the controller has to do, and what it has refused.  From any thread."""
        return {
            "connections": len(self.server.connections),
            "accepted": self.server.accepted,
            "refused": dict(self.server.refusals),
            "requests_waiting": self.server.queues.waiting() + self.server.cleanups.waiting(),
            "requests_running": self.server.queues.running(),
            "threads_not_started": self.server.queues.start_failures,
            "inspectors": self.inspectors.count(),
            "inspectors_filtered": self.inspectors.filtered,
            "inspectors_started": self.inspectors.started,
            "inspectors_lost": dict(self.inspectors.lost),
            **(self.public.numbers() if self.public else {}),
        }

    def kick(self, number: int) -> bool:
        """Hang up on a client; its loads end.

        Args:
            number: the connection's, as clients() tells it.

        Returns:
            False if there is no such connection.
        """
        for connection in list(self.server.connections):
            if connection.number == number and connection.handler is not self.root:
                self._hang_up(connection)
                return True
        return False

    def _budget(self, settings: ResolvedConfig) -> None:
        budgets = self.ledger.budgets
        budgets.total = settings.config.total_budget
        budgets.per_user = settings.config.user_budget
        budgets.rule = settings.config.admission
        budgets.models = settings.budgets

    def _link(self, path: Path) -> None:
        """Leave a link where clients look first, if the socket is elsewhere."""
        usual = RUN_DIR / "control.sock"
        if path == usual:
            return
        with suppress(OSError):
            usual.unlink(missing_ok=True)
            usual.symlink_to(path)
            RUN_DIR.chmod(0o711)

    def _open_to(self, config: Config, listen: str) -> None:
        """Give the public socket to its group.  Raises UsageError when there is no such group."""
        group = config.group or DEFAULT_GROUP
        try:
            gid = grp.getgrnam(group).gr_gid
        except KeyError:
            if config.group:
                raise UsageError(
                    "the socket cannot be opened to its group",
                    f"there is no group {group}",
                    f"Create it (groupadd --system {group}) or change socket.group",
                ) from None
            gid = 0
        os.chown(listen, 0, gid)
        os.chmod(listen, config.mode)

    # --- the parts ---

    def _facts(self) -> dict[str, Any]:
        return {
            "pid": os.getpid(),
            "serving": self.config is not None,
            "listen": self.config.listen if self.config else None,
            "config": str(self.config.source) if self.config and self.config.source else None,
            "persist": self.persist,
            "inherited": self.inherited,
            "cpus": len(os.sched_getaffinity(0)),
            "process_events": self.public.watch.how if self.public else None,
            "process_events_why": self.public.watch.why if self.public else "",
        }

    def _save(self) -> None:
        """Write down what the next controller has to know, if there is something."""
        # Of policies of the agent nothing is kept, unless they persist.
        if self._has_written or self.persist or kmod.is_loaded():
            self._commit.now()

    def _write_state(self) -> None:
        if self.config is None:
            return
        ours = self.ledger.placed()
        if self.tagger is not None:
            ours = {**ours, **self.tagger.placed()}
        with self._lock:
            self._has_written = self.persist or kmod.is_loaded()
            try:
                saved_state.save_kernel(self.engines.own, ours.values())
                if self.persist:
                    saved_state.save(self.service, ours)
                else:
                    saved_state.forget()
            except OSError as error:
                _log.error("what the next controller has to know was not written: %s", error)

    def _hang_up(self, connection: Connection) -> None:
        self.server.call(connection.close)


def serve(config: Config, persist: bool, ready: Any = None) -> None:
    """Run the controller in this process until SIGTERM or SIGINT.

    Args:
        config: what to serve, and how.
        persist: take policies and tags up again, whatever the configuration says.
        ready: called with the Daemon when it answers.

    Raises:
        PagecacheError: it cannot start.
    """
    # Others may reach the socket's directory: what is written there is root's alone.
    os.umask(0o077)
    lock = one_at_a_time.take_lock_for_serve()
    _describe(lock, "serve")
    daemon = Daemon(config, persist)
    signal.signal(signal.SIGTERM, lambda *_: daemon.stop())
    signal.signal(signal.SIGINT, lambda *_: daemon.stop())
    signal.signal(signal.SIGHUP, lambda *_: daemon.hang_up_signal())
    try:
        daemon.start()
        notify("READY=1", f"STATUS=listening on {config.listen}")
        if ready is not None:
            ready(daemon)
        daemon.run()
    finally:
        notify("STOPPING=1")
        daemon.close()
        os.close(lock)


def on_demand() -> int:
    """Start for `attach`, tell the starter by a line on stdout, serve until all is over.

    Returns:
        The exit code of the process.
    """
    try:
        lock = one_at_a_time.take_lock_in_time()
    except PagecacheError as error:
        print(error, flush=True)
        return 1
    inherited = reset()
    _describe(lock, "agent")
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(name)s: %(message)s")
    daemon = Daemon(None)
    daemon.inherited = inherited
    for sentence in inherited:
        _log.warning("%s", sentence)
    signal.signal(signal.SIGTERM, lambda *_: daemon.stop())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        daemon.start()
        print("ready", flush=True)
        os.dup2(os.open(os.devnull, os.O_RDWR), 1)
        daemon.run()
    finally:
        daemon.close()
    return 0


def _describe(lock: int, kind: str) -> None:
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{kind} {os.getpid()}\n".encode(), 0)
