# SPDX-License-Identifier: Apache-2.0
"""Templates as text; docs/templates.md describes the format.

    pagecache-bpf template 1
    source: derived
    loader: safetensors keys
    tp: 1
    file: 1234 0 800 8f43... "model.safetensors"
    consumer: "rank 0"
    extents: 2
    0 0 0 800 800
    0 0 800 434 434
    end

Reading takes bounded memory whatever the file says, and any damage is an error.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np

from pagecache_bpf.errors import PrivilegeError, UsageError
from pagecache_bpf.templates.template import (
    EXTENT,
    MAX_CONSUMERS,
    MAX_EXTENTS,
    MAX_FILES,
    STRIDED,
    Extents,
    Template,
    counts,
)
from pagecache_bpf.weights.identity import TemplateFile

MAGIC = "pagecache-bpf template"
VERSION = 1
#: Behind the number of extents: some lines have a count and a stride.  Templates of fewer ranges
#: than this are written without.
_WITH_STRIDES = " strided"
_PLAIN_LINES = 1 << 16
SOURCES = ("derived", "recorded", "imported")
MAX_BYTES = 512 << 20
_LINE = 16 << 10
_BATCH = 1 << 16
_DOCS = "docs/troubleshooting.md#is-not-a-template"
_EXTENT_LINE = re.compile(rb"(?:\d{1,19} ){4}\d{1,19}\n")
_STRIDED_LINE = re.compile(rb"(?:\d{1,19} ){4}\d{1,19}(?: \d{1,19} \d{1,19})?\n")


def write(template: Template, path: Path) -> None:
    """Write a template as text, atomically.

    Args:
        template: the I/O template.
        path: the file, which is replaced if it exists.

    Raises:
        UsageError: the place cannot be written.
    """
    try:
        fd, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise UsageError(f"{path} cannot be written", error.strerror or str(error)) from error
    try:
        with os.fdopen(fd, "wb") as out:
            for piece in render(template):
                out.write(piece)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, path)
    except BaseException as error:
        with suppress(OSError):
            os.unlink(name)
        if isinstance(error, OSError):
            why = error.strerror or str(error)
            raise UsageError(f"{path} cannot be written", why) from error
        raise


def render(template: Template) -> Iterator[bytes]:
    """Make the text of a template.

    Args:
        template: the I/O template.

    Yields:
        Pieces of it, each of whole lines.
    """
    extents = template.extents
    if int(counts(extents).sum()) <= _PLAIN_LINES:
        extents = template.plain()
    strided = extents.dtype != EXTENT
    lines = [
        f"{MAGIC} {VERSION}",
        f"source: {template.source}",
        f"loader: {template.loader}",
        f"tp: {template.tp}",
    ]
    lines += [
        f"file: {file.size} {file.hashed_from} {file.hashed_bytes} {file.digest} "
        + json.dumps(file.path)
        for file in template.files
    ]
    lines += [f"consumer: {json.dumps(name)}" for name in template.consumers]
    columns = "consumer file offset length wanted" + (" [count stride]" if strided else "")
    lines += [f"extents: {len(extents)}{_WITH_STRIDES if strided else ''}", f"# {columns}", ""]
    yield "\n".join(lines).encode()
    for start in range(0, len(extents), _BATCH):
        some = extents[start : start + _BATCH]
        if strided:
            rows = [row if row[5] > 1 else row[:5] for row in some.tolist()]
            yield "".join(" ".join(map(str, row)) + "\n" for row in rows).encode()
        else:
            yield _lines(some)
    yield b"end\n"


def _lines(extents: Extents) -> bytes:
    """Write the lines of extents without strides, a digit of all of them at a time.

    That takes less than a third of the time that formatting does.
    """
    columns = [extents[name] for name in extents.dtype.names or ()]
    widths = [len(str(int(column.max()))) for column in columns]
    # A row for each place of a line, which shorter numbers leave out, and a column for each line.
    places = np.empty((sum(widths) + len(widths), len(extents)), np.uint8)
    used = np.ones(places.shape, np.bool_)
    end = 0
    for column, width in zip(columns, widths, strict=True):
        rest = column.astype(np.uint32 if width < 10 else np.uint64)
        ten = rest.dtype.type(10)
        for place in range(end + width - 1, end - 1, -1):
            if place < end + width - 1:  # of 0 the last digit is written, too
                used[place] = rest > 0
            above = rest // ten
            places[place] = (rest - above * ten).astype(np.uint8) + ord("0")
            rest = above
        end += width
        places[end] = ord(" ")
        end += 1
    places[-1] = ord("\n")
    lines: bytes = np.ascontiguousarray(places.T)[np.ascontiguousarray(used.T)].tobytes()
    return lines


def is_template(path: Path) -> bool:
    """Tell whether a file begins as a template does.

    Args:
        path: the file.

    Returns:
        False, too, where it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC.encode()
    except OSError:
        return False


def read(path: Path) -> Template:
    """Read a template.

    Args:
        path: the file.

    Returns:
        The template.

    Raises:
        UsageError: it is damaged (the error names the line), or cannot be read.
        PrivilegeError: it may not be read.
    """
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size > MAX_BYTES:
                raise _Damaged(0, f"it is larger than {MAX_BYTES >> 20} MiB")
            return _Reader(file).template()
    except _Damaged as error:
        line = f"line {error.line}: " if error.line else ""
        raise UsageError(
            f"{path} is not a template", f"{line}{error}", "Derive or record it anew", _DOCS
        ) from None
    except PermissionError as error:
        raise PrivilegeError(f"{path} cannot be read", "permission denied") from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read", error.strerror or str(error)) from error
    except UsageError as error:
        raise UsageError(f"{path}: {error.what}", error.why, error.fix, error.docs) from None


