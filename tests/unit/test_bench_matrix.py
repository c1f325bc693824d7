# SPDX-License-Identifier: Apache-2.0
"""The matrix: which cells there are, going on where it stopped, ratios, each reader's bytes."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import pytest

from benchmarks import (
    loaders,
    matrix,
    matrix_cells,
    matrix_readers,
    matrix_show,
    schema,
)
from benchmarks.cachestat import drop
from benchmarks.matrix_cells import AMPLE, BY_NAME, MB, TIGHT, Device, Reader, Setting, paired
from benchmarks.schema import Report, Row
from pagecache_bpf.errors import UsageError
from pagecache_bpf.weights.models import Model
from tests.engines import start
from tests.unit.cold_checkpoints import measurable

NATIVE = Device(128)
SETTING = Setting(NATIVE, 1000 * MB, 1)


def row(loader: str, state: matrix.State, seconds: list[float], read: list[int]) -> Row:
    """Make a row of SETTING as a round makes it."""
    return Row(
        SETTING.name,
        loader,
        "ext4",
        10**9,
        policy=state[0] if state[1] else None,
        engine=state[1] or None,
        seconds=seconds,
        device_bytes_rounds=read,
        extra={
            **SETTING.labels,
            "state": state[0],
            "engine_of_state": state[1],
            "reader_cpu_s": [0.5] * len(seconds),
            "our_cpu_s": [0.25] * len(seconds),
        },
    )


@pytest.mark.parametrize("short", [True, False])
def test_every_cell_is_there_once_with_every_policy_and_engine(short: bool) -> None:
    settings = matrix_cells.settings(short)
    cells = list(matrix_cells.cells(settings, short))
    assert len(set(cells)) == len(cells)
    for setting in settings:
        found = [cell for cell in cells if cell.setting == setting]
        kinds = {(cell.policy, cell.engine) for cell in found}
        engines = {"agent"} if setting.device.native else {"agent", "struct_ops"}
        assert kinds == {(p, e) for p in ("sequential", "maio") for e in engines}
        assert len(found) == len(kinds) * len(matrix_cells.readers(setting, short))


def test_short_form_has_what_it_promises() -> None:
    cells = list(matrix_cells.cells(matrix_cells.settings(True), True))
    assert {cell.setting.device.name for cell in cells} == {"native-128", "native-8192"}
    assert {cell.setting.memory for cell in cells} == {AMPLE, TIGHT}
    shards = {cell.setting.shards for cell in cells if cell.reader.kind != "engine"}
    assert shards == {1, 48}
    assert {cell.reader.kind for cell in cells} == {"whole", "random", "engine"}


@pytest.mark.parametrize("short", [True, False])
def test_engines_load_models_of_their_own_kind(short: bool) -> None:
    found = {
        (cell.reader.name, cell.setting.model)
        for cell in matrix_cells.cells(matrix_cells.settings(short), short)
        if cell.reader.kind == "engine"
    }
    assert found == {("transformers", "llama"), ("vLLM", "llama"), ("llama.cpp", "gguf")}
    for reader in matrix_cells.READERS:
        assert reader.kind != "engine" or matrix_readers.engine_of(reader) in start.ENGINES


def test_reader_that_is_not_installed_is_a_cell_that_says_so() -> None:
    reader = Reader("nothing", "whole", "no-such-program-here")
    assert reader.absent == "not installed"
    assert matrix_cells.absent(reader, SETTING) == "not installed"
    assert not BY_NAME["read 1 MiB"].absent
    module = Reader("nothing", "engine", "no_such_module_here")
    assert module.absent.startswith("not installed: ")


def test_every_reader_of_the_matrix_can_run_or_has_a_reason() -> None:
    for reader in matrix_cells.READERS:
        assert reader.kind != "whole" or reader.name in matrix_readers.WHOLE


def test_readers_can_be_chosen() -> None:
    parse = matrix.make_parser().parse_args
    options = parse(["--short", "--reader", "read 16 MiB", "--reader", "llama.cpp"])
    for setting in matrix.chosen(options):
        names = [reader.name for reader in matrix.usable(options, setting)]
        assert names in ([["read 16 MiB"]] if setting.model == "generated" else [[], ["llama.cpp"]])
    with pytest.raises(UsageError, match="no such cells"):
        matrix.chosen(parse(["--reader", "nobody"]))


def test_ratios_are_of_the_same_round() -> None:
    # The second round's machine was ten times slower for both.
    ratio = paired([1.0, 10.0, 1.0], [0.5, 5.0, 2.0])
    assert ratio is not None
    assert (ratio.low, ratio.median, ratio.high) == (0.5, 0.5, 1.25)
    assert paired([], []) is None
    nothing = paired([0.0], [0.0])
    assert nothing is not None and nothing.median == 1.0
    some = paired([0.0], [4096.0])
    assert some is not None and some.median == math.inf


def test_it_goes_on_with_the_round_that_is_not_whole() -> None:
    names = ["safe_open", "read 1 MiB"]
    rows = [
        row(name, state, [1.0, 1.0], [10**9] * 2)
        for name in names
        for state in matrix.states_of(SETTING)
    ]
    assert matrix.rounds_done(rows, SETTING, names) == 2
    rows[-1].seconds.pop()
    assert matrix.rounds_done(rows, SETTING, names) == 1
    other = row("cp", ("default", ""), [1.0, 1.0], [10**9] * 2)
    matrix.cut([*rows, other], SETTING, names, 1)
    assert len(other.seconds) == 2
    for kept in rows:
        assert len(kept.seconds) == len(kept.extra["our_cpu_s"]) == 1
        assert len(kept.device_bytes_rounds) == 1
    assert matrix.rounds_done(rows[:-1], SETTING, names) == 0
    assert matrix.rounds_done(rows, Setting(NATIVE, 90 * MB, 1), names) == 0


def test_file_of_another_machine_is_not_gone_on_with(tmp_path: Path) -> None:
    options = argparse.Namespace(out=tmp_path / "matrix.json", short=True)
    report = matrix.opened(options)
    schema.write(options.out, report)
    assert matrix.opened(options).machine == report.machine
    report.machine["kernel"] = "another"
    schema.write(options.out, report)
    with pytest.raises(UsageError, match="cannot be gone on with"):
        matrix.opened(options)


def test_cell_above_its_limit_is_named(tmp_path: Path) -> None:
    states = matrix.states_of(SETTING)
    report = Report(
        schema.machine(short=True),
        [
            row("read 1 MiB", states[0], [1.0, 1.0, 1.0], [10**9] * 3),
            row("read 1 MiB", states[1], [0.5, 0.5, 0.5], [10**9] * 3),
            row("read 1 MiB", states[2], [1.5, 1.5, 1.0], [2 * 10**9] * 3),
            row("direct", ("limit", ""), [0.4, 0.4, 0.4], [10**9] * 3),
        ],
    )
    faster, slower = matrix_show.results(report)
    assert faster.over == [] and faster.of_limit == (0.4, 0.8)
    assert slower.over == ["time", "bytes"]
    assert (slower.reader_cpu, slower.our_cpu) == (0.5, 0.25)
    assert len(matrix_show.markdown(report).splitlines()) == 4


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return measurable(tmp_path, 4 << 20)


@pytest.mark.parametrize(
    "reader",
    [r for r in matrix_cells.READERS if r.model == matrix_cells.GENERATED and not r.absent],
    ids=lambda r: r.name,
)
def test_reader_gets_the_right_bytes_and_counts_them(model: Model, reader: Reader) -> None:
    reference = loaders.Reference(model.files)
    wanted = matrix_readers.wanted(reader, model)  # before: it looks into the files
    drop(model.files)
    entered = model.root / "entered"
    outcome = matrix_readers.run(reader, model, reference, entered.touch, 1)
    assert outcome.correct
    assert entered.exists() or reader.kind == "ranks"
    # Nothing is cached, so the device has to give all of it, whoever else reads meanwhile.
    if outcome.device_bytes is not None:
        assert outcome.device_bytes >= wanted


def test_random_places_are_the_same_in_every_state_of_a_round(model: Model) -> None:
    reader = BY_NAME["random 4 KiB pread"]
    first = matrix_readers.places(reader, model, 1)
    assert first == matrix_readers.places(reader, model, 1)
    assert first != matrix_readers.places(reader, model, 2)
    assert len(set(first)) == len(first)
