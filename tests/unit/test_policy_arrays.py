# SPDX-License-Identifier: Apache-2.0
"""Templates in an attached policy, given by path and read back; its maps are plain memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pagecache_bpf.errors import PagecacheError
from pagecache_bpf.kernel.bpf_maps import BpfMap
from pagecache_bpf.kernel.file_pages import PAGE_SIZE
from pagecache_bpf.metrics import collect
from pagecache_bpf.policy import loader
from pagecache_bpf.templates import policy_arrays, template_maps
from pagecache_bpf.templates.layout import ARRAYS, FILES
from pagecache_bpf.templates.policy_arrays import Assigned
from pagecache_bpf.templates.template import EXTENT, Template
from pagecache_bpf.weights.identity import TemplateFile
from tests.unit.test_template_maps import Memory, template

POLICY = "maio"


class Maps:
    """The maps of a policy by name, and how often one was opened and closed."""

    def __init__(self, sizes: dict[str, int]) -> None:
        self.maps = {
            name: Memory(sizes[name], np.dtype(kind).itemsize) for name, kind in ARRAYS.items()
        }
        self.maps[FILES] = Memory(sizes[FILES], 0)
        self.open = 0
        for opened in self.maps.values():
            opened.close = self.closed  # type: ignore[attr-defined]

    def closed(self) -> None:
        self.open -= 1

    def opened(self, name: str) -> Any:
        self.open += 1
        return self.maps[name]

    def change(self, name: str, number: int, **fields: int) -> None:
        """Write fields of an element, as the policy's programs do."""
        kind = ARRAYS[name]
        with self.maps[name].memory(write=True) as memory:
            array: Any = np.frombuffer(memory, kind)
            for field, value in fields.items():
                array[number][field] = value


