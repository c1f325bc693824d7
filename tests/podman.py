# SPDX-License-Identifier: Apache-2.0
"""What every container that the tests start with podman is given."""

from __future__ import annotations

import resource


def limits() -> list[str]:
    """Return options of `podman run`: limits may not be raised everywhere, also by root."""
    files = min(20000, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    return ["--ulimit", f"nofile={files}:{files}", "--ulimit", "nproc=4096:4096"]
