# SPDX-License-Identifier: Apache-2.0
"""The policy `maio` on engine struct_ops."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks.cachestat import PAGE_SIZE, drop
from benchmarks.guest.cgroups import group
from pagecache_bpf.policy.engines import Engines
from pagecache_bpf.templates import Template, policy_arrays
from tests import maio_cases as cases
from tests.vm.kernel import (
    INTERPRETER,
    MAPPED_LOADER,
    Policy,
    attached,
    lending,
    make_file,
    read_all,
    read_pages,
    resident,
)

pytestmark = pytest.mark.vm


class Attached(Policy):
    """As a case looks at it."""

    def replay(self) -> policy_arrays.TemplateReplay:
        """How its template does."""
        with Engines() as engines:
            (found,) = policy_arrays.state(engines, self.name)
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
        with attached("maio", *files, **knobs) as policy, Engines() as engines:
            if template is not None:
                paths = dict(enumerate(files))
                given = policy_arrays.Assigned("test", template, paths)
                assert policy_arrays.give(engines, "maio", [given]) == len(files)
            yield Attached(policy.name, policy.device)


class TestStructOps(cases.Cases):
    """The cases, in a guest."""

    engine = StructOps()

    @pytest.fixture
    def place(self, mount: Path) -> Path:
        return mount


def test_the_first_access_is_told(mount: Path) -> None:
    """One of the first page, too: steps count from what was told before."""
    file = make_file(mount / "weights", cases.PAGES)
    with attached("maio", file) as policy:
        for page, calls in ((0, 1), (1, 1), (33, 2)):
            read_pages(file, page, 1)
            assert policy.count("access_calls") == calls


@pytest.mark.parametrize("percent", [45, 30])
def test_a_mapped_load_in_a_small_cgroup_reads_nothing_twice(mount: Path, percent: int) -> None:
    """The kernel keeps what was used, which is mapped; the policy what is used next."""
    pages = 2 * cases.PAGES
    file = make_file(mount / "weights", pages)
    order = cases.backwards(pages)
    ranges = json.dumps([(start, many) for _, start, many in order])
    limit = pages * PAGE_SIZE * percent // 100 + INTERPRETER
    with (
        group("pcbmaio", max=limit) as memory,
        StructOps().attach(cases.template_of([file], order), [file], window_mib=8) as policy,
    ):
        drop([file])
        assert memory.run(sys.executable, "-c", MAPPED_LOADER, str(file), ranges) == 0
        policy.idle()
        assert policy.count("evicted_now_bytes") > 0
        assert policy.count("added_bytes") <= 1.03 * pages * PAGE_SIZE


@pytest.mark.parametrize("session", [True, False])
def test_the_window_goes_on_into_the_next_shard(mount: Path, session: bool) -> None:
    """In the order of the template, not of the loan; before the first access."""
    shards = [make_file(mount / f"shard-{number}", 1024 + number) for number in range(9)]
    order = [(number, 0, 1024 + number) for number in reversed(range(9))]
    before = []
    with (
        StructOps().attach(cases.template_of(shards, order), shards, window_mib=4) as policy,
        lending(*shards[: 9 * session]),
    ):
        drop(shards)
        for path in reversed(shards):
            policy.idle()
            before.append(resident(path))
            read_all(path, 32 * PAGE_SIZE)
        policy.idle()
        replay = policy.replay()
        assert replay.accuracy == 1.0 and replay.jumps == 0
        assert policy.count("added_bytes") == sum(path.stat().st_size for path in shards)
        assert bool(policy.count("prefetch_lent_bytes")) == session
    assert before[0] == 0
    if session:
        assert all(pages >= 512 for pages in before[1:]), before
    else:
        assert not any(before)
