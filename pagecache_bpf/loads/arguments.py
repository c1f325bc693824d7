# SPDX-License-Identifier: Apache-2.0
"""Checks what callers of the Python API give: paths, devices, budgets; and guards their server.

It knows nothing of how a load is served.
"""

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
    """Check a budget and convert it to bytes.

    Args:
        value: bytes as a number, or a text such as "8GiB"; None: no bound.

    Returns:
        Bytes, more than 0; None: no bound.

    Raises:
        UsageError: it is neither, or not more than 0.
    """
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
    """Check that a file of a name can be written, before there is anything to write.

    Args:
        path: the file, which need not exist; a relative path begins in the current directory.

    Returns:
        Its absolute path.

    Raises:
        UsageError: it is a directory, or the directory that it is to be in does not exist.
    """
    found = Path(path).absolute()
    if not found.parent.is_dir() or found.is_dir():
        raise UsageError(f"{path} cannot be written", "", "Name a file in a directory that exists")
    return found


def placements_of(devices: Device | Iterable[Device] | None) -> tuple[Placement, ...]:
    """Find out where accelerators are in this machine: their NUMA nodes.

    Args:
        devices: one device or several, by name ("cuda:0") or as objects whose str() is such a name;
            None: none.

    Returns:
        A placement a device, in the same order; one whose node is not known says why.

    Raises:
        UsageError: a name is not one of a device.
    """
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
    """Find the files of a model.

    Args:
        path: a file of weights, a directory, or what else weights.models.resolve() takes.

    Returns:
        The model; and why nothing can be read ahead of it, which is empty where something can.
        Weights in memory (a tmpfs, say) have no files to read ahead.

    Raises:
        UsageError: there are no weights of a known format.
        PrivilegeError: a file may not be read.
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
    """Call something of ours, which must not end the server that calls it.

    Args:
        call: what to call.
        otherwise: returned when it fails; the reason is logged at level debug.

    Returns:
        What the call returned, or `otherwise`.
    """
    try:
        return call()
    except Exception:  # a server must not end because of us
        _log.debug("a call goes on without an answer", exc_info=True)
        return otherwise
