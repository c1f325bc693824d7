# SPDX-License-Identifier: Apache-2.0
"""The policy `maio` on engine struct_ops."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from pagecache_bpf.governor import Governor
from pagecache_bpf.templates import Template, replay
from tests import maio_cases as cases
from tests.vm.kernel import Policy, attached, make_file, read_pages

pytestmark = pytest.mark.vm


class Attached(Policy):
    """As a case looks at it."""

    def replay(self) -> replay.Replay:
        """How its template does."""
        with Governor() as governor:
            (found,) = replay.state(governor, self.name)
        return found


class StructOps:
    """Attaches through the loader, as the command does."""

    across = False
    beyond = 0

    @contextmanager
    def attach(
        self, template: Template | None, files: Sequence[Path], **knobs: int
    ) -> Iterator[Attached]:
        """In the block."""
        with attached("maio", *files, **knobs) as policy, Governor() as governor:
            if template is not None:
                paths = dict(enumerate(files))
                given = replay.Assigned("test", template, paths)
                assert replay.give(governor, "maio", [given]) == len(files)
            yield Attached(policy.name, policy.device)


ENGINE = StructOps()


@pytest.fixture
def file(mount: Path) -> Path:
    return make_file(mount / "weights", cases.PAGES)


@pytest.mark.parametrize("through_mmap", [False, True], ids=["read", "mmap"])
def test_the_order_is_followed(file: Path, through_mmap: bool) -> None:
    cases.follows_the_order(ENGINE, file, through_mmap)


def test_the_window_is_never_exceeded(file: Path) -> None:
    cases.stays_within_the_window(ENGINE, file)


def test_a_jump_moves_the_window(file: Path) -> None:
    cases.moves_when_the_consumer_jumps(ENGINE, file)


def test_single_accesses_elsewhere_are_no_jumps(file: Path) -> None:
    cases.looks_elsewhere(ENGINE, file)


def test_going_down_through_a_range(file: Path) -> None:
    cases.goes_down(ENGINE, file)


def test_ranks_share_one_prefetch(file: Path) -> None:
    cases.ranks_share(ENGINE, file)


def test_a_wrong_template_is_dropped(file: Path) -> None:
    cases.drops_a_wrong_template(ENGINE, file)


def test_the_first_access_is_told(file: Path) -> None:
    """One of the first page, too: steps count from what was told before."""
    with attached("maio", file) as policy:
        for page, calls in ((0, 1), (1, 1), (33, 2)):
            read_pages(file, page, 1)
            assert policy.count("access_calls") == calls


def test_drop_behind(file: Path) -> None:
    cases.drops_behind(ENGINE, file)


def test_a_second_load(file: Path) -> None:
    cases.reads_again_what_was_dropped(ENGINE, file)


def test_without_a_template(file: Path) -> None:
    cases.streams_without_a_template(ENGINE, file)


def test_two_files_in_turns(mount: Path) -> None:
    files = [make_file(mount / f"shard-{number}", 1024) for number in range(2)]
    cases.alternates_between_files(ENGINE, files)
