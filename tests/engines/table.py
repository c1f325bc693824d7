# SPDX-License-Identifier: Apache-2.0
"""Print the table of docs/engines.md, from what `make test-engines` saw."""

from __future__ import annotations

import json

from pagecache_bpf.units import format_size
from tests.engines.test_engines import TOLD


def main() -> None:
    """Print a line for each engine and way."""
    print("| engine, way | served by | read ahead | seconds |")
    print("| --- | --- | --- | --- |")
    for name, row in json.loads(TOLD.read_text()).items():
        seconds = ", ".join(f"{phase} {took:.2f}" for phase, took in row["seconds"].items())
        ahead = row["prefetched"]
        ahead = format_size(ahead) if isinstance(ahead, int) else ahead
        print(f"| {name} | {row['verdict']} | {ahead} | {seconds} |")


if __name__ == "__main__":
    main()
