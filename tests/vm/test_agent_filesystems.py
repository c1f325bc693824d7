# SPDX-License-Identifier: Apache-2.0
"""Engine `agent` and the observer on file systems that this machine's kernel may lack.

The tests are those of tests/native, on the guest's kernel.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.native import test_filesystems, test_stopped_server
from tests.native.filesystems import Places, made_in
from tests.native.test_record import _nothing_attached  # noqa: F401  # a fixture

NAMES = ("verity", "nfs")


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Places]:
    with made_in(tmp_path_factory.mktemp("places")) as made:
        yield made


@pytest.mark.parametrize("name", NAMES)
def test_what_readers_want_is_counted(places: Places, name: str) -> None:
    test_filesystems.test_what_readers_want_is_counted(places, name)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_is_served(places: Places, name: str) -> None:
    test_filesystems.test_a_model_is_served(places, name)


def test_nothing_of_ours_waits_for_an_nfs_server(places: Places) -> None:
    with test_stopped_server.nfs(places) as served:
        test_stopped_server.test_nothing_of_ours_waits_for_a_server(served)
