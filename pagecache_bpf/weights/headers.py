# SPDX-License-Identifier: Apache-2.0
"""Headers of weight files: what lies where, without reading what lies there.

Headers come from anywhere, so nothing in them is believed: every length is compared with the
file before it is used, and what is kept in memory is bounded.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from pagecache_bpf.errors import UsageError
from pagecache_bpf.kernel.file_key import open_to_read
from pagecache_bpf.weights import gguf, safetensors, torch_zip
from pagecache_bpf.weights.contents import Contents


def parse(path: Path) -> Contents:
    """Read the header of a weight file, whatever of the known formats it has.

    Raises UsageError (it cannot be read, or no format is known), PagecacheError (damaged).
    """
    fd = open_to_read(path)
    try:
        size = os.fstat(fd).st_size
        start = os.pread(fd, 16, 0)
        readers: dict[str, Callable[[Path, int, int], Contents]] = {
            "gguf": gguf.parse,
            "torch": torch_zip.parse,
            "safetensors": safetensors.parse,
        }
        return readers[_kind(path, start)](path, fd, size)
    except IsADirectoryError:
        raise UsageError(f"{path} is a directory", "", "Name a weight file") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read", error.strerror or str(error)) from error
    finally:
        os.close(fd)


def _kind(path: Path, start: bytes) -> str:
    if start[:4] == b"GGUF":
        return "gguf"
    if start[:4] == b"PK\x03\x04":
        return "torch"
    if path.suffix == ".safetensors" or start[8:9] == b"{":
        return "safetensors"
    why = "it is neither safetensors nor GGUF nor a zip checkpoint of PyTorch"
    if start[:1] == b"\x80":
        why = "it is one pickle; only PyTorch's zip format says what lies where"
    raise UsageError(
        f"no template can be derived from {path}",
        why,
        "Record one: pagecache-bpf template record",
        "docs/troubleshooting.md#no-template-can-be-derived-from",
    )
