# SPDX-License-Identifier: Apache-2.0
"""Which file of a model comes after which."""

from __future__ import annotations

import random

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


def test_what_the_programs_are_told() -> None:
    first, second = tag("a"), tag("b")
    second.__dict__["pages"] = 77
    first.next = second
    record = abi.pagecache_agent_tag.from_buffer_copy(first.record())
    assert (record.model, record.next.ino, record.next_pages) == (1, second.ino, 77)
    first.next = None
    assert abi.pagecache_agent_tag.from_buffer_copy(first.record()).next_pages == 0
