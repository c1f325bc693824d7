# SPDX-License-Identifier: Apache-2.0
"""Names of weight files: their natural order, and what is not complete yet."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagecache_bpf.weights.names import (
    dotted,
    in_natural_order,
    is_unfinished,
    natural,
    split_of,
)

NAMES = st.text("ab-.019", max_size=6)


@given(st.lists(NAMES, max_size=8))
def test_the_short_way_to_the_natural_order_leads_there(names: list[str]) -> None:
    assert in_natural_order(names) == sorted(sorted(names), key=natural)


def test_numbers_are_numbers() -> None:
    names = ["layer-10", "layer-9.b", "layer-9", "layer-9.a", "layer-09", "2", "layer", "10"]
    expected = ["2", "10", "layer", "layer-09", "layer-9", "layer-9.a", "layer-9.b", "layer-10"]
    assert in_natural_order(names) == expected
    shards = [f"model-{number:05}-of-00120.safetensors" for number in range(1, 121)]
    assert in_natural_order(reversed(shards)) == shards
    # More digits than a number may have, and digits that are none.
    assert in_natural_order(["9" * 40, "1" * 41, "\u0664", "\u00b2"])[0] == "1" * 41


def test_the_key_of_transformers() -> None:
    """What core_model_loading.dot_natural_key() of transformers 5.19 made of these names."""
    names = ["2.a", "10.a", "a.norm", "a.norm.weight", "a.norm2.b", "a.norm10.b", "a.norm_b", "b.1"]
    assert sorted(reversed(names), key=dotted) == names
    assert dotted("h.10.c_attn.w1.b2x") == [
        (1, "h"),
        (0, 10),
        (1, "c_attn"),
        (1, "w", 1),
        (1, "b2x"),
    ]
    assert dotted("a." + "7" * 30)[1][0] == 0


@pytest.mark.parametrize(
    ("name", "unfinished"),
    [
        ("a.safetensors.incomplete", True),
        ("model.safetensors.aria2", True),
        ("sha256-0f-partial", True),
        ("sha256-0f-partial-12", True),
        ("sha256-0f", False),
        ("incomplete.safetensors", False),
        ("tmp", False),
    ],
)
def test_what_is_not_complete(name: str, unfinished: bool) -> None:
    assert is_unfinished(name) is unfinished


@pytest.mark.parametrize(
    ("name", "number", "sibling"),
    [
        ("model-00002-of-00012.safetensors", 11, "model-00011-of-00012.safetensors"),
        ("m-Q4-00001-of-00002.gguf", 2, "m-Q4-00002-of-00002.gguf"),
    ],
)
def test_siblings_have_as_many_digits(name: str, number: int, sibling: str) -> None:
    split = split_of(name)
    assert split is not None
    assert split.sibling(number, name) == sibling
