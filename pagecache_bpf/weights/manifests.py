# SPDX-License-Identifier: Apache-2.0
"""The manifests by which a checkpoint of several parts says which directories it is made of.

It knows diffusers, sentence-transformers and Megatron-LM, and only names: no weights are opened.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from pagecache_bpf.kernel.file_key import read_small_file

_SMALL = 1 << 20


def _json_of(path: Path) -> object:
    """Return the content of a small JSON file; None where it is not readable as such."""
    try:
        return json.loads(read_small_file(path, _SMALL))
    except (OSError, ValueError, RecursionError):
        return None


def _pipeline(directory: Path, names: list[str], directories: list[str]) -> list[str] | None:
    """Return the components of a diffusers pipeline that are there, in the manifest's order."""
    if "model_index.json" not in names:
        return None
    content = _json_of(directory / "model_index.json")
    if not isinstance(content, dict):
        return None
    found = [
        key
        for key, value in content.items()
        if not key.startswith("_") and isinstance(value, list) and value and value[0] is not None
    ]
    return [name for name in found if name in directories] or None


def _sentence_modules(
    directory: Path, names: list[str], directories: list[str]
) -> list[str] | None:
    """Return the modules of a sentence-transformers model: the directory itself, then others."""
    if "modules.json" not in names:
        return None
    content = _json_of(directory / "modules.json")
    if not isinstance(content, list):
        return None
    paths = [item.get("path") for item in content if isinstance(item, dict)]
    found = [path for path in paths if isinstance(path, str) and (not path or path in directories)]
    return found or None


def _megatron(directory: Path, names: list[str], directories: list[str]) -> list[str] | None:
    """Return the ranks' directories of a Megatron-LM checkpoint: its newest iteration."""
    tracker = "latest_checkpointed_iteration.txt"
    if tracker in names:
        try:
            text = read_small_file(directory / tracker, 64).decode().strip()
        except (OSError, UnicodeDecodeError):
            return None
        name = text if text == "release" else f"iter_{int(text):07}" if text.isdecimal() else ""
        return [name] if name in directories else None
    ranks = [name for name in directories if re.fullmatch(r"mp_rank_\d\d(?:_\d{3}){0,2}", name)]
    return ranks or None


#: What asks for the parts of a directory: functions of its path, its files and its directories,
#: which return the parts in their order ("" for the directory itself), or None.
READERS = (_pipeline, _sentence_modules, _megatron)
