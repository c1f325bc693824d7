# SPDX-License-Identifier: Apache-2.0
"""The result files: their shape, atomic writes, the tables and the picture made of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks import cold_load, demo, hosted, load_api, overhead, random_read, schema, show
from benchmarks.cachestat import Sample
from pagecache_bpf.errors import PagecacheError, UsageError
from tests.unit.command import ROOT

KEYS = {
    "case",
    "engine",
    "policy",
    "loader",
    "fs",
    "seconds",
    "median_s",
    "device_bytes",
    "wanted_bytes",
    "limit_s",
    "correct",
}


def row(state: str, seconds: list[float], **more: object) -> schema.Row:
    """A row of the scaled device's kind."""
    policy = "sequential" if state == "attached" else None
    extra = {"state": state, "delay_ms": 20.0, "cap_bytes_per_s": 64_000_000, **more}
    loader = "direct" if state == "limit" else "read"
    return schema.Row(
        "llama", loader, "ext4", 64_000_000, policy, None, seconds, [64_000_000], extra=extra
    )


@pytest.fixture
def report() -> schema.Report:
    """A whole small report, with samples for the picture."""
    rows = [
        row("default", [5.0, 6.0, 7.0], residency=[[0.0, 0], [6.0, 64_000_000]]),
        row("attached", [1.0, 2.0, 9.0], residency=[[-0.1, 0], [0.5, 64_000_000]]),
        row("limit", [1.0, 1.5, 2.0]),
    ]
    for default in rows[:2]:
        default.extra |= {"residency_end_s": 6.0 if default.policy is None else 1.0}
    rows[1].extra |= {"speedup": 3.0, "of_limit": 0.75}
    schema.fill_limits(rows, same=lambda _: None)
    rows.append(row("again", [0.5]))
    rows[-1].policy = "sequential"
    return schema.Report(schema.machine(device={"delay_ms": 20.0}), rows)


def test_shape(report: schema.Report) -> None:
    data = report.as_json()
    assert {"kernel", "cpus", "memory_bytes", "versions", "device"} <= data["machine"].keys()
    for entry in data["rows"]:
        assert entry.keys() >= KEYS
    default, attached, _, _ = data["rows"]
    assert default["policy"] is None
    assert default["median_s"] == 6.0
    assert attached["limit_s"] == 1.5
    assert attached["device_bytes"] == 64_000_000


