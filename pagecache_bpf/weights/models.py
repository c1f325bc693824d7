# SPDX-License-Identifier: Apache-2.0
"""From the path a person names to the weight files of a model.

A path is one file, a directory of shards, a Hugging Face snapshot, or a Hugging Face cache
directory (models--ORG--NAME).  What comes back are real regular files: symbolic links are
followed and a file that is reached twice counts once.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pagecache_bpf.errors import PagecacheError, PrivilegeError, UsageError
from pagecache_bpf.kernel import kernelfs
from pagecache_bpf.kernel.file_key import read_small_file

#: What weight files are called, by suffix.
SUFFIXES = frozenset(
    (
        "safetensors",
        "gguf",
        "ggml",
        "bin",
        "pt",
        "pth",
        "ckpt",
        "npz",
        "npy",
        "h5",
        "onnx",
        "onnx_data",
        "msgpack",
        "tensors",
        "pdparams",
    )
)
NAME_BYTES = 63  # PAGECACHE_MODEL_LEN less the terminating NUL
MAX_DEPTH = 4  # diffusion pipelines keep weights one level down; nothing known needs more
MAX_INDEX_BYTES = 64 << 20  # of an index; that of a 700B model in 163 shards has 9 MB
MAX_ENTRIES = 100_000  # a directory with more than this is not one model

_NAME_OK = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+@/-]*")
_HUB_CACHE = re.compile(r"models--(.+)")
# Their pages are the only copy of the data: there is no device to read ahead from.
_IN_MEMORY = frozenset({"tmpfs", "ramfs", "devtmpfs", "hugetlbfs"})
_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
)
_DOCS = "docs/troubleshooting.md"


@dataclass(frozen=True)
class Model:
    """A named set of weight files: real, regular, not empty, each one once, sorted by path."""

    name: str
    root: Path
    files: tuple[Path, ...]

    @property
    def size(self) -> int:
        """Bytes of all files now."""
        return sum(path.stat().st_size for path in self.files)


def resolve(path: str | Path, name: str | None = None) -> Model:
    """Find the weight files that PATH stands for and name the model.

    name: the model's name; by default that of the file, the directory or the Hugging Face
    repository.

    Raises UsageError when the path does not lead to weight files that can be governed, and
    PrivilegeError when a file may not be opened; both name the file.
    """
    root = Path(os.path.abspath(path))
    if name is not None:
        check_name(name)
    status = _stat(root)
    kinds: dict[int, str | None] = {}
    if stat.S_ISDIR(status.st_mode):
        directory = _snapshot(root)
        found: dict[tuple[int, int], Path] = {}
        empty = []
        for shard, required in _shards(directory):
            real, status = _regular(shard)
            if status.st_size == 0 and not required:
                empty.append(shard)  # a stray empty file is no reason to refuse the others
            else:
                _check_content(real, status, kinds)
                found.setdefault((status.st_dev, status.st_ino), real)
        if not found:
            raise _nothing_found(root, directory, empty)
        files = tuple(sorted(found.values()))
    else:
        real, status = _regular(root)
        _check_content(real, status, kinds)
        files = (real,)
    return Model(name if name is not None else _default_name(root), root, files)


def _stat(path: Path) -> os.stat_result:
    """Follow PATH; each way this fails has its own message."""
    try:
        return path.stat()
    except OSError as error:
        raise _path_error(path, error) from None


def _path_error(path: Path, error: OSError) -> PagecacheError:
    if error.errno == errno.ENOENT and path.is_symlink():
        return UsageError(
            f"{path} is a broken symbolic link",
            f"it points to {os.readlink(path)}, which does not exist",
            "Download or restore that file, then try again",
            f"{_DOCS}#is-a-broken-symbolic-link",
        )
    if error.errno == errno.ENOENT:
        return UsageError(
            f"{path} does not exist",
            "",
            "Check the path for typing errors",
            f"{_DOCS}#does-not-exist",
        )
    if error.errno == errno.ELOOP:
        return UsageError(
            f"{path} cannot be followed",
            "its symbolic links lead back to themselves",
            "Point the link at the real file",
            f"{_DOCS}#cannot-be-followed",
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        return PrivilegeError(
            f"{path} cannot be opened",
            "permission denied",
            "Run as a user who may read the file (root usually may)",
            f"{_DOCS}#cannot-be-opened",
        )
    return UsageError(f"{path} cannot be opened", os.strerror(error.errno or 0))


def _regular(path: Path) -> tuple[Path, os.stat_result]:
    """Return the real path and status of a regular file, or say what it is instead."""
    status = _stat(path)
    if not stat.S_ISREG(status.st_mode):
        kind = next((text for test, text in _KINDS if test(status.st_mode)), "something else")
        raise UsageError(
            f"{path} is not a regular file",
            f"it is {kind}",
            "Name the file that holds the weights",
            f"{_DOCS}#is-not-a-regular-file",
        )
    return Path(os.path.realpath(path)), status


def _check_content(path: Path, status: os.stat_result, kinds: dict[int, str | None]) -> None:
    """Refuse a file that has no pages: a virtual one, one in memory, an empty one.

    kinds: file system types by device that are known already.
    """
    if status.st_dev not in kinds:
        kinds[status.st_dev] = kernelfs.LIVE.fstype(status.st_dev)
    fstype = kinds[status.st_dev]
    if fstype in _IN_MEMORY:
        raise UsageError(
            f"{path} has no pages to read ahead",
            f"on {fstype} the file is in memory already",
            "Name the copy on disk, if there is one",
            f"{_DOCS}#has-no-pages-to-read-ahead",
        )
    if not _can_be_mapped(path):
        raise UsageError(
            f"{path} has no pages to read ahead",
            f"the file system ({fstype or 'unknown'}) does not keep it in the page cache",
            "Name a file on a disk or network file system",
            f"{_DOCS}#has-no-pages-to-read-ahead",
        )
    if status.st_size == 0:
        raise UsageError(
            f"{path} is empty",
            "there is nothing to read ahead",
            "Check that the download or copy has finished",
            f"{_DOCS}#is-empty",
        )


def _can_be_mapped(path: Path) -> bool:
    """Ask the kernel for a shared mapping: only files with page cache pages have one.

    The mmap module refuses empty files by itself, and procfs files look empty, so this goes
    to the C library.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise _path_error(path, error) from None
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [
            ctypes.c_void_p,
            ctypes.c_size_t,
            ctypes.c_int,
            ctypes.c_int,
            ctypes.c_int,
            ctypes.c_long,
        ]
        libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        length, prot_read, map_shared = 4096, 1, 1
        address = libc.mmap(None, length, prot_read, map_shared, fd, 0)
        if address in (None, ctypes.c_void_p(-1).value):
            return False
        libc.munmap(address, length)
        return True
    finally:
        os.close(fd)


