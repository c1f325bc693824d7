# SPDX-License-Identifier: Apache-2.0
"""I/O templates of loads: made from the descriptors that were passed, then given to the policy.

Nothing of a client's is parsed here: that is done by a process of the client's user (inspectors),
and a template of its own is compared with its own files only.  What a policy has been given by
others stays as it is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pagecache_bpf.controller.client_files import ClientFile
from pagecache_bpf.controller.engine_control import AGENT, EngineControl, policy_info
from pagecache_bpf.controller.inspectors import Inspectors, Owner
from pagecache_bpf.errors import PagecacheError, UsageError
from pagecache_bpf.kernel import abi

if TYPE_CHECKING:
    from pagecache_bpf.kernel.bpf_maps import BpfMap
    from pagecache_bpf.templates.template import Template

#: Maps are made when a policy is attached: room for more than the first template.
_SPARE = 2


@dataclass(frozen=True)
class Asker:
    """Whose files are to be looked at, and whether the answer is still wanted.

    owner: user, and whether it is root of this machine.  text: the descriptor of a template that
    came along; None: it is derived.
    """

    owner: Owner
    gid: int
    text: int | None = None
    wanted: Callable[[], bool] = lambda: True


@dataclass
class _Given:
    """What a policy was given for a model: its files, where it is from, and for which loads."""

    files: frozenset[bytes]
    source: str
    loads: set[str] = field(default_factory=set)


class LoadTemplates:
    """What I/O templates each policy has been given, and for which loads.

    Args:
        engines: gives them to policies.
        inspectors: processes without rights that read headers and templates of clients.
    """

    def __init__(self, engines: EngineControl, inspectors: Inspectors) -> None:
        self._engines, self._inspectors = engines, inspectors
        self._lock = threading.Lock()
        self._given: dict[str, dict[str, _Given]] = {}  # policy -> model

    def warm_up(self) -> None:
        """Import what templates take, which the first load would wait for."""
        import numpy as _  # noqa: F401

        from pagecache_bpf.templates import layout, policy_arrays, template, template_maps  # noqa: F401
        from pagecache_bpf.weights import identity, names  # noqa: F401

    def prepare(
        self, policy: str, files: Sequence[ClientFile], fds: Sequence[int], asker: Asker
    ) -> Template | None:
        """Make the template for a load: the client's, or one by the headers of its files.

        Args:
            policy: the policy that it is for.
            files: the files of the load, each once.
            fds: open descriptors of them, in that order.
            asker: whose they are.

        Returns:
            The template, whose files are these in their order; None: the policy takes none.

        Raises:
            PagecacheError: it does not fit, or none can be derived.
            UsageError: the policy takes no I/O template, and the client gives one.
        """
        if not policy_info(policy).takes_templates:
            if asker.text is not None:
                raise UsageError(f"the policy {policy} takes no I/O template")
            return None
        import numpy as np

        from pagecache_bpf.templates.template import EXTENT, STRIDED, Template
        from pagecache_bpf.weights.identity import TemplateFile
        from pagecache_bpf.weights.names import natural

        # Loaders read files by their names.
        order = sorted(range(len(files)), key=lambda number: natural(files[number].path))
        names = _names([files[number] for number in order])
        passed = [fds[number] for number in order]
        job = "derive" if asker.text is None else "fit"
        if asker.text is not None:
            passed.insert(0, asker.text)
        facts, data = self._inspectors.run(
            asker.owner, asker.gid, job, passed, asker.wanted, names=names
        )
        try:
            extents = np.frombuffer(data, STRIDED if facts["strided"] else EXTENT).copy()
            if len(extents) and extents["file"].max() >= len(order):
                raise ValueError("it names a file that was not passed")
            extents["file"] = np.array(order, np.uint32)[extents["file"]]
            by_number = dict(zip(order, names, strict=True))
            return Template(
                tuple(
                    TemplateFile(by_number[number], file.size, 0, 0, "")
                    for number, file in enumerate(files)
                ),
                tuple(f"rank {rank}" for rank in range(int(facts["consumers"]))),
                extents,
                source if (source := facts["source"]) in ("recorded", "imported") else "derived",
                str(facts["loader"])[:100],
                int(facts["tp"]),
            )
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise PagecacheError(
                "the files were not looked at", f"its process tells nonsense: {error}"
            ) from None

    def join(self, load: str, policy: str, model: str, files: Sequence[ClientFile]) -> str | None:
        """Have a load take part in the template that its policy has for these files already.

        The ranks of one model come one after the other: its headers are read for the first.

        Args:
            load: the load's id.
            policy: the policy that governs the files.
            model: the model's name, as tags have it.
            files: the files of the load.

        Returns:
            Where the template is from; None: there is none of these files.
        """
        with self._lock:
            known = self._given.get(policy, {}).get(model)
            if known is None or known.files != frozenset(file.key for file in files):
                return None
            known.loads.add(load)
            return known.source

    def sizes(self, template: Template | None) -> dict[str, int]:
        """Return how many elements maps should have, for a policy that is not attached yet.

        Args:
            template: the template that is given to it first; None: there is none.

        Returns:
            Elements by the name of the map.
        """
        if template is None:
            return {}
        from pagecache_bpf.templates.policy_arrays import sizes_for

        return {name: count * _SPARE for name, count in sizes_for([("", template)]).items()}

    def give(
        self,
        load: str,
        policy: str,
        engine: str,
        model: str,
        template: Template,
        files: Sequence[ClientFile],
    ) -> None:
        """Give a policy the template of a load, beside those that it has.

        Args:
            load: the load's id.
            policy: the policy, which is attached.
            engine: the engine that it runs on.
            model: the model's name, as tags have it.
            template: as prepare() made it.
            files: the files of the load; those that are tagged can be found by the policy.

        Raises:
            PagecacheError: there is no room.
            UsageError: a load of that name has other files.
        """
        from pagecache_bpf.templates import template_maps
        from pagecache_bpf.templates.layout import Identity

        keys = frozenset(file.key for file in files)
        with self._lock:
            given = self._given.setdefault(policy, {})
            known = given.get(model)
            if known is not None and known.files != keys:
                raise UsageError(
                    "no template is used", f"another load of {model} is open, with other files"
                )
            if known is None:
                identities = {}
                for number, key in self._engines.tag_keys(policy, engine, files).items():
                    raw = abi.pagecache_file_key.from_buffer_copy(key)
                    identities[number] = Identity(
                        raw.dev_major, raw.dev_minor, raw.ino, raw.generation
                    )
                with self._maps(policy, engine) as maps:
                    template_maps.add(maps, model, template, identities)
                known = given[model] = _Given(keys, template.source)
            known.loads.add(load)

    def forget(self, load: str) -> None:
        """Take note that a load is over: a template that no other load has is taken away.

        Args:
            load: its id.
        """
        from pagecache_bpf.templates import template_maps

        with self._lock:
            for policy, given in self._given.items():
                for model, known in list(given.items()):
                    known.loads.discard(load)
                    if known.loads:
                        continue
                    del given[model]
                    engine = self._engines.attached().get(policy)
                    with suppress(OSError, PagecacheError):
                        if engine is not None:
                            with self._maps(policy, engine) as maps:
                                template_maps.remove(maps, model)

    @contextmanager
    def _maps(self, policy: str, engine: str) -> Iterator[Mapping[str, BpfMap]]:
        from pagecache_bpf.templates.policy_arrays import open_maps_by

        ids = self._engines.map_ids(policy) if engine == AGENT else None
        with open_maps_by(policy, ids) as maps:
            yield maps


def _names(files: Sequence[ClientFile]) -> list[str]:
    """Return a distinct name for each file, for messages and for the order of loading."""
    found: list[str] = []
    for number, file in enumerate(files):
        name = file.path.rpartition("/")[2].removesuffix(" (deleted)") or "file"
        name = name if name.isprintable() and name not in (".", "..") else "file"
        found.append(name if name not in found else f"{number}/{name}")
    return found
