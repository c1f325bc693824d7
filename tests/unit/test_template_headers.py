# SPDX-License-Identifier: Apache-2.0
"""Headers of weight files: what lies where, and every way in which they can be wrong."""

from __future__ import annotations

import json
import os
import struct
import sys
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from pagecache_bpf.errors import PagecacheError, UsageError
from pagecache_bpf.templates import derive
from pagecache_bpf.weights import contents, formats, weight_format
from pagecache_bpf.weights.contents import Contents
from pagecache_bpf.weights.headers import parse
from pagecache_bpf.weights.models import resolve
from tests.unit import weights

FUZZ = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def places(contents: Contents) -> dict[str, tuple[int, int]]:
    pairs = zip(contents.offsets.tolist(), contents.lengths.tolist(), strict=True)
    return dict(zip(contents.names, pairs, strict=True))


def test_safetensors_as_the_library_writes_them(tmp_path: Path) -> None:
    tensors: dict[str, Any] = {
        "b": np.arange(12, dtype=np.float32).reshape(3, 4),
        "a": np.arange(7, dtype=np.int64),
        "empty": np.zeros((0, 4), np.float16),
    }
    path = tmp_path / "x.safetensors"
    save_file(tensors, path)
    data, found = path.read_bytes(), places(parse(path))
    assert found.keys() == tensors.keys()
    for name, (offset, length) in found.items():
        assert data[offset : offset + length] == tensors[name].tobytes()


