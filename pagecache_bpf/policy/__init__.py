# SPDX-License-Identifier: Apache-2.0
"""Policies: found, compiled, loaded and attached on either engine, and the maps they share.

What programs use is named here, and loaded when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pagecache_bpf.kernel.control_device import Device, ExitRecord, PolicyStatus, Tag, status
    from pagecache_bpf.policy.catalog import Knob, PolicyInfo, discover, find, parse_knobs
    from pagecache_bpf.policy.hints import forget, gauges, hint, read_map
    from pagecache_bpf.policy.loader import Attachment, attach, detach, knobs_of, pinned

__all__ = [
    "Attachment",
    "Device",
    "ExitRecord",
    "Knob",
    "PolicyInfo",
    "PolicyStatus",
    "Tag",
    "attach",
    "detach",
    "discover",
    "find",
    "forget",
    "gauges",
    "hint",
    "knobs_of",
    "parse_knobs",
    "pinned",
    "read_map",
    "status",
]

#: Modules for the names that are not in `policy.loader`.
_HOMES = {
    "pagecache_bpf.kernel.control_device": (
        "Device",
        "ExitRecord",
        "PolicyStatus",
        "Tag",
        "status",
    ),
    "pagecache_bpf.policy.catalog": ("Knob", "PolicyInfo", "discover", "find", "parse_knobs"),
    "pagecache_bpf.policy.hints": ("forget", "gauges", "hint", "read_map"),
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    home = next((module for module, names in _HOMES.items() if name in names), f"{__name__}.loader")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
