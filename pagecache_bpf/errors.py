# SPDX-License-Identifier: Apache-2.0
"""Errors of pagecache-bpf: each says what failed, why, and what to do about it.

Exit codes of the command line follow from the class: 1 failed, 2 usage, 3 the kernel (or a
tool) lacks something, 4 not enough privilege.
"""

from __future__ import annotations

import sys
from pathlib import Path


class PagecacheError(Exception):
    """Base of every error this package raises on purpose.

    Args:
        what: what was tried and failed.
        why: the cause.
        fix: the next step for the person reading.
        docs: where to read more (a path below docs/, with a section).
    """

    exit_code = 1

    def __init__(self, what: str, why: str = "", fix: str = "", docs: str = "") -> None:
        self.what, self.why, self.fix, self.docs = what, why, fix, docs
        super().__init__(self._text())

    def _text(self) -> str:
        text = f"{self.what}: {self.why}" if self.why else self.what
        return f"{text}. {self.fix}" if self.fix else text


class UsageError(PagecacheError):
    """The request itself is wrong: an unknown policy or knob, a bad value, a bad path."""

    exit_code = 2


class UnsupportedError(PagecacheError):
    """This machine lacks something: the module, a kernel feature, libbpf, clang."""

    exit_code = 3


class PrivilegeError(PagecacheError):
    """Root, or a right to the file, is missing."""

    exit_code = 4


class NotAdmitted(PagecacheError):
    """A budget leaves no room for a load: whoever goes on all the same goes past the budget."""


class PolicyRejected(PagecacheError):
    """The kernel refused a policy: the verifier, or the attachment.

    Args:
        what: what was tried and failed.
        why: the cause.
        fix: the next step for the person reading.
        docs: where to read more (a path below docs/, with a section).
        log_path: the file with the verifier's whole log; None: there is none.
    """

    def __init__(
        self,
        what: str,
        why: str = "",
        fix: str = "",
        docs: str = "",
        log_path: Path | None = None,
    ) -> None:
        super().__init__(what, why, fix, docs)
        self.log_path = log_path


def missing_package(error: ModuleNotFoundError) -> UnsupportedError | None:
    """Say how to install the Python package that an import did not find.

    The core of this package needs none; others come with the extras of pyproject.toml.

    Args:
        error: what the import raised.

    Returns:
        What to tell a person; None where a module of this package or of Python itself is missing,
        which is a bug or a damaged installation.
    """
    name = (error.name or "").partition(".")[0]
    if not name or name == __name__.partition(".")[0] or name in sys.stdlib_module_names:
        return None
    return UnsupportedError(
        f"the Python package {name} is not installed",
        "only load() does without all others",
        "Run `pip install 'pagecache-bpf[all]'`; docs/install.md tells which extra is for what",
        docs="docs/install.md",
    )
