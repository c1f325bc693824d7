# SPDX-License-Identifier: Apache-2.0
"""A load served by a policy that this process, being root, attaches itself.

It knows policies, tags and hints, and nothing of the caller's other loads.
"""

from __future__ import annotations

import logging
import os
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pagecache_bpf.errors import PagecacheError, UsageError
from pagecache_bpf.kernel import kmod, pid_namespace
from pagecache_bpf.kernel.control_device import PolicyStatus
from pagecache_bpf.kernel.file_key import identity_of
from pagecache_bpf.kernel.lending import Session
from pagecache_bpf.kernel.numa import nodes
from pagecache_bpf.loads.reader_progress import blocked_seconds
from pagecache_bpf.loads.report import Report
from pagecache_bpf.loads.request import LoadRequest, Starting
from pagecache_bpf.loads.residency_snapshot import Snapshot, opened, resident_of
from pagecache_bpf.policy import agent_device, catalog, hints, loader
from pagecache_bpf.policy.agent_device import AgentDevice
from pagecache_bpf.policy.catalog import PolicyInfo
from pagecache_bpf.policy.engines import AGENT, Engines
from pagecache_bpf.policy.hint_maps import CONSUMERS

if TYPE_CHECKING:
    from pagecache_bpf.templates.policy_arrays import Assigned

#: Taken when the caller names none: without a template, and with one.
DEFAULT_POLICY = "sequential"
TEMPLATE_POLICY = "maio"
_MIB = 1 << 20
_log = logging.getLogger(__name__)


