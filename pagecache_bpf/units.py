# SPDX-License-Identifier: Apache-2.0
"""Sizes, durations and counts as people write and read them.

Parsing is exact (integers in, integers out; a fraction has to come to whole bytes or
nanoseconds) and printing is short: a printed value is for eyes, JSON carries the integer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from pagecache_bpf.errors import UsageError

_BINARY = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_SIZES = {
    "": 1,
    "B": 1,
    **_BINARY,
    **{unit[0]: factor for unit, factor in _BINARY.items()},
    "kB": 10**3,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}
_DURATIONS = {"ns": 1, "us": 10**3, "ms": 10**6, "s": 10**9, "min": 60 * 10**9, "h": 3600 * 10**9}
_QUANTITY = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")


def parse_size(text: str) -> int:
    """Return the bytes that "64MiB", "64M", "1.5 GB" or "4096" stand for.

    K, M, G and T alone are powers of 1024; kB, MB, GB and TB are powers of 1000.

    Args:
        text: the size, as a person writes it.

    Returns:
        Bytes.

    Raises:
        UsageError: the text is no size or comes to a fraction of a byte.
    """
    return _parse(text, _SIZES, "size", "64MiB, 64MB or a number of bytes")


def parse_duration(text: str) -> int:
    """Return the nanoseconds that "20ms", "1.5s" or "2 min" stand for.

    Args:
        text: the duration, as a person writes it.

    Returns:
        Nanoseconds.

    Raises:
        UsageError: the text is no duration, has no unit, or comes to a fraction of a nanosecond.
    """
    return _parse(text, _DURATIONS, "duration", "20ms, 1.5s, 2min")


def _parse(text: str, units: Mapping[str, int], kind: str, examples: str) -> int:
    match = _QUANTITY.fullmatch(text)
    factor = units.get(match[2]) if match else None
    if match is None or factor is None:
        known = ", ".join(unit for unit in units if unit)
        raise UsageError(
            f"{text!r} is not a {kind}", f"known units: {known}", f"Write it like {examples}"
        )
    from fractions import Fraction  # late: few commands take such a number

    value = Fraction(match[1]) * factor
    if value.denominator != 1:
        raise UsageError(f"{text!r} is not a {kind}", "it is not a whole number of the base unit")
    return int(value)


def format_cached(resident: int, size: int) -> str:
    """Write how much of files is in the page cache, for people.

    The last page of a file is cached as a whole, so pages can have more bytes than the files.

    Args:
        resident: bytes of the pages that are in the page cache.
        size: bytes of the files.

    Returns:
        As format_size(), and no more than the files have.
    """
    return format_size(min(resident, size))


def format_size(count: int) -> str:
    """Print bytes with a binary unit.

    Args:
        count: bytes; a negative number keeps its sign.

    Returns:
        "0 B", "1023 B", "1.5 GiB".
    """
    sign, rest = ("-", -count) if count < 0 else ("", count)
    unit, factor = "B", 1
    for name, size in _BINARY.items():
        # 1023.96 KiB would print as "1024.0 KiB": go up one unit where rounding gets there.
        if rest * 20 >= size * 20 - size // 1024:
            unit, factor = name, size
    if factor == 1:
        return f"{sign}{rest} B"
    return f"{sign}{rest / factor:.1f} {unit}"


def format_duration(nanoseconds: int) -> str:
    """Print a duration in the unit that suits it.

    Args:
        nanoseconds: the duration.

    Returns:
        "850 ns", "20.0 ms", "1.5 s", "3 min 5 s".
    """
    if nanoseconds < 0:
        return "-" + format_duration(-nanoseconds)
    if nanoseconds < 1000:
        return f"{nanoseconds} ns"
    for unit in ("us", "ms", "s"):
        value = nanoseconds / _DURATIONS[unit]
        limit = 60 if unit == "s" else 1000
        if round(value, 1) < limit:
            return f"{value:.1f} {unit}"
    seconds = round(nanoseconds / 10**9)
    minutes, seconds = divmod(seconds, 60)
    if minutes < 60:
        return f"{minutes} min {seconds} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h"


def format_count(count: int, unit: str) -> str:
    """Print a counter with its unit.

    Args:
        count: its value.
        unit: "bytes", which are printed as a size, or another, whose thousands are separated.

    Returns:
        The text.
    """
    if unit == "bytes":
        return format_size(count)
    return f"{count:,} {unit}".rstrip()


def plural(count: int, noun: str) -> str:
    """Print a number of things.

    Args:
        count: how many.
        noun: what they are; more than one take a plain s.

    Returns:
        "1 file", "4 files".
    """
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return the question that a mistyped word calls for.

    Args:
        word: what was typed.
        known: the words that there are.

    Returns:
        "Did you mean X?", or nothing when none of them is close.
    """
    import difflib

    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"Did you mean {close[0]}?" if close else ""


def printable(text: str, keep: str = "") -> str:
    """Return text that a terminal shows as it is, whatever names in it were chosen to do.

    Control characters (line feeds and the ESC of terminal sequences among them), characters that
    turn the direction of writing, and bytes that are no text become backslash escapes.

    Args:
        text: what is to be shown; names of files and processes may hold anything.
        keep: control characters that stay.

    Returns:
        The text with those escapes.
    """

    def escaped(match: re.Match[str]) -> str:
        character = match[0]
        if character in keep:
            return character
        code = ord(character)
        if 0xDC80 <= code <= 0xDCFF:  # os.fsdecode() of a byte that is no text
            code -= 0xDC00
        named = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}.get(character)
        return named or (f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}")

    return _UNPRINTABLE.sub(escaped, text)


#: C0 and C1 controls, DEL, marks and overrides of direction, line separators, surrogates.
_UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
