# SPDX-License-Identifier: Apache-2.0
"""Where the caches of model hubs keep what people call by a repository's name.

Known are those of huggingface_hub, ModelScope, Ollama, llama.cpp and LM Studio.  Everything is
looked up on this machine; nothing is downloaded.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pagecache_bpf.errors import UsageError
from pagecache_bpf.kernel.file_key import read_small_file
from pagecache_bpf.weights.names import natural

_REPOSITORY = re.compile(
    r"(?P<name>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[\w./-]+)|:(?P<tag>[\w.-]+))?"
)
_OLLAMA = re.compile(
    r"(?:(?P<prefix>ollama)[:/]+)?(?:(?P<host>[\w.-]+\.[\w.-]+)/)?(?:(?P<space>[\w.-]+)/)?"
    r"(?P<model>[\w.-]+)(?::(?P<tag>[\w.-]+))?"
)
HUB_DIRECTORY = re.compile(r"models--(.+)")
_MANIFEST_BYTES = 1 << 20
_DOCS = "docs/troubleshooting.md"
#: What a layer of an Ollama manifest is, by its media type; others are texts and parameters.
_LAYERS = (
    "application/vnd.ollama.image.model",
    "application/vnd.ollama.image.adapter",
    "application/vnd.ollama.image.projector",
    "application/vnd.ollama.image.tensor",
)


@dataclass(frozen=True)
class Listed:
    """A model whose files a manifest lists: paths in their order, and the name people call it."""

    name: str
    files: tuple[Path, ...]


def _home(environ: Mapping[str, str]) -> Path:
    """Return the user's home directory in an environment."""
    return Path(environ.get("HOME") or os.path.expanduser("~"))


def hub_directories(environ: Mapping[str, str] = os.environ) -> list[Path]:
    """Return where huggingface_hub keeps its cache, by its own variables and their precedence.

    Args:
        environ: the environment.

    Returns:
        Directories, which need not exist, in the order in which they are looked into.

    Source: huggingface_hub, `constants.py`.
    """
    home = environ.get("HF_HOME") or os.path.join(
        environ.get("XDG_CACHE_HOME") or _home(environ) / ".cache", "huggingface"
    )
    places = [
        environ.get("HF_HUB_CACHE")
        or environ.get("HUGGINGFACE_HUB_CACHE")
        or os.path.join(home, "hub"),
        environ.get("TRANSFORMERS_CACHE"),
    ]
    return [Path(place).expanduser() for place in places if place]


def _modelscope(environ: Mapping[str, str]) -> list[Path]:
    """Return where ModelScope keeps repositories, as its releases have done one after the other."""
    cache = environ.get("MODELSCOPE_CACHE")
    root = Path(cache).expanduser() if cache else _home(environ) / ".cache" / "modelscope"
    return [root / "models", root / "hub" / "models", root / "hub", root]


def _lm_studio(environ: Mapping[str, str]) -> list[Path]:
    """Return where LM Studio keeps repositories, now and before."""
    home = _home(environ)
    return [home / ".lmstudio" / "models", home / ".cache" / "lm-studio" / "models"]


def _llama_cpp(environ: Mapping[str, str]) -> Path:
    """Return the directory of llama.cpp's own cache."""
    cache = environ.get("LLAMA_CACHE")
    if cache:
        return Path(cache)
    return Path(environ.get("XDG_CACHE_HOME") or _home(environ) / ".cache") / "llama.cpp"


def ollama_directories(environ: Mapping[str, str] = os.environ) -> list[Path]:
    """Return where Ollama keeps models: OLLAMA_MODELS, the user's directory, and the service's.

    Args:
        environ: the environment.

    Returns:
        Directories, which need not exist, in the order in which they are looked into.
    """
    named = environ.get("OLLAMA_MODELS")
    places = [Path(named)] if named else []
    return [
        *places,
        _home(environ) / ".ollama" / "models",
        Path("/usr/share/ollama/.ollama/models"),
    ]


def find(name: str, environ: Mapping[str, str] = os.environ) -> Path | Listed | None:
    """Find the model of a name in the caches on this machine.

    Args:
        name: ORG/NAME or NAME, with @REVISION (Hugging Face) or :TAG (llama.cpp's -hf and Ollama);
            ollama:NAME says which cache is meant.
        environ: the environment whose variables say where the caches are.

    Returns:
        Its directory or file, or the files that a manifest lists; None if no cache has it.

    Raises:
        UsageError: the repository is there, but not that revision or that tag.
    """
    if not name.startswith("ollama:"):
        matched = _REPOSITORY.fullmatch(name)
        cached = _repository(matched, environ) if matched is not None else None
        if cached is not None:
            return cached
    manifest = _ollama_manifest(name, environ)
    return ollama_model(manifest) if manifest is not None else None


