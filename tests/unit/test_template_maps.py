# SPDX-License-Identifier: Apache-2.0
"""S11: templates in the maps of a policy, beside those of others; maps that are plain memory."""

from __future__ import annotations

import mmap
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pagecache_bpf.errors import PagecacheError
from pagecache_bpf.templates import template_maps
from pagecache_bpf.templates.layout import ARRAYS, FILES, Identity, lay_out
from pagecache_bpf.templates.template import EXTENT, Template
from pagecache_bpf.weights.identity import TemplateFile


class Memory:
    """The kernel's side of a map: an array as memory, a hash as a dict."""

    def __init__(self, entries: int, size: int) -> None:
        self.entries = entries
        self._memory = mmap.mmap(-1, max(1, entries * size))
        self._elements: dict[bytes, bytes] = {}

    def memory(self, write: bool = False) -> Any:
        return _Open(self._memory)

    def update(self, key: bytes, value: bytes) -> None:
        self._elements[key] = value

    def delete(self, key: bytes) -> bool:
        return self._elements.pop(key, None) is not None

    def items(self) -> dict[bytes, bytes]:
        return dict(self._elements)


class _Open:
    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = memory

    def __enter__(self) -> mmap.mmap:
        return self._memory

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture(autouse=True)
def _run_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(template_maps, "RUN_DIR", tmp_path)


def maps(**entries: int) -> Any:
    found: dict[str, Memory] = {
        name: Memory(entries.get(name, 2000), np.dtype(kind).itemsize)
        for name, kind in ARRAYS.items()
    }
    found[FILES] = Memory(1000, 0)
    return found


def template(files: int, extents: int, consumers: int = 1, seed: int = 0) -> Template:
    chooser = random.Random(seed)
    rows = []
    for consumer in range(consumers):
        for number in range(extents):
            length = 4096 * chooser.randrange(1, 40)
            rows.append(
                (consumer, number % files, number // files * (64 << 10) * 4, length, length)
            )
    size = (extents + 1) * (256 << 10)
    return Template(
        tuple(TemplateFile(f"{seed}-{number}", size, 0, 0, "") for number in range(files)),
        tuple(f"rank {number}" for number in range(consumers)),
        np.array(rows, EXTENT),
        "derived",
        "test",
        1,
    )


def identities(first: int, files: int) -> dict[int, Identity]:
    return {number: Identity(8, 1, first + number, 0) for number in range(files)}


def seen_by_a_policy(held: Any, ino: int) -> list[list[tuple[int, int, int]]]:
    """What a policy finds from a file: for each consumer its steps, as (file, start, end)."""
    from pagecache_bpf.kernel import abi

    arrays = template_maps.read_all(held)
    key = bytes(abi.pagecache_file_key(ino=ino, dev_major=8, dev_minor=1, generation=0))
    value = abi.pagecache_template_file.from_buffer_copy(held[FILES].items()[key])
    model = arrays["template_models"][value.model]
    found = []
    for number in range(int(model["nr_consumers"])):
        consumer = arrays["template_consumers"][int(model["first_consumer"]) + number]
        first, count = int(consumer["first_step"]), int(consumer["nr_steps"])
        steps = []
        for step in arrays["template_steps"][first : first + count]:
            extent = arrays["template_extents"][int(step["extent"])]
            target = arrays["template_targets"][int(extent["file"])]
            known = abi.pagecache_file_key.from_buffer_copy(target["key"].tobytes())
            steps.append((int(known.ino), int(extent["start"]), int(extent["end"])))
        span = arrays["template_spans"][value.spans + number]
        entries = arrays["template_index"][int(span["first"]) : int(span["first"] + span["nr"])]
        for entry in entries:  # the index leads to steps of this consumer
            assert first <= int(entry["step"]) < first + count
        found.append(steps)
    return found


def alone(content: Template, first: int, files: int) -> list[list[tuple[int, int, int]]]:
    held = maps()
    template_maps.add(held, "alone", content, identities(first, files))
    return seen_by_a_policy(held, first)


def test_what_is_alone_is_as_it_was_laid_out_before() -> None:
    content = template(3, 20, 2, 7)
    held = maps()
    keys = template_maps.add(held, "model", content, identities(100, 3))
    layout = lay_out([("model", content)], lambda _, file: identities(100, 3)[file])
    assert keys == [key for key, _ in layout.files]
    for name, array in template_maps.read_all(held).items():
        expected = layout.arrays[name]
        assert array[: len(expected)].tobytes() == expected.tobytes()


def test_s11_what_others_have_stays_through_every_coming_and_going() -> None:
    """Templates come and go; each that is there is found whole at every moment."""
    chooser = random.Random(11)
    held = maps()
    there: dict[int, tuple[Template, int]] = {}
    for turn in range(40):
        if there and chooser.random() < 0.45:
            gone = chooser.choice(list(there))
            template_maps.remove(held, f"model-{gone}")
            del there[gone]
        else:
            files = chooser.randrange(1, 4)
            content = template(files, chooser.randrange(1, 30), chooser.randrange(1, 3), turn)
            try:
                template_maps.add(held, f"model-{turn}", content, identities(turn * 10, files))
            except PagecacheError:
                continue  # no room at this moment
            there[turn] = (content, files)
        for number, (content, files) in there.items():
            expected = alone(content, number * 10, files)
            assert seen_by_a_policy(held, number * 10) == expected
    assert there


def test_s11_a_replaced_template_leaves_no_stale_key() -> None:
    held = maps()
    template_maps.add(held, "model", template(3, 9), identities(1, 3))
    template_maps.add(held, "model", template(1, 5, seed=1), identities(50, 1))
    assert len(held[FILES].items()) == 1
    assert seen_by_a_policy(held, 50) == alone(template(1, 5, seed=1), 50, 1)
    template_maps.remove(held, "model")
    assert held[FILES].items() == {}
    assert template_maps.regions(template_maps.read_all(held), {}) == []


@pytest.mark.parametrize("small", sorted(ARRAYS))
def test_s11_no_room_is_told_before_anything_is_changed(small: str) -> None:
    held = maps(**{small: 1})
    first = template(1, 1)
    template_maps.add(held, "first", first, identities(1, 1))
    before = {name: array.tobytes() for name, array in template_maps.read_all(held).items()}
    with pytest.raises(PagecacheError, match=f"map {small} has room for 0 elements more"):
        template_maps.add(held, "second", template(2, 40, 2), identities(10, 2))
    after = {name: array.tobytes() for name, array in template_maps.read_all(held).items()}
    assert after == before and len(held[FILES].items()) == 1


def test_s11_a_file_keeps_the_template_that_was_there_first() -> None:
    """A client that passes a file of root's model does not take root's template away."""
    held = maps()
    content = template(2, 8)
    template_maps.add(held, "roots", content, identities(1, 2))
    assert template_maps.add(held, "clients@1234", template(1, 3, seed=2), identities(1, 1)) == []
    template_maps.remove(held, "clients@1234")
    assert seen_by_a_policy(held, 1) == alone(content, 1, 2)
