# SPDX-License-Identifier: Apache-2.0
"""The soak's rules notice what grows, and its readers what is not as it was written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests import soak_figures, soak_files


def samples(name: str, values: list[float]) -> list[dict[str, float]]:
    return [{name: value} for value in values]


@pytest.mark.parametrize(
    ("name", "values", "grows"),
    [
        ("agent descriptors", [80.0] * 12, False),
        ("agent descriptors", [80.0] * 9 + [81.0] * 3, True),
        ("agent descriptors", [80.0] * 15 + [95.0], False),  # one sample is no growth
        ("agent descriptors", [80.0, 81.0, 82.0, 80.0] * 3, False),  # goes up and down
        ("agent anonymous bytes", [24e6 + 4096 * at for at in range(120)], False),
        ("agent anonymous bytes", [24e6 + 100_000 * at for at in range(120)], True),
        ("controller leftover processes", [0.0] * 9 + [1.0] * 3, True),
        ("controller leftover processes", [0.0] * 11 + [1.0], True),
        ("slab mem_cgroup", [84.0] * 6 + [120.0] * 6, False),
        ("slab mem_cgroup", [84.0] * 6 + [900.0] * 6, True),
        ("something else", [1.0, 2.0, 3.0, 4.0, 5.0], False),  # shown only
    ],
)
def test_what_grows_is_noticed(name: str, values: list[float], grows: bool) -> None:
    (verdict,) = soak_figures.judge(samples(name, values))
    assert bool(verdict.grew) == grows
    assert ("GREW" in soak_figures.table([verdict])) == grows


def test_every_figure_of_a_process_has_a_rule() -> None:
    for name in soak_figures.of_processes("agent", os.getpid()):
        assert soak_figures.rule_of(name), name


def test_readers_notice_a_wrong_byte(tmp_path: Path) -> None:
    path, size = tmp_path / "m.safetensors", (1 << 20) + 4096 + 13
    soak_files.write(path, 7, size)
    assert path.stat().st_size == size
    for how in soak_files.HOW:
        assert soak_files.check(how, [str(path), str(tmp_path / "gone")]) == size
    os.truncate(path, 12_345)
    assert soak_files.check("read", [str(path)]) == 12_345
    soak_files.write(path, 8, size)
    for at in (100, 5000, size - 1):
        data = bytearray(path.read_bytes())
        data[at] ^= 1
        path.write_bytes(data)
        for how in soak_files.HOW:
            with pytest.raises(soak_files.WrongBytesError):
                soak_files.check(how, [str(path)])
        soak_files.write(path, 8, size)


def test_the_files_are_weights_to_safetensors(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors", reason="not installed")
    path = tmp_path / "m.safetensors"
    soak_files.write(path, 9, 1 << 20)
    with safetensors.safe_open(path, "np") as file:
        data = b"".join(file.get_tensor(name).tobytes() for name in sorted(file.keys()))
    assert data == path.read_bytes()[soak_files.HEADER_BYTES :]
