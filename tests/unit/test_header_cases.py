# SPDX-License-Identifier: Apache-2.0
"""Headers as the libraries take them: what safetensors and gguf read is no damaged file."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagecache_bpf.errors import PagecacheError
from pagecache_bpf.weights.headers import parse

CASES = Path(__file__).resolve().parents[1] / "cases"
FILES: dict[str, str] = json.loads((CASES / "headers.json").read_text())
#: gguf takes these, and llama.cpp does not: an alignment below 8, and tensors over each other.
STRICTER = {"align1.gguf", "dup_off.gguf"}


def case(name: str, directory: Path) -> Path:
    path = directory / name
    path.write_bytes(base64.b64decode(FILES[name]))
    return path


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".safetensors")])
def test_what_safetensors_reads_is_read(name: str, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    path = case(name, tmp_path)
    try:
        with safetensors.safe_open(path, "numpy") as file:
            names = sorted(file.keys())
    except safetensors.SafetensorError:
        return  # the loader refuses it: whatever is said of it is no harm
    assert sorted(parse(path).names) == names


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".gguf")])
def test_what_gguf_reads_is_read(name: str, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    path = case(name, tmp_path)
    try:
        known = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    except (ValueError, KeyError):
        return
    if name in STRICTER:
        with pytest.raises(PagecacheError, match="is damaged"):
            parse(path)
        return
    contents = parse(path)
    for number, tensor in enumerate(contents.names):
        assert int(contents.offsets[number]) == int(known[tensor].data_offset)
        assert int(contents.lengths[number]) == int(known[tensor].n_bytes)
    assert len(known) == len(contents.names)


def test_storages_by_their_addresses_come_in_the_order_of_the_pickle(tmp_path: Path) -> None:
    contents = parse(case("torch16.pt", tmp_path))
    # As torch.load() reads them; by number the second would be first.
    assert contents.names == ["data/94370124866400", "data/94370124712352"]
    assert contents.lengths.tolist() == [400, 200]


def test_every_quantization_type_of_gguf(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    for kind, (elements, size) in gguf.GGML_QUANT_SIZES.items():
        if kind.name == "Q8_1":
            continue  # 36 bytes in ggml (block_q8_1), 40 in the package; it is in no file
        path = tmp_path / f"{kind.name}.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        for name, rows in (("a", 3), ("b", 1), ("c", 5)):
            data = np.zeros((rows, 2 * size), np.uint8)
            writer.add_tensor(name, data, raw_shape=data.shape, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        contents = parse(path)
        assert contents.lengths.tolist() == [3 * 2 * size, 2 * size, 5 * 2 * size], kind
        assert contents.shapes[0][-1] == 2 * elements


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=20).filter(lambda name: name != "__metadata__"),
        st.tuples(
            st.sampled_from(["float32", "float16", "int8", "uint16", "bool", "int64"]),
            st.lists(st.integers(0, 5), max_size=4),
        ),
        max_size=8,
    ),
    st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=3),
)
def test_files_of_the_library_are_read_as_it_wrote_them(
    tmp_path_factory: pytest.TempPathFactory,
    tensors: dict[str, tuple[str, list[int]]],
    metadata: dict[str, str],
) -> None:
    numpy = pytest.importorskip("safetensors.numpy")
    error = pytest.importorskip("safetensors").SafetensorError
    path = tmp_path_factory.mktemp("library") / "x.safetensors"
    arrays = {name: np.zeros(shape, kind) for name, (kind, shape) in tensors.items()}
    try:
        path.write_bytes(numpy.save(arrays, metadata))
    except UnicodeEncodeError:
        return  # a surrogate, which the library cannot write
    try:
        numpy.load_file(path)
    except error:
        return  # safetensors 0.8.0 writes a header of nothing and no metadata that is no JSON
    contents = parse(path)
    assert sorted(contents.names) == sorted(arrays)
    for number, name in enumerate(contents.names):
        assert contents.shapes[number] == arrays[name].shape
        assert int(contents.lengths[number]) == arrays[name].nbytes
        if arrays[name].nbytes:
            assert contents.itemsize[number] == arrays[name].itemsize
    assert path.stat().st_size == contents.header_bytes + int(contents.lengths.sum())
