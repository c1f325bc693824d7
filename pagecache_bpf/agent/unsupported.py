# SPDX-License-Identifier: Apache-2.0
"""What engine agent does not do of what a policy may ask for, and what each hook hears from.

It is known without running a policy; what turns out not to work while one runs, engine tells.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from pagecache_bpf.errors import UnsupportedError
from pagecache_bpf.kernel.kernelfs import LIVE

#: What a policy may ask for and this engine does not do.
NOT_HONORED = (
    "the kernel's own readahead goes on: an answer adds to it",
    "the marker and the folio order of an answer",
    "the exit hook and access_step_pages",
    "tags do not outlive the policy (detach --keep-tags)",
)
#: Hooks that are not asked, and what that means.
_NOT_ASKED = {"evict": "the hook evict: nothing is kept from reclaim, which evicts as it likes"}

#: The kernel's trace events of what readers want ("filemap: add trace events for get_pages,
#: map_pages, and fault", 6.12) and of pages that come and go (3.12).
_READS = ("mm_filemap_get_pages", "mm_filemap_map_pages", "mm_filemap_fault")
_ADDED = ("mm_filemap_add_to_page_cache",)
_REMOVED = ("mm_filemap_delete_from_page_cache",)
#: What a hook is called from; any of them is enough.  `pressure` is asked by the agent itself.
_EVENTS = {"access": _READS, "readahead": _READS, "added": _ADDED, "removed": _REMOVED}


def events_here() -> list[str]:
    """Ask the kernel's type information which of the trace events it has.

    Returns:
        Their names; all of them where there is no type information to ask.
    """
    names = [*_READS, *_ADDED, *_REMOVED]
    types = LIVE.read_bytes("/sys/kernel/btf/vmlinux")
    return [name for name in names if types is None or f"\0btf_trace_{name}\0".encode() in types]


def check_heard(policy: str, hooks: Iterable[str], attached: Collection[str]) -> None:
    """Refuse a policy one of whose hooks nothing would ever call on this kernel.

    Args:
        policy: its name.
        hooks: names of its hooks.
        attached: names of the trace events that its programs sit on.

    Raises:
        UnsupportedError: there is such a hook.
    """
    for hook in hooks:
        events = _EVENTS.get(hook, ())
        if events and not any(event in attached for event in events):
            raise UnsupportedError(
                f"the policy {policy} cannot run on the engine agent here",
                f"nothing would call its hook {hook}, as this kernel has none of the tracepoints "
                f"{', '.join(events)}",
                "Boot Linux 6.12 or newer, or use the engine struct_ops",
                "docs/troubleshooting.md#cannot-run-on-the-engine-agent-here",
            )


def not_honored(hooks: Iterable[str]) -> list[str]:
    """List what this engine does not do of what a policy may ask for.

    Args:
        hooks: names of the policy's hooks.

    Returns:
        Sentences for people.
    """
    return [*(text for hook, text in _NOT_ASKED.items() if hook in hooks), *NOT_HONORED]
