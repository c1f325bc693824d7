# SPDX-License-Identifier: Apache-2.0
"""What engine agent does not do of what a policy may ask for, and what each hook hears from.

It is known without running a policy; what turns out not to work while one runs, engine tells.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from pagecache_bpf.errors import UnsupportedError
from pagecache_bpf.kernel.event_sources import ACCESSES, EVENTS, MOVES, NEWER, TRACEPOINT, lacking

#: What a policy may ask for and this engine does not do.
NOT_HONORED = (
    "the kernel's own readahead goes on: an answer adds to it",
    "the marker and the folio order of an answer",
    "the exit hook and access_step_bytes",
    "tags do not outlive the policy (detach --keep-tags)",
)
#: Hooks that are not asked, and what that means.
_NOT_ASKED = {"evict": "the hook evict: nothing is kept from reclaim, which evicts as it likes"}

_READS = tuple(event.name for event in ACCESSES)
_ADDED, _REMOVED = ((event.name,) for event in MOVES)
#: What a hook is called from; any of them is enough.  `pressure` is asked by the agent itself.
_EVENTS = {"access": _READS, "readahead": _READS, "added": _ADDED, "removed": _REMOVED}


def check_heard(policy: str, hooks: Iterable[str], attached: Collection[str]) -> None:
    """Refuse a policy one of whose hooks nothing would ever call on this kernel.

    Args:
        policy: its name.
        hooks: names of its hooks.
        attached: names of the events that its programs are told of.

    Raises:
        UnsupportedError: there is such a hook.
    """
    for hook in hooks:
        events = _EVENTS.get(hook, ())
        if events and not any(event in attached for event in events):
            raise UnsupportedError(
                f"the policy {policy} cannot run on the engine agent here",
                f"nothing would call its hook {hook}: this kernel has none of the tracepoints "
                f"{', '.join(events)}, and {_others(events)}",
                "Boot Linux 6.12 or newer, or use the engine struct_ops",
                "docs/troubleshooting.md#cannot-run-on-the-engine-agent-here",
            )


def check_kernel(policy: str) -> None:
    """Refuse a policy on a kernel that lacks what all programs use.

    Args:
        policy: its name.

    Raises:
        UnsupportedError: something is missing.
    """
    if missing := lacking():
        raise UnsupportedError(
            f"the policy {policy} cannot run on the engine agent here",
            f"this kernel lacks {', '.join(missing)}",
            NEWER,
            "docs/troubleshooting.md#cannot-run-on-the-engine-agent-here",
        )


def _others(names: Collection[str]) -> str:
    """Say what else could have told of events, and does not."""
    sources = [source for event in EVENTS if event.name in names for source in event.sources]
    functions = [source.place for source in sources if source.kind != TRACEPOINT]
    if not functions:
        return "nothing else tells of that"
    return f"no program can be attached to its functions {', '.join(functions)}"


def not_honored(hooks: Iterable[str]) -> list[str]:
    """List what this engine does not do of what a policy may ask for.

    Args:
        hooks: names of the policy's hooks.

    Returns:
        Sentences for people.
    """
    return [*(text for hook, text in _NOT_ASKED.items() if hook in hooks), *NOT_HONORED]