def _snapshot(directory: Path) -> Path:
    """Return the snapshot inside a Hugging Face cache directory; any other as it is."""
    if not _HUB_CACHE.fullmatch(directory.name) or not (directory / "snapshots").is_dir():
        return directory
    try:
        revision = read_small_file(directory / "refs" / "main", 4096).decode().strip()
    except (OSError, UnicodeDecodeError):
        revision = ""
    known = sorted(entry.name for entry in (directory / "snapshots").iterdir())
    if revision in known:
        return directory / "snapshots" / revision
    if not revision and len(known) == 1:
        return directory / "snapshots" / known[0]
    why = f"refs/main names revision {revision}" if revision else "there is no refs/main"
    raise UsageError(
        f"{directory} does not say which snapshot to use",
        f"{why}; there are: {', '.join(known) or 'none'}",
        f"Name one, for example {directory}/snapshots/{known[0] if known else 'REVISION'}",
        f"{_DOCS}#does-not-say-which-snapshot-to-use",
    )


def _shards(directory: Path) -> Iterator[tuple[Path, bool]]:
    """Walk a directory; yield (file, required), where an index makes its files required."""
    pending = [(directory, 0)]
    seen: set[tuple[int, int]] = set()
    entries = 0
    while pending:
        current, depth = pending.pop()
        status = _stat(current)
        if (status.st_dev, status.st_ino) in seen:
            continue  # reached twice, or a loop of links
        seen.add((status.st_dev, status.st_ino))
        try:
            children = sorted(current.iterdir())
        except OSError as error:
            raise _path_error(current, error) from None
        entries += len(children)
        if entries > MAX_ENTRIES:
            raise UsageError(
                f"{directory} holds more than {MAX_ENTRIES:,} files",
                "that is not one model",
                "Name the model's own directory",
                f"{_DOCS}#holds-more-than-100000-files",
            )
        indexed = _indexed(children)
        if indexed is not None:
            yield from ((shard, True) for shard in indexed)
        for child in children:
            if child.name.startswith("."):
                continue
            if child.is_dir():
                if depth < MAX_DEPTH:
                    pending.append((child, depth + 1))
            elif indexed is None and child.suffix[1:].lower() in SUFFIXES:
                yield child, False


