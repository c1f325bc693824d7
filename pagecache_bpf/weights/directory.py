# SPDX-License-Identifier: Apache-2.0
"""Which files of a directory are the model, in which order, and why the others are not.

The rules are those of the loaders: transformers (`PreTrainedModel.from_pretrained`), vLLM
(`DefaultModelLoader`), diffusers (`model_index.json`), sentence-transformers (`modules.json`), and
llama.cpp for GGUF files.  Names are compared only; no weight file is opened here.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from pagecache_bpf.errors import UsageError
from pagecache_bpf.weights import manifests
from pagecache_bpf.weights.files import follow, path_error
from pagecache_bpf.weights.names import in_natural_order
from pagecache_bpf.weights.siblings import (
    LeftOut,
    Selection,
    choose,
    leave_out_projectors,
    require_one_quantization,
    several_models,
)
from pagecache_bpf.weights.weight_format import format_of, known_formats

#: A directory with more entries than this is not one model.
MAX_ENTRIES = 100_000
#: How far below the directory weights are looked for where it has none itself.
MAX_DEPTH = 4
_DOCS = "docs/troubleshooting.md"

#: Directories that hold a copy of the weights for another program, by name.
_COPIES = {
    "original": "the publisher's own copy, which Hugging Face loaders do not read",
    "metal": "a copy for Apple's Metal",
    "onnx": "a copy for ONNX Runtime",
    "openvino": "a copy for OpenVINO",
    "coreml": "a copy for Core ML",
    "tflite": "a copy for TensorFlow Lite",
}
#: What a model has of its own.
_OWN = ("config.json", "params.json", "model_index.json", "adapter_config.json")
_TRAINED = re.compile(r"checkpoint-\d+|global_step\d+")


def select(directory: Path) -> Selection:
    """Choose the files of the model in a directory.

    Args:
        directory: the directory that holds config.json, or would.

    Returns:
        The names of the files in the order in which they are loaded; none where nothing was found.

    Raises:
        UsageError: it holds several models, a shard is missing, an index is damaged, or it is no
            model's directory at all.
        PrivilegeError: it may not be read.
    """
    return _Walk(directory).select(directory, 0)


class _Walk:
    """One look below a directory; counts entries and remembers directories for loops of links."""

    def __init__(self, top: Path) -> None:
        self._top = top
        self._entries = 0
        self._seen: set[tuple[int, int]] = set()

    def select(self, directory: Path, depth: int) -> Selection:
        """Choose below `directory`, which is `depth` levels below the top."""
        status = follow(directory)
        if (status.st_dev, status.st_ino) in self._seen:
            return Selection()  # reached twice, or a loop of links
        self._seen.add((status.st_dev, status.st_ino))
        names, directories = self._list(directory)
        for manifest in manifests.READERS:
            parts = manifest(directory, names, directories)
            if parts is not None:
                return self._joined(directory, names, parts, depth)
        found = choose(directory, names)
        if found.names:
            for name in directories:
                found.left_out += _beside(directory, name, found.names)
            return found
        below = self._below(directory, names, directories, depth, found)
        if below.names:
            leave_out_projectors(below, found.projectors)
        elif found.projectors:
            require_one_quantization(directory, found.projectors)
            below.names, below.format, below.required = found.projectors, "gguf", True
        return below

    def _list(self, directory: Path) -> tuple[list[str], list[str]]:
        """Return names of files and of directories, in natural order, without hidden ones."""
        try:
            with os.scandir(directory) as entries:
                listed = [(entry.name, _is_directory(entry)) for entry in entries]
        except OSError as error:
            raise path_error(directory, error) from None
        self._entries += len(listed)
        if self._entries > MAX_ENTRIES:
            raise UsageError(
                f"{self._top} holds more than {MAX_ENTRIES:,} files",
                "that is not one model",
                "Name the model's own directory",
                f"{_DOCS}#holds-more-than-100000-files",
            )
        shown = in_natural_order(name for name, _ in listed if not name.startswith("."))
        kinds = dict(listed)
        return [name for name in shown if not kinds[name]], [name for name in shown if kinds[name]]

    def _joined(self, directory: Path, names: list[str], parts: list[str], depth: int) -> Selection:
        """Return the selections of the parts that a manifest lists; "" is the directory itself."""
        found = Selection(required=True)
        formats = set()
        for part in parts:
            if part in ("", "."):
                chosen = choose(directory, names)
            else:
                chosen = self.select(directory / part, depth + 1).below(part)
            found.names += chosen.names
            found.left_out += chosen.left_out
            if chosen.names:
                formats.add(chosen.format)
        found.format = formats.pop() if len(formats) == 1 else ""
        beside = [name for name in names if format_of(name) and name not in found.names]
        known = {item.path for item in found.left_out}
        found.left_out += [
            LeftOut(name, "the manifest of the pipeline does not name it")
            for name in beside
            if name not in known
        ]
        return found

    def _below(
        self,
        directory: Path,
        names: list[str],
        directories: list[str],
        depth: int,
        found: Selection,
    ) -> Selection:
        """Look in the directories below one that has no weights itself."""
        parts: list[Selection] = []
        models: list[str] = []
        if depth < MAX_DEPTH:
            for name in directories:
                if name in _COPIES or _TRAINED.fullmatch(name):
                    continue
                chosen = self.select(directory / name, depth + 1)
                if chosen.names or chosen.left_out:
                    parts.append(chosen.below(name))
                if chosen.names and any((directory / name / own).exists() for own in _OWN):
                    models.append(name)
        if len(models) > 1 and not any(own in names for own in _OWN):
            raise several_models(directory, models)
        best = next(
            (kind for kind in known_formats() if any(part.format == kind for part in parts)), ""
        )
        for part in parts:
            found.left_out += part.left_out
            if part.format in (best, ""):
                found.names += part.names
                found.required |= part.required
            else:
                found.left_out += [
                    LeftOut(name, f"another format; {best} is taken") for name in part.names
                ]
        found.format = best
        if best == "gguf":
            require_one_quantization(directory, found.names)
        if not found.names and depth == 0:
            copies = [name for name in directories if name in _COPIES]
            if len(copies) == 1:  # nothing else is there, so this is what was meant
                return self.select(directory / copies[0], 1).below(copies[0])
        return found


def _is_directory(entry: os.DirEntry[str]) -> bool:
    """Tell whether an entry is walked.

    What has the name of an index or is a link with that of a weight file is taken for a file: that
    it is none is said when it is looked at, and the links of a snapshot are not followed twice.
    """
    if entry.name.endswith(".index.json") or (entry.is_symlink() and format_of(entry.name)):
        return False
    return entry.is_dir()


def _beside(directory: Path, name: str, taken: list[str]) -> list[LeftOut]:
    """Say what is left out of a directory beside the weights, of which an index may name some."""
    if name in _COPIES:
        return [LeftOut(name, _COPIES[name])]
    if _TRAINED.fullmatch(name):
        return [LeftOut(name, "a checkpoint of training, which is a model of its own")]
    try:
        with os.scandir(directory / name) as entries:
            held = in_natural_order(entry.name for entry in entries if format_of(entry.name))
    except OSError:
        return []
    if not any(file.startswith(f"{name}/") for file in taken):
        return [LeftOut(name, "the weights above it are the model")] if held else []
    return [
        LeftOut(f"{name}/{file}", "the index does not name it")
        for file in held
        if f"{name}/{file}" not in taken
    ]
