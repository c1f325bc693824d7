# SPDX-License-Identifier: Apache-2.0
"""Print the table of docs/engines.md, from what `make test-engines` saw."""

from __future__ import annotations

import json
from collections.abc import Sequence

from pagecache_bpf.units import format_size
from tests.engines.starts import TOLD


def main() -> None:
    """Print a line for each engine and way."""
    print("| engine, way | served by | read ahead | cached afterwards | seconds |")
    print("| --- | --- | --- | --- | --- |")
    for name, row in json.loads(TOLD.read_text()).items():
        seconds = ", ".join(f"{phase} {took:.2f}" for phase, took in row["seconds"].items())
        cached = f"{format_size(row['cached'])} of {format_size(row['size'])}"
        ahead = _each(
            [size if isinstance(size, str) else format_size(size) for size in row["prefetched"]]
        )
        print(f"| {name} | {_each(row['verdicts'])} | {ahead} | {cached} | {seconds} |")


def _each(texts: Sequence[str]) -> str:
    """Say what holds for each rank; once where it is the same for all."""
    return texts[0] if len(set(texts)) == 1 else "; ".join(texts)


if __name__ == "__main__":
    main()
