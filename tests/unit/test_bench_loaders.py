# SPDX-License-Identifier: Apache-2.0
"""Loaders deliver the right bytes, wrong ones are noticed, failures are told."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from benchmarks import checkpoints, disks, loaders, rounds
from benchmarks.cachestat import drop, resident_pages
from benchmarks.directio import Plan, read_whole
from pagecache_bpf.errors import PagecacheError
from pagecache_bpf.weights.models import Model
from tests.unit.cold_checkpoints import measurable


@pytest.fixture
def llama(tmp_path: Path) -> Model:
    """A small checkpoint whose pages can be evicted and read directly."""
    return measurable(tmp_path, 2 << 20)


@pytest.mark.parametrize("name", loaders.LOADERS)
def test_loader_gets_every_byte_right(llama: Model, name: str) -> None:
    reference = loaders.Reference(llama.files)
    outcome = loaders.run_loader(name, llama.files, reference)
    assert outcome.correct
    assert outcome.seconds > 0
    headers = sum(
        min(offset for offset, _ in checkpoints.data_offsets(path).values()) for path in llama.files
    )
    wanted = llama.size - headers if name == "safe_open" else llama.size
    assert outcome.loaded_bytes == wanted


@pytest.mark.parametrize("name", loaders.LOADERS)
def test_one_wrong_byte_is_noticed(llama: Model, name: str) -> None:
    reference = loaders.Reference(llama.files)
    with llama.files[1].open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    assert not loaders.run_loader(name, llama.files, reference).correct


@pytest.mark.parametrize("plan", [Plan(64 << 10, 1), Plan(1 << 20, 8)])
def test_direct_io_reads_all_and_leaves_the_cache_alone(llama: Model, plan: Plan) -> None:
    drop(llama.files)
    outcome = loaders.run_direct(llama.files, loaders.Reference(llama.files), plan)
    assert outcome.correct
    assert outcome.loaded_bytes == llama.size
    assert sum(map(resident_pages, llama.files)) == 0


def test_reference_is_what_a_plain_read_gets(llama: Model) -> None:
    for path, content in zip(llama.files, loaders.Reference(llama.files).contents, strict=True):
        assert bytes(content) == path.read_bytes()


def test_a_failing_loader_says_what_failed(llama: Model) -> None:
    reference = loaders.Reference(llama.files)
    llama.files[0].write_bytes(b"\0" * 4096)
    with pytest.raises(PagecacheError, match="loading with safe_open failed: SafetensorError"):
        loaders.run_loader("safe_open", llama.files, reference)


class Recorder:
    """A Control that only remembers; `fail` makes attaching raise."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def attach(self, policy: str, root: Path) -> None:
        self.calls.append(f"attach {policy}")

    def detach(self, policy: str, root: Path) -> None:
        self.calls.append(f"detach {policy}")


def test_the_device_counts_what_it_reads(llama: Model) -> None:
    path = llama.files[0]
    before = disks.device_bytes_read(path)
    if before is None:
        pytest.skip(f"{path} is on no block device")
    read_whole(path)
    after = disks.device_bytes_read(path)
    assert after is not None and after - before >= path.stat().st_size


def own_reads(_: Path) -> int | None:
    """What this process had read from devices, whatever others read beside it."""
    try:
        text = Path("/proc/self/io").read_text()
    except OSError:  # a kernel that does not count
        return None
    return int(text.partition("\nread_bytes: ")[2].split()[0])


def test_rounds_measure_every_state_cold(llama: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "device_bytes_read", own_reads)
    control = Recorder()
    case = rounds.new_case(llama, "any", llama, delay_ms=0)
    plan = Plan(1 << 20, 2)
    other = {"other loader": partial(loaders.run_loader, "read", case.files, case.reference)}
    rows = rounds.interleave(case, "p", control, ["read"], 3, plan, detached_rounds=1, others=other)
    by_state = {row.extra["state"]: row for row in rows if row.loader != "other loader"}
    theirs = {row.extra["state"]: len(row.seconds) for row in rows if row.loader == "other loader"}
    assert theirs == {"peer": 3, "again": 1}
    assert {state: len(row.seconds) for state, row in by_state.items()} == {
        "default": 3,
        "attached": 3,
        "detached": 1,
        "limit": 3,
        "again": 1,
        "warm": 1,
    }
    assert control.calls == ["attach p", "detach p"] * 4
    assert by_state["attached"].policy == "p"
    assert by_state["detached"].policy is None
    assert all(row.correct for row in rows)
    cold = by_state["default"].device_bytes
    if cold is not None:
        assert cold >= llama.size
        assert by_state["warm"].device_bytes == by_state["again"].device_bytes == 0
    assert by_state["attached"].extra["speedup"] > 0
    assert by_state["default"].limit_s == by_state["limit"].median_s


def test_the_policy_goes_when_a_round_fails(llama: Model) -> None:
    control = Recorder()
    with pytest.raises(KeyboardInterrupt), rounds.attached(control, "p", llama.root):
        raise KeyboardInterrupt
    assert control.calls == ["attach p", "detach p"]


def test_a_damaged_copy_is_not_measured(llama: Model, tmp_path: Path) -> None:
    copy = checkpoints.copy_to(llama, tmp_path / "copy")
    rounds.new_case(copy, "any", llama)
    with copy.files[0].open("r+b") as file:
        file.write(b"\1")
    with pytest.raises(PagecacheError, match="damaged"):
        rounds.new_case(copy, "any", llama)