def _repository(matched: re.Match[str], environ: Mapping[str, str]) -> Path | None:
    """Return the directory or file of a repository in a cache that has repositories."""
    name, revision, tag = matched["name"], matched["revision"], matched["tag"]
    for place in _places(name, environ):
        if place.is_dir():
            return _revision(place, revision, tag)
    return _in_llama_cpp(name, tag, environ) if "/" in name else None


def _places(name: str, environ: Mapping[str, str]) -> Iterator[Path]:
    """Yield the directories that a repository of that name would have, the likeliest first."""
    for hub in hub_directories(environ):
        yield hub / f"models--{name.replace('/', '--')}"
    if "/" not in name:
        return
    owner, _, model = name.partition("/")
    for root in _modelscope(environ):
        yield root / owner / model.replace(".", "___")
        yield root / owner / model
    for root in _lm_studio(environ):
        yield root / owner / model


def _revision(place: Path, revision: str | None, tag: str | None) -> Path:
    """Return the snapshot of a revision, or the file of a quantization, below a repository."""
    if revision is not None:
        return snapshot(place, revision)
    if tag is None:
        return place
    directory = snapshot(place)
    wanted = tag.lower()
    files = sorted(
        (path for path in directory.rglob("*.gguf") if wanted in path.name.lower()),
        key=lambda path: natural(str(path)),
    )
    exact = [
        path
        for path in files
        if re.search(rf"[-_./]{re.escape(wanted)}[-.]", f"/{path.name.lower()}")
    ]
    if not (exact or files):
        raise UsageError(
            f"{directory} has no quantization {tag}",
            "no GGUF file there has it in its name",
            "Check the tag, or name the file",
            f"{_DOCS}#holds-several-models",
        )
    return (exact or files)[0]


def repositories(directory: Path) -> list[Path]:
    """List the repositories in the directory of a Hugging Face cache.

    Args:
        directory: what HF_HUB_CACHE names, or anything else.

    Returns:
        Their cache directories (models--ORG--NAME), sorted; none for other directories.
    """
    try:
        with os.scandir(directory) as entries:
            names = sorted(entry.name for entry in entries if HUB_DIRECTORY.fullmatch(entry.name))
    except OSError:
        return []
    return [directory / name for name in names if (directory / name / "snapshots").is_dir()]


def snapshot(directory: Path, revision: str | None = None) -> Path:
    """Return the snapshot inside a Hugging Face cache directory; any other directory as it is.

    Args:
        directory: models--ORG--NAME, or anything else.
        revision: a branch, a tag or a commit (its beginning is enough); by default refs/main.

    Returns:
        The directory with the files.

    Raises:
        UsageError: it does not say which snapshot to use, or has none of that revision.
    """
    if directory.name == "snapshots" and HUB_DIRECTORY.fullmatch(directory.parent.name):
        directory = directory.parent
    if not HUB_DIRECTORY.fullmatch(directory.name) or not (directory / "snapshots").is_dir():
        if revision is not None:
            raise UsageError(
                f"{directory} has no revisions",
                f"{revision} was asked for, and it is no Hugging Face cache directory",
                "Name the directory alone",
                f"{_DOCS}#does-not-say-which-snapshot-to-use",
            )
        return directory
    known = sorted(entry.name for entry in (directory / "snapshots").iterdir())
    wanted = revision if revision is not None else "main"
    try:
        commit = read_small_file(directory / "refs" / wanted, 4096).decode().strip()
    except (OSError, UnicodeDecodeError, ValueError):
        commit = ""
    if commit in known:
        return directory / "snapshots" / commit
    if revision is not None:
        begun = [name for name in known if name.startswith(revision)]
        if len(begun) == 1:
            return directory / "snapshots" / begun[0]
        raise UsageError(
            f"{directory} has no revision {revision}",
            f"its snapshots are {', '.join(known) or 'none'}",
            "Download that revision, or name one of these",
            f"{_DOCS}#does-not-say-which-snapshot-to-use",
        )
    if not commit and len(known) == 1:
        return directory / "snapshots" / known[0]
    why = f"refs/main names revision {commit}" if commit else "there is no refs/main"
    raise UsageError(
        f"{directory} does not say which snapshot to use",
        f"{why}; there are: {', '.join(known) or 'none'}",
        f"Name one, for example {directory}/snapshots/{known[0] if known else 'REVISION'}",
        f"{_DOCS}#does-not-say-which-snapshot-to-use",
    )