def test_safetensors_shapes(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    expected = weights.safetensors(path, {"z": (4, 2), "a": (3,)})
    contents = parse(path)
    assert places(contents) == expected
    assert contents.shapes == [(4, 2), (3,)] and contents.itemsize == [2, 2]
    assert contents.header_bytes == expected["z"][0]


def entry(**changes: object) -> bytes:
    values = {"dtype": "F16", "shape": [2], "data_offsets": [0, 4], **changes}
    return json.dumps({"t": values}).encode()


@pytest.mark.parametrize(
    ("header", "why"),
    [
        (b"", "header would have 0 bytes"),
        (b"[]", "not a JSON object"),
        (b"{ ", "not the JSON of safetensors"),
        (b'{"t": NaN}', "NaN is no JSON"),
        (b'{"t": 1.5}', "not described by an object"),
        (entry(shape=[1.5]), "not a list of sizes"),
        (b'{"t": -Infinity}', "-Infinity is no JSON"),
        (b'{"t": {}, "t": {}}', "names 't' twice"),
        (b'{"t": {"a": 1, "a": 2}}', "names 'a' twice"),
        (b'{"\xff": 1}', "not UTF-8"),
        (b'{"t": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"t": ' + b"9" * 5000 + b"}", "not the JSON of safetensors|not described"),
        (b'{"t": 3}', "not described by an object"),
        (entry(data_offsets=[4, 0]), "not two numbers in order"),
        (entry(data_offsets=[-4, 0]), "not two numbers in order"),
        (entry(data_offsets=[0]), "not two numbers in order"),
        (entry(data_offsets=["0", "4"]), "not two numbers in order"),
        (entry(data_offsets=[False, True]), "not two numbers in order"),
        (entry(data_offsets=[0, 1 << 70], shape=[1 << 69]), "ends behind the file's end"),
        (entry(data_offsets=[0, 400], shape=[200]), "ends behind the file's end"),
        (entry(shape=[3]), "do not make 4 bytes"),
        (entry(shape=[1 << 62, 1 << 62, 1 << 62]), "do not make 4 bytes"),
        (entry(shape="x"), "not a list of sizes"),
        (entry(shape=[-2]), "not a list of sizes"),
        (entry(dtype=5), "no dtype"),
        (
            b'{"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]},'
            b' "b": {"dtype": "U8", "shape": [4], "data_offsets": [3, 7]}}',
            "'a' and 'b' overlap",
        ),
    ],
)
def test_bad_safetensors(tmp_path: Path, header: bytes, why: str) -> None:
    path = weights.raw_safetensors(tmp_path / "x.safetensors", header)
    with pytest.raises(PagecacheError, match=why) as caught:
        parse(path)
    assert caught.value.docs.endswith("#is-damaged")


@pytest.mark.parametrize(
    ("length", "size", "why"),
    [
        (1 << 63, 100, "header would have"),
        ((1 << 64) - 1, 100, "header would have"),
        (93, 100, "header would have 93 bytes, the file has 100"),
        (2 << 30, (2 << 30) + 100, "100,000,000 are allowed"),
    ],
)
def test_lengths_that_are_not_believed(tmp_path: Path, length: int, size: int, why: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}")
    os.truncate(path, size)  # the rest is a hole
    tracemalloc.start()
    with pytest.raises(PagecacheError, match=why):
        parse(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


def test_a_header_of_many_small_values_is_refused_before_it_is_parsed(tmp_path: Path) -> None:
    header = b'{"a":[' + b"[]," * (3 * contents.MAX_TENSORS) + b"[]]}"
    header += b"," * (4 * contents.MAX_TENSORS)
    path = weights.raw_safetensors(tmp_path / "x.safetensors", header)
    tracemalloc.start()
    with pytest.raises(PagecacheError, match="more than 8,388,608 values"):
        parse(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 << 20


def test_truncated_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    weights.safetensors(path, {"a": (16,), "b": (4, 4)})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(PagecacheError):
            parse(path)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("alignment", [None, 64])
@pytest.mark.parametrize("version", [2, 3])
def test_gguf(tmp_path: Path, version: int, alignment: int | None, order: str) -> None:
    path = tmp_path / "x.gguf"
    tensors = [("q4", (64, 2), 2, 0), ("f16", (8, 4), 1, 128), ("new", (64,), 99, 256)]
    base = weights.gguf(path, tensors, version=version, alignment=alignment, order=order)
    contents = parse(path)
    # 2 rows of 2 blocks of 18 bytes; 32 halves; of an unknown type what is there.
    assert places(contents) == {
        "q4": (base, 72),
        "f16": (base + 128, 64),
        "new": (base + 256, 4096 - 256),
    }
    assert contents.shapes[1] == (4, 8) and contents.itemsize == [0, 2, 0]


def gguf_header(tensors: int = 0, keys: int = 0, version: int = 3, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + rest


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"GGUF", "goes on behind"),
        (gguf_header(version=1), "version 1 of GGUF"),
        (gguf_header(tensors=1 << 60), "tensors and"),
        (gguf_header(keys=1 << 60), "tensors and"),
        (gguf_header(tensors=5), "goes on behind"),
        (gguf_header(keys=1, rest=struct.pack("<Q", 1 << 40)), "a name would have"),
        (gguf_header(keys=1, rest=struct.pack("<Q", 2) + b"\xff\xff"), "not UTF-8"),
        (
            gguf_header(keys=1, rest=weights.string("k") + struct.pack("<IQ", 8, 1 << 62)),
            "goes on behind",
        ),
        (
            gguf_header(keys=1, rest=weights.string("k") + struct.pack("<IIQ", 9, 8, 1 << 62)),
            "goes on behind",
        ),
        (
            gguf_header(keys=1, rest=weights.string("k") + struct.pack("<IIQ", 9, 10, 1 << 62)),
            "goes on behind",
        ),
        (
            gguf_header(
                keys=1,
                rest=weights.string("k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 99,
            ),
            "array of type 9",
        ),
        (gguf_header(keys=1, rest=weights.string("k") + struct.pack("<I", 77)), "type 77"),
        (
            gguf_header(
                keys=1, rest=weights.string("general.alignment") + struct.pack("<II", 4, 0)
            ),
            "alignment would be 0",
        ),
        (
            gguf_header(tensors=1, rest=weights.string("t") + struct.pack("<I", 99)),
            "99 dimensions",
        ),
        (
            gguf_header(
                tensors=1, rest=weights.string("t") + struct.pack("<IQIQ", 1, 4, 0, 1 << 63)
            ),
            "begins behind",
        ),
        (
            gguf_header(
                tensors=1,
                rest=weights.string("t") + struct.pack("<IQQIQ", 2, 1 << 63, 8, 0, 0) + bytes(64),
            ),
            "ends behind",
        ),
    ],
)
def test_bad_gguf(tmp_path: Path, data: bytes, why: str) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    with pytest.raises(PagecacheError, match=why):
        parse(path)


def test_overlapping_gguf(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    weights.gguf(path, [("a", (64,), 0, 0), ("b", (64,), 0, 128)])
    with pytest.raises(PagecacheError, match="'a' and 'b' overlap"):
        parse(path)


def torch_zip(path: Path, storages: int = 12, method: int = zipfile.ZIP_STORED) -> dict[str, bytes]:
    """A checkpoint as torch.save() lays it out: members are aligned by an extra field."""
    written = {}
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}q\x00.")
        # Older versions sort the keys as text, loading goes by their numbers.
        for number in sorted(range(storages), key=str):
            data = bytes([number]) * (100 + number)
            info = zipfile.ZipInfo(f"archive/data/{number}")
            info.extra = struct.pack("<HH", 0x4246, 20) + bytes(20)
            info.compress_type = method
            archive.writestr(info, data)
            written[f"data/{number}"] = data
        archive.writestr("archive/version", b"3\n")
    return written


def test_torch_zip(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    written = torch_zip(path)
    data, contents = path.read_bytes(), parse(path)
    assert contents.names == [f"data/{number}" for number in range(12)]
    for name, (offset, length) in places(contents).items():
        assert data[offset : offset + length] == written[name]


def test_torch_zip_that_is_compressed(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch_zip(path, method=zipfile.ZIP_DEFLATED)
    with pytest.raises(UsageError, match="is compressed"):
        parse(path)


@pytest.mark.parametrize("content", [b"\x80\x02}q\x00.", b"hello world, this is text"])
def test_other_formats(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="no template can be derived"):
        parse(path)


def test_other_zip_files(tmp_path: Path) -> None:
    path = tmp_path / "model.npz"
    np.savez(path, a=np.zeros(3))
    with pytest.raises(UsageError, match="without PyTorch's storages"):
        parse(path)


def test_a_zip_directory_that_is_huge(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch_zip(path)
    data = bytearray(path.read_bytes())
    end = data.rfind(b"PK\x05\x06")
    size = 1 << 30
    path.write_bytes(data[:end])
    with path.open("r+b") as file:
        file.truncate(size)
        file.seek(size)
        data[end + 12 : end + 20] = struct.pack("<II", size - 100, 10)
        file.write(data[end:])
    tracemalloc.start()
    with pytest.raises(PagecacheError, match="directory would have"):
        parse(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


def _gguf_sample(path: Path) -> None:
    weights.gguf(path, [("a", (64, 2), 2, 0), ("b", (8, 4), 1, 128)])


def _safetensors_sample(path: Path) -> None:
    weights.safetensors(path, {"model.a": (4, 8), "model.b": (16,), "c": (2, 2)})


def _torch_sample(path: Path) -> None:
    torch_zip(path)


@pytest.mark.parametrize("make", [_safetensors_sample, _gguf_sample, _torch_sample])
@FUZZ
@given(data=st.data())
def test_damaged_files_end_in_our_error(
    tmp_path: Path, make: Callable[[Path], None], data: st.DataObject
) -> None:
    """Whatever is changed: extents inside of the file, or PagecacheError."""
    path = tmp_path / "x.safetensors"
    make(path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        if data.draw(st.booleans()):
            value = data.draw(st.sampled_from([0, (1 << 64) - 1, 1 << 63, 1 << 31, 255]))
            content[at : at + 8] = struct.pack("<Q", value)
        else:
            content[at] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(len(content) // 2, len(content)))])
    check_parsed(path)


@FUZZ
@given(content=st.binary(max_size=400), start=st.sampled_from([b"", b"GGUF", b"PK\x03\x04"]))
def test_random_files_end_in_our_error(tmp_path: Path, content: bytes, start: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(start + content)
    check_parsed(path)


@FUZZ
@given(
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=12), inner),
        max_leaves=12,
    )
)
def test_random_json_ends_in_our_error(tmp_path: Path, value: object) -> None:
    header = json.dumps({"t": {"dtype": "F16", "shape": value, "data_offsets": value}, "u": value})
    check_parsed(weights.raw_safetensors(tmp_path / "x.safetensors", header.encode()))


def check_parsed(path: Path) -> None:
    try:
        contents = parse(path)
    except PagecacheError as error:
        assert error.what and error.why
        return
    ends = contents.offsets + contents.lengths
    assert np.all(contents.offsets >= 0) and np.all(ends <= path.stat().st_size)


PLAIN = """
import os

from pagecache_bpf.weights.contents import Contents
from pagecache_bpf.weights.weight_format import WeightFormat


def parse(path, fd, size):
    import numpy as np

    count = os.pread(fd, 5, 0)[4]
    lengths = np.array([*os.pread(fd, count, 5)], np.int64)
    offsets = 5 + count + np.cumsum(lengths) - lengths
    names = [f"part.{number}" for number in range(count)]
    return Contents(path, size, "plain", names, offsets, lengths, 0, 5 + count)


FORMATS = (WeightFormat("plain", ("plain",), 5, "a plain file", magic=b"PLN1", parse=parse),)
"""


def test_a_new_format_is_one_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is resolved, preferred, parsed and derived of without a change anywhere else."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "plain_files.py").write_text(PLAIN)
    monkeypatch.setattr(formats, "__path__", [*formats.__path__, str(tmp_path / "code")])
    weight_format.forget()
    try:
        model = tmp_path / "model"
        model.mkdir()
        weights.safetensors(model / "model-1.safetensors", {"a": (4,)})
        (model / "weights.PLAIN").write_bytes(b"PLN1\x02\x03\x04abcdefg")
        assert resolve(model).names == ("model-1.safetensors",)
        (model / "model-1.safetensors").unlink()
        (model / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
        resolved = resolve(model)
        assert (resolved.names, resolved.format) == (("weights.PLAIN",), "plain")
        assert places(parse(resolved.files[0])) == {"part.0": (7, 3), "part.1": (10, 4)}
        (extent,) = derive(resolved).extents.tolist()
        assert extent[2:4] == (0, 14)
        (model / "other.bin").write_bytes(b"what is this")
        with pytest.raises(UsageError, match=r"neither safetensors nor a plain file nor a zip"):
            parse(model / "other.bin")
    finally:
        sys.modules.pop(f"{formats.__name__}.plain_files", None)
        weight_format.forget()


def test_a_tensor_without_elements_overlaps_nothing(tmp_path: Path) -> None:
    """It may be said to lie anywhere, inside of another one too."""
    lengths = np.array([100, 0, 50], np.int64)
    offsets = np.array([10, 60, 110], np.int64)
    names = ["whole", "empty", "next"]
    contents.check_extents(tmp_path, names, offsets, lengths, 10, 160)
    lengths[1] = 1
    with pytest.raises(PagecacheError, match="'whole' and 'empty' overlap"):
        contents.check_extents(tmp_path, names, offsets, lengths, 10, 160)
