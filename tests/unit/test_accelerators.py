# SPDX-License-Identifier: Apache-2.0
"""`doctor` names accelerators with which loading is different."""

from __future__ import annotations

from pagecache_bpf.explain import accelerators
from pagecache_bpf.topology import AMD, NVIDIA, Accelerator, Topology


def found(*there: Accelerator) -> str:
    return accelerators.probe(Topology((), there, (), ())).found


def test_a_card_of_its_own_memory_is_named_and_no_more() -> None:
    assert found() == "none"
    assert found(Accelerator(NVIDIA, "0000:01:00.0", model="H200")) == "H200"


def test_one_memory_is_told() -> None:
    told = found(Accelerator(NVIDIA, "000f:01:00.0", model="GB10", unified=True))
    assert told == f"GB10 {accelerators.UNIFIED}; {accelerators.KEPT}"


def test_rocm_is_told_once() -> None:
    cards = [Accelerator(AMD, f"0000:0{number}:00.0", model="MI355X") for number in range(4)]
    assert found(*cards) == f"MI355X {accelerators.REGISTERED}; {accelerators.KEPT}"
    both = found(Accelerator(AMD, "0000:01:00.0", unified=True))
    assert accelerators.UNIFIED in both and accelerators.REGISTERED in both
