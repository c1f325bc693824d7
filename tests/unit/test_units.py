# SPDX-License-Identifier: Apache-2.0
"""Sizes, durations and counts: known values, and properties over many values."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagecache_bpf import units
from pagecache_bpf.errors import UsageError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0),
        ("4096", 4096),
        ("1B", 1),
        ("64MiB", 64 << 20),
        ("64M", 64 << 20),
        ("64 MB", 64_000_000),
        ("1.5GiB", 3 << 29),
        (" 2 kB ", 2000),
        ("2KiB", 2048),
        ("1T", 1 << 40),
    ],
)
def test_sizes_that_people_write(text: str, expected: int) -> None:
    assert units.parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "M", "-1", "1 PiB", "1mib", "0.3B", "1e3", "1 2", "\u0661"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size") as caught:
        units.parse_size(text)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [("20ms", 20_000_000), ("1.5s", 1_500_000_000), ("2 min", 120 * 10**9), ("1h", 3600 * 10**9)],
)
def test_durations_that_people_write(text: str, expected: int) -> None:
    assert units.parse_duration(text) == expected


@pytest.mark.parametrize("text", ["20", "", "ms", "0.5ns", "-1s", "1 day"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a duration"):
        units.parse_duration(text)


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1048575, "1.0 MiB"),
        (3 << 29, "1.5 GiB"),
        (-2048, "-2.0 KiB"),
        (5 << 50, "5120.0 TiB"),
    ],
)
def test_printed_sizes(count: int, expected: str) -> None:
    assert units.format_size(count) == expected


def test_no_more_is_cached_than_there_is() -> None:
    assert units.format_cached(8192, 4097) == units.format_size(4097)
    assert units.format_cached(4096, 4097) == units.format_size(4096)


@pytest.mark.parametrize(
    ("nanoseconds", "expected"),
    [
        (0, "0 ns"),
        (999, "999 ns"),
        (20_000_000, "20.0 ms"),
        (999_999_999, "1.0 s"),
        (59_990_000_000, "1 min 0 s"),
        (185 * 10**9, "3 min 5 s"),
        (3 * 3600 * 10**9, "3 h 0 min"),
        (50 * 3600 * 10**9, "2 d 2 h"),
        (-1_500_000_000, "-1.5 s"),
    ],
)
def test_printed_durations(nanoseconds: int, expected: str) -> None:
    assert units.format_duration(nanoseconds) == expected


@given(st.integers(min_value=0, max_value=1 << 62))
def test_a_printed_size_parses_back_to_nearly_the_same(count: int) -> None:
    number, unit = units.format_size(count).split()
    factor = units.parse_size(f"1{unit}")
    # one decimal is printed, so half a tenth of the unit may be lost, plus float rounding
    assert abs(float(number) * factor - count) <= 0.05 * factor + count * 1e-12
    assert float(number) < 1024 or unit == "TiB"


@given(st.integers(min_value=0, max_value=1 << 40), st.sampled_from(["KiB", "MiB", "GiB", "kB"]))
def test_whole_numbers_of_a_unit_are_exact(count: int, unit: str) -> None:
    assert units.parse_size(f"{count}{unit}") == count * units.parse_size(f"1{unit}")


@given(st.integers(min_value=0, max_value=10**18))
def test_durations_never_print_a_full_unit(nanoseconds: int) -> None:
    number, unit, *_ = units.format_duration(nanoseconds).split()
    limits = {"ns": 1000, "us": 1000, "ms": 1000, "s": 60, "min": 60, "h": 48}
    assert float(number) < limits.get(unit, float("inf"))


@given(st.text())
def test_no_text_makes_the_parsers_raise_anything_else(text: str) -> None:
    for parse in (units.parse_size, units.parse_duration):
        with contextlib.suppress(UsageError):
            assert parse(text) >= 0


def test_counts_carry_their_unit() -> None:
    assert units.format_count(1 << 20, "bytes") == "1.0 MiB"
    assert units.format_count(12345, "calls") == "12,345 calls"
    assert units.plural(1, "file") == "1 file"
    assert units.plural(4000, "file") == "4,000 files"
