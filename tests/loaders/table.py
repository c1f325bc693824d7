# SPDX-License-Identifier: Apache-2.0
"""Print docs/templates.md's table of what vLLM was seen to read, against templates derived now.

`python -m tests.loaders.table [FILE]`; the file is tests/cases/loader_reads.json by default.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.loaders.reads import PAGE, Place, expected, tensors_of, unpacked, without, write_hole

CASES = Path(__file__).resolve().parents[1] / "cases" / "loader_reads.json"
HEAD = (
    "| checkpoint | read by each rank (MB) | template | left out | too much | order |",
    "|---|---|---|---|---|---|",
)


def told(directory: Path, case: Mapping[str, Any]) -> list[list[Place]]:
    """Derive the templates of both ranks.

    Args:
        directory: an empty one, for files of holes.
        case: what was recorded of a checkpoint.

    Returns:
        The pages of each rank in the template's order.
    """
    for config, content in case["config"].items():
        (directory / config).write_text(json.dumps(content))
    for file, described in case["files"].items():
        write_hole(directory / file, described)
    return [expected(directory, case, rank) for rank in range(len(case["ranks"]))]


def row(name: str, case: Mapping[str, Any], templates: Sequence[Sequence[Place]]) -> str:
    """Return the table's line of a checkpoint; templates: what told() has returned."""
    read, derived, left_out, too_much, same = [], [], 0, 0, True
    for found, template in zip(case["ranks"], templates, strict=True):
        pages = {(file, page) for file, runs in found["pages"].items() for page in unpacked(runs)}
        read.append(f"{len(pages) * PAGE / 1e6:.1f}")
        derived.append(f"{len(template) * PAGE / 1e6:.1f}")
        left_out += len(pages - set(template)) * PAGE
        too_much += len(set(template) - pages) * PAGE
        names = without(tensors_of(template, case["files"]), case.get("more"))
        same &= names == without(found["tensors"], case.get("more"))
    cells = [name, ", ".join(read), ", ".join(derived), f"{left_out:,}", f"{too_much:,}"]
    return "| " + " | ".join([*cells, "the same" if same else "another"]) + " |"


def main() -> None:
    """Print a line for each checkpoint."""
    cases = json.loads((Path(sys.argv[1]) if sys.argv[1:] else CASES).read_text())
    print(*HEAD, sep="\n")
    for name, case in cases.items():
        with tempfile.TemporaryDirectory(dir=".") as scratch:
            print(row(name, case, told(Path(scratch), case)), flush=True)


if __name__ == "__main__":
    main()
