# SPDX-License-Identifier: Apache-2.0
"""Derived templates against what vLLM was seen to read, as `make test-loaders` has recorded it.

Files are holes with the headers that the loaded checkpoints had; the pages are those that came into
the page cache while each rank loaded, and the order is that of the tensors.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.loaders.reads import expected, tensors_of, unpacked, write_hole

CASES: dict[str, Any] = json.loads(
    (Path(__file__).resolve().parents[1] / "cases" / "loader_reads.json").read_text()
)


@pytest.mark.parametrize("name", CASES)
def test_the_template_is_what_was_read(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    for config, content in case["config"].items():
        (tmp_path / config).write_text(json.dumps(content))
    for file, described in case["files"].items():
        write_hole(tmp_path / file, described)
    for rank, read in enumerate(case["ranks"]):
        template = expected(tmp_path, case, rank)
        for file in case["files"]:
            pages = {page for path, page in template if path == file}
            assert pages == unpacked(read["pages"][file]), (file, rank)
        assert tensors_of(template, case["files"]) == read["tensors"]
