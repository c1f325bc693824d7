# SPDX-License-Identifier: Apache-2.0
"""Print docs/templates.md's table of what vLLM was seen to read, against templates derived now.

`python -m tests.loaders.table [FILE]`; the file is tests/cases/loader_reads.json by default.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from tests.loaders.reads import PAGE, expected, tensors_of, unpacked, write_hole

_CASES = Path(__file__).resolve().parents[1] / "cases" / "loader_reads.json"


def main() -> None:
    """Print a line for each checkpoint."""
    cases = json.loads((Path(sys.argv[1]) if sys.argv[1:] else _CASES).read_text())
    print("| checkpoint | read by rank 0, 1 (MB) | template | left out | too much | order |")
    print("|---|---|---|---|---|---|")
    for name, case in cases.items():
        with tempfile.TemporaryDirectory(dir=".") as scratch:
            directory = Path(scratch)
            for config, content in case["config"].items():
                (directory / config).write_text(json.dumps(content))
            for file, described in case["files"].items():
                write_hole(directory / file, described)
            read, told, left_out, too_much, same = [], [], 0, 0, True
            for rank, found in enumerate(case["ranks"]):
                template = expected(directory, case, rank)
                pages = {
                    (file, page) for file, runs in found["pages"].items() for page in unpacked(runs)
                }
                read.append(f"{len(pages) * PAGE / 1e6:.1f}")
                told.append(f"{len(template) * PAGE / 1e6:.1f}")
                left_out += len(pages - set(template)) * PAGE
                too_much += len(set(template) - pages) * PAGE
                same &= tensors_of(template, case["files"]) == found["tensors"]
        row = [name, ", ".join(read), ", ".join(told), f"{left_out:,}", f"{too_much:,}"]
        print("| " + " | ".join([*row, "the same" if same else "another"]) + " |", flush=True)


if __name__ == "__main__":
    main()
