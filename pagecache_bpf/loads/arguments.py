# SPDX-License-Identifier: Apache-2.0
"""What callers of the Python API may give: paths, devices, budgets; and what may not raise."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pagecache_bpf.errors import UsageError

if TYPE_CHECKING:
    from pagecache_bpf.topology import Placement
    from pagecache_bpf.weights.models import Model

#: A device by name, or whatever names itself so, as a torch.device does.
Device = object
PathLike = str | os.PathLike[str]

_IN_MEMORY = "has-no-pages-to-read-ahead"
_T = TypeVar("_T")
_log = logging.getLogger(__name__)


def parse_budget(value: int | str | None) -> int | None:
    """Return a budget in bytes; None: no bound.  Raises UsageError."""
    if value is None:
        return None
    if isinstance(value, str):
        from pagecache_bpf.units import parse_size

        value = parse_size(value)
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise UsageError(
            f"{value!r} is not a budget", "it has to be more than 0 bytes", 'Write it like "8GiB"'
        )
    return value


def output_path(path: PathLike) -> Path:
    """Return the absolute path of a file to be written.  Raises UsageError where it cannot be."""
    found = Path(path).absolute()
    if not found.parent.is_dir() or found.is_dir():
        raise UsageError(f"{path} cannot be written", "", "Name a file in a directory that exists")
    return found


def placements_of(devices: Device | Iterable[Device] | None) -> tuple[Placement, ...]:
    """Return where devices are.  Raises UsageError for one that is not there."""
    if devices is None:
        return ()
    if isinstance(devices, str) or not isinstance(devices, Iterable):
        devices = [devices]
    names = [str(device) for device in devices]
    if not names:
        return ()
    from pagecache_bpf import topology

    machine = topology.read()
    return tuple(topology.place_or_unknown(name, machine) for name in names)


def resolve_model(path: PathLike) -> tuple[Model, str]:
    """Return the model at PATH; and why nothing can be read ahead of it, if so.

    Raises as weights.models.resolve().
    """
    from pagecache_bpf.weights.models import Model, resolve

    try:
        return resolve(path), ""
    except UsageError as error:
        # Weights in memory are no mistake: there is nothing to be done for them.
        if not error.docs.endswith(_IN_MEMORY):
            raise
        return Model(Path(path).name or "model", Path(path), ()), str(error)


def guarded(call: Callable[[], _T], otherwise: _T) -> _T:
    """Call something of ours, which must not end a server.

    Args:
        call: what to call.
        otherwise: returned when it fails; the reason is logged at level debug.
    """
    try:
        return call()
    except Exception:  # a server must not end because of us
        _log.debug("a call goes on without an answer", exc_info=True)
        return otherwise