def test_write_and_read_back(report: schema.Report, tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.json"
    schema.write(path, report)
    assert schema.read(path).as_json() == report.as_json()
    assert [entry.name for entry in path.parent.iterdir()] == ["results.json"]


def test_a_failed_write_leaves_the_old_file(report: schema.Report, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    schema.write(path, report)
    before = path.read_text()
    report.rows[0].extra["bad"] = object()
    with pytest.raises(TypeError):
        schema.write(path, report)
    assert path.read_text() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize("text", ["", "[]", '{"machine": {}}', '{"machine": {}, "rows": [{}]}'])
def test_what_is_no_result_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(PagecacheError):
        schema.read(path)


def test_select_looks_at_fields_and_extras(report: schema.Report) -> None:
    assert report.select(policy="sequential", state="attached") == [report.rows[1]]
    assert report.select(state="nothing") == []


def test_table_fits_80_columns_and_says_it_all(report: schema.Report) -> None:
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    show.print_cold(report, console)
    text = console.export_text()
    assert "\u2026" not in text  # nothing was cut
    for word in ("kernel default", "sequential", "direct I/O", "3.00x", "75%", "5.00-7.00"):
        assert word in text
    assert "byte for byte" in text


def test_other_peoples_loaders_fit_into_the_table(report: schema.Report) -> None:
    for name in ("read after vmtouch -t", "read + prefetch threads", "run:ai streamer"):
        peer = row("peer", [3.0, 4.0])
        peer.loader = name
        report.rows.append(peer)
    theirs = row("again", [2.0])
    theirs.loader = "run:ai streamer"
    report.rows.append(theirs)
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    show.print_cold(report, console)
    text = console.export_text()
    assert "\u2026" not in text
    for words in ("vmtouch -t", "prefetch threads", "sequential again"):
        assert words in text
    assert text.count("run:ai streamer") == 2


def test_one_table_has_both_kernels(report: schema.Report) -> None:
    here = [schema.Row.from_json(row.as_json()) for row in report.rows]
    for measured in here:
        measured.case = "all-MiniLM-L6-v2"
        measured.extra |= {"host": "native", "delay_ms": None, "cap_bytes_per_s": None}
        measured.wanted_bytes = round(min(measured.seconds) * 10.8e9)
        measured.loader = measured.loader.replace("read", "safe_open")
    here[0].extra["state"] = "detached"  # the longest words, and five digits of MB/s
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(show.one_table([*here, *report.rows], "Cold loads"))
    text = console.export_text()
    assert "\u2026" not in text
    assert text.count("3.00x") == 2 and text.index("native") < text.index("guest")


@pytest.mark.parametrize(
    ("memory_gib", "disk_gib", "mib"), [(23, 70, 2048), (8, 70, 1024), (23, 3, 1024), (0, 0, 64)]
)
def test_the_native_checkpoint_fits_the_machine(memory_gib: int, disk_gib: int, mib: int) -> None:
    assert demo.native_size(2 << 30, memory_gib << 30, disk_gib << 30) == mib << 20


def test_wrong_bytes_show_and_fail(
    report: schema.Report, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report.rows[1].correct = False
    options = cold_load.make_parser().parse_args(["--out", str(tmp_path / "r.json")])
    code = hosted.finish(report, options, lambda console: show.print_cold(report, console))
    captured = capsys.readouterr()
    assert code == 1
    assert "WRONG BYTES: read (sequential)" in captured.out
    assert "WRONG BYTES" in captured.err


def test_json_output_is_the_file(
    report: schema.Report, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = cold_load.make_parser().parse_args(["--json", "--out", str(tmp_path / "r.json")])
    assert hosted.finish(report, options, lambda console: None) == 0
    assert json.loads(capsys.readouterr().out) == report.as_json()


def test_picture_is_drawn_and_the_same_each_time(report: schema.Report, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra 'demo'")
    svg, png = demo.draw(report, tmp_path)
    first = svg.read_bytes()
    assert b"<svg" in first
    assert png.read_bytes().startswith(b"\x89PNG")
    demo.draw(report, tmp_path)
    assert svg.read_bytes() == first


def test_picture_without_samples_is_none(report: schema.Report, tmp_path: Path) -> None:
    for measured in report.rows:
        measured.extra.pop("residency", None)
    assert demo.draw(report, tmp_path) == []


def test_summary_gives_both_ratios(report: schema.Report) -> None:
    assert demo.summary(report.rows) == [
        "in the guest, llama by read: 3.0 times faster with sequential, "
        "75% of what direct I/O gets from this device."
    ]


def test_samples_are_named_tuples_of_time_and_bytes() -> None:
    assert Sample(1.0, 2) == Sample(at_s=1.0, resident=2)


def test_guest_gets_the_same_run(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"x")
    words = ["--fs", "xfs", "--delay", "10", "--sweep", "2,40", "--rounds", "7", "--cap", "0"]
    words += ["--loader", "mmap", "--detached-rounds", "1", "--picture", "--model", str(tmp_path)]
    parser = cold_load.make_parser()
    options = parser.parse_args(words)
    inside = parser.parse_args(cold_load.guest_arguments(options, cold_load.inputs(options)))
    assert vars(inside) == vars(options)


def test_a_checkpoint_too_large_for_the_guest_is_refused() -> None:
    with pytest.raises(UsageError, match="too large for this machine"):
        hosted.memory_for(1 << 44)


def test_a_disk_has_room() -> None:
    disk = hosted.disk_for(1 << 30, 64_000_000)
    assert disk.bytes() > 1 << 30
    assert disk.read_bps == 64_000_000


@pytest.mark.parametrize("module", [cold_load, overhead, random_read, load_api, demo])
def test_bad_options_exit_with_2(module: object, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        module.make_parser().parse_args(["--nonsense"])  # type: ignore[attr-defined]
    assert caught.value.code == 2
    assert "--nonsense" in capsys.readouterr().err


def test_errors_become_messages_and_codes(capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> int:
        raise UsageError("what", "why", "fix")

    assert hosted.guarded(fails) == 2
    assert capsys.readouterr().err == "error: what: why. fix\n"


def test_a_reader_that_has_had_enough_is_no_error() -> None:
    """As `head` is, when a list is longer than it wants."""
    code = "from benchmarks import hosted; import sys; " + (
        "sys.exit(hosted.guarded(lambda: [print(n) for n in range(100000)] and 0))"
    )
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_readbench_times_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overhead, "READBENCH", tmp_path / "readbench")
    overhead.build_readbench()
    path = tmp_path / "data"
    path.write_bytes(bytes(2 << 20))
    assert overhead.time_reads(path, "cached pread 4K") > 0
    assert overhead.time_reads(path, "cached mmap") > 0
    with pytest.raises(PagecacheError, match="cached pread 4K failed"):
        overhead.time_reads(tmp_path / "absent", "cached pread 4K")
