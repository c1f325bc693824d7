# SPDX-License-Identifier: Apache-2.0
"""What a rank read of a checkpoint, as it is compared and kept: pages, and the order of tensors.

Kept in tests/cases/loader_reads.json, from which the unit tests compare without any loader.  Pages
are runs: [first page, pages, times, pages from one to the next], so that slices by columns are
short.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pagecache_bpf import templates
from pagecache_bpf.templates import Template
from pagecache_bpf.templates.parallel import Parallel
from pagecache_bpf.weights.models import resolve

PAGE = 4096
Place = tuple[str, int]  # name of a file, number of a page in it
Header = Mapping[str, Any]


def header(path: Path) -> dict[str, Any]:
    """Return the header of a safetensors file, with its length as "bytes" and its tensors."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        found: dict[str, Any] = json.loads(file.read(length))
    found.pop("__metadata__", None)
    return {"bytes": 8 + length, "tensors": found}


def write_hole(path: Path, described: Header) -> None:
    """Write a file with a header that was kept, and a hole for the bytes of its tensors."""
    text = json.dumps(described["tensors"], separators=(",", ":")).encode()
    size = described["bytes"] - 8
    assert len(text) <= size
    ends = [tensor["data_offsets"][1] for tensor in described["tensors"].values()]
    with path.open("wb") as file:
        file.write(struct.pack("<Q", size) + text.ljust(size))
        file.truncate(described["bytes"] + max(ends))


def expected(directory: Path, parallel: Mapping[str, Any], rank: int) -> list[Place]:
    """Return the pages of a rank's derived template, in its order, each once.

    Args:
        directory: the checkpoint's.
        parallel: how many ranks: "tp", "ep", "pp"; and "order", if it is not that of keys().
        rank: which one.
    """
    template = derived(directory, parallel, rank)
    pages: dict[Place, None] = {}
    for extent in template.plain():
        name = template.files[int(extent["file"])].path
        first, length = int(extent["offset"]), int(extent["length"])
        for page in range(first // PAGE, (first + length - 1) // PAGE + 1):
            pages[name, page] = None
    return list(pages)


def derived(directory: Path, parallel: Mapping[str, Any], rank: int) -> Template:
    """Derive the template of a rank; of one rank, that of the only loader."""
    spread = Parallel(parallel["tp"], parallel["ep"], parallel["pp"])
    only = rank if spread.world > 1 else None
    unknown: list[str] = []
    order = parallel.get("order", "keys")
    model = resolve(directory)
    made = templates.derive(model, order, rank=only, parallel=spread, unknown=unknown)
    assert not unknown, f"read whole, since they are not known: {unknown}"
    return made


def tensors_of(pages: Iterable[Place], headers: Mapping[str, Header]) -> list[str]:
    """Return the tensors in the order in which pages of their own were first read.

    Pages that two tensors share say nothing about which of them was read.
    """
    owners: dict[Place, str | None] = {}
    for name, described in headers.items():
        for tensor, entry in described["tensors"].items():
            begin, end = (described["bytes"] + at for at in entry["data_offsets"])
            for page in range(begin // PAGE, -(-end // PAGE)):
                owners[name, page] = None if (name, page) in owners else tensor
    own = (owners.get(page) for page in pages)
    return list(dict.fromkeys(tensor for tensor in own if tensor is not None))


def without(tensors: Iterable[str], end: str | None) -> list[str]:
    """Return tensors but for those with this end of their names."""
    return [name for name in tensors if end is None or not name.endswith(end)]


def packed(pages: Iterable[int]) -> list[list[int]]:
    """Return numbers of pages as runs."""
    runs: list[list[int]] = []
    for page in sorted(pages):
        if runs and page == sum(runs[-1]):
            runs[-1][1] += 1
        else:
            runs.append([page, 1])
    found: list[list[int]] = []
    for first, count in runs:
        last = found[-1] if found else None
        if last and last[1] == count and last[2] == 1:
            last[2:] = [2, first - last[0]]
        elif last and last[1] == count and first == last[0] + last[2] * last[3]:
            last[2] += 1
        else:
            found.append([first, count, 1, 0])
    return found


def unpacked(runs: Iterable[Sequence[int]]) -> set[int]:
    """Return the numbers of pages that packed() was given."""
    return {
        first + time * stride + page
        for first, count, times, stride in runs
        for time in range(times)
        for page in range(count)
    }
