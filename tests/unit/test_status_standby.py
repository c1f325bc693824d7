# SPDX-License-Identifier: Apache-2.0
"""What `status` says of models that are left to the kernel: the reason that decided."""

from __future__ import annotations

import pytest

from pagecache_bpf.cli.verbs import status


@pytest.mark.parametrize(
    ("measured", "stalled", "device", "why"),
    [
        (0, 0, 0, "left to the kernel's readahead (how long it makes readers wait is not measured"),
        (1, 9, 0, "the kernel keeps up (stalled 9% of the time)"),
        (1, 9, 50, "the kernel keeps up (stalled 9% of the time)"),
        (1, 60, 70, "the kernel keeps up (70% of the device's speed)"),
        (1, 60, 69, "left to the kernel's readahead (stalled 60% of the time)"),
        (1, 60, 0, "left to the kernel's readahead (stalled 60% of the time)"),
    ],
)
def test_why_a_model_is_left_to_the_kernel(
    measured: int, stalled: int, device: int, why: str
) -> None:
    gauges = {
        "standing_down": 1,
        "stalls_measured": measured,
        "stalled_percent": stalled,
        "device_percent": device,
        "of_its_own": 1000,
    }
    assert len(status.STANDBY_GAUGES) == 6
    own, (title, text) = status._gauge_rows(gauges)
    assert own == ("of_its_own", "1,000")
    assert title == "standing down" and str(text).startswith(f"1 model: {why}")
    _, (_, text) = status._gauge_rows({**gauges, "as_fast_alone": 1})
    assert text == "1 model: as fast by the kernel's readahead alone as with help"
    _, (_, text) = status._gauge_rows({**gauges, "short_files": 1})
    assert text == "1 model: its files are so short that the device reads each in an instant"
    assert status._gauge_rows({**gauges, "standing_down": 0}) == [own]
