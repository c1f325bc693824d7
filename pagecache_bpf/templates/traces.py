# SPDX-License-Identifier: Apache-2.0
"""MAIO's text trace: one I/O a line, `path offset length numa`; read and written.

The trace has no identity of the files, so what is imported is checked against files that are
there, and gets theirs.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pagecache_bpf.errors import PagecacheError, UsageError
from pagecache_bpf.kernel.file_key import open_to_read
from pagecache_bpf.templates.template import EXTENT, MAX_EXTENTS, MAX_FILES, Template, coalesce
from pagecache_bpf.weights import headers
from pagecache_bpf.weights.identity import TemplateFile, identify

_LINE = 64 << 10
_NODE_ANY, _NODE_END = -1, 1 << 20
_MOST_NODES = 1024
_BLOCK_BYTES = 16 << 20
_LINES_AT_ONCE = 1 << 14
_ROW = np.dtype(
    [("file", np.int64), ("offset", np.int64), ("length", np.int64), ("node", np.int64)]
)
_DOCS = "docs/troubleshooting.md#is-not-a-maio-trace"
#: Paths of more bytes are looked at one by one.
_LONGEST_PATH = 256
#: Three words of eight digits, which a number may have, lie before its end.
_BEFORE = 24
_ZEROS = np.uint64(0x3030303030303030)
_ODD = np.uint64(0x9E3779B97F4A7C15)
#: What keeps the first or the last so many bytes of a word.
_FIRST_BYTES = np.array([(1 << 8 * count) - 1 for count in range(9)], np.uint64)
_LAST_BYTES = np.array([(1 << 64) - (1 << 8 * (8 - count)) for count in range(9)], np.uint64)


def describe(path: Path, name: str) -> TemplateFile:
    """Describe a file of any format as a template does.

    Args:
        path: the file.
        name: its path below the model's directory.

    Returns:
        Its size and digest: of its header, or of its start and end where the format is not known.

    Raises:
        UsageError: it cannot be read.
        PrivilegeError: it may not be read.
    """
    try:
        return headers.parse(path).file(name)
    except PagecacheError:
        pass  # of a format that says nothing, the edges are its identity
    fd = open_to_read(path)
    try:
        size = os.fstat(fd).st_size
        return TemplateFile(name, size, 0, 0, identify(fd, size, 0, 0))
    except (OSError, EOFError) as error:
        raise UsageError(f"{path} cannot be read", str(error) or "it ends early") from error
    finally:
        os.close(fd)


def read_trace(trace: Path, root: Path | None = None, gap: int = 0) -> Template:
    """Import a trace.

    The NUMA node of a line says where its pages are to be, not who reads them: -1 leaves that
    open, so such a line belongs to the reader of the line before.  Lines for two or more nodes
    become a consumer for each node, since loaders that read for several nodes have a process on
    each.

    Args:
        trace: the file.
        root: where the files are, by their names, if not where the trace says.
        gap: bytes between two I/Os of a file that are not worth a seek.

    Returns:
        The template, with the identities that the files have now.

    Raises:
        UsageError: it is no trace (with the line), or reads behind the end of a file.
        PrivilegeError: a file may not be read.
    """
    paths, table = _table(trace)
    if not len(table):
        raise _damaged(trace, 1, "it has no I/O")
    found = [_find(Path(path), root) for path in paths]
    base = Path(os.path.commonpath([path.parent for path in found]))
    files = tuple(describe(path, str(path.relative_to(base))) for path in found)
    sizes = np.array([file.size for file in files], np.int64)[table["file"]]
    over = (table["offset"] >= sizes) | (table["length"] > sizes - table["offset"])
    if over.any():
        bad = table[int(np.flatnonzero(over)[0])]
        raise UsageError(
            f"{trace} does not fit the files",
            f"it reads behind the end of {found[int(bad['file'])]}",
            "Record a template of these files",
            "docs/troubleshooting.md#does-not-fit-the-files",
        )
    names, readers = _readers(table["node"])
    extents = np.zeros(len(table), EXTENT)
    extents["consumer"], extents["file"] = readers, table["file"]
    extents["offset"], extents["length"] = table["offset"], table["length"]
    extents["wanted"] = table["length"]
    order = np.argsort(extents["consumer"], kind="stable")
    return Template(files, names, coalesce(extents[order], gap), "imported", "maio trace")


def _readers(nodes: NDArray[np.int64]) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Return the names of the consumers, and the number of the consumer of each line."""
    known = nodes != _NODE_ANY
    if not known.any():
        return ("any node",), np.zeros(len(nodes), np.int64)
    # -1 takes the node of the line before; at the beginning, the first that there is.
    lines = np.where(known, np.arange(len(nodes)), int(np.argmax(known)))
    filled = nodes[np.maximum.accumulate(lines)]
    distinct, first, numbers = np.unique(filled, return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(first))  # in the order in which they come
    names = [f"node {node}" for node in distinct[np.argsort(first)]]
    return tuple(names), rank[numbers].astype(np.int64)


