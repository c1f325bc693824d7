# SPDX-License-Identifier: Apache-2.0
"""The text of templates: what is written is read again, everything else is refused."""

from __future__ import annotations

import os
import stat
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pagecache_bpf.errors import PagecacheError, UsageError
from pagecache_bpf.templates import EXTENT, Template, TemplateFile, read, write
from pagecache_bpf.templates.template import MAX_SIZE
from pagecache_bpf.templates.text import render
from pagecache_bpf.weights.identity import MAX_HASHED

FUZZ = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
DIGEST = "ab" * 32


def sample() -> Template:
    files = (
        TemplateFile("a.safetensors", 1000, 0, 100, DIGEST),
        TemplateFile('sub/o dd "name"\n\udcff.bin', 1 << 40, 10, 20, DIGEST),
    )
    rows = [(0, 0, 0, 1000, 900), (0, 1, 5, (1 << 40) - 5, 7), (1, 0, 999, 1, 1)]
    return Template(files, ("rank 0", "r\u00e4nk 1"), np.array(rows, EXTENT), "recorded", "x y", 2)


def same(one: Template, other: Template) -> bool:
    return (
        (one.files, one.consumers, one.source, one.loader, one.tp)
        == (other.files, other.consumers, other.source, other.loader, other.tp)
    ) and np.array_equal(one.extents, other.extents)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "t"
    write(sample(), path)
    assert same(read(path), sample())
    assert path.read_text().startswith("pagecache-bpf template 1\nsource: recorded\n")
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
    assert [path.name for path in tmp_path.iterdir()] == ["t"]


def bounded(size: int, hashed_bytes: int) -> Template:
    """A template of one file of that size."""
    file = TemplateFile("a.bin", size, 0, hashed_bytes, DIGEST)
    return Template((file,), ("r",), np.array([(0, 0, 0, 1, 0)], EXTENT), "recorded", "x", 1)


@pytest.mark.parametrize("hashed_bytes", [0, 1, MAX_HASHED])
def test_the_largest_file_and_hashed_part_are_taken(tmp_path: Path, hashed_bytes: int) -> None:
    template = bounded(MAX_SIZE, hashed_bytes)
    write(template, tmp_path / "t")
    assert same(read(tmp_path / "t"), template)


@pytest.mark.parametrize(("size", "hashed_bytes"), [(MAX_SIZE + 1, 0), (MAX_SIZE, MAX_HASHED + 1)])
def test_what_is_larger_is_refused(tmp_path: Path, size: int, hashed_bytes: int) -> None:
    (tmp_path / "t").write_bytes(
        b"".join(render(bounded(1000, 100)))
        .replace(b"1000", str(size).encode())
        .replace(b"100 ", f"{hashed_bytes} ".encode())
    )
    with pytest.raises(UsageError, match=r"has \d+ bytes|the hashed part of .* does not lie"):
        read(tmp_path / "t")


@st.composite
def templates(draw: st.DrawFn) -> Template:
    sizes = draw(st.lists(st.integers(1, 1 << 50), min_size=1, max_size=4))
    names = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1)
    consumers = draw(st.lists(names, min_size=1, max_size=3))
    rows = []
    for _ in range(draw(st.integers(0, 8))):
        file = draw(st.integers(0, len(sizes) - 1))
        offset = draw(st.integers(0, sizes[file] - 1))
        length = draw(st.integers(1, sizes[file] - offset))
        consumer = draw(st.integers(0, len(consumers) - 1))
        rows.append((consumer, file, offset, length, draw(st.integers(0, length))))
    files = tuple(TemplateFile(f"f{n}", size, 0, 1, DIGEST) for n, size in enumerate(sizes))
    source = draw(st.sampled_from(["derived", "recorded", "imported"]))
    return Template(
        files,
        tuple(consumers),
        np.array(sorted(rows), EXTENT),
        source,
        "any",
        draw(st.integers(1, 9)),
    )


@FUZZ
@given(template=templates())
def test_any_template_survives(tmp_path: Path, template: Template) -> None:
    write(template, tmp_path / "t")
    assert same(read(tmp_path / "t"), template)


LINES = b"".join(render(sample())).decode().splitlines(keepends=True)