class _Damaged(Exception):
    """A template's text that is wrong: why, and in which line (0: as a whole)."""

    def __init__(self, line: int, why: str) -> None:
        super().__init__(why)
        self.line = line


class _Reader:
    """Reads a template line by line up to the extents, and those in batches.

    Raises _Damaged, and UsageError for a template that contradicts itself.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._number = 0
        self._line = b""
        self._strided = False

    def template(self) -> Template:
        """Read the whole file.

        Returns:
            The template.
        """
        first = self._next()
        magic, _, version = first.rpartition(" ")
        if magic != MAGIC:
            raise self._damaged(f"it does not start with {MAGIC!r}")
        if version != str(VERSION):
            raise self._damaged(
                f"it has version {version!r}; this pagecache-bpf reads version {VERSION}"
            )
        fields = {key: self._field(key) for key in ("source", "loader", "tp")}
        if fields["source"] not in SOURCES:
            raise self._damaged(f"its source is none of {', '.join(SOURCES)}")
        tp = self._number_of(fields["tp"], MAX_CONSUMERS)
        files, consumers = [], []
        while (line := self._next()).startswith("file: "):
            files.append(self._one_file(line))
            if len(files) > MAX_FILES:
                raise self._damaged(f"it has more than {MAX_FILES:,} files")
        while line.startswith("consumer: "):
            consumers.append(self._text(line.removeprefix("consumer: ")))
            if len(consumers) > MAX_CONSUMERS:
                raise self._damaged(f"it has more than {MAX_CONSUMERS:,} consumers")
            line = self._next()
        if not line.startswith("extents: "):
            raise self._damaged("a line file:, consumer: or extents: was expected")
        text = line.removeprefix("extents: ")
        self._strided = text.endswith(_WITH_STRIDES)
        count = self._number_of(text.removesuffix(_WITH_STRIDES), MAX_EXTENTS)
        extents = self._extents(count)
        if self._next() != "end":
            raise self._damaged(f"it has more than the {count:,} extents it speaks of")
        if self._file.read(1):
            raise self._damaged("something follows the end")
        return Template(
            tuple(files), tuple(consumers), extents, fields["source"], fields["loader"], tp
        )

    def _damaged(self, why: str) -> _Damaged:
        """Make the error for the line that was read last."""
        return _Damaged(self._number, why)

    def _next(self) -> str:
        """Read the next line that is no comment, without its newline."""
        while True:
            line = self._file.readline(_LINE)
            self._number += 1
            if not line.endswith(b"\n"):
                why = "it is too long" if len(line) == _LINE else "the file ends too early"
                raise self._damaged(why)
            if not line.startswith(b"#"):
                self._line = line
                try:
                    return line[:-1].decode()
                except UnicodeDecodeError:
                    raise self._damaged("it is not UTF-8") from None

    def _field(self, key: str) -> str:
        """Read the line of a field and return its value."""
        line = self._next()
        if not line.startswith(f"{key}: "):
            raise self._damaged(f"a line {key}: was expected")
        return line.removeprefix(f"{key}: ")

    def _number_of(self, text: str, limit: int) -> int:
        # isdecimal() alone takes the digits of every script.
        """Read a decimal number up to a limit."""
        if not (text.isascii() and text.isdecimal() and len(text) < 20 and int(text) <= limit):
            raise self._damaged(f"{text[:40]!r} is not a number up to {limit:,}")
        return int(text)

    def _text(self, text: str) -> str:
        """Read a text in quotes, as JSON has them."""
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, str):
            raise self._damaged("a quoted text was expected")
        return value

    def _one_file(self, line: str) -> TemplateFile:
        """Read a line `file: SIZE FROM BYTES SHA256 PATH`."""
        words = line.split(" ", 5)
        if len(words) != 6 or not re.fullmatch(r"[0-9a-f]{64}", words[4]):
            raise self._damaged("it is not `file: SIZE FROM BYTES SHA256 PATH`")
        size, start, length = (self._number_of(word, 1 << 63) for word in words[1:4])
        return TemplateFile(self._text(words[5]), size, start, length, words[4])

    def _extents(self, count: int) -> Extents:
        """Read so many extents, in batches, as an array of EXTENT or STRIDED."""
        batches = []
        while count:
            lines = []
            for _ in range(min(count, _BATCH)):
                self._next()
                pattern = _STRIDED_LINE if self._strided else _EXTENT_LINE
                if not pattern.fullmatch(self._line):
                    raise self._damaged("it is not an extent, `CONSUMER FILE OFFSET LENGTH WANTED`")
                plain = self._strided and self._line.count(b" ") == 4
                lines.append(self._line[:-1] + b" 1 0\n" if plain else self._line)
            count -= len(lines)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                try:
                    numbers = np.loadtxt(lines, np.uint64, ndmin=2)
                except (ValueError, Warning) as error:
                    raise self._damaged(f"a number is out of range ({error})") from None
            batch = np.zeros(len(lines), STRIDED if self._strided else EXTENT)
            for column, name in enumerate(batch.dtype.names or ()):
                if name in ("consumer", "file") and numbers[:, column].max() >= 1 << 32:
                    raise self._damaged("a number is out of range")
                batch[name] = numbers[:, column]
            batches.append(batch)
        return np.concatenate(batches) if batches else np.zeros(0, EXTENT)