def _find(path: Path, root: Path | None) -> Path:
    """Find a file that the trace names, below `root` if there is one.  Raises UsageError."""
    if root is not None:
        path = root / path.name if root.is_dir() else root
    path = Path(os.path.abspath(path))
    if not path.is_file():
        raise UsageError(
            f"{path} does not exist",
            "the trace names it",
            "Say where the files are with --path",
            "docs/troubleshooting.md#does-not-exist",
        )
    return path


def _table(trace: Path) -> tuple[list[str], NDArray[Any]]:
    """Read the paths of a trace and its lines, without those of 0 bytes.  Raises UsageError."""
    paths: dict[bytes, int] = {}
    blocks: list[NDArray[Any]] = []
    number = rows = 0
    for data in _blocks(trace):
        block, lines = _block(trace, data, number, paths)
        number += lines
        rows += len(block)
        nodes = np.unique(block["node"]) if len(block) else ()
        if rows > MAX_EXTENTS or len(paths) > MAX_FILES or len(nodes) > _MOST_NODES:
            raise _damaged(trace, number, "it has more lines, files or nodes than are possible")
        blocks.append(block)
    return [os.fsdecode(path) for path in paths], np.concatenate([np.zeros(0, _ROW), *blocks])


def _blocks(trace: Path) -> Iterator[bytes]:
    """Yield the bytes of a trace in pieces of whole lines.  Raises UsageError."""
    rest = b""
    try:
        with trace.open("rb") as file:
            while data := file.read(_BLOCK_BYTES):
                whole, newline, tail = data.rpartition(b"\n")
                if newline:
                    yield rest + whole + newline
                    rest = tail
                else:
                    rest += tail
                if len(rest) > _BLOCK_BYTES:
                    break  # a line that long is refused by its length
    except OSError as error:
        raise UsageError(f"{trace} cannot be read", error.strerror or str(error)) from error
    if rest:
        yield rest


def _block(
    trace: Path, data: bytes, before: int, paths: dict[bytes, int]
) -> tuple[NDArray[Any], int]:
    """Read whole lines; return a table of those with bytes, and how many lines there were.

    The three numbers at the end of all lines are read at once, eight digits of each at a time; a
    line that is anything but path, blank, number, blank, number, blank, number is looked at by
    itself.

    Args:
        trace: for messages.
        data: the lines.
        before: number of lines before them.
        paths: the numbers of the paths by their bytes; new ones are added.
    """
    text = _Text(data)
    raw = np.frombuffer(data, np.uint8)
    # Blanks and line ends are what is looked for; other such characters end a number as well.
    marks = np.concatenate(([-1] * 4, np.flatnonzero(raw <= ord(" "))))
    kinds = np.concatenate(([0] * 4, raw[marks[4:]])).astype(np.uint8)
    last = np.flatnonzero(kinds == ord("\n"))
    ends = marks[last]
    if not data.endswith(b"\n"):
        last, ends = np.append(last, len(marks)), np.append(ends, len(raw))
    starts = np.concatenate(([0], ends[:-1] + 1))
    returns = (kinds[last - 1] == ord("\r")) & (marks[last - 1] == ends - 1)
    stops, last = ends - returns, last - returns
    cuts = [marks[last - back] for back in (3, 2, 1)]
    good = (cuts[0] > starts) & (stops - starts < _LINE)
    for back in (3, 2, 1):
        good &= kinds[last - back] == ord(" ")
    values = []
    for begin, end in zip(cuts, (cuts[1], cuts[2], stops), strict=True):
        value, fine = text.numbers(begin + 1, end)
        values.append(value)
        good &= fine
    good &= (values[0] >= 0) & (values[1] >= 0)
    good &= (values[2] >= _NODE_ANY) & (values[2] < _NODE_END)
    table = np.zeros(len(ends), _ROW)
    table["offset"], table["length"], table["node"] = values
    cut = cuts[0]
    for line in np.flatnonzero(~good).tolist():
        words = data[starts[line] : ends[line]].rstrip(b"\r\n")
        if not words.strip():
            table[line] = 0  # an empty line has no bytes to read, and is left out below
            continue
        if len(words) >= _LINE:
            raise _damaged(trace, before + line + 1, "the line is too long")
        split = os.fsdecode(words).rsplit(" ", 3)
        path, *numbers = _parsed(trace, before + line + 1, split)
        table["offset"][line], table["length"][line], table["node"][line] = numbers
        cut[line] = starts[line] + len(os.fsencode(path))
    used = table["length"] > 0
    table = table[used]
    table["file"] = text.files(starts[used], cut[used], paths)
    return table, len(ends)


