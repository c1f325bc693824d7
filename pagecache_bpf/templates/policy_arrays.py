# SPDX-License-Identifier: Apache-2.0
"""Gives templates to an attached policy, and tells how well they predict.  Root only.

It finds the maps and the tagged files; template_maps writes the maps, layout makes their content.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pagecache_bpf.errors import PagecacheError
from pagecache_bpf.kernel.bpf_maps import BpfMap, close_all
from pagecache_bpf.kernel.file_pages import PAGE_SIZE
from pagecache_bpf.policy import loader
from pagecache_bpf.policy.engines import Engines
from pagecache_bpf.templates import template_maps
from pagecache_bpf.templates.layout import ARRAYS, FILES, Identity, lay_out
from pagecache_bpf.templates.template import Template


@dataclass(frozen=True)
class Assigned:
    """A template, and the real files that it is for.

    Attributes:
        name: the model's name.
        template: what is read in which order.
        paths: files by their numbers in the template.
    """

    name: str
    template: Template
    paths: dict[int, Path]


@dataclass(frozen=True)
class ConsumerPosition:
    """How far a consumer of a template has come.

    Attributes:
        tgid: its process; 0: no process has been matched with it yet.
        position: bytes of its order that it has passed.
        length: bytes of its order.
    """

    tgid: int
    position: int
    length: int


@dataclass(frozen=True)
class TemplateReplay:
    """How well a template predicts what is read.

    Attributes:
        model: the model's name.
        source: "derived", "recorded" or "imported".
        followed: bytes that came as the template said.
        strayed: bytes that did not, or were prefetched for nothing.
        jumps: how often a consumer went on elsewhere in its order.
        dropped: whether the policy has given the template up.
        consumers: how far each consumer has come.
    """

    model: str
    source: str
    followed: int
    strayed: int
    jumps: int
    dropped: bool
    consumers: tuple[ConsumerPosition, ...]

    @property
    def accuracy(self) -> float | None:
        """Share of the bytes that came as the template said; None before the first access."""
        total = self.followed + self.strayed
        return self.followed / total if total else None

    def as_json(self) -> dict[str, Any]:
        """Convert it for JSON, as `status --json` shows it.

        Returns:
            Numbers by name, sizes in bytes.
        """
        return {
            "model": self.model,
            "source": self.source,
            "accuracy": self.accuracy,
            "followed_bytes": self.followed,
            "strayed_bytes": self.strayed,
            "jumps": self.jumps,
            "dropped": self.dropped,
            "consumers": [
                {
                    "tgid": consumer.tgid,
                    "position_bytes": consumer.position,
                    "bytes": consumer.length,
                }
                for consumer in self.consumers
            ],
        }


def sizes_for(templates: Sequence[tuple[str, Template]]) -> dict[str, int]:
    """Count the elements that the maps of a policy need for some templates.

    Args:
        templates: names of models and their templates.

    Returns:
        Elements by the name of the map.
    """
    layout = lay_out(templates)
    files = sum(len(template.files) for _, template in templates)
    return {**layout.sizes(), FILES: files}


def give(engines: Engines, policy: str, templates: Sequence[Assigned]) -> int:
    """Give templates to an attached policy, beside those of other models that it has.

    Args:
        engines: what is attached and tagged; the files have to be tagged, as a template is found
            by the identity that a tag has.
        policy: the name of the policy.
        templates: one of each model; that of a model which has one already takes its place.

    Returns:
        How many files they cover.

    Raises:
        PagecacheError: they need more room than the policy's maps have.
    """
    tags = {
        os.path.realpath(tag.path): Identity(tag.dev_major, tag.dev_minor, tag.ino, tag.generation)
        for tag in engines.tags()
        if tag.policy == policy
    }
    covered = 0
    with open_maps(engines, policy) as maps:
        for assigned in templates:
            found = {
                number: tags[real]
                for number, path in assigned.paths.items()
                if (real := os.path.realpath(path)) in tags
            }
            covered += len(template_maps.add(maps, assigned.name, assigned.template, found))
    return covered


def state(engines: Engines, policy: str) -> list[TemplateReplay]:
    """Tell how well the templates of an attached policy predict what is read.

    Args:
        engines: the engines that policies run on.
        policy: the name of the policy.

    Returns:
        One entry a template; none where the policy has none or its maps cannot be read.
    """
    try:
        with open_maps(engines, policy) as maps:
            models, consumers, steps, extents = (
                template_maps.read_array(maps[name], name)
                for name in (
                    *("template_models", "template_consumers"),
                    *("template_steps", "template_extents"),
                )
            )
    except PagecacheError:
        return []
    found = []
    for model in models[models["nr_consumers"] > 0]:
        first, count = int(model["first_consumer"]), int(model["nr_consumers"])
        own = consumers[first : first + count]
        found.append(
            TemplateReplay(
                model["name"].tobytes().rstrip(b"\0").decode(errors="replace"),
                _SOURCES.get(int(model["source"]), "unknown"),
                int(model["followed"]) * PAGE_SIZE,
                int(model["strayed"]) * PAGE_SIZE,
                int(model["jumps"]),
                bool(model["failed"]),
                tuple(_consumer(row, steps, extents) for row in own),
            )
        )
    return found


@dataclass(frozen=True)
class FollowedOrder:
    """The order of a template as the policy has it.

    Attributes:
        model: the model's name, as far as the map keeps it.
        source: derived, recorded or imported.
        ranges: (consumer, key of the file, start, end), bytes, in the order of each consumer; the
            key is that of kernel.file_key.
    """

    model: str
    source: str
    ranges: list[tuple[int, bytes, int, int]]


def orders(engines: Engines, policy: str) -> list[FollowedOrder]:
    """Return in which order an attached policy expects what it has templates of.

    Args:
        engines: what is attached.
        policy: its name.

    Returns:
        An order for each model that it has a template of; none where it takes no templates.
    """
    try:
        with open_maps(engines, policy) as maps:
            arrays = template_maps.read_all(maps)
    except PagecacheError:
        return []
    models, extents = arrays["template_models"], arrays["template_extents"]
    keys = arrays["template_targets"]["key"]
    found = []
    for model in models[models["nr_consumers"] > 0]:
        ranges = []
        for consumer in range(int(model["nr_consumers"])):
            row = arrays["template_consumers"][int(model["first_consumer"]) + consumer]
            first, count = int(row["first_step"]), int(row["nr_steps"])
            steps = arrays["template_steps"][first : first + count]
            for extent in extents[steps["extent"]]:
                key = keys[int(extent["file"])].tobytes()
                ranges.append(
                    (
                        consumer,
                        key,
                        int(extent["start"]) * PAGE_SIZE,
                        int(extent["end"]) * PAGE_SIZE,
                    )
                )
        source = _SOURCES.get(int(model["source"]), "unknown")
        name = model["name"].tobytes().rstrip(b"\0").decode(errors="replace")
        found.append(FollowedOrder(name, source, ranges))
    return found


_SOURCES = {1: "derived", 2: "recorded", 3: "imported"}


def _consumer(row: Any, steps: Any, extents: Any) -> ConsumerPosition:
    """Tell how far a consumer has come, by its row and its last step."""
    pages = 0
    if row["nr_steps"]:
        last = steps[int(row["first_step"]) + int(row["nr_steps"]) - 1]
        extent = extents[int(last["extent"])]
        pages = int(last["before"]) + int(extent["end"]) - int(extent["start"])
    return ConsumerPosition(int(row["tgid"]), int(row["position"]) * PAGE_SIZE, pages * PAGE_SIZE)


@contextmanager
def open_maps(engines: Engines, policy: str) -> Iterator[dict[str, BpfMap]]:
    """Open the template maps of an attached policy for as long as the with block runs.

    Args:
        engines: the engines that policies run on.
        policy: the name of the policy.

    Yields:
        Maps by name.

    Raises:
        PagecacheError: it takes no templates, or its maps cannot be used.
    """
    ids = None
    if engines.agent and policy in engines.agent.details():
        ids = engines.agent.map_ids(policy)
    with open_maps_by(policy, ids) as maps:
        yield maps


@contextmanager
def open_maps_by(policy: str, ids: Mapping[str, int] | None) -> Iterator[dict[str, BpfMap]]:
    """Open the template maps of an attached policy for as long as the with block runs.

    Args:
        policy: its name.
        ids: the kernel's numbers of its maps by their names; None: they are pinned.

    Yields:
        Maps by name.

    Raises:
        PagecacheError: it takes no templates, or its maps cannot be used.
    """
    names = [*ARRAYS, FILES]
    maps: dict[str, BpfMap] = {}
    try:
        if ids is not None:
            for name in names:
                if name in ids:
                    maps[name] = BpfMap.by_id(ids[name])
        else:
            for name in names:
                path = loader.PIN_ROOT / policy / "maps" / name
                if path.exists():
                    maps[name] = BpfMap.pinned(path)
        if len(maps) != len(names):
            raise PagecacheError(f"the policy {policy} takes no templates")
        yield maps
    except OSError as error:
        raise PagecacheError(
            f"the maps of the policy {policy} cannot be used", error.strerror or str(error)
        ) from error
    finally:
        close_all(maps)