def _in_llama_cpp(name: str, tag: str | None, environ: Mapping[str, str]) -> Path | None:
    """Return the file that llama.cpp's own cache has of a repository.

    Source: llama.cpp, common/arg.cpp: manifest=ORG=NAME=TAG.json beside ORG_NAME_FILE.gguf.
    """
    cache = _llama_cpp(environ)
    flat = name.replace("/", "=")
    content = _json(cache / f"manifest={flat}={tag or 'latest'}.json")
    if content is None and tag is None:
        others = sorted(cache.glob(f"manifest={flat}=*.json")) if cache.is_dir() else []
        content = _json(others[0]) if len(others) == 1 else None
    file = content.get("ggufFile") if isinstance(content, dict) else None
    remote = file.get("rfilename") if isinstance(file, dict) else None
    if not isinstance(remote, str) or "\0" in remote:
        return None
    path = cache / f"{name}/{remote}".replace("/", "_")
    return path if path.exists() else None


def _json(path: Path) -> object:
    """Return the content of a manifest; None where it cannot be read as one."""
    try:
        return json.loads(read_small_file(path, _MANIFEST_BYTES))
    except (OSError, ValueError, RecursionError):
        return None


# Ollama: manifests/HOST/NAMESPACE/MODEL/TAG lists blobs by their digests.


def _ollama_manifest(name: str, environ: Mapping[str, str]) -> Path | None:
    """Return the manifest of a model of Ollama; None if it has none.

    Raises UsageError if the name says that it is Ollama's.
    """
    matched = _OLLAMA.fullmatch(name)
    if matched is None:
        return None
    host = matched["host"] or "registry.ollama.ai"
    below = Path(host) / (matched["space"] or "library") / matched["model"]
    for root in ollama_directories(environ):
        manifest = root / "manifests" / below / (matched["tag"] or "latest")
        if manifest.is_file():
            return manifest
    if matched["prefix"]:
        raise UsageError(
            f"Ollama has no model {name.partition(':')[2]}",
            f"there is no manifest {below / (matched['tag'] or 'latest')}",
            "Run ollama list, then ollama pull",
            f"{_DOCS}#does-not-exist",
        )
    return None


def is_ollama_manifest(path: Path) -> bool:
    """Tell whether a file lies where Ollama keeps its manifests.

    Args:
        path: the file: manifests/HOST/NAMESPACE/MODEL/TAG is one.

    Returns:
        True also for a file there that is no manifest; ollama_model() reads it.
    """
    return len(path.parents) > 4 and path.parents[3].name == "manifests" and path.is_file()


def ollama_models(directory: Path) -> list[Path]:
    """Find the manifests below a directory of Ollama's, or below a part of its manifests.

    Args:
        directory: the directory of Ollama's models, that above it, or one of its manifests'.

    Returns:
        The manifests, sorted; none for other directories.
    """
    for root in (directory, directory / "models"):
        if (root / "manifests").is_dir() and (root / "blobs").is_dir():
            directory = root / "manifests"
            break
    else:
        if "manifests" not in [part.name for part in (directory, *directory.parents)][:4]:
            return []
    return sorted(path for path in directory.rglob("*") if is_ollama_manifest(path))


def ollama_model(manifest: Path) -> Listed:
    """Return the blobs of weights that a manifest of Ollama lists, in its order.

    Args:
        manifest: the manifest's path.

    Returns:
        The blobs, and the name by which people call the model.

    Raises:
        UsageError: it is not a manifest, or a blob is missing or still being downloaded.
    """
    content = _json(manifest)
    layers = content.get("layers") if isinstance(content, dict) else None
    if not isinstance(layers, list):
        raise UsageError(
            f"{manifest} is not a manifest of Ollama",
            "it lists no layers",
            "Pull the model again",
            f"{_DOCS}#is-not-a-weight-index",
        )
    blobs = manifest.parents[4] / "blobs"
    files = []
    for layer in layers:
        kind = layer.get("mediaType") if isinstance(layer, dict) else None
        digest = layer.get("digest") if isinstance(layer, dict) else None
        if kind not in _LAYERS or not isinstance(digest, str):
            continue
        if not re.fullmatch(r"sha256[:-][0-9a-f]{1,64}", digest):
            raise UsageError(
                f"{manifest} is not a manifest of Ollama",
                f"{digest[:80]!r} is no digest",
                "Pull the model again",
                f"{_DOCS}#is-not-a-weight-index",
            )
        blob = blobs / digest.replace(":", "-")
        if not os.path.lexists(blob):
            why = f"{manifest} names it"
            if any(blobs.glob(f"{blob.name}-partial*")):
                why += "; a download is in progress"
            raise UsageError(
                f"{blob} is missing", why, "Complete the download", f"{_DOCS}#is-missing"
            )
        files.append(blob)
    if not files:
        raise UsageError(
            f"no weight files in {manifest}",
            "no layer of it is a model",
            "Pull the model again",
            f"{_DOCS}#no-weight-files-in",
        )
    *_, space, model, tag = manifest.parts
    name = model if space == "library" else f"{space}/{model}"
    return Listed(name if tag == "latest" else f"{name}@{tag}", tuple(dict.fromkeys(files)))