@pytest.fixture
def _places(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(template_maps, "RUN_DIR", tmp_path)
    monkeypatch.setattr(loader, "PIN_ROOT", tmp_path / "pins")


@pytest.fixture(params=["struct_ops", "agent"])
def maps(
    request: pytest.FixtureRequest, _places: None, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Maps]:
    """Maps with room for what is given below, pinned or known by their numbers."""
    sizes = policy_arrays.sizes_for([("a", template(2, 10, 2)), ("b", template(3, 7, 1, seed=1))])
    made = Maps(sizes)
    monkeypatch.setattr(BpfMap, "pinned", lambda path: made.opened(path.name))
    monkeypatch.setattr(BpfMap, "by_id", lambda number: made.opened(list(made.maps)[number]))
    made.engine = request.param  # type: ignore[attr-defined]
    if request.param == "struct_ops":
        folder = loader.PIN_ROOT / POLICY / "maps"
        folder.mkdir(parents=True)
        for name in made.maps:
            (folder / name).touch()
    yield made
    assert made.open == 0, "a map was left open"


class Engines:
    """What is attached and tagged."""

    def __init__(self, maps: Maps, tags: list[Any]) -> None:
        numbers = {name: number for number, name in enumerate(maps.maps)}
        by_agent = maps.engine == "agent"  # type: ignore[attr-defined]
        self.agent = SimpleNamespace(
            details=lambda: [POLICY] if by_agent else [], map_ids=lambda policy: numbers
        )
        self._tags = tags

    def tags(self) -> list[Any]:
        return self._tags


def files_of(folder: Path, count: int) -> list[Path]:
    folder.mkdir()
    paths = [folder / f"shard-{number}" for number in range(count)]
    for path in paths:
        path.touch()
    return paths


def tag(path: Path, policy: str = POLICY) -> Any:
    status = path.stat()
    device = status.st_dev
    return SimpleNamespace(
        path=str(path),
        policy=policy,
        ino=status.st_ino,
        generation=0,
        dev_major=os.major(device),
        dev_minor=os.minor(device),
    )


def given(maps: Maps, tmp_path: Path) -> Any:
    """Engines whose policy has the templates of two models."""
    a, b = files_of(tmp_path / "a", 2), files_of(tmp_path / "b", 3)
    links = tmp_path / "links"
    links.mkdir()
    for number, path in enumerate(b):
        (links / str(number)).symlink_to(path)
    engines: Any = Engines(maps, [tag(path) for path in [*a, *b]])
    wanted = [
        Assigned("a", template(2, 10, 2), dict(enumerate(a))),
        # by other paths than those that were tagged
        Assigned("b", template(3, 7, 1, seed=1), {n: links / str(n) for n in range(3)}),
    ]
    assert policy_arrays.give(engines, POLICY, wanted) == 5
    return engines


def test_what_was_given_is_read_back(maps: Maps, tmp_path: Path) -> None:
    engines = given(maps, tmp_path)
    a, b = policy_arrays.state(engines, POLICY)
    assert (a.model, a.source, len(a.consumers)) == ("a", "derived", 2)
    assert (b.model, b.source, len(b.consumers)) == ("b", "derived", 1)
    for replay, content in ((a, template(2, 10, 2)), (b, template(3, 7, 1, seed=1))):
        lengths = [0] * len(replay.consumers)
        for extent in content.plain():
            lengths[int(extent["consumer"])] += int(extent["length"])
        assert [consumer.length for consumer in replay.consumers] == lengths
        assert replay.accuracy is None and not replay.dropped and replay.jumps == 0
        assert {consumer.tgid for consumer in replay.consumers} == {0}


def test_what_the_programs_count(maps: Maps, tmp_path: Path) -> None:
    engines = given(maps, tmp_path)
    maps.change("template_models", 1, followed=30, strayed=10, jumps=4, failed=1)
    maps.change("template_consumers", 1, tgid=77, position=5)
    a, b = policy_arrays.state(engines, POLICY)
    assert a.accuracy is None and a.consumers[1].tgid == 77
    assert a.consumers[1].position == 5 * PAGE_SIZE and a.consumers[0].position == 0
    assert b.as_json() == {
        **{"model": "b", "source": "derived", "accuracy": 0.75, "dropped": True, "jumps": 4},
        **{"followed_bytes": 30 * PAGE_SIZE, "strayed_bytes": 10 * PAGE_SIZE},
        "consumers": [{"tgid": 0, "position_bytes": 0, "bytes": b.consumers[0].length}],
    }
    engine = maps.engine  # type: ignore[attr-defined]
    found = collect.replays(engines, engine, POLICY)
    assert [replay["model"] for replay in found] == ["a", "b"]


def test_files_of_other_policies_are_left_out(maps: Maps, tmp_path: Path) -> None:
    paths = files_of(tmp_path / "a", 2)
    engines: Any = Engines(maps, [tag(paths[0]), tag(paths[1], "sequential")])
    wanted = Assigned("a", template(2, 10, 2), dict(enumerate(paths)))
    assert policy_arrays.give(engines, POLICY, [wanted]) == 1
    assert len(maps.maps[FILES].items()) == 1


def test_more_than_there_is_room_for(maps: Maps, tmp_path: Path) -> None:
    engines = given(maps, tmp_path)
    wanted = Assigned("c", template(2, 10, 2, seed=2), {})
    with pytest.raises(PagecacheError):
        policy_arrays.give(engines, POLICY, [wanted])
    assert [replay.model for replay in policy_arrays.state(engines, POLICY)] == ["a", "b"]


@pytest.mark.parametrize("number", range(2))
def test_the_length_of_one_consumer(maps: Maps, tmp_path: Path, number: int) -> None:
    """Bytes by hand: an extent of two pages and one that ends within a page."""
    rows = [(number, 0, 0, 2 * PAGE_SIZE, 2 * PAGE_SIZE), (number, 0, 1 << 20, 5000, 5000)]
    content = Template(
        (TemplateFile("w", 2 << 20, 0, 0, ""),),
        ("rank 0", "rank 1"),
        np.array(rows, EXTENT),
        "recorded",
        "test",
        2,
    )
    (path,) = files_of(tmp_path / "w", 1)
    engines: Any = Engines(maps, [tag(path)])
    assert policy_arrays.give(engines, POLICY, [Assigned("w", content, {0: path})]) == 1
    (replay,) = policy_arrays.state(engines, POLICY)
    assert replay.source == "recorded"
    expected = [0, 0]
    expected[number] = 4 * PAGE_SIZE
    assert [consumer.length for consumer in replay.consumers] == expected


@pytest.mark.usefixtures("_places")
def test_a_policy_without_templates(monkeypatch: pytest.MonkeyPatch) -> None:
    engines: Any = SimpleNamespace(
        agent=SimpleNamespace(details=lambda: [POLICY], map_ids=lambda policy: {"tags": 1}),
        tags=lambda: [],
    )
    assert policy_arrays.state(engines, POLICY) == []
    assert collect.replays(engines, "agent", POLICY) == []
    assert collect.replays(engines, "struct_ops", POLICY) == []
    with pytest.raises(PagecacheError, match="takes no templates"):
        policy_arrays.give(engines, POLICY, [])

    def gone(path: Path) -> Any:
        raise FileNotFoundError(2, "No such file or directory", str(path))

    monkeypatch.setattr(BpfMap, "pinned", gone)
    folder = loader.PIN_ROOT / POLICY / "maps"
    folder.mkdir(parents=True)
    (folder / FILES).touch()
    pinned = policy_arrays.open_maps_by(POLICY, None)
    with pytest.raises(PagecacheError, match="cannot be used: No such file"), pinned:
        pass
