# SPDX-License-Identifier: Apache-2.0
"""What is read of a policy without loading it, and the checks of its knobs."""

from __future__ import annotations

import random
from contextlib import suppress
from pathlib import Path

import pytest

from pagecache_bpf.errors import PagecacheError, UnsupportedError, UsageError
from pagecache_bpf.policy import catalog
from pagecache_bpf.policy.catalog import Knob, PolicyInfo, find, parse_knobs, read_object
from pagecache_bpf.policy.compiler import compile_policy

SOURCE = r"""// SPDX-License-Identifier: GPL-2.0-only
/*
 * sample - shows what can be declared
 *
 * When to use: never,
 *	it is only read: by tests.
 * Limits: all of them.
 *
 * How: not at all.
 */
#include "policy.bpf.h"

PAGECACHE_KNOB(u32, window_kib, 128, "KiB", 4, 0x1000, "how far, \"ahead\"");
PAGECACHE_KNOB(s64, shift_pages, -5, "pages", -100, 100, "where to");
const volatile u32 not_a_knob = 3;

PAGECACHE_READAHEAD(sample_readahead)
(struct pagecache_ctx *ctx, struct pagecache_answer *answer)
{
	answer->start = ctx->index + shift_pages + not_a_knob;
	answer->nr = window_kib / 4;
	return PAGECACHE_OVERRIDE;
}

PAGECACHE_ACCESS(sample_access)
(struct pagecache_ctx *ctx)
{
}

PAGECACHE_POLICY(sample, .access = (void *)sample_access, .readahead = (void *)sample_readahead);
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("policy") / "sample.bpf.c"
    path.write_text(SOURCE)
    return path


@pytest.fixture(scope="module")
def built(source: Path) -> Path:
    try:
        return compile_policy(source, source.with_suffix(".o"))
    except UnsupportedError as error:
        pytest.skip(str(error))


@pytest.fixture
def info() -> PolicyInfo:
    knobs = (
        Knob("window_kib", "u32", 128, "KiB", 4, 4096, "how far"),
        Knob("shift_pages", "s64", -5, "pages", -100, 100, "where to"),
    )
    return PolicyInfo("sample", "", "", "", ("readahead",), knobs, None, None)


def test_everything_declared_is_found(built: Path, source: Path) -> None:
    found = read_object(built, source)
    assert (found.name, found.object, found.source) == ("sample", built, source)
    assert found.purpose == "shows what can be declared"
    assert found.when == "never, it is only read: by tests."
    assert found.limits == "all of them."
    assert found.hooks == ("readahead", "access")
    assert found.knobs == (
        Knob("window_kib", "u32", 128, "KiB", 4, 4096, 'how far, "ahead"'),
        Knob("shift_pages", "s64", -5, "pages", -100, 100, "where to"),
    )


def test_paths_are_found_compiled_or_not(built: Path, source: Path) -> None:
    assert find(str(built)).source == source
    compiled = find(str(source))
    assert compiled.object is not None
    assert compiled.object != built
    assert compiled.knobs == find(str(built)).knobs


def test_an_object_that_is_no_policy_says_so(tmp_path: Path, source: Path) -> None:
    other = tmp_path / "other.bpf.c"
    other.write_text('#include "policy.bpf.h"\nconst volatile u32 x = 1;\n')
    try:
        obj = compile_policy(other, tmp_path / "other.bpf.o")
    except UnsupportedError as error:
        pytest.skip(str(error))
    with pytest.raises(UsageError, match=r"no table .*PAGECACHE_POLICY"):
        read_object(obj)


@pytest.mark.parametrize("name", ["has.dot", "", "../up", "a b"])
def test_names_that_bpffs_does_not_take_are_refused(tmp_path: Path, built: Path, name: str) -> None:
    data = built.read_bytes()
    assert data.count(b"sample\0" + b"\0" * 25) == 1
    path = tmp_path / "x.bpf.o"
    path.write_bytes(data.replace(b"sample\0" + b"\0" * 25, name.encode().ljust(32, b"\0")))
    with pytest.raises(UsageError, match="its name"):
        read_object(path)


def test_unknown_names_list_the_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("sequential", "noop"):
        (tmp_path / f"{name}.bpf.c").write_text("/* x */")
    monkeypatch.setattr(catalog, "_source_dirs", lambda: [tmp_path])
    monkeypatch.setattr(catalog, "_object_dirs", lambda: [tmp_path])
    with pytest.raises(UsageError, match="no policy maoi: known are noop, sequential") as caught:
        find("maoi")
    assert caught.value.exit_code == 2
    with pytest.raises(PagecacheError, match=r"not built. Run `make bpf`"):
        find("noop")
    assert [info.name for info in catalog.discover()] == ["noop", "sequential"]


def test_paths_that_are_no_policies(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        find(str(tmp_path / "absent.bpf.c"))
    with pytest.raises(UsageError, match="not a file"):
        find(str(tmp_path))
    text = tmp_path / "notes.txt"
    text.write_text("hello")
    with pytest.raises(UsageError, match=r"neither .bpf.c nor .bpf.o"):
        find(str(text))
    wrong = tmp_path / "wrong.bpf.o"
    wrong.write_text("hello")
    with pytest.raises(UsageError, match="not an object file"):
        find(str(wrong))
    with pytest.raises(UsageError, match="not for BPF"):
        read_object(Path("/proc/self/exe").resolve())


def test_shipped_policies_are_complete() -> None:
    shipped = catalog.discover()
    assert {"noop", "sequential"} <= {info.name for info in shipped}
    for info in shipped:
        assert info.source is not None
        assert info.purpose and info.when and info.limits, f"{info.name} lacks its texts"
        for knob in info.knobs:
            assert knob.minimum <= knob.default <= knob.maximum, f"{info.name}: {knob}"
            assert knob.unit and knob.help, f"{info.name}: {knob}"


def test_knobs_are_parsed(info: PolicyInfo) -> None:
    settings = {"window-kib": "0x80", "shift_pages": " -100 "}
    assert parse_knobs(info, settings) == {"window_kib": 128, "shift_pages": -100}
    assert parse_knobs(info, {}) == {}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("window", "1", "no knob window: its knobs are window_kib, shift_pages"),
        ("window_kib", "many", "'many' is not a value .* whole number"),
        ("window_kib", "1.5", "is not a value"),
        ("window_kib", "", "is not a value"),
        ("window_kib", "3", "3 is out of range .* 4 to 4096 KiB"),
        ("window_kib", "4097", "out of range"),
        ("shift_pages", "-101", "out of range .* -100 to 100 pages"),
    ],
)
def test_bad_knobs_say_why(info: PolicyInfo, name: str, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_knobs(info, {name: text})


def test_damaged_objects_end_in_our_error(built: Path, tmp_path: Path) -> None:
    data, path, chance = built.read_bytes(), tmp_path / "bad.bpf.o", random.Random(1)
    for length in range(0, len(data), 97):
        path.write_bytes(data[:length])
        with pytest.raises(PagecacheError):
            read_object(path)
    for _ in range(300):
        bad = bytearray(data)
        for _ in range(chance.choice((1, 4, 30))):
            bad[chance.randrange(len(bad))] = chance.randrange(256)
        path.write_bytes(bad)
        with suppress(PagecacheError):
            read_object(path)
