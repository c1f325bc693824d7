# SPDX-License-Identifier: Apache-2.0
"""MAIO's text trace: one I/O a line, `path offset length numa`; read and written.

The trace has no identity of the files, so what is imported is checked against files that are
there, and gets theirs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pagecache_bpf.errors import PagecacheError, UsageError
from pagecache_bpf.kernel.file_key import open_to_read
from pagecache_bpf.templates.template import EXTENT, MAX_EXTENTS, MAX_FILES, Template, coalesce
from pagecache_bpf.weights import headers
from pagecache_bpf.weights.identity import TemplateFile, identify

_LINE = 64 << 10
_NODE_ANY = -1
_DOCS = "docs/troubleshooting.md#is-not-a-maio-trace"


def describe(path: Path, name: str) -> TemplateFile:
    """The identity of a file of any format.  Raises UsageError, PrivilegeError."""
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
    """Import a trace.  root: where the files are, by their names, if not where it says.

    NUMA nodes become consumers: the trace tells for which node the bytes were read.  Files
    behind whose end a line reads are refused.  Raises UsageError, with the line.
    """
    paths: dict[str, int] = {}
    nodes: dict[int, int] = {}
    rows: list[tuple[int, int, int, int, int]] = []
    for number, (path, offset, length, node) in enumerate(_lines(trace), 1):
        if length == 0:
            continue
        file = paths.setdefault(path, len(paths))
        consumer = nodes.setdefault(node, len(nodes))
        if len(rows) >= MAX_EXTENTS or len(paths) > MAX_FILES or len(nodes) > 1024:
            raise _damaged(trace, number, "it has more lines, files or nodes than are possible")
        rows.append((consumer, file, offset, length, length))
    if not rows:
        raise _damaged(trace, 1, "it has no I/O")
    found = [_find(Path(path), root) for path in paths]
    base = Path(os.path.commonpath([path.parent for path in found]))
    files = tuple(describe(path, str(path.relative_to(base))) for path in found)
    extents = np.array(rows, EXTENT)
    sizes = np.array([file.size for file in files], np.uint64)[extents["file"]]
    over = (extents["offset"] >= sizes) | (extents["length"] > sizes - extents["offset"])
    if over.any():
        bad = extents[int(np.flatnonzero(over)[0])]
        raise UsageError(
            f"{trace} does not fit the files",
            f"it reads behind the end of {found[int(bad['file'])]}",
            "Record a template of these files",
            "docs/troubleshooting.md#does-not-fit-the-files",
        )
    order = np.argsort(extents["consumer"], kind="stable")
    names = [f"node {node}" if node >= 0 else "any node" for node in nodes]
    return Template(files, tuple(names), coalesce(extents[order], gap), "imported", "maio trace")


def _find(path: Path, root: Path | None) -> Path:
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


def _lines(trace: Path) -> Iterator[tuple[str, int, int, int]]:
    try:
        with trace.open("rb") as file:
            number = 0
            while line := file.readline(_LINE):
                number += 1
                if not line.strip():
                    continue
                # Paths may have blanks; numbers do not.
                words = os.fsdecode(line.rstrip(b"\r\n")).rsplit(" ", 3)
                if not line.endswith(b"\n") and len(line) == _LINE:
                    raise _damaged(trace, number, "the line is too long")
                yield _parsed(trace, number, words)
    except OSError as error:
        raise UsageError(f"{trace} cannot be read", error.strerror or str(error)) from error


def _parsed(trace: Path, number: int, words: list[str]) -> tuple[str, int, int, int]:
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
    if offset < 0 or length < 0 or not _NODE_ANY <= node < 1 << 20:
        raise _damaged(trace, number, "a number is out of range")
    return words[0], offset, length, node


def _damaged(trace: Path, number: int, why: str) -> UsageError:
    return UsageError(
        f"{trace} is not a MAIO trace", f"line {number}: {why}", "Check the file", _DOCS
    )


def render_trace(template: Template, paths: dict[int, Path]) -> Iterator[str]:
    """The lines of a trace.  Consumers named "node N" are on that node, all others on 0.

    Consumers take turns in the order of their progress, since the trace knows one order only.
    """
    nodes = [
        int(name.removeprefix("node ")) if name.startswith("node ") and name[5:].isdecimal() else 0
        for name in template.consumers
    ]
    extents = template.plain()
    ends = np.cumsum(extents["length"])
    first = np.searchsorted(extents["consumer"], extents["consumer"])
    progress = ends - np.concatenate(([0], ends))[first].astype(ends.dtype)
    for number in np.argsort(progress, kind="stable"):
        extent = extents[number]
        path = paths.get(int(extent["file"]))
        if path is not None:
            yield f"{path} {extent['offset']} {extent['length']} {nodes[int(extent['consumer'])]}\n"
