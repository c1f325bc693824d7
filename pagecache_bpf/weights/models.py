# SPDX-License-Identifier: Apache-2.0
"""From what a person names to one description of a model: its files, in its loader's order.

A model is named by a file, a directory of shards, a snapshot or cache directory of huggingface_hub,
a manifest of Ollama, or by the name of a repository that a cache on this machine has.  What loads
it, what derives a template of it and what tags it all work from this one description.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from pagecache_bpf.errors import UsageError
from pagecache_bpf.weights import caches, directory
from pagecache_bpf.weights.caches import HUB_DIRECTORY, Listed
from pagecache_bpf.weights.files import follow, regular, require_weights
from pagecache_bpf.weights.index import shards_of
from pagecache_bpf.weights.names import split_of
from pagecache_bpf.weights.siblings import (
    LeftOut,
    Selection,
    refuse_begun,
    several_models,
    splits_of,
)
from pagecache_bpf.weights.weight_format import format_of, suffixes

__all__ = ["LeftOut", "Model", "check_name", "find", "resolve"]

NAME_BYTES = 63  # PAGECACHE_MODEL_LEN less the terminating NUL
_NAME_OK = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+@/-]*")
_DOCS = "docs/troubleshooting.md"


@dataclass(frozen=True)
class Model:
    """A named model: the files that its loader reads, in the order in which it does.

    Attributes:
        name: what policies and statistics call it, NAME_BYTES at most.
        root: the file or directory that was named.
        files: real paths of regular files that are not empty, each file once.
        names: of these files as people see them, below `directory`: a link has its own name, not
            that of the blob it leads to.
        directory: where the model's config.json lies.
        left_out: what beside the files looks like weights and is not read.
        format: a WeightFormat's name; "" for an unknown one or several.
    """

    name: str
    root: Path
    files: tuple[Path, ...]
    names: tuple[str, ...] = ()
    directory: Path = field(default=Path())
    left_out: tuple[LeftOut, ...] = ()
    format: str = ""

    def __post_init__(self) -> None:
        # Whoever has the files already may leave out what follows from them.
        if self.directory == Path():
            directory = self.root if self.root.is_dir() else self.root.parent
            object.__setattr__(self, "directory", directory)
        if len(self.names) != len(self.files):
            object.__setattr__(self, "names", tuple(_names_of(self.files, self.directory)))

    @property
    def size(self) -> int:
        """Bytes of all files now."""
        return sum(path.stat().st_size for path in self.files)


def _names_of(files: Iterable[Path], base: Path) -> Iterable[str]:
    """Return paths below a directory; the names alone of files that lie elsewhere."""
    roots = (base, Path(os.path.realpath(base)))
    for path in files:
        root = next((root for root in roots if path.is_relative_to(root)), None)
        yield path.name if root is None else str(path.relative_to(root))


def find(path: str | os.PathLike[str]) -> Path | Listed:
    """Find what a path or a repository's name leads to on this machine.

    Args:
        path: a path; or ORG/NAME, ORG/NAME@REVISION, ORG/NAME:QUANTIZATION, ollama:NAME:TAG of a
            model that a cache has.  A path that exists is taken as it is.

    Returns:
        The file or directory, or the files that a manifest lists; a path that leads nowhere as it
        is.

    Raises:
        UsageError: a cache has the repository, but not that revision.
    """
    found = Path(path)
    if isinstance(path, str) and not os.path.lexists(found):
        return caches.find(path) or found
    return found


def resolve(path: str | os.PathLike[str], name: str | None = None) -> Model:
    """Describe the model that a path or a repository's name stands for.

    Args:
        path: see find().
        name: the model's name; by default that of the repository, the directory or the file.

    Returns:
        The model with at least one file.

    Raises:
        UsageError: it does not lead to weight files that can be read ahead; the error names the
            file and says whether it is missing, unfinished, empty, or one of several models.
        PrivilegeError: a file may not be opened.
    """
    if name is not None:
        check_name(name)
    found = find(path)
    if isinstance(found, Listed):
        return _described(found.files[0], found.files[0].parent, name or found.name, found.files)
    root = Path(os.path.abspath(found))
    if not stat.S_ISDIR(follow(root).st_mode):
        return _of_file(root, name)
    manifests = caches.ollama_models(root)
    if manifests:
        return _of_manifests(root, manifests, name)
    repositories = caches.repositories(root)
    if len(repositories) > 1:
        raise several_models(root, [path.name for path in repositories])
    base = caches.snapshot(*repositories or (root,))
    chosen = directory.select(base)
    return _of_selection(root, base, chosen, name)


def _of_file(path: Path, name: str | None) -> Model:
    """Describe the model that one file stands for: itself, its splits, its index or manifest."""
    if caches.is_ollama_manifest(path):
        return _of_manifests(path, [path], name)
    if path.name.endswith(".index.json"):
        shards = shards_of(path)
        chosen = Selection(shards, [], format_of(shards[0]) or "", required=True)
        return _of_selection(path, path.parent, chosen, name)
    names = splits_of(path)
    notes = [f"{split}.aria2" for split in names]
    refuse_begun(path.parent, [note for note in notes if (path.parent / note).exists()], names)
    chosen = Selection(names, [], format_of(path.name) or "", required=True)
    if len(names) > 1 and name is None and (split := split_of(path.name)) is not None:
        name = _default_name(path.with_name(f"{split.base}{split.rest}"))
    return _of_selection(path, path.parent, chosen, name)


def _of_manifests(root: Path, manifests: list[Path], name: str | None) -> Model:
    """Describe the model of an Ollama manifest; several of them ask for one."""
    models = [caches.ollama_model(path) for path in manifests[:1]]
    if len(manifests) > 1:
        shown = ", ".join("/".join(path.parts[-2:]) for path in manifests[:12])
        raise UsageError(
            f"{root} holds {len(manifests)} models",
            f"there are {shown}",
            f"Name one of them: {manifests[0]}",
            f"{_DOCS}#holds-several-models",
        )
    return _described(root, models[0].files[0].parent, name or models[0].name, models[0].files)


def _described(root: Path, base: Path, name: str, files: tuple[Path, ...]) -> Model:
    """Describe a model whose files a manifest lists."""
    names = [os.path.relpath(path, base) for path in files]
    chosen = Selection(names, [], "gguf", required=True)
    return _of_selection(root, base, chosen, name)


def _of_selection(root: Path, base: Path, chosen: Selection, name: str | None) -> Model:
    """Look at the files that were chosen, and leave out what is no file of its own."""
    kinds: dict[int, str | None] = {}
    directories: dict[str, Path] = {}
    seen: set[tuple[int, int]] = set()
    files, names, empty = [], [], []
    left_out = list(chosen.left_out)
    for shown in chosen.names:
        path = f"{base}/{shown}"
        real, status = regular(path, directories)
        if status.st_size == 0 and not chosen.required:
            empty.append(Path(path))  # a stray empty file is no reason to refuse the others
            left_out.append(LeftOut(shown, "it is empty"))
            continue
        require_weights(path, real, status, kinds)
        identity = (status.st_dev, status.st_ino)
        if identity in seen:
            left_out.append(LeftOut(shown, "another name of a file that is taken"))
            continue
        seen.add(identity)
        files.append(real)
        names.append(shown)
    if not files:
        raise _nothing_found(root, base, empty, left_out)
    return Model(
        name if name is not None else _default_name(root),
        root,
        tuple(files),
        tuple(names),
        base,
        tuple(left_out),
        chosen.format,
    )


def _nothing_found(
    root: Path, base: Path, empty: list[Path], left_out: list[LeftOut]
) -> UsageError:
    """Return the error for a directory without weights."""
    docs = f"{_DOCS}#no-weight-files-in"
    try:
        nothing = not any(base.iterdir())
    except OSError as error:
        return UsageError(f"no weight files in {root}", error.strerror or str(error), "", docs)
    if nothing:
        return UsageError(f"no weight files in {root}", "the directory is empty", "", docs)
    if empty:
        names = ", ".join(path.name for path in empty[:3])
        return UsageError(
            f"no weight files in {root}",
            f"those there are empty ({names})",
            "Check that the download or copy has finished",
            docs,
        )
    if left_out:
        return UsageError(
            f"no weight files in {root}",
            f"what is there is no model: {left_out[0].path} is {left_out[0].why}",
            "Name the file itself if it is meant",
            docs,
        )
    return UsageError(
        f"no weight files in {root}",
        f"looked for an index and for {', '.join(sorted(suffixes()))}",
        "Name the weight files themselves if they are called otherwise",
        docs,
    )


def check_name(name: str) -> None:
    """Check that a model can have a name.

    Args:
        name: a model's name, from the user or a client.

    Raises:
        UsageError: it is too long, or has characters that no name has.
    """
    if len(name) > NAME_BYTES or not _NAME_OK.fullmatch(name):
        raise UsageError(
            f"{name!r} is not a model name",
            f"a name has 1 to {NAME_BYTES} of the characters A-Z a-z 0-9 . _ + @ / - and starts "
            "with a letter or a digit",
            "Choose another with --model",
            f"{_DOCS}#is-not-a-model-name",
        )


def _default_name(root: Path) -> str:
    """Name a model after its repository, directory or file; always a legal name."""
    base = root.name
    for part in (root, *root.parents):
        hub = HUB_DIRECTORY.fullmatch(part.name)
        # below the cache directory only its snapshots are the model, not any folder there
        if hub and (part == root or part / "snapshots" in (root, *root.parents)):
            base = hub[1].replace("--", "/")
            if root.suffix[1:].lower() in suffixes():
                base += f"/{root.name}"
            break
    name = re.sub(r"[^A-Za-z0-9._+@/-]+", "_", base).lstrip("._+@/-") or "model"
    if len(name) > NAME_BYTES:  # keep what tells two long names apart
        import hashlib  # which takes a third of the time that a look at a model does

        name = f"{name[: NAME_BYTES - 9]}-{hashlib.sha256(base.encode()).hexdigest()[:8]}"
    return name
