# SPDX-License-Identifier: Apache-2.0
"""Which file of a model comes after which."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable

from pagecache_bpf.agent.read_threads import Source
from pagecache_bpf.agent.tagged_files import FileTag, Sequence
from pagecache_bpf.kernel import abi


def tag(path: str, model: str = "m") -> FileTag:
    number = abs(hash((model, path))) % 2**32
    key = bytes(abi.pagecache_file_key(ino=number))
    return FileTag(key, 0, 0, number, 0, model, 1, path, Source(lambda: -1))


def test_files_follow_in_the_order_they_are_tagged_in() -> None:
    # The order of a Hugging Face cache's links: the blobs they lead to have other names.
    names = random.Random(5).sample([f"{n:03}" for n in range(60)], 60)
    sequence = Sequence()
    for number, name in enumerate(names):
        before, after = sequence.add(tag(name))
        assert (before.path if before else None) == (names[number - 1] if number else None)
        assert after is None
    assert sequence.add(tag("001", "other")) == (None, None)


def test_one_that_goes_leaves_its_neighbors_beside_each_other() -> None:
    sequence = Sequence()
    tags = [tag(name) for name in "abc"]
    for file in tags:
        sequence.add(file)
    assert sequence.remove(tags[1]) == (tags[0], tags[2])
    assert sequence.remove(tags[2]) == (tags[0], None)
    assert sequence.remove(tags[0]) == (None, None)


def test_any_order_of_coming_and_going_is_that_of_a_list() -> None:
    turns = random.Random(7)
    sequence, files = Sequence(), list[FileTag]()
    for number in range(2000):
        if files and turns.random() < 0.5:
            at = turns.randrange(len(files))
            before = files[at - 1] if at else None
            after = files[at + 1] if at + 1 < len(files) else None
            found = sequence.remove(files.pop(at))
            assert found[0] is before and found[1] is after
        else:
            files.append(tag(str(number)))
            assert sequence.add(files[-1])[0] is (files[-2] if len(files) > 1 else None)


def steps(action: Callable[[], object]) -> int:
    """How many lines of Python an action runs, which is known without a clock."""
    lines = 0

    def count(frame: object, event: str, argument: object) -> object:
        nonlocal lines
        lines += event == "line"
        return count

    before = sys.gettrace()  # what measures coverage
    sys.settrace(count)  # type: ignore[arg-type]
    try:
        action()
    finally:
        sys.settrace(before)
    return lines


def test_a_file_goes_as_fast_from_many_as_from_few() -> None:
    """A model may have 10,000 shards; the last one is found without passing the others."""
    needed = set()
    for count in (10, 3000):
        sequence = Sequence()
        files = [tag(str(number)) for number in range(count)]
        for file in files:
            sequence.add(file)
        needed.add(steps(lambda sequence=sequence, file=files[-1]: sequence.remove(file)))  # type: ignore[misc]
    assert len(needed) == 1


def test_what_the_programs_are_told() -> None:
    first, second = tag("a"), tag("b")
    second.__dict__["pages"] = 77
    first.next = second
    record = abi.pagecache_agent_tag.from_buffer_copy(first.record())
    assert (record.model, record.next.ino, record.next_pages) == (1, second.ino, 77)
    first.next = None
    assert abi.pagecache_agent_tag.from_buffer_copy(first.record()).next_pages == 0
