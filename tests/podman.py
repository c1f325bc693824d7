# SPDX-License-Identifier: Apache-2.0
"""What every container that the tests start with podman is given."""

from __future__ import annotations

import resource


def ulimits() -> dict[str, int]:
    """Return the limits by their names: they may not be raised everywhere, also by root."""
    return {"nofile": min(20000, resource.getrlimit(resource.RLIMIT_NOFILE)[1]), "nproc": 4096}


def limits() -> list[str]:
    """Return the limits as options of `podman run`."""
    return [
        word
        for name, limit in ulimits().items()
        for word in ("--ulimit", f"{name}={limit}:{limit}")
    ]
