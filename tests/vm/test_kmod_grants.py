# SPDX-License-Identifier: Apache-2.0
"""pin and cyclic: what a file was granted is another's when the file has gone."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.cachestat import drop
from pagecache_bpf.policy import gauges
from tests.vm.kernel import attached, make_file, read_all, wait_for

pytestmark = pytest.mark.vm

MIB = 256  # pages


@pytest.mark.parametrize(
    ("name", "gauge"), [("pin", "promised_pages"), ("cyclic", "granted_pages")]
)
def test_the_next_checkpoint_is_granted_what_the_last_one_had(
    mount: Path, name: str, gauge: str
) -> None:
    """The old one is deleted while the new one, which has got too little, is read."""
    old = make_file(mount / "old", 3 * MIB)
    new = make_file(mount / "new", 2 * MIB)
    with attached(name, old, new, budget_mib=4) as policy:
        read_all(old)
        read_all(new)
        assert gauges(name)[0][gauge] == 4 * MIB
        old.unlink()

        def granted() -> int:
            """The new file is met again, when no page of it is in the cache."""
            drop([new])
            read_all(new)
            return gauges(name)[0][gauge]

        wait_for(lambda: granted() == 2 * MIB, "the old file's part", 30)
        if name == "pin":
            assert gauges(name)[0]["pinned_pages"] == 2 * MIB
        assert policy.alive
