# SPDX-License-Identifier: Apache-2.0
"""CPU time that is shared out: so much at once, and so much more with the time."""

from __future__ import annotations

import pytest

from pagecache_bpf.controller.cpu_allowance import CpuAllowance


def test_s6_what_was_taken_comes_back_with_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("pagecache_bpf.controller.cpu_allowance.time.monotonic", lambda: now)
    allowance = CpuAllowance(3.0, 0.02)
    allowance.charge("a", 3.0)
    assert allowance.rest("a") == 0  # it had saved that up
    allowance.charge("a", 0.5)
    assert allowance.rest("a") == pytest.approx(25)
    assert allowance.rest("b") == 0
    now += 10
    assert allowance.rest("a") == pytest.approx(15)
    now += 15
    assert allowance.rest("a") == pytest.approx(0)
    now += 1000  # no more than that is saved
    allowance.charge("a", 4.0)
    assert allowance.rest("a") == pytest.approx(50)


def test_who_has_everything_back_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("pagecache_bpf.controller.cpu_allowance.time.monotonic", lambda: now)
    allowance = CpuAllowance(1.0, 0.1)
    for user in range(1000):
        allowance.charge(user, 0.1)
        now += 0.5
    assert len(allowance._left) <= 3
