# SPDX-License-Identifier: Apache-2.0
"""For those who use PyTorch (extra `torch`): one call from a file to tensors on a device.

    from pagecache_bpf.torch import load_file
    tensors = load_file("/models/llama-3-8b/model.safetensors", device="cuda:0")

The bytes are those that safetensors.torch.load_file() gives.  To a CUDA or ROCm device they go
through two pinned buffers, so that the next tensors are read from the page cache while the last
ones travel; the pages themselves are read ahead by pagecache_bpf.load().
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pagecache_bpf import api, topology
from pagecache_bpf.errors import PagecacheError, UnsupportedError, UsageError

try:
    import torch
    from safetensors import safe_open
except ImportError as error:
    raise UnsupportedError(
        "pagecache_bpf.torch cannot be imported", str(error), "pip install 'pagecache-bpf[torch]'"
    ) from error

#: Size of one pinned buffer; a larger tensor travels in several parts.
STAGING_BYTES = 64 << 20
_ALIGNMENT = 64  # of a tensor in a buffer: no element type needs more


def place(device: torch.device | str | int) -> topology.Placement:
    """Find which accelerator a torch device is, and the NUMA node next to it.

    CUDA is not initialized for that; where it is already, torch's own PCI addresses are used.

    Args:
        device: a device, its name, or the number of a CUDA device.

    Returns:
        The accelerator and the node; None for what is unknown.

    Raises:
        UsageError: the device is not there.
    """
    found = torch.device(device)
    if found.type == "cpu":
        return topology.place("cpu", _NO_MACHINE)
    number = found.index
    if number is None:
        started = found.type == "cuda" and torch.cuda.is_initialized()
        number = torch.cuda.current_device() if started else 0
    return topology.place_or_unknown(f"{found.type}:{number}", topology.read())


_NO_MACHINE = topology.Topology((), ())


def load_file(
    path: str | os.PathLike[str],
    device: torch.device | str | int = "cpu",
    *,
    pinned: bool = True,
    **wishes: Any,
) -> dict[str, torch.Tensor]:
    """Load all tensors of a safetensors file onto a device.

    The tensors are copies: nothing maps the file afterwards, and its pages can be dropped.

    Args:
        path: the file.
        device: where the tensors are to be.
        pinned: stage through pinned host memory on the way to a CUDA or ROCm device.
        wishes: what pagecache_bpf.load() takes besides: policy, budget, template, keep, wait.

    Returns:
        The tensors by name.

    Raises:
        UsageError: the path or the device is wrong.
        PagecacheError: the file is no safetensors file.
    """
    target = torch.device(device)
    _check(target)
    devices = [] if target.type == "cpu" else [str(target)]
    with api.load(path, devices=devices, **wishes):
        try:
            with safe_open(os.fspath(path), framework="pt", device="cpu") as file:
                if target.type == "cuda" and pinned:
                    return _staged(file, target)
                # clone(): what safetensors gives for a CPU is the mapping itself.
                return {name: _copy(file.get_tensor(name), target) for name in list(file.keys())}
        except (ValueError, OSError) as error:
            raise PagecacheError(f"{path} cannot be loaded", str(error)) from error
        except Exception as error:
            if type(error).__name__ != "SafetensorError":
                raise
            raise PagecacheError(f"{path} is not a safetensors file", str(error)) from error


def _check(device: torch.device) -> None:
    if device.type != "cuda":
        return
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (device.index or 0) >= there:
        raise UsageError(
            f"there is no device {device}",
            f"torch sees {there} CUDA devices",
            "Check the number, CUDA_VISIBLE_DEVICES and `pagecache-bpf topology`",
        )


def _copy(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return tensor.clone() if device.type == "cpu" else tensor.to(device)


@dataclass
class _Part:
    """Bytes of one tensor: [start, start + length) of it."""

    tensor: torch.Tensor
    target: torch.Tensor
    start: int
    length: int


class _Buffer:
    """A pinned buffer and the event after which it may be filled again."""

    def __init__(self, stream: torch.cuda.Stream, pin: bool) -> None:
        self.bytes = torch.empty(STAGING_BYTES, dtype=torch.uint8, pin_memory=pin)
        self._stream = stream
        self._sent = torch.cuda.Event() if pin else None
        self._used = False
        self._at = 0

    def begin(self) -> None:
        """Wait until what was sent from here has arrived."""
        if self._used and self._sent is not None:
            self._sent.synchronize()
        self._used, self._at = False, 0

    def take(self, part: _Part) -> bool:
        """Copy a part in and send it; False if it does not fit."""
        start = -(-self._at // _ALIGNMENT) * _ALIGNMENT
        if start + part.length > STAGING_BYTES:
            return False
        here = self.bytes[start : start + part.length]
        here.copy_(part.tensor[part.start : part.start + part.length])
        part.target[part.start : part.start + part.length].copy_(here, non_blocking=True)
        self._at, self._used = start + part.length, True
        return True

    def sent(self) -> None:
        """Note how far the stream has to come before begin() may go on."""
        if self._sent is not None:
            self._sent.record(self._stream)


def _staged(file: Any, device: torch.device) -> dict[str, torch.Tensor]:
    """Through two pinned buffers, on a stream of its own; complete when this returns."""
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        found = {}
        with torch.cuda.stream(stream):
            buffers = (_Buffer(stream, True), _Buffer(stream, True))
            found = send(file, device, buffers)
        stream.synchronize()
        for tensor in found.values():
            tensor.record_stream(torch.cuda.current_stream())
        return found


def send(file: Any, device: torch.device, buffers: Any) -> dict[str, torch.Tensor]:
    """Send every tensor of an open safetensors file through two buffers, in turn.

    Public for tests, which have it work without a GPU.

    Args:
        file: what safetensors.safe_open() returned.
        device: where the tensors are to be.
        buffers: two host buffers of the same size.

    Returns:
        The tensors by name.
    """
    found: dict[str, torch.Tensor] = {}
    turn = 0
    buffers[turn].begin()
    for name in list(file.keys()):
        tensor = file.get_tensor(name)
        found[name] = torch.empty_like(tensor, device=device)
        for part in _parts(tensor, found[name]):
            if not buffers[turn].take(part):
                buffers[turn].sent()
                turn = 1 - turn
                buffers[turn].begin()
                buffers[turn].take(part)
    buffers[turn].sent()
    return found


def _parts(tensor: torch.Tensor, target: torch.Tensor) -> Iterator[_Part]:
    if not tensor.numel():
        return
    source, sink = (part.reshape(-1).view(torch.uint8) for part in (tensor, target))
    for start in range(0, len(source), STAGING_BYTES):
        yield _Part(source, sink, start, min(STAGING_BYTES, len(source) - start))
