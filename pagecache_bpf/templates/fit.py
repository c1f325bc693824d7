# SPDX-License-Identifier: Apache-2.0
"""Whether a template fits the files at hand, which are known by their sizes and headers.

It opens files for reading only, and knows nothing of how a template is used.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pagecache_bpf.errors import PagecacheError, PrivilegeError
from pagecache_bpf.templates.template import Template, counts
from pagecache_bpf.units import format_size, plural
from pagecache_bpf.weights.identity import TemplateFile, identify
from pagecache_bpf.weights.models import Model

_DOCS = "docs/troubleshooting.md"


@dataclass(frozen=True)
class Mismatch:
    """A file that is not what a template was made for.

    Attributes:
        path: the file's path in the template.
        why: in what it differs.
    """

    path: str
    why: str


@dataclass(frozen=True)
class Fit:
    """How a template fits the files at hand.

    Attributes:
        paths: the files that fit, by their numbers in the template.
        mismatches: those that do not, and why.
        fitting_bytes: bytes of the extents of files that fit.
        total_bytes: bytes of all extents.
    """

    paths: dict[int, Path] = field(default_factory=dict)
    mismatches: tuple[Mismatch, ...] = ()
    fitting_bytes: int = 0
    total_bytes: int = 0

    @property
    def whole(self) -> bool:
        """Whether every file is the one that the template was made for."""
        return not self.mismatches


def locate(template: Template, where: Path | Model) -> list[Path]:
    """Return where the files of a template are, in the template's order.

    Args:
        template: its files have names below a model's directory.
        where: a model, whose files are taken by the names that people see; or a directory, or the
            one file of a template of one.

    Returns:
        A path for each file of the template, whether there is such a file or not.
    """
    if isinstance(where, Model):
        if len(template.files) == len(where.files) == 1:
            return [where.files[0]]
        known = dict(zip(where.names, where.files, strict=True))
        by_name = {Path(name).name: path for name, path in known.items()}
        return [
            known.get(file.path) or by_name.get(Path(file.path).name) or where.directory / file.path
            for file in template.files
        ]
    if where.is_file():
        if len(template.files) == 1:
            return [where]
        where = where.parent
    return [where / file.path for file in template.files]


def check(template: Template, where: Path | Model) -> Fit:
    """Compare a template with files, by their sizes and headers.

    Args:
        template: the I/O template that is compared with the files.
        where: see locate().

    Returns:
        Which files fit.

    Raises:
        PrivilegeError: a file may not be read.
    """
    paths: dict[int, Path] = {}
    mismatches = []
    for number, (file, path) in enumerate(
        zip(template.files, locate(template, where), strict=True)
    ):
        why = _difference(file, path)
        if why:
            mismatches.append(Mismatch(file.path, why))
        else:
            paths[number] = path
    extents = template.extents
    fits = np.isin(extents["file"], np.array(sorted(paths), np.uint32))
    fitting = (extents["length"] * counts(extents))[fits]
    return Fit(paths, tuple(mismatches), int(fitting.sum()), template.length)


def _difference(expected: TemplateFile, path: Path) -> str:
    """Say in what a file differs from what is expected; "" if it is the same.

    Raises PrivilegeError.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except PermissionError as error:
        raise PrivilegeError(
            f"{path} cannot be opened", "permission denied", "Run as a user who may read the file"
        ) from error
    except OSError as error:
        return error.strerror or str(error)
    try:
        size = os.fstat(fd).st_size
        if size != expected.size:
            return f"it has {size:,} bytes, not {expected.size:,}"
        digest = identify(fd, size, expected.hashed_from, expected.hashed_bytes)
    except OSError as error:
        return error.strerror or str(error)
    except EOFError:
        return "it ends early"
    finally:
        os.close(fd)
    return "" if digest == expected.digest else "its header is another one"


def require_fit(template: Template, fit: Fit, what: str, partial: bool = False) -> Template:
    """Return a template if it fits the files, or the part of it that does.

    Args:
        template: the I/O template that is compared with the files.
        fit: what check() said of it.
        what: the template's name, for people.
        partial: whether a part of it is enough.

    Returns:
        The template; with `partial`, only the extents of files that fit.

    Raises:
        PagecacheError: it does not fit, or with `partial` no file of it does.
    """
    if fit.whole:
        return template
    first = "; ".join(f"{mismatch.path}: {mismatch.why}" for mismatch in fit.mismatches[:3])
    if len(fit.mismatches) > 3:
        first += f"; and {plural(len(fit.mismatches) - 3, 'more file')}"
    share = f"{format_size(fit.fitting_bytes)} of {format_size(fit.total_bytes)} fit"
    if not partial or not fit.paths:
        raise PagecacheError(
            f"{what} does not fit the files",
            f"{first} ({share})",
            "Derive or record a template of these files",
            f"{_DOCS}#does-not-fit-the-files",
        )
    keep = np.isin(template.extents["file"], np.array(sorted(fit.paths), np.uint32))
    return Template(
        template.files,
        template.consumers,
        template.extents[keep],
        template.source,
        template.loader,
        template.tp,
    )
