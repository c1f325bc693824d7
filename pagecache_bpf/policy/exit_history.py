# SPDX-License-Identifier: Apache-2.0
"""How the last policies of engine agent ended, in a file that outlives the agent's process.

The file also lists the policies that are attached.  One that is listed there while no agent runs
ended with its process, which was killed: nothing else leaves the list as it was.  Without a file
(a full or read-only run directory) the history is that of the process alone.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pagecache_bpf._run_dir import RUN_DIR
from pagecache_bpf.kernel.control_device import ExitRecord

PATH = RUN_DIR / "exits.json"
EXITS_KEPT = 64
KILLED = "killed"
_MOST_BYTES = 1 << 20

_log = logging.getLogger(__name__)


def read(path: Path = PATH) -> list[dict[str, Any]]:
    """Return how the last policies ended, those that ended with a killed agent included.

    Args:
        path: the file.

    Returns:
        The members of ExitRecord, the oldest first; empty when there is no file.
    """
    try:
        with path.open("rb") as file:
            data = json.loads(file.read(_MOST_BYTES))
            when = int(os.fstat(file.fileno()).st_mtime_ns)
        exits = [vars(ExitRecord(**record)) for record in data["exits"]]
        attached = [str(name) for name in data["attached"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []
    last = max((record["seq"] for record in exits), default=0)
    for number, name in enumerate(attached, 1):
        exits.append(
            {
                "seq": last + number,
                "time_ns": when,
                "policy": name,
                "kind": KILLED,
                "code": -9,
                "hook": "init",
                "reason": "the agent's process was killed, and its policies ended with it",
                "message": "",
            }
        )
    return exits


def write(attached: Iterable[str], exits: Sequence[dict[str, Any]], path: Path = PATH) -> None:
    """Write down what is attached and how the last policies ended; failures are only logged.

    Args:
        attached: names of the policies that are attached now.
        exits: the records, the oldest first.
        path: the file; it is replaced as a whole.
    """
    data = {"attached": list(attached), "exits": list(exits[-EXITS_KEPT:]), "time": time.time()}
    fresh = path.with_suffix(".new")
    try:
        fresh.write_text(json.dumps(data), encoding="utf-8")
        os.chmod(fresh, 0o600)
        fresh.replace(path)
    except OSError as error:
        _log.warning("%s cannot be written: %s", path, error.strerror or error)