class _Text:
    """Bytes of which many places are read at once, eight bytes at a time.

    Args:
        data: the bytes.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        # So that the words around any place lie inside.
        self._padded = bytes(_BEFORE) + data + bytes(_LONGEST_PATH + 8)
        self._words = self._rows("<u8")

    def _rows(self, kind: str) -> NDArray[Any]:
        """Return what lies at each byte, read as some kind of data; nothing is copied."""
        size = np.dtype(kind).itemsize
        found: NDArray[Any] = np.ndarray(
            (len(self._padded) - size + 1,), kind, self._padded, 0, (1,)
        )
        return found

    def numbers(
        self, begin: NDArray[np.int64], end: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Read decimal numbers at many places; tell which are numbers of at most 18 digits."""
        raw = np.frombuffer(self._padded, np.uint8)
        negative = raw[begin + _BEFORE] == ord("-")
        digits = end - begin - negative
        good = (digits > 0) & (digits < 19)
        value = np.zeros(len(begin), np.int64)
        for part in range(3):
            some = np.flatnonzero(good & (digits > 8 * part))
            if not len(some):
                break
            word = self._words[end[some] + (_BEFORE - 8 * (part + 1))]
            keep = _LAST_BYTES[np.minimum(digits[some] - 8 * part, 8)]
            word = (word & keep) | (_ZEROS & ~keep)
            good[some] = _all_digits(word)
            value[some] += _eight_digits(word) * 10 ** (8 * part)
        return np.where(negative, -value, value), good

    def files(
        self, begin: NDArray[np.int64], end: NDArray[np.int64], paths: dict[bytes, int]
    ) -> NDArray[np.int64]:
        """Return the number of the path at each place; new ones are added to `paths`."""
        lengths = end - begin
        if not len(lengths) or int(lengths.max()) > _LONGEST_PATH:
            return self._files_one_by_one(begin, end, paths)
        width = (int(lengths.max()) + 7) // 8
        words = self._rows(f"V{8 * width}")[begin + _BEFORE].view("<u8").reshape(-1, width)
        known = lengths.astype(np.uint64)
        for column in range(width):
            words[:, column] &= _FIRST_BYTES[np.clip(lengths - 8 * column, 0, 8)]
            known = known * _ODD ^ words[:, column]
            known ^= known >> np.uint64(29)
        _, first, which = np.unique(known, return_index=True, return_inverse=True)
        same = (words == words[first][which]).all() and (lengths == lengths[first][which]).all()
        if not same:  # two paths have the same sum
            return self._files_one_by_one(begin, end, paths)
        found = np.zeros(len(first), np.int64)
        for number in np.argsort(first).tolist():  # in the order in which they come
            at = first[number]
            path = self._data[begin[at] : end[at]]
            found[number] = paths.setdefault(path, len(paths))
        return found[which]

    def _files_one_by_one(
        self, begin: NDArray[np.int64], end: NDArray[np.int64], paths: dict[bytes, int]
    ) -> NDArray[np.int64]:
        where = zip(begin.tolist(), end.tolist(), strict=True)
        numbers = [paths.setdefault(self._data[start:stop], len(paths)) for start, stop in where]
        return np.array(numbers, np.int64)


