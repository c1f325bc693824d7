# SPDX-License-Identifier: Apache-2.0
"""Whether a fault maps large folios whole: what a file in memory tells, and what others tell."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from pagecache_bpf.observer import fault_probe

pytestmark = pytest.mark.native


@contextmanager
def _refused() -> Iterator[int]:
    raise PermissionError
    yield -1


def test_memory_tells_what_files_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    """And where no file system at hand makes large folios it is all that tells."""
    with monkeypatch.context() as patched:
        patched.setattr(fault_probe, "_file_in_memory", _refused)
        by_files = fault_probe.maps_whole_folios()
    monkeypatch.setattr(fault_probe, "_PLACES", ())
    by_memory = fault_probe.maps_whole_folios()
    assert by_memory or not by_files
    for _ in range(8):  # wherever the mapping comes to lie
        assert fault_probe.maps_whole_folios() == by_memory


def test_nothing_is_left_of_it() -> None:
    with open("/proc/self/mountinfo") as file:
        before = file.read()
    with fault_probe._file_in_memory() as fd:
        assert fd > 0
    with open("/proc/self/mountinfo") as file:
        assert file.read() == before
