# SPDX-License-Identifier: Apache-2.0
"""Load a checkpoint with a library as its documentation says: `python library_load.py HOW PATH`."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def safetensors(directory: str) -> None:
    """Take every tensor of every file, in the order of keys()."""
    from safetensors import safe_open

    for path in sorted(Path(directory).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - no dictionary
                file.get_tensor(name).clone()


def safetensors_offsets(directory: str) -> None:
    """Take every tensor of every file, in the order of offset_keys()."""
    from safetensors import safe_open

    for path in sorted(Path(directory).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.offset_keys():
                file.get_tensor(name).clone()


def torch_load(path: str) -> None:
    """Load pickled weights, as is usual."""
    import torch

    torch.load(path, weights_only=True)


def torch_load_mapped(path: str) -> None:
    """Load pickled weights as vLLM and transformers do: mapped, then taken in their order."""
    import torch

    for tensor in torch.load(path, weights_only=True, mmap=True).values():
        tensor.clone()


def transformers(directory: str) -> None:
    """Load a model of the architecture that its configuration names, in another type.

    On the CPU it would map tensors of the same type and leave them unread; a copy to a GPU reads
    them as a conversion does.
    """
    import torch
    import transformers as library
    from transformers import AutoConfig, core_model_loading

    # Of the threads that read tensors ahead one is left, so that their order is that of the queue.
    core_model_loading.GLOBAL_WORKERS = 1
    (name,) = AutoConfig.from_pretrained(directory).architectures
    getattr(library, name).from_pretrained(directory, dtype=torch.float32)


def llama_cpp(path: str) -> None:
    """Load a GGUF model on the CPU, read into memory."""
    _llama_cpp(path, "LLAMA_LOAD_MODE_NONE")


def llama_cpp_mapped(path: str) -> None:
    """Load a GGUF model on the CPU, mapped, as is usual."""
    _llama_cpp(path, "LLAMA_LOAD_MODE_MMAP")


def _llama_cpp(path: str, mode: str) -> None:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = path
    params.load_mode = getattr(xllamacpp.llama_load_mode, mode)
    params.warmup, params.n_ctx, params.n_gpu_layers = False, 64, 0
    server = xllamacpp.Server(params)
    assert server.listening_address  # it has loaded the model
    os._exit(0)  # its threads would wait for requests


HOW = {
    function.__name__: function
    for function in (
        *(safetensors, safetensors_offsets, torch_load, torch_load_mapped, transformers),
        *(llama_cpp, llama_cpp_mapped),
    )
}

if __name__ == "__main__":
    HOW[sys.argv[1]](sys.argv[2])
