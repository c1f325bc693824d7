# SPDX-License-Identifier: Apache-2.0
"""pagecache-bpf: eBPF policies for the page cache of model weights.

These are the names for programs that load models; those for policies are in
pagecache_bpf.policy.  Importing this package costs next to nothing, needs no root and never fails
because the kernel lacks something: names are loaded when they are first used.
"""

from __future__ import annotations

# Type checkers take this name as true. Importing it from typing would be most of what importing
# this package costs, and a Ctrl-C in that time is a traceback: see __main__.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pagecache_bpf.api import (
        Load,
        Residency,
        drop,
        load,
        prefetch,
        report,
        residency,
        tag,
        untag,
    )
    from pagecache_bpf.errors import (
        PagecacheError,
        PolicyRejected,
        PrivilegeError,
        UnsupportedError,
        UsageError,
    )
    from pagecache_bpf.loads.report import Report
    from pagecache_bpf.recording.phases import phase

__all__ = [
    "Load",
    "PagecacheError",
    "PolicyRejected",
    "PrivilegeError",
    "Report",
    "Residency",
    "UnsupportedError",
    "UsageError",
    "__version__",
    "drop",
    "load",
    "phase",
    "prefetch",
    "report",
    "residency",
    "tag",
    "untag",
]

#: Modules below this package for the names that are not in `api`.
_HOMES = {
    "errors": (
        "PagecacheError",
        "PolicyRejected",
        "PrivilegeError",
        "UnsupportedError",
        "UsageError",
    ),
    "loads.report": ("Report",),
    "recording.phases": ("phase",),
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "__version__":
        value: Any = _version()
    else:
        from importlib import import_module

        home = next((module for module, names in _HOMES.items() if name in names), "api")
        value = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    """Return the version that pyproject.toml gives; it is the only place that has it."""
    from pathlib import Path

    project = Path(__file__).resolve().parent.parent / "pyproject.toml"
    # A wheel may have left some other project's file beside this package.
    if project.is_file() and 'name = "pagecache-bpf"' in (
        text := project.read_text(encoding="utf-8", errors="replace")
    ):
        for line in text.splitlines():
            if line.startswith("version = "):
                return line.split('"')[1]
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("pagecache-bpf")
    except PackageNotFoundError:
        return "unknown"
