# SPDX-License-Identifier: Apache-2.0
"""Which of the files that lie side by side in one directory are the model.

The rules are those of transformers (`PreTrainedModel.from_pretrained`), vLLM
(`DefaultModelLoader`) and, for GGUF files, llama.cpp.  Directories below are not looked at.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from pagecache_bpf.errors import UsageError
from pagecache_bpf.weights.index import shards_of
from pagecache_bpf.weights.names import (
    Split,
    is_unfinished,
    natural,
    split_of,
    variant_of,
)
from pagecache_bpf.weights.weight_format import format_of, known_formats

#: More parts than this are no model.
MAX_PARTS = 100_000
_DOCS = "docs/troubleshooting.md"

#: What training leaves beside the weights (transformers' Trainer, accelerate, DeepSpeed).
_TRAINING = re.compile(
    r"optimizer(?:_\d+)?\.(?:pt|bin|safetensors)|scheduler(?:_\d+)?\.(?:pt|bin)|scaler\.pt"
    r"|rng_state(?:_\d+)?\.pth|random_states_\d+\.(?:pkl|pt)|training_args\.bin|trainer_state\.pt"
    r"|(?:zero|bf16_zero)_pp_rank_.+_optim_states\.pt|distrib_optim\.pt|optim(?:izer)?[-_].+\.(?:pt|bin|pth)"
)
_ADAPTER = re.compile(r"adapter_model\..+|pytorch_lora_weights\..+|lora\.(?:safetensors|gguf)")
_CONSOLIDATED = re.compile(r"consolidated.*\.(?:safetensors|pth|pt)")
_PROJECTOR = re.compile(r"(?:.*[-_.])?mmproj[-_.].*\.gguf|mmproj\.gguf", re.IGNORECASE)
_MATRIX = re.compile(r"(?:.*[-_.])?imatrix.*", re.IGNORECASE)
_DISTRIBUTED = re.compile(r"__\d+_\d+\.distcp")
#: Formats that are no part of a checkpoint of torch.distributed.
_WHOLE = ("safetensors", "gguf")
_ENGINE = re.compile(r"rank\d+\.engine|.*\.(?:engine|plan)")
_TRAINING_WHY = "training state, which no inference loader reads"
#: Roots of the names of a Hugging Face model, the most usual first: base.safetensors,
#: base.safetensors.index.json, base-00001-of-00003.safetensors.
_BASES = ("model", "pytorch_model", "diffusion_pytorch_model", "flax_model", "tf_model")


@dataclass(frozen=True)
class LeftOut:
    """A file or directory that is not part of the model.

    Attributes:
        path: below the model's directory.
        why: the reason, as part of a sentence: "PATH is left out: WHY".
    """

    path: str
    why: str


@dataclass
class Selection:
    """The files of a model by the names that people see, in the order of its loader.

    Attributes:
        names: paths of the files below the directory.
        left_out: what is not part of the model, and why.
        format: a WeightFormat's name; "" where the files have several.
        required: whether an empty file is an error; otherwise it is left out.
        projectors: GGUF projectors, where the directory has nothing else.
    """

    names: list[str] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    format: str = ""
    required: bool = False
    projectors: list[str] = field(default_factory=list)

    def below(self, prefix: str) -> Selection:
        """Return the same selection as it is seen from a directory above.

        Args:
            prefix: the path of the selection's directory below that one.

        Returns:
            A new selection.
        """
        return Selection(
            [f"{prefix}/{name}" for name in self.names],
            [LeftOut(f"{prefix}/{item.path}", item.why) for item in self.left_out],
            self.format,
            self.required,
        )


def choose(directory: Path, names: list[str]) -> Selection:
    """Choose the files of the model among those of a directory; those below it are not looked at.

    Args:
        directory: the directory that holds the weight files.
        names: names of its files, in natural order.

    Returns:
        The selection; without names where there are no weight files.

    Raises:
        UsageError: they are several models, a shard is missing, an index is damaged, a download is
            in progress, or only another program can read them.
    """
    found = Selection()
    indexed = _indexed(directory, names, found)
    if indexed is not None:
        refuse_begun(directory, names, indexed.names)
        return indexed
    if any(map(_DISTRIBUTED.fullmatch, names)) and not any(format_of(n) in _WHOLE for n in names):
        _refuse_foreign(directory, names)  # what else is there belongs to it (common.pt)
    candidates: list[str] = []
    for name in names:
        if format_of(name) is None:
            continue
        if _TRAINING.fullmatch(name):
            found.left_out.append(LeftOut(name, _TRAINING_WHY))
        elif _MATRIX.fullmatch(name):
            found.left_out.append(LeftOut(name, "an importance matrix for quantizing"))
        else:
            candidates.append(name)
    if not candidates:
        _refuse_foreign(directory, names)
        _refuse_unfinished(directory, names)
        return found
    candidates = _without(candidates, _ADAPTER, "an adapter: name it, too, to have it", found)
    candidates = _one_format(directory, candidates, found)
    if found.format == "gguf":
        return _quantization(directory, candidates, names, found)
    candidates = _without_variants(candidates, found)
    candidates = _without(
        candidates,
        _CONSOLIDATED,
        "the same weights in the publisher's own names: name it to have it",
        found,
    )
    found.names = _one_set(directory, candidates, found)
    refuse_begun(directory, names, found.names)
    return found


def _indexed(directory: Path, names: list[str], found: Selection) -> Selection | None:
    """Return the files that the index of a directory names; None without one that counts."""
    indexes = [name for name in names if name.endswith(".index.json")]
    endings = [".safetensors.index.json"]
    # transformers and vLLM look for pickled weights only where there are no safetensors.
    if not any(name.endswith(".safetensors") and name.startswith(_BASES) for name in names):
        endings += [".bin.index.json", ".h5.index.json"]
    for ending in endings:
        usual = [name for name in indexes if name.endswith(ending)]
        usual.sort(key=lambda name: (not name.startswith(_BASES), name.startswith("consolidated")))
        for name in usual:
            if variant_of(name):
                continue
            shards = shards_of(directory / name)
            there, taken = set(names), set(shards)
            missing = [
                shard
                for shard in shards
                if shard not in there and not os.path.lexists(directory / shard)
            ]
            single = name.removesuffix(".index.json")
            if missing and single in names:
                # transformers looks for the single file first, and only then for an index.
                found.left_out.append(LeftOut(name, f"stale: it names {missing[0]}, not {single}"))
                continue
            if missing:
                raise _missing(directory, missing, f"{name} names it")
            found.names, found.required = shards, True
            found.format = format_of(shards[0]) or ""
            for other in names:
                if other not in taken and format_of(other):
                    found.left_out.append(LeftOut(other, _why_beside(other, name)))
            return found
    return None


def _why_beside(name: str, index: str) -> str:
    """Say why a weight file beside an index is not part of the model."""
    if _TRAINING.fullmatch(name):
        return _TRAINING_WHY
    if _ADAPTER.fullmatch(name):
        return "an adapter: name it, too, to have it"
    return f"{index} does not name it"


def _without(
    candidates: list[str], pattern: re.Pattern[str], why: str, found: Selection
) -> list[str]:
    """Leave out files of a kind where there are others; a directory of these only is a model."""
    others = [name for name in candidates if not pattern.fullmatch(name)]
    if not others:
        return candidates
    found.left_out += [LeftOut(name, why) for name in candidates if pattern.fullmatch(name)]
    return others


def _one_format(directory: Path, candidates: list[str], found: Selection) -> list[str]:
    """Keep the files of one format, the preferred one that has a file which is not empty."""
    formats = {name: format_of(name) or "" for name in candidates}

    def has_bytes(kind: str) -> bool:
        return any(formats[name] == kind and _size(directory / name) for name in candidates)

    best = next((kind for kind in known_formats() if has_bytes(kind)), None)
    if best is None:
        best = next(kind for kind in known_formats() if kind in formats.values())
    found.format = best
    found.left_out += [
        LeftOut(name, f"another format; {best} is taken")
        for name in candidates
        if formats[name] != best
    ]
    return [name for name in candidates if formats[name] == best]


def _size(path: Path) -> int:
    """Return the size of a file; 1 for one that cannot be followed, which is an error later."""
    try:
        return path.stat().st_size
    except OSError:
        return 1


def _without_variants(candidates: list[str], found: Selection) -> list[str]:
    """Leave out variants such as fp16 where there is the plain one, or ask which is meant."""
    variants = {name: variant_of(name) for name in candidates}
    plain = [name for name in candidates if not variants[name]]
    if plain:
        found.left_out += [
            LeftOut(name, f"the variant {variants[name]}: name it to have it")
            for name in candidates
            if variants[name]
        ]
        return plain
    chosen = sorted({variant for variant in variants.values() if variant}, key=natural)[:1]
    found.left_out += [
        LeftOut(name, f"another variant; {chosen[0]} is taken: name it to have it")
        for name in candidates
        if variants[name] not in chosen
    ]
    return [name for name in candidates if variants[name] in chosen]


def _one_set(directory: Path, candidates: list[str], found: Selection) -> list[str]:
    """Keep the files of one format that a loader takes: vLLM takes all with the first suffix.

    A set of shards has to be complete.  Where a single file of the same name is there as well, the
    shards are the same weights once more, and transformers takes the single file.
    """
    endings = [name.rpartition(".")[2].lower() for name in candidates]
    suffix = next(suffix for suffix in known_formats()[found.format].suffixes if suffix in endings)
    kept = [name for name in candidates if name.lower().endswith(f".{suffix}")]
    found.left_out += [
        LeftOut(name, f"loaders take the .{suffix} files")
        for name in candidates
        if not name.lower().endswith(f".{suffix}")
    ]
    sets: dict[tuple[str, int, str], list[tuple[int, str]]] = {}
    for name in kept:
        if (split := split_of(name)) is not None:
            key = (split.base, split.count, split.rest)
            sets.setdefault(key, []).append((split.number, name))
    for (base, _, rest), parts in sets.items():
        if f"{base}{rest}" in kept and _size(directory / f"{base}{rest}"):
            again = {name for _, name in parts}
            found.left_out += [
                LeftOut(name, f"the same weights as {base}{rest}") for name in kept if name in again
            ]
            kept = [name for name in kept if name not in again]
        else:
            _require_all(directory, parts)
    return kept


def _require_all(directory: Path, parts: list[tuple[int, str]]) -> None:
    """Refuse a set of numbered shards of which one is missing; numbers begin at 0 or 1."""
    split = split_of(parts[0][1])
    assert split is not None
    numbers = {number for number, _ in parts}
    first = 0 if 0 in numbers else 1
    missing = [
        split.sibling(number, parts[0][1])
        for number in range(first, first + split.count)
        if number not in numbers
    ]
    if missing and split.count <= MAX_PARTS:
        raise _missing(directory, missing, f"{parts[0][1]} is one of {split.count:,} parts")


def _missing(directory: Path, names: list[str], why: str) -> UsageError:
    """Return the error for shards that are missing; says so when they are being downloaded."""
    unfinished = unfinished_below(directory)
    if len(names) > 1:
        why += f", and {len(names) - 1:,} more are missing"
    if unfinished:
        why += f"; a download is in progress ({unfinished[0]})"
    return UsageError(
        f"{directory / names[0]} is missing",
        why,
        "Complete the download, then try again",
        f"{_DOCS}#is-missing",
    )


def unfinished_below(directory: Path) -> list[str]:
    """Find files that a download has not completed, where the tools put them.

    Those of huggingface_hub lie among the blobs of the cache, or in .cache/huggingface/download of
    a plain directory; those of ModelScope in ._____temp.

    Args:
        directory: the model's directory.

    Returns:
        Names of the files, without their directories.
    """
    places = [
        directory,
        directory / ".cache" / "huggingface" / "download",
        directory / "._____temp",
        directory.parent.parent / "blobs",
    ]
    found = []
    for place in places:
        try:
            with os.scandir(place) as entries:
                names = sorted(entry.name for entry in entries)
        except OSError:
            continue
        inside = place.name == "._____temp"
        found += [name for name in names if is_unfinished(name) or (inside and format_of(name))]
    return found


def _refuse_unfinished(directory: Path, names: list[str]) -> None:
    """Say that a download is in progress where nothing else is there yet."""
    unfinished = [
        name for name in unfinished_below(directory) if not name.endswith((".tmp", ".lock"))
    ]
    if unfinished and ("config.json" in names or not names or is_unfinished(names[0])):
        raise UsageError(
            f"the download of {directory} is not complete",
            f"{unfinished[0]} is in progress, and there is no weight file yet",
            "Wait for the download, or start it again",
            f"{_DOCS}#is-not-complete",
        )


def refuse_begun(directory: Path, names: list[str], taken: list[str]) -> None:
    """Refuse a file that has its size already but not yet its bytes, as aria2 notes beside it.

    Args:
        directory: the directory that holds the weight files.
        names: of all its files.
        taken: of those that are the model.

    Raises:
        UsageError: one of these is still being downloaded.
    """
    begun = [name for name in names if name.endswith(".aria2")]
    for name in begun:
        if name.removesuffix(".aria2") in taken:
            raise UsageError(
                f"{directory / name.removesuffix('.aria2')} is not complete",
                f"{name} beside it tells that its download is in progress",
                "Wait for the download, or start it again",
                f"{_DOCS}#is-not-complete",
            )


def _refuse_foreign(directory: Path, names: list[str]) -> None:
    """Say what a directory is whose files only one program can read."""
    for pattern, kind, fix in (
        (
            _DISTRIBUTED,
            "a checkpoint of torch.distributed.checkpoint, which only its own loader can read",
            "Convert it: python -m torch.distributed.checkpoint.format_utils dcp_to_torch",
        ),
        (_ENGINE, "a TensorRT engine, which is no list of tensors", "Name the engine file itself"),
    ):
        if any(pattern.fullmatch(name) for name in names):
            raise UsageError(
                f"no weight files in {directory}",
                f"it is {kind}",
                fix,
                f"{_DOCS}#no-weight-files-in",
            )


# GGUF.


def splits_of(file: Path) -> list[str]:
    """List all parts of a GGUF model, of which one is known.

    Args:
        file: one part, or a file that is no part.

    Returns:
        The names of the parts in their order; the file's own if it is no part.

    Raises:
        UsageError: a part is missing.

    Source: llama.cpp, llama_split_path().
    """
    split = split_of(file.name)
    if split is None or not file.name.lower().endswith(".gguf") or split.count > MAX_PARTS:
        return [file.name]
    names = [split.sibling(number, file.name) for number in range(1, split.count + 1)]
    missing = [name for name in names if not os.path.lexists(file.parent / name)]
    if missing:
        raise _missing(file.parent, missing, f"{file.name} is one of {split.count:,} parts")
    return names if file.name in names else [file.name]


def _quantization(
    directory: Path, candidates: list[str], names: list[str], found: Selection
) -> Selection:
    """Choose the one model among GGUF files; a directory of several asks for a name."""
    models = [name for name in candidates if not _PROJECTOR.fullmatch(name)]
    projectors = [name for name in candidates if name not in models]
    if models:
        leave_out_projectors(found, projectors)
    else:
        found.projectors = projectors  # the model is one of the directories below, or there is none
        return found
    require_one_quantization(directory, models)
    split = split_of(models[0])
    found.names = splits_of(directory / models[0]) if split else models
    found.required = True
    refuse_begun(directory, names, found.names)
    return found


def leave_out_projectors(found: Selection, names: Iterable[str]) -> None:
    """Say why projectors are not part of a model.

    Args:
        found: the selection; added to.
        names: of the projectors.
    """
    why = "a multimodal projector, which is loaded by a name of its own (--mmproj)"
    found.left_out += [LeftOut(name, why) for name in names]


def require_one_quantization(directory: Path, names: Iterable[str]) -> None:
    """Check that GGUF files are parts of one model.

    Args:
        directory: where they are; for messages.
        names: their names.

    Raises:
        UsageError: they are several models, such as several quantizations of one.
    """
    models: dict[object, str] = {}
    for name in names:
        split = split_of(name)
        key: object = (split.base, split.count) if isinstance(split, Split) else name
        models.setdefault(key, name)
    if len(models) > 1:
        raise several_models(directory, models.values())


def several_models(directory: Path, names: Iterable[str]) -> UsageError:
    """Make the error for a directory of which nobody can tell which model is meant.

    Args:
        directory: the directory that holds the weight files.
        names: of the models, below it.

    Returns:
        The error, to be raised; it lists them and asks for one.
    """
    listed = sorted(names, key=natural)
    shown = ", ".join(listed[:12]) + (f" and {len(listed) - 12} more" if len(listed) > 12 else "")
    return UsageError(
        f"{directory} holds {len(listed)} models",
        f"there are {shown}",
        f"Name one of them: {directory / listed[0]}",
        f"{_DOCS}#holds-several-models",
    )