def _all_digits(words: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Tell of which words each of the eight bytes is a digit."""
    high, six = np.uint64(0xF0F0F0F0F0F0F0F0), np.uint64(0x0606060606060606)
    over = words + six  # 9 stays below 0x40; a byte that carries into the next was no digit itself
    return np.asarray(((words & high) == _ZEROS) & ((over & high) == _ZEROS))


def _eight_digits(words: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return the numbers of eight digits that words are, the first digit in the lowest byte.

    Pairs of digits become numbers below 100, and these numbers below 10,000.
    """
    pairs = words - _ZEROS
    pairs = pairs * np.uint64(10) + (pairs >> np.uint64(8))
    every_other = np.uint64(0x000000FF000000FF)
    upper = (pairs & every_other) * np.uint64(1_000_000 * (1 << 32) + 100)
    lower = (pairs >> np.uint64(16) & every_other) * np.uint64(10_000 * (1 << 32) + 1)
    numbers: NDArray[np.int64] = ((upper + lower) >> np.uint64(32)).astype(np.int64)
    return numbers


def _parsed(trace: Path, number: int, words: list[str]) -> tuple[str, int, int, int]:
    """Read one line as path, offset, length and node.  Raises UsageError."""
    wrong = "it is not `PATH OFFSET LENGTH NUMA`"
    if len(words) != 4 or not words[0]:
        raise _damaged(trace, number, wrong)
    values = []
    for word in words[1:]:
        digits = word.removeprefix("-")
        if not (digits.isascii() and digits.isdecimal() and len(digits) < 19):
            raise _damaged(trace, number, wrong)
        values.append(int(word))
    offset, length, node = values
    if offset < 0 or length < 0 or not _NODE_ANY <= node < _NODE_END:
        raise _damaged(trace, number, "a number is out of range")
    return words[0], offset, length, node


def _damaged(trace: Path, number: int, why: str) -> UsageError:
    """Make the error for a line that is no line of a trace."""
    return UsageError(
        f"{trace} is not a MAIO trace", f"line {number}: {why}", "Check the file", _DOCS
    )


def check_names(paths: Iterable[Path]) -> None:
    """Refuse names that a trace cannot have: with a line feed a line would end in the name.

    Other control characters would act on the terminal that a trace is written to.

    Args:
        paths: the files that the trace names.

    Raises:
        UsageError: one of them has such a name.
    """
    for path in paths:
        if any(character < " " or character == "\x7f" for character in str(path)):
            raise UsageError(
                f"{path} cannot stand in a trace",
                "its name has a control character",
                "Rename the file or its directory",
            )


def render_trace(template: Template, paths: dict[int, Path]) -> Iterator[str]:
    """Write a template as a trace.

    Consumers take turns in the order of their progress, since a trace knows one order only.

    Args:
        template: the I/O template.
        paths: where its files are, by their numbers; the extents of others are left out.

    Yields:
        Some thousand lines at a time.  Those of a consumer named "node N" are for that node; for
        all others the node is left open (-1).
    """
    nodes = [
        int(name.removeprefix("node "))
        if name.startswith("node ") and name[5:].isdecimal()
        else _NODE_ANY
        for name in template.consumers
    ]
    extents = template.plain()
    ends = np.cumsum(extents["length"])
    first = np.searchsorted(extents["consumer"], extents["consumer"])
    progress = ends - np.concatenate(([0], ends))[first].astype(ends.dtype)
    names = [str(paths[file]) if file in paths else None for file in range(len(template.files))]
    ordered = extents[np.argsort(progress, kind="stable")]
    for begin in range(0, len(ordered), _LINES_AT_ONCE):
        some = ordered[begin : begin + _LINES_AT_ONCE]
        columns = (some[name].tolist() for name in ("file", "offset", "length", "consumer"))
        yield "".join(
            f"{names[file]} {offset} {length} {nodes[consumer]}\n"
            for file, offset, length, consumer in zip(*columns, strict=True)
            if names[file] is not None
        )
