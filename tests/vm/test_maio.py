# SPDX-License-Identifier: Apache-2.0
"""The policy `maio` on engine struct_ops."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from pagecache_bpf.policy.engines import Engines
from pagecache_bpf.templates import Template, policy_arrays
from tests import maio_cases as cases
from tests.vm.kernel import Policy, attached, make_file, read_pages

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
