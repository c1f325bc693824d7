# SPDX-License-Identifier: Apache-2.0
"""Tags the files of models as a whole: all of them, or none and everything as it was."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pagecache_bpf.cli.output import TROUBLESHOOTING
from pagecache_bpf.errors import PagecacheError, PrivilegeError
from pagecache_bpf.ipc.wire import BATCH_REQUESTS
from pagecache_bpf.kernel.control_device import Tag
from pagecache_bpf.kernel.file_key import identity_at, identity_of, open_to_read
from pagecache_bpf.policy.engines import Engines
from pagecache_bpf.weights.models import LeftOut, Model, resolve

if TYPE_CHECKING:
    from pagecache_bpf.cli.undo_log import Steps

_Identity = tuple[int, int, int]


def require_root(what: str) -> None:
    """Refuse users who are not root.

    Args:
        what: what only root can do, such as "attach policies".

    Raises:
        PrivilegeError: this process does not run as root.
    """
    if os.geteuid() != 0:
        raise PrivilegeError(
            f"only root can {what}",
            f"this runs as user {os.geteuid()}",
            "Run the command with sudo",
            f"{TROUBLESHOOTING}#only-root-can",
        )


def resolve_all(paths: Sequence[str], name: str | None) -> list[Model]:
    """Find the weight files behind each path of a command line.

    Args:
        paths: weight files, directories, snapshots or ORG/NAME, as weights.models.resolve() takes.
        name: the name that --model gives all of them; None: each has its own.

    Returns:
        A model a path, in their order.

    Raises:
        UsageError: one of them leads to no weights.
        PrivilegeError: a file may not be looked at.
    """
    return [resolve(path, name) for path in paths]


def left_out_json(left_out: Iterable[LeftOut]) -> list[dict[str, str]]:
    """Return what is not part of a model, as commands print it with --json.

    Args:
        left_out: files that lie with the model and were not taken.

    Returns:
        The path of each and the reason.
    """
    return [{"path": item.path, "why": item.why} for item in left_out]


def left_out_row(left_out: Sequence[dict[str, str]]) -> tuple[str, str]:
    """Make the row that tells people what is not part of a model.

    Args:
        left_out: what left_out_json() returned, not empty.

    Returns:
        (title, text); the text names the first five and counts the others.
    """
    shown = [f"{item['path']} ({item['why']})" for item in left_out[:5]]
    if len(left_out) > 5:
        shown.append(f"and {len(left_out) - 5:,} more (--json lists them)")
    return "left out", "; ".join(shown)


@dataclass(frozen=True)
class TaggedFile:
    """A file that is tagged now, with its size."""

    path: Path
    size: int


@dataclass
class Tagging:
    """Tags files for one policy and knows what takes that back.

    replace: take over files that another policy governs.
    """

    device: Engines
    policy: str
    replace: bool = False
    models: dict[str, list[TaggedFile]] = field(default_factory=dict)
    left_out: dict[str, list[LeftOut]] = field(default_factory=dict)
    _before: dict[_Identity, Tag] = field(default_factory=dict)
    _at_path: dict[str, list[Tag]] = field(default_factory=dict)
    _done: dict[_Identity, Path] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for tag in self.device.tags():
            self._before[tag.identity[:3]] = tag
            self._at_path.setdefault(tag.path, []).append(tag)

    def add(self, model: Model) -> None:
        """Tag every file of a model; a file that two of the paths lead to is tagged once.

        Args:
            model: the model; its name becomes the label of the files' counters.

        Raises:
            PagecacheError: a file cannot be tagged.  What was tagged before stays so: the undo
                log's steps, from steps_back(), take it back.
        """
        self.models.setdefault(model.name, [])
        self.left_out.setdefault(model.name, []).extend(model.left_out)
        for begin in range(0, len(model.files), BATCH_REQUESTS):
            with ExitStack() as opened:
                self._add_some(model, model.files[begin : begin + BATCH_REQUESTS], opened)

    def _add_some(self, model: Model, paths: Sequence[Path], opened: ExitStack) -> None:
        """Tag some files of a model at once; they stay open until the stack is closed."""
        found: dict[int, tuple[Path, _Identity, int]] = {}
        for path in paths:
            fd = open_to_read(path)
            opened.callback(os.close, fd)
            major, minor, inode, generation = identity_of(fd)
            identity = (major, minor, inode)
            if identity not in self._done:  # the same file below two of the paths
                self._done[identity] = path
                found[fd] = path, identity, generation
        for replace, group in itertools.groupby(
            found, lambda fd: self._may_replace(found[fd][0], self._before.get(found[fd][1]))
        ):
            files = {fd: str(found[fd][0]) for fd in group}
            self.device.tag_files(files, policy=self.policy, model=model.name, replace=replace)
        for fd, (path, identity, generation) in found.items():
            self._forget_replaced(str(path), identity[2], generation)
            self.models[model.name].append(TaggedFile(path, os.fstat(fd).st_size))

    def _forget_replaced(self, path: str, inode: int, generation: int) -> None:
        """Take the tags off what had this path before: another file has its name now."""
        for tag in self._at_path.pop(path, ()):
            if (tag.ino, tag.generation) != (inode, generation):
                untag(self.device, [tag])

    def _may_replace(self, path: Path, tag: Tag | None) -> bool:
        if tag is None or self.replace or tag.policy == self.policy:
            return self.replace or tag is not None
        raise PagecacheError(
            f"{path} is tagged already",
            f"the policy {tag.policy} governs it (model {tag.model})",
            f"Add --replace to move it to {self.policy}, or untag it first",
            f"{TROUBLESHOOTING}#is-tagged-already",
        )

    def steps_back(self, models: Sequence[Model], *, attached: bool) -> Steps:
        """Return the steps that undo the tagging of these models; called before it is done.

        Args:
            models: what add() is going to be called with.
            attached: whether the command attaches the policy as well.

        Returns:
            Steps for the undo log: files to untag, and those that another policy governed before,
            to be given back to it.
        """
        from pagecache_bpf.cli.undo_log import Steps

        known = {tag.model for tag in self._before.values()}
        names = [model.name for model in models if model.name not in known]
        steps = Steps(undo=True, policy=self.policy, release=names)
        if attached:
            steps.detach.append(self.policy)
        for model in models:
            for path in model.files:
                old = None
                try:
                    if self._before:
                        old = self._before.get(identity_at(path)[:3])
                    elif not os.access(path, os.R_OK):
                        continue  # add() says why
                except (PagecacheError, OSError):
                    continue
                if old and (old.policy, old.model) == (self.policy, model.name):
                    continue
                steps.untag_paths.append(str(path))
                if old and old.active:
                    steps.retag.append({"path": old.path, "policy": old.policy, "model": old.model})
        return steps

    def as_json(self) -> list[dict[str, Any]]:
        """Return the models with their files, as attach and tag print them.

        Returns:
            A dictionary a model: its name, bytes, files and what was left out.
        """
        return [
            {
                "name": name,
                "bytes": sum(file.size for file in files),
                "files": [{"path": str(file.path), "bytes": file.size} for file in files],
                "left_out": left_out_json(self.left_out.get(name, ())),
            }
            for name, files in self.models.items()
        ]


def untag(device: Engines, tags: Iterable[Tag]) -> list[Tag]:
    """Take tags off by the identity of the file, which its path may no longer lead to.

    Args:
        device: the engines that govern the files.
        tags: what to take off.

    Returns:
        Those that were still there.
    """
    tags = list(tags)
    there = device.untag_all([tag.identity for tag in tags])
    return [tag for tag, found in zip(tags, there, strict=True) if found]  # somebody was faster