def changed(number: int, text: str) -> str:
    return "".join([*LINES[:number], text, *LINES[number + 1 :]])


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("", "line 1: the file ends too early"),
        ("hello\n", "line 1: it does not start with"),
        (
            changed(0, "pagecache-bpf template 2\n"),
            "version '2'; this pagecache-bpf reads version 1",
        ),
        (changed(1, "source: guessed\n"), "its source is none of"),
        (changed(1, ""), "line 2: a line source: was expected"),
        (changed(3, "tp: -1\n"), "'-1' is not a number"),
        (changed(3, "tp: 1e3\n"), "'1e3' is not a number"),
        (changed(3, "tp: \u0663\n"), "is not a number"),
        (changed(4, f"file: 10 0 5 {DIGEST} a\n"), "line 5: a quoted text was expected"),
        (changed(4, f"file: 10 0 5 {DIGEST} NaN\n"), "a quoted text was expected"),
        (changed(4, f'file: 10 0 5 {DIGEST[:-1]}X "a"\n'), "it is not `file:"),
        (changed(4, f'file: 99999999999999999999 0 5 {DIGEST} "a"\n'), "is not a number"),
        (changed(4, f'file: 10 0 50 {DIGEST} "a"\n'), "hashed part .* does not lie in the file"),
        (changed(4, f'file: 0 0 0 {DIGEST} "a"\n'), "has 0 bytes"),
        (changed(4, f'file: 9 0 5 {DIGEST} "../a"\n'), "not below the model's directory"),
        (changed(4, f'file: 9 0 5 {DIGEST} "/a"\n'), "not below the model's directory"),
        (changed(4, f'file: 9 0 5 {DIGEST} "a\\u0000"\n'), "not below the model's directory"),
        (changed(4, LINES[5]), "names a file twice"),
        (
            changed(4, "") and changed(8, "extents: 99999999999\n"),
            "is not a number up to 4,194,304",
        ),
        (changed(8, "extents: 2\n"), "more than the 2 extents"),
        (changed(8, "extents: 4\n"), "line 14: it is not an extent"),
        (changed(10, "0 0 0 -1 0\n"), "line 11: it is not an extent"),
        (changed(10, "0 0 0 1\n"), "it is not an extent"),
        (changed(10, "0 0 0 1.0 0\n"), "it is not an extent"),
        (changed(10, "0 0 0 1 0 # x\n"), "it is not an extent"),
        (changed(10, "0 7 0 1 0\n"), "a file that there is not"),
        (changed(10, "7 0 0 1 0\n"), "a consumer that there is not"),
        (changed(10, "1 0 0 1 0\n"), "not grouped by consumer"),
        (changed(10, "0 0 0 0 0\n"), "extent 0 does not lie in its file"),
        (changed(10, "0 0 1000 1 0\n"), "does not lie in its file"),
        (changed(10, "0 0 999 2 0\n"), "does not lie in its file"),
        (changed(10, f"0 0 1 {(1 << 63) - 1} 0\n"), "does not lie in its file"),
        (changed(10, f"{1 << 32} 0 0 1 0\n"), "out of range"),
        (changed(10, "0 0 0 1 2\n"), "more bytes of an extent are wanted"),
        ("".join(LINES[:-1]), "the file ends too early"),
        ("".join(LINES) + "x", "something follows the end"),
        ("".join(LINES)[:-1], "the file ends too early"),
        (changed(2, "loader: " + "x" * 20_000 + "\n"), "line 3: it is too long"),
    ],
)
def test_damage_is_named(tmp_path: Path, content: str, why: str) -> None:
    path = tmp_path / "t"
    path.write_text(content)
    with pytest.raises(UsageError, match=why) as caught:
        read(path)
    assert str(path) in caught.value.what


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "t"
    path.write_bytes(b"pagecache-bpf template 1\nsource: \xff\n")
    with pytest.raises(UsageError, match="line 2: it is not UTF-8"):
        read(path)


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "t"
    path.touch()
    os.truncate(path, 2 << 30)
    tracemalloc.start()
    with pytest.raises(UsageError, match="larger than 512 MiB"):
        read(path)
    os.truncate(path, 400 << 20)
    with pytest.raises(UsageError, match="line 1"):
        read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_places_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        read(tmp_path / "absent")
    with pytest.raises(UsageError, match="cannot be written"):
        write(sample(), tmp_path / "absent" / "t")
    with pytest.raises(UsageError, match="cannot be read"):
        read(tmp_path)


@FUZZ
@given(data=st.data())
def test_damaged_text_ends_in_our_error(tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(b"".join(render(sample())))
    for _ in range(data.draw(st.integers(1, 5))):
        at = data.draw(st.integers(0, len(content) - 1))
        piece = data.draw(st.binary(max_size=4) | st.sampled_from([b"\n", b"-1", b"9" * 30, b" "]))
        content[at : at + data.draw(st.integers(0, 4))] = piece
    path = tmp_path / "t"
    path.write_bytes(content)
    try:
        template = read(path)
    except PagecacheError as error:
        assert error.what
        return
    sizes = np.array([file.size for file in template.files], np.uint64)
    ends = template.extents["offset"] + template.extents["length"]
    assert np.all(ends <= sizes[template.extents["file"]])