def _indexed(children: list[Path]) -> list[Path] | None:
    """Return the files that a directory's weight index names; None without an index.

    An index of safetensors files wins over one of pickled files: that is what loaders take.
    """
    for ending in (".safetensors.index.json", ".bin.index.json"):
        for index in children:
            if index.name.endswith(ending):
                return _read_index(index)
    return None


def _read_index(index: Path) -> list[Path]:
    docs = f"{_DOCS}#is-not-a-weight-index"
    fix = "Download it again, or name the shards one by one"
    try:
        content = json.loads(read_small_file(index, MAX_INDEX_BYTES))
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EFBIG):
            why = error.strerror or str(error)
            raise UsageError(f"{index} is not a weight index", why, fix, docs) from None
        raise _path_error(index, error) from None
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"{index} is not a weight index", f"bad JSON: {error}", fix, docs
        ) from None
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UsageError(f"{index} is not a weight index", "it has no weight_map", fix, docs)
    shards = []
    for name in sorted({str(value) for value in weight_map.values()}):
        if "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts:
            raise UsageError(
                f"{index} is not a weight index",
                f"it names {name!r}, outside its directory",
                fix,
                docs,
            )
        shard = index.parent / name
        if not os.path.lexists(shard):
            raise UsageError(
                f"{shard} is missing",
                f"{index.name} names it",
                "Complete the download, then try again",
                f"{_DOCS}#is-missing",
            )
        shards.append(shard)
    return shards


def _nothing_found(root: Path, directory: Path, empty: list[Path]) -> UsageError:
    docs = f"{_DOCS}#no-weight-files-in"
    if not any(directory.iterdir()):
        return UsageError(f"no weight files in {root}", "the directory is empty", "", docs)
    if empty:
        names = ", ".join(path.name for path in empty[:3])
        return UsageError(
            f"no weight files in {root}",
            f"those there are empty ({names})",
            "Check that the download or copy has finished",
            docs,
        )
    return UsageError(
        f"no weight files in {root}",
        f"looked for an index and for {', '.join(sorted(SUFFIXES))}",
        "Name the weight files themselves if they are called otherwise",
        docs,
    )


def check_name(name: str) -> None:
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
        hub = _HUB_CACHE.fullmatch(part.name)
        # below the cache directory only its snapshots are the model, not any folder there
        if hub and (part == root or part / "snapshots" in (root, *root.parents)):
            base = hub[1].replace("--", "/")
            if root.suffix[1:].lower() in SUFFIXES:
                base += f"/{root.name}"
            break
    name = re.sub(r"[^A-Za-z0-9._+@/-]+", "_", base).lstrip("._+@/-") or "model"
    if len(name) > NAME_BYTES:  # keep what tells two long names apart
        name = f"{name[: NAME_BYTES - 9]}-{hashlib.sha256(base.encode()).hexdigest()[:8]}"
    return name