class AttachedLoad:
    """Files of a load, tagged for a policy that is attached for it if it was not.

    The module serves it if it is loaded: loading one is not for a server to do.  On engine agent
    everything is held by a connection, and goes with it: also when this process is killed.
    """

    def __init__(self, request: LoadRequest, snapshot: Snapshot, starting: Starting) -> None:
        """Attach the policy and tag the files.

        Args:
            request: what is asked for.
            snapshot: what of its files was cached before.
            starting: tells when nobody waits for it any more.

        Raises:
            PagecacheError: it cannot be done; everything has been taken back.
            OSError: a file cannot be opened; the same.
            LoadOver: the load is over already; the same.
        """
        self._policy = request.policy or (TEMPLATE_POLICY if request.template else DEFAULT_POLICY)
        self._request = replace(request, policy=self._policy)
        self._snapshot, self._starting = snapshot, starting
        self._notes: list[str] = []
        self._tagged: list[Path] = []
        self._hinted = self._attached = False
        self._agent: AgentDevice | None = None
        self._session: Session | None = None
        self._started = time.monotonic()
        self._stalled = blocked_seconds()
        try:
            info = catalog.find(self._policy)
            template = self._template(info)
            starting.check()
            self._attach(info, template)
            starting.check()
            with self._engines() as engines:
                engine = engines.engine_of(self._policy)
                if engine is None:
                    raise PagecacheError(f"the policy {self._policy} has ended")
                self._engine = engine
                self._before = self._status(engines)
                self._tag(engines)
                self._lend()
                if template is not None:
                    self._give(engines, template)
                self._hint()
            starting.check()
        except BaseException:
            self._undo()
            raise
        self._why = ""
        if engine == AGENT:
            self._why = "this kernel cannot load modules"
            if kmod.takes_modules():
                self._why = "the kernel module is not loaded (pagecache-bpf module load)"

    def _engines(self) -> Engines:
        return Engines(lease=self._agent)

    def _template(self, info: PolicyInfo) -> Assigned | None:
        """Return the template that was asked for, or derive one for a policy that takes templates.

        A template that cannot be used is no reason not to serve the load: a note says why.
        """
        if not info.takes_templates:
            if self._request.template is not None:
                self._notes.append(f"the template is not used: {info.name} takes none")
            return None
        from pagecache_bpf import templates
        from pagecache_bpf.templates.policy_arrays import Assigned

        model = self._request.model
        try:
            if self._request.template is None:
                found = templates.derive(model)
                paths = dict(enumerate(templates.locate(found, model)))
                return Assigned(model.name, found, paths)
            found = templates.read(Path(self._request.template))
            fit = templates.check(found, model)
            found = templates.require_fit(found, fit, self._request.template, partial=True)
            return Assigned(model.name, found, fit.paths)
        except PagecacheError as error:
            self._notes.append(f"no template is used: {error}")
            return None

    def _give(self, engines: Engines, template: Assigned) -> None:
        """Write the template into the maps of the policy, unless somebody else has attached it."""
        from pagecache_bpf.templates import policy_arrays

        if not self._attached:
            self._notes.append(
                f"the template is not used: {self._policy} was attached already, perhaps with one"
            )
            return
        try:
            policy_arrays.give(engines, self._policy, [template])
        except PagecacheError as error:
            self._notes.append(f"the template is not used: {error}")

    def _connect(self) -> AgentDevice:
        """Return the connection that holds what engine agent does for this load; made once."""
        if self._agent is None:
            self._agent = agent_device.connect_started(self._starting.check)
            self._starting.waits_for(self._agent)
        return self._agent

    def _attach(self, info: PolicyInfo, template: Assigned | None) -> None:
        """Attach the policy unless it is attached, also by somebody who is doing so just now."""
        with Engines() as engines:
            engine = engines.engine_of(info.name)
            if engine is not None:
                if engine == AGENT:
                    self._connect()
                if self._request.budget is not None:
                    self._notes.append(
                        f"the policy {info.name} was attached already: its own budget holds"
                    )
                return
        knobs = self._knobs(info)
        sizes: dict[str, int] = {}
        if template is not None:
            from pagecache_bpf.templates.policy_arrays import sizes_for

            sizes = sizes_for([(template.name, template.template)])
        try:
            if kmod.is_loaded():
                loader.attach(info, knobs, sizes=sizes)
            else:
                obj = catalog.agent_object(info)
                self._connect().attach(info, obj, knobs, sizes, lease=True)
        except PagecacheError as error:
            self._starting.check()
            with Engines() as engines:
                if engines.engine_of(info.name) is None:
                    raise
            self._notes.append(f"somebody else was faster: {error}")
            return
        self._attached = True

    def _knobs(self, info: PolicyInfo) -> dict[str, int]:
        """Turn the budget into the policy's knob that bounds what it keeps in the page cache."""
        if self._request.budget is None:
            return {}
        knob = next((knob for knob in info.knobs if knob.name == "budget_mib"), None)
        if knob is None:
            self._notes.append(f"the policy {info.name} has no knob for a budget")
            return {}
        # At least one: 0 is "no bound".
        return {knob.name: min(max(1, self._request.budget // _MIB), knob.maximum)}

    def _tag(self, engines: Engines) -> None:
        """Tag the files that nobody has tagged yet; a note tells of each that is left out."""
        ours = {tag.identity[:3]: tag for tag in engines.tags()}
        for path in self._request.model.files:
            with opened(path) as fd:
                key = identity_of(fd)[:3]
                if key in ours:
                    self._notes.append(f"{path} was tagged already, for {ours[key].policy}")
                    continue
                try:
                    engines.tag(
                        fd,
                        policy=self._policy,
                        model=self._request.model.name,
                        path=str(path),
                    )
                except UsageError as error:
                    self._notes.append(str(error))
                    continue
                self._tagged.append(path)

    def _lend(self) -> None:
        """Lend the files to the module's policy, which reads ahead from each into the next then."""
        if self._engine == AGENT or len(self._request.model.files) < 2:
            return
        self._session = Session()
        for path in self._request.model.files:
            with opened(path) as fd:
                self._session.lend(fd)

    def _hint(self) -> None:
        """Tell the policy the node that the devices of this process are near."""
        node = self._request.node
        if node is None or node not in nodes():
            return
        if not pid_namespace.is_first():
            self._notes.append("no hint of a node: this is not the host's PID namespace")
            return
        try:
            hints.hint(self._policy, CONSUMERS, tgid=os.getpid(), node=node)
            self._hinted = True
        except PagecacheError as error:
            self._notes.append(f"no hint of node {node}: {error}")

    def report(self) -> Report:
        """Ask the kernel how the load goes.

        The policy counts for all its files together, so `prefetched_bytes` is known only while it
        governs no others.

        Returns:
            The report; a note tells if the policy has ended.

        Raises:
            PagecacheError: an engine refuses to answer.
        """
        with Engines() as engines:
            now = self._status(engines)
        notes = list(self._notes)
        prefetched = None
        if now is None:
            notes.append(f"the policy {self._policy} has ended; `pagecache-bpf status` says why")
        elif self._before is not None and now.tags == len(self._tagged):
            name = "prefetch_issued_bytes"
            prefetched = now.counters[name] - self._before.counters[name]
        stalled = blocked_seconds()
        return replace(
            self._request.blank(self._engine, "direct", self._why),
            seconds=time.monotonic() - self._started,
            prefetched_bytes=prefetched,
            stall_seconds=None
            if stalled is None or self._stalled is None
            else max(0.0, stalled - self._stalled),
            resident_before_bytes=self._snapshot.resident,
            resident_bytes=resident_of(self._request.model.files),
            notes=tuple(notes),
        )

    def finish(self, keep: bool) -> Report:
        """End the load: untag its files, and detach the policy if it was attached for them only.

        Args:
            keep: leave its pages in the page cache; otherwise those go that were not there before
                it.

        Returns:
            The last report.

        Raises:
            PagecacheError: an engine refuses to tell how the load went; the load has ended all the
                same.
        """
        try:
            last = self.report()
        finally:  # what was attached for this load must not stay because an engine does not answer
            self._undo()
        evicted = 0 if keep else self._snapshot.drop_rest()
        resident = resident_of(self._request.model.files)
        return replace(last, done=True, evicted_bytes=evicted, resident_bytes=resident)

    def forget(self) -> None:
        """Close the child's ends of the connection and the session that are the parent's."""
        if self._session is not None:
            self._session.close()
        if self._agent is not None:
            self._agent.disconnect()

    def _status(self, engines: Engines) -> PolicyStatus | None:
        """Return the policy's counters, from whichever engine runs it; None: it is not attached."""
        found = (status for _, status in engines.policies() if status.name == self._policy)
        return next(found, None)

    def _undo(self) -> None:
        """Take everything back.  What the agent does not answer to goes with the connection."""
        if self._session is not None:
            self._session.close()
        try:
            if self._hinted:
                self._hinted = False
                hints.forget(self._policy, CONSUMERS, tgid=os.getpid())
            with self._engines() as engines:
                for path in self._tagged:
                    with suppress(UsageError, OSError), opened(path) as fd:
                        engines.untag_fd(fd)
                self._tagged.clear()
                status = self._status(engines)
                if self._attached and (status is None or not status.tags):
                    engines.detach(self._policy)
        except PagecacheError:
            _log.debug("the policy %s was not detached", self._policy, exc_info=True)
        finally:
            if self._agent is not None:
                self._agent.disconnect()
