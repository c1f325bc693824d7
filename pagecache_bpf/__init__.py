# SPDX-License-Identifier: Apache-2.0
"""pagecache-bpf: eBPF policies for the page cache of model weights.

Importing this package costs next to nothing, needs no root and never fails because the kernel
lacks something: the names below are loaded when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pagecache_bpf.api import (
        Load,
        Residency,
        Tagged,
        drop,
        load,
        prefetch,
        report,
        residency,
        tag,
    )
    from pagecache_bpf.errors import (
        PagecacheError,
        PolicyRejected,
        PrivilegeError,
        UnsupportedError,
        UsageError,
    )
    from pagecache_bpf.kernel.control_device import Device, ExitRecord, PolicyStatus, Tag, status
    from pagecache_bpf.loads.report import Report
    from pagecache_bpf.policy.catalog import Knob, PolicyInfo, discover, find, parse_knobs
    from pagecache_bpf.policy.hints import forget, gauges, hint, read_map
    from pagecache_bpf.policy.loader import Attachment, attach, detach, knobs_of, pinned
    from pagecache_bpf.recording.phases import phase

__all__ = [
    "Attachment",
    "Device",
    "ExitRecord",
    "Knob",
    "Load",
    "PagecacheError",
    "PolicyInfo",
    "PolicyRejected",
    "PolicyStatus",
    "PrivilegeError",
    "Report",
    "Residency",
    "Tag",
    "Tagged",
    "UnsupportedError",
    "UsageError",
    "__version__",
    "attach",
    "detach",
    "discover",
    "drop",
    "find",
    "forget",
    "gauges",
    "hint",
    "knobs_of",
    "load",
    "parse_knobs",
    "phase",
    "pinned",
    "prefetch",
    "read_map",
    "report",
    "residency",
    "status",
    "tag",
]

_HOMES = {
    "api": (
        "Load",
        "Residency",
        "Tagged",
        "drop",
        "load",
        "prefetch",
        "report",
        "residency",
        "tag",
    ),
    "kernel.control_device": ("Device", "ExitRecord", "PolicyStatus", "Tag", "status"),
    "errors": (
        "PagecacheError",
        "PolicyRejected",
        "PrivilegeError",
        "UnsupportedError",
        "UsageError",
    ),
    "policy.hints": ("forget", "gauges", "hint", "read_map"),
    "policy.loader": ("Attachment", "attach", "detach", "knobs_of", "pinned"),
    "loads.report": ("Report",),
    "recording.phases": ("phase",),
    "policy.catalog": ("Knob", "PolicyInfo", "discover", "find", "parse_knobs"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = _version()
    elif name in _HOME_OF:
        value = getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    """The version that pyproject.toml gives; it is the only place that has it."""
    from pathlib import Path

    project = Path(__file__).resolve().parent.parent / "pyproject.toml"
    if project.is_file():  # run from the source tree
        for line in project.read_text(encoding="utf-8").splitlines():
            if line.startswith("version = "):
                return line.split('"')[1]
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("pagecache-bpf")
    except PackageNotFoundError:
        return "unknown"
