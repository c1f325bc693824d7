# SPDX-License-Identifier: Apache-2.0
"""Formats that are known by their suffixes only: governed, but no template is derived of them."""

from __future__ import annotations

from pagecache_bpf.weights.weight_format import WeightFormat

FORMATS = (
    WeightFormat("tensorizer", ("tensors",), 30),
    WeightFormat("numpy", ("npz", "npy"), 31),
    WeightFormat("nemo", ("nemo",), 32),
    WeightFormat("flax", ("msgpack",), 33),
    WeightFormat("tensorflow", ("h5",), 34),
    WeightFormat("paddle", ("pdparams",), 35),
    WeightFormat("rust", ("ot",), 36),
    WeightFormat("onnx", ("onnx", "onnx_data"), 37),
)
