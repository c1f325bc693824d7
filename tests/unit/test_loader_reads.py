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

from tests.loaders.reads import tensors_of, unpacked, without
from tests.loaders.table import CASES as RECORDED
from tests.loaders.table import HEAD, row, told

CASES: dict[str, Any] = json.loads(RECORDED.read_text())
DOCS = (Path(__file__).resolve().parents[2] / "docs" / "templates.md").read_text().splitlines()


@pytest.mark.parametrize("name", CASES)
def test_the_template_is_what_was_read(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    # Of GPTQ a template has the order of groups, too, which this release of vLLM does not read.
    more = case.get("more")
    templates = told(tmp_path, case)
    for rank, read in enumerate(case["ranks"]):
        template = templates[rank]
        pages = {(file, page) for file in case["files"] for page in unpacked(read["pages"][file])}
        assert not pages - set(template), rank
        too_much = set(template) - pages
        assert not (
            too_much if more is None else without(tensors_of(too_much, case["files"]), more)
        )
        names = tensors_of(template, case["files"])
        assert without(names, more) == without(read["tensors"], more)
    assert row(name, case, templates) in DOCS


def test_the_table_of_the_documentation_has_no_other_lines() -> None:
    begin = DOCS.index(HEAD[0]) + len(HEAD)
    table = DOCS[begin : DOCS.index("", begin)]
    assert [line.split(" | ")[0].removeprefix("| ") for line in table] == list(CASES)
