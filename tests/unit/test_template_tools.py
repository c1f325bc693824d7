# SPDX-License-Identifier: Apache-2.0
"""Recording, MAIO's traces, comparisons, and the command."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from pagecache_bpf.cli.verbs import template as verb
from pagecache_bpf.errors import PagecacheError, UsageError
from pagecache_bpf.kernel.file_pages import PAGE_SIZE
from pagecache_bpf.templates import EXTENT, Template, TemplateFile, check, derive, read
from pagecache_bpf.templates.compare import compare
from pagecache_bpf.templates.record import AccessRecorder
from pagecache_bpf.templates.traces import _table, read_trace, render_trace
from pagecache_bpf.weights.models import resolve
from tests.unit import weights
from tests.unit.command import run, undocumented

SHAPES = {"model.2.w": (64, 64), "model.10.w": (64, 64), "model.1.w": (64, 64)}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    at = tmp_path / "model"
    at.mkdir()
    for number in range(2):
        names = {f"{name}{number}": shape for name, shape in SHAPES.items()}
        weights.safetensors(at / f"model-{number}.safetensors", names)
    return at


def pages(template: Template, consumer: int) -> list[tuple[int, int, int]]:
    return [
        (int(e["file"]), int(e["offset"]) // PAGE_SIZE, -(-int(e["length"]) // PAGE_SIZE))
        for e in template.of(consumer)
    ]


def named(paths: list[Path]) -> tuple[list[Path], list[str]]:
    return paths, [path.name for path in paths]


def big_files(root: Path) -> list[Path]:
    paths = [root / name for name in ("a.bin", "b.bin")]
    for path in paths:
        path.touch()
        os.truncate(path, 100 * PAGE_SIZE - 1)
    return paths


def test_recording_joins_orders_and_tells_processes_apart(tmp_path: Path) -> None:
    recorder = AccessRecorder(gap=4)
    for file, tgid, index, nr in [
        *((0, 7, 0, 4), (0, 7, 4, 4), (0, 7, 10, 2)),  # goes on, with a small gap
        *((1, 7, 50, 16), (1, 7, 80, 1)),  # elsewhere, and elsewhere again
        *((0, 8, 90, 10), (0, 8, 86, 2)),  # another process; from the end of a range
        (0, 7, 12, 2),  # goes on where it was before
        (0, 7, 2, 8),  # a repeat
        (1, 7, 40, 20),  # partly a repeat
    ]:
        recorder.add(file, tgid, index, nr)
    template = recorder.template(*named(big_files(tmp_path)), "loader")
    assert pages(template, 0) == [(0, 0, 14), (1, 50, 16), (1, 80, 1), (1, 40, 10)]
    assert pages(template, 1) == [(0, 86, 14)]
    # the last page is not whole
    assert int(template.of(1)["length"][0]) == 14 * PAGE_SIZE - 1
    assert template.source == "recorded" and check(template, tmp_path).whole
    assert [file.path for file in template.files] == ["a.bin", "b.bin"]


def test_sparse_accesses_stay_apart(tmp_path: Path) -> None:
    recorder = AccessRecorder(gap=2)
    for index in range(0, 90, 10):
        recorder.add(0, 1, index, 1)
    template = recorder.template(*named(big_files(tmp_path)), "loader")
    assert pages(template, 0) == [(0, index, 1) for index in range(0, 90, 10)]


def test_accesses_that_are_128_kib_apart_are_joined(tmp_path: Path) -> None:
    far = (128 << 10) // PAGE_SIZE
    recorder = AccessRecorder()
    for index in (0, 1 + far, 3 + 2 * far):
        recorder.add(0, 1, index, 1)
    template = recorder.template(*named(big_files(tmp_path)), "loader")
    assert pages(template, 0) == [(0, 0, 2 + far), (0, 3 + 2 * far, 1)]


def test_strangers_are_not_recorded(tmp_path: Path) -> None:
    recorder = AccessRecorder(wanted=lambda tgid: tgid == 2)
    recorder.add(0, 1, 0, 10)
    with pytest.raises(PagecacheError, match="nothing was recorded"):
        recorder.template(*named(big_files(tmp_path)), "loader")


def test_traces_go_both_ways(root: Path, tmp_path: Path) -> None:
    files = sorted(root.iterdir())
    trace = tmp_path / "trace"
    lines = [f"{files[1]} 0 4096 1", f"{files[1]} 4096 4096 1", f"{files[0]} 100 50 0", ""]
    trace.write_text("\n".join([*lines, f"{files[0]} 0 10 -1", f"{files[1]} 9000 10 1"]) + "\n")
    template = read_trace(trace)
    # A line whose node is left open (-1) is of the reader of the line before.
    assert template.consumers == ("node 1", "node 0")
    assert [int(row["length"]) for row in template.of(0)] == [8192, 10]
    assert check(template, root).whole
    paths = dict(enumerate(root / file.path for file in template.files))
    written = "".join(render_trace(template, paths)).splitlines(keepends=True)
    assert sorted(written) == sorted(
        f"{line}\n"
        for line in (
            *(f"{files[1]} 0 8192 1", f"{files[0]} 100 50 0"),
            *(f"{files[0]} 0 10 0", f"{files[1]} 9000 10 1"),
        )
    )
    trace.write_text("".join(written))
    again = read_trace(trace)
    assert again.distinct == template.distinct


def test_one_reader_keeps_its_order_whatever_the_nodes(root: Path, tmp_path: Path) -> None:
    files = sorted(root.iterdir())
    trace = tmp_path / "trace"
    order = [(0, 0), (1, 4096), (0, 8192), (1, 0), (0, 4096)]
    for nodes in ((-1, -1, -1, -1, -1), (-1, 0, -1, 0, 0), (0, -1, -1, -1, 0)):
        lines = [f"{files[f]} {at} 100 {node}" for (f, at), node in zip(order, nodes, strict=True)]
        trace.write_text("\n".join(lines))
        template = read_trace(trace)
        assert len(template.consumers) == 1
        assert [int(extent["offset"]) for extent in template.of(0)] == [at for _, at in order]
        node = max(nodes)  # open for all, or the one that there is
        paths = dict(enumerate(root / file.path for file in template.files))
        written = "".join(render_trace(template, paths)).splitlines()
        assert [line.rpartition(" ")[2] for line in written] == [str(node)] * len(order)


def test_a_trace_is_read_as_line_by_line(root: Path, tmp_path: Path) -> None:
    """Against the plain way to read such a file, with all that may stand in a path."""
    rng = random.Random(3)
    names = ["a b", "tab\tbed", "0 1 2", "bytes \udcff", " x", "y" * 250]
    for name in names:
        shutil.copyfile(min(root.iterdir()), root / name)
    lines = []
    for number in range(3000):
        offset, length = rng.randrange(10 ** rng.randrange(1, 19)), rng.choice((0, 1, 77, 1 << 10))
        end = rng.choice(("\n", "\n", "\r\n", "\n\n", "\n \n"))
        lines.append(f"{root}/{rng.choice(names)} {offset} {length} {number % 2 - 1}{end}")
    trace = tmp_path / "trace"
    trace.write_bytes(os.fsencode("".join(lines)))
    expected = []
    for line in trace.read_bytes().split(b"\n"):
        words = line.rstrip(b"\r").rsplit(b" ", 3)
        if len(words) == 4 and int(words[2]):
            expected.append((os.fsdecode(words[0]), int(words[1]), int(words[2])))
    paths, table = _table(trace)
    found = [(paths[row["file"]], row["offset"], row["length"]) for row in table]
    assert found == expected and len(expected) > 1000


def test_traces_of_files_that_were_moved(root: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    trace.write_text("/gone/model-0.safetensors 0 100 0\n")
    with pytest.raises(UsageError, match="does not exist"):
        read_trace(trace)
    assert check(read_trace(trace, root), root).whole


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "it has no I/O"),
        ("x\n", "line 1: it is not `PATH OFFSET LENGTH NUMA`"),
        ("f 1 2\n", "line 1: it is not"),
        ("\nf a 1 0\n", "line 1: it is not|line 2: it is not"),
        ("f 1.5 1 0\n", "it is not"),
        *(
            (f"f {number} 1 0\n", "it is not")
            for number in ("1:", "/1", "1234567a", "12345678\0", "-")
        ),
        ("f 123456789012345678: 1 0\n", "it is not"),
        ("f 1:345678901234567 1 0\n", "it is not"),
        ("f -1 1 0\n", "out of range"),
        ("f 0 -1 0\n", "out of range"),
        ("f 0 1 -2\n", "out of range"),
        ("f 0 99999999999999999999 0\n", "it is not"),
        ("f 0 1 " + "0" * 70_000 + "\n", "too long"),
    ],
)
def test_bad_traces(tmp_path: Path, text: str, why: str) -> None:
    trace = tmp_path / "trace"
    trace.write_text(text)
    with pytest.raises(UsageError, match=why):
        read_trace(trace)


def test_a_trace_that_reads_behind_the_end(root: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    trace.write_text(f"{root}/model-0.safetensors 0 {1 << 40} 0\n")
    with pytest.raises(UsageError, match="behind the end"):
        read_trace(trace)


def test_comparisons(root: Path) -> None:
    keys, natural = derive(resolve(root)), derive(resolve(root), "natural")
    assert compare(keys, keys).same
    found = compare(keys, natural)
    assert found.common == keys.size and found.only_left == found.only_right == 0
    assert found.in_order is not None and 0 < found.in_order < found.common and not found.same
    part = Template(keys.files, keys.consumers, keys.extents[:1], "derived", "x")
    found = compare(part, keys)
    assert (found.common, found.only_left) == (part.length, 0)
    assert found.only_right == keys.size - part.length and found.in_order == found.common
    ranks = derive(resolve(root), tp=2)
    assert not compare(keys, ranks).same


def test_the_order_of_large_templates_is_compared_quickly() -> None:
    """The heaviest run in common is found without looking at all pairs."""
    count = 20_000
    files = (TemplateFile("f", count * 10, 0, 0, "00" * 32),)
    rows = np.zeros(count, EXTENT)
    rows["offset"], rows["length"], rows["wanted"] = np.arange(count) * 10, 10, 10
    one = Template(files, ("x",), rows, "derived", "a")
    other = Template(files, ("x",), rows[::-1].copy(), "derived", "b")
    assert compare(one, one).same
    assert compare(one, other).in_order == 10


# The command.


def test_the_command_makes_shows_and_checks(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "t"
    made = run("template", "derive", root, "-o", out, "--json")
    assert (made.code, made.err) == (0, "")
    assert not undocumented(made.data, verb.JSON["template derive"])
    assert made.data["bytes"] == sum(path.stat().st_size for path in root.iterdir())
    printed = run("template", "derive", root)
    assert printed.out == out.read_text()
    shown = run("template", "show", out, "--order", "--json")
    assert not undocumented(shown.data, verb.JSON["template show"])
    assert len(shown.data["order"]) == made.data["extents"]
    assert "derived (safetensors keys)" in run("template", "show", out).out
    fits = run("template", "check", out, root, "--json")
    assert fits.code == 0 and fits.data["fits"]
    weights.safetensors(root / "model-1.safetensors", {"other": (64, 64)})
    fails = run("template", "check", out, root, "--json")
    assert fails.code == 1 and not undocumented(fails.data, verb.JSON["template check"])
    assert fails.data["mismatches"][0]["path"] == "model-1.safetensors"
    assert "model-1.safetensors" in run("template", "check", out, root).out


def test_the_command_converts_and_compares(root: Path, tmp_path: Path) -> None:
    one, other, trace = tmp_path / "one", tmp_path / "other", tmp_path / "trace"
    assert run("template", "derive", root, "-o", one).code == 0
    assert run("template", "derive", root, "--order", "natural", "-o", other).code == 0
    same = run("template", "diff", one, one, "--json")
    assert same.code == 0 and same.data["same"]
    assert not undocumented(same.data, verb.JSON["template diff"])
    assert run("template", "diff", one, other).code == 1
    exported = run("template", "export", one, root, "-o", trace, "--json")
    assert exported.code == 0 and not undocumented(exported.data, verb.JSON["template export"])
    assert exported.data["lines"] == len(trace.read_text().splitlines())
    assert run("template", "export", one, root).out == trace.read_text()
    here = run("template", "export", one)
    assert here.code == 0 and "does not exist; PATH says where the files are" in here.err
    back = run("template", "import", trace, "-o", other, "--json")
    assert back.code == 0 and not undocumented(back.data, verb.JSON["template import"])
    assert read(other).source == "imported"
    assert run("template", "diff", one, other, "--json").data["same"]


def test_wrong_use(root: Path, tmp_path: Path) -> None:
    assert run("template").code == 2
    assert run("template", "derive", root, "--tp", "0").code == 2
    assert run("template", "derive", root, "--tp", "2", "--rank", "2").code == 2
    assert run("template", "derive", root, "--gap", "much").code == 2
    assert run("template", "show", tmp_path / "absent").code == 2
    assert run("template", "record", "--path", root, "-o", tmp_path / "t").code == 2
    names = tmp_path / "names"
    names.write_text("model.2.w0\nother\n")
    listed = run("template", "derive", root, "--list", names)
    assert listed.code == 2 and "'other'" in listed.err


def test_names_that_would_break_a_trace_are_refused(root: Path, tmp_path: Path) -> None:
    source = min(root.iterdir())
    for name in ("a\nb.safetensors", "a\x1b[31m.safetensors"):
        model = tmp_path / f"m{len(list(tmp_path.iterdir()))}"
        model.mkdir()
        shutil.copyfile(source, model / name)
        template = tmp_path / "t"
        assert run("template", "derive", model, "-o", template).code == 0
        done = run("template", "export", template, model)
        assert done.code == 2 and done.out == "" and "control character" in done.err
        assert "\x1b" not in done.err
    model = tmp_path / "bytes"
    model.mkdir()
    shutil.copyfile(source, os.fsencode(model) + b"/\xff.safetensors")
    assert run("template", "derive", model, "-o", template).code == 0
    assert run("template", "export", template, model, "-o", tmp_path / "trace").code == 0
    assert b"\xff.safetensors 0 " in (tmp_path / "trace").read_bytes()
