# SPDX-License-Identifier: Apache-2.0
"""What engine agent does not do of what a policy may ask for.

It is known without running a policy; what turns out not to work while one runs, engine tells.
"""

from __future__ import annotations

from collections.abc import Iterable

#: What a policy may ask for and this engine does not do.
NOT_HONORED = (
    "the kernel's own readahead goes on: an answer adds to it",
    "the marker and the folio order of an answer",
    "the exit hook and access_step_pages",
    "tags do not outlive the policy (detach --keep-tags)",
)
#: Hooks that are not asked, and what that means.
_NOT_ASKED = {"evict": "the hook evict: nothing is kept from reclaim, which evicts as it likes"}


def not_honored(hooks: Iterable[str]) -> list[str]:
    """List what this engine does not do of what a policy may ask for.

    Args:
        hooks: names of the policy's hooks.

    Returns:
        Sentences for people.
    """
    return [*(text for hook, text in _NOT_ASKED.items() if hook in hooks), *NOT_HONORED]
