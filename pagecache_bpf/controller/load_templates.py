# SPDX-License-Identifier: Apache-2.0
"""I/O templates of loads: compared with the descriptors that were passed, then given to the policy.

A client's template is compared with the client's own files only, and by content: opening what it
names would tell the client about files that it cannot open.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from pagecache_bpf.controller.client_files import ClientFile
from pagecache_bpf.controller.engine_control import AGENT, EngineControl
from pagecache_bpf.errors import PagecacheError, UsageError
from pagecache_bpf.kernel.control_device import Device
from pagecache_bpf.kernel.kmod import is_loaded
from pagecache_bpf.policy import catalog, loader

if TYPE_CHECKING:
    from pagecache_bpf.templates.policy_arrays import Assigned
    from pagecache_bpf.templates.template import Template

#: Maps are made when a policy is attached: room for more than the first template.
_SPARE = 2

_log = logging.getLogger(__name__)


@dataclass
class _Given:
    assigned: Assigned
    keys: tuple[bytes, ...]
    loads: set[str] = field(default_factory=set)


class LoadTemplates:
    """What each policy has been given, and for which loads."""

    def __init__(self, engines: EngineControl) -> None:
        self._engines = engines
        self._lock = threading.Lock()
        self._given: dict[str, dict[str, _Given]] = {}  # policy -> model

    def prepare(
        self,
        policy: str,
        model: str,
        files: Sequence[ClientFile],
        fds: Sequence[int],
        text: Path | None,
    ) -> Assigned | None:
        """The template for a load: the client's, or derived from the headers of its files.

        None: the policy takes none.  Raises UsageError when it does not fit, or none can be
        derived.
        """
        if not catalog.find(policy).takes_templates:
            if text is not None:
                raise UsageError(f"the policy {policy} takes no I/O template")
            return None
        from pagecache_bpf import templates
        from pagecache_bpf.templates.policy_arrays import Assigned

        by_number: dict[int, Path] = {}
        if text is not None:
            template = templates.read(text)
        else:
            from pagecache_bpf.weights.models import Model

            paths = [Path(file.path) for file in files]
            root = Path(os.path.commonpath([path.parent for path in paths]))
            template = templates.derive(Model(model, root, tuple(paths)))
        for number, file in match(template, files, fds).items():
            path = file.reachable_path()
            if path is not None:
                by_number[number] = Path(path)
        return Assigned(model, template, by_number)

    def sizes(self, assigned: Assigned | None) -> dict[str, int]:
        """Elements that maps should have, for a policy that is not attached yet."""
        if assigned is None:
            return {}
        from pagecache_bpf.templates.policy_arrays import sizes_for

        needed = sizes_for([(assigned.name, assigned.template)])
        return {name: count * _SPARE for name, count in needed.items()}

    def give(self, load: str, policy: str, assigned: Assigned, keys: Sequence[bytes]) -> None:
        """Give a policy the template, beside those it has.  Raises PagecacheError."""
        from pagecache_bpf.templates import policy_arrays

        with self._lock:
            given = self._given.setdefault(policy, {})
            known = given.get(assigned.name)
            if known is None:
                fresh = {**given, assigned.name: _Given(assigned, tuple(keys))}
                everything = [each.assigned for each in fresh.values()]
                policy_arrays.give(_InProcess(self._engines), policy, everything)  # type: ignore[arg-type]
                self._given[policy] = given = fresh
            given[assigned.name].loads.add(load)

    def forget(self, load: str) -> None:
        """A load is over: the policy must not find the files of its template any more."""
        with self._lock:
            for policy, given in self._given.items():
                for model, each in list(given.items()):
                    each.loads.discard(load)
                    if not each.loads:
                        del given[model]
                        self._delete(policy, each.keys)

    def _delete(self, policy: str, keys: Sequence[bytes]) -> None:
        from pagecache_bpf.kernel.bpf_maps import BpfMap
        from pagecache_bpf.templates.layout import FILES

        with suppress(OSError, PagecacheError, KeyError):
            here = _InProcess(self._engines)
            if policy in here.details():
                found = BpfMap.by_id(here.map_ids(policy)[FILES])
            else:
                found = BpfMap.pinned(loader.PIN_ROOT / policy / "maps" / FILES)
            with found:
                for key in keys:
                    found.delete(key)


def match(
    template: Template, files: Sequence[ClientFile], fds: Sequence[int]
) -> dict[int, ClientFile]:
    """Which of the files each of the template's is: by size and header, whatever their names.

    Raises UsageError, saying what fits none of them.
    """
    from pagecache_bpf.weights.identity import identify

    by_size: dict[int, list[tuple[ClientFile, int]]] = {}
    for file, fd in zip(files, fds, strict=True):
        by_size.setdefault(file.size, []).append((file, fd))
    found: dict[int, ClientFile] = {}
    for number, each in enumerate(template.files):
        for file, fd in by_size.get(each.size, ()):
            with suppress(OSError, EOFError):
                if identify(fd, file.size, each.hashed_from, each.hashed_bytes) == each.digest:
                    found[number] = file
                    break
        else:
            raise UsageError(
                "the template does not fit the files",
                f"none of them has the {each.size:,} bytes and the header of {each.path}",
                "Make it anew for these files: pagecache-bpf template derive",
            )
    return found


class _InProcess:
    """What templates.replay asks of a Engines, answered without a socket."""

    def __init__(self, engines: EngineControl) -> None:
        self._engines = engines
        self.agent = self

    def tags(self) -> Iterator[Any]:
        with self._engines.lock:
            agents = list(self._engines.service.agents.items())
        for name, agent in agents:
            for tag in list(agent.tags.values()):
                identity = {
                    key: getattr(tag, key)
                    for key in ("dev_major", "dev_minor", "ino", "generation", "path")
                }
                yield SimpleNamespace(policy=name, **identity)
        if is_loaded():
            with Device() as device:
                yield from device.tags()

    def details(self) -> Mapping[str, Any]:
        with self._engines.lock:
            return dict(self._engines.service.agents)

    def map_ids(self, policy: str) -> dict[str, int]:
        with self._engines.lock:
            return self._engines.service.agents[policy].map_ids()


def keys_of(
    engines: EngineControl, policy: str, engine: str, files: Sequence[ClientFile]
) -> list[bytes]:
    """How the policy's maps know these files: by the identity of their tags."""
    from pagecache_bpf.kernel import abi

    if engine == AGENT:
        return [file.key for file in files]
    paths = {file.path for file in files}
    return [
        bytes(
            abi.pagecache_file_key(
                ino=tag.ino,
                dev_major=tag.dev_major,
                dev_minor=tag.dev_minor,
                generation=tag.generation,
            )
        )
        for tag in _InProcess(engines).tags()
        if tag.policy == policy and tag.path in paths
    ]
