# SPDX-License-Identifier: Apache-2.0
"""A short part of `make fuzz`, the same each time; it has found what tests/cases/fuzz keeps."""

from __future__ import annotations

from itertools import islice

import pytest

from tests import fuzzing

COUNT = 400


@pytest.mark.parametrize("target", fuzzing.TARGETS)
def test_what_is_right_is_taken_and_what_is_broken_is_refused(target: str) -> None:
    for data in fuzzing.seeds()[target]:
        if target != "wire":  # answers are no requests
            fuzzing.TARGETS[target](data)
    for data in islice(fuzzing.inputs(target, seed=17), COUNT):
        why = fuzzing.attempt(target, data)
        assert why is None, f"{data.hex()}\n{why}"


def test_a_parser_that_fails_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else this would say that all is well, whatever happens."""
    monkeypatch.setitem(fuzzing.TARGETS, "wire", lambda data: data[3])
    found = [fuzzing.attempt("wire", data) for data in islice(fuzzing.inputs("wire", 1), 300)]
    assert any(why and "IndexError" in why for why in found)
