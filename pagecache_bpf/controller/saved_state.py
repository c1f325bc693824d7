# SPDX-License-Identifier: Apache-2.0
"""What a restarted controller takes up again, or clears away.

The module's policies, tags and counters live in the kernel and need no file; which of them the
controller had made for loads and configured models is written down at each change, so that the
next one can end what a killed one could not.  Policies of the agent end with its process; with
`persist` they and their tags are written down too.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from pagecache_bpf._run_dir import RUN_DIR
from pagecache_bpf.agent.service import Service
from pagecache_bpf.controller.engine_control import STRUCT_OPS, EngineControl, PlacedTag
from pagecache_bpf.errors import PagecacheError
from pagecache_bpf.kernel.file_key import reopen
from pagecache_bpf.policy import catalog

PATH = RUN_DIR / "state.json"
KERNEL = RUN_DIR / "kernel.json"
VERSION = 1
_log = logging.getLogger(__name__)


def save(service: Service, without: Collection[bytes], path: Path = PATH) -> None:
    """Write down policies and tags of engine agent, all or nothing.

    Args:
        service: where they are.
        without: keys of files that are tagged for loads.
        path: the file.

    Raises:
        OSError: it cannot be written.
    """
    attached = []
    for name, agent in service.agents.items():
        if agent.exit is None:
            source = name if agent.info.object is None else str(agent.info.object)
            attached.append({"policy": source, "name": name, "knobs": agent.knobs})
    tags = [
        {"policy": name, "model": tag.model, "path": tag.path, "key": key.hex()}
        for name, agent in service.agents.items()
        for key, tag in list(agent.tags.items())
        if key not in without
    ]
    _write({"version": VERSION, "policies": attached, "tags": tags}, path)


def _write(content: dict[str, Any], path: Path) -> None:
    fresh = path.with_suffix(".new")
    with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as out:
        json.dump(content, out, indent=1)
        out.flush()
        os.fsync(out.fileno())
    fresh.replace(path)


def forget(path: Path = PATH) -> None:
    """Leave nothing behind.

    Args:
        path: the file.
    """
    path.unlink(missing_ok=True)


def save_kernel(own: Mapping[str, str], placed: Iterable[PlacedTag], path: Path = KERNEL) -> None:
    """Write down which of the kernel's policies and tags are this controller's.

    Args:
        own: policies that were attached here, with their engines.
        placed: tags that were set here.
        path: the file.

    Raises:
        OSError: it cannot be written.
    """
    mine = [name for name, engine in own.items() if engine == STRUCT_OPS]
    tags = [tag.identity for tag in placed if tag.identity is not None]
    if mine or tags:
        _write({"version": VERSION, "policies": mine, "tags": tags}, path)
    else:
        path.unlink(missing_ok=True)


def adopt_kernel(engines: EngineControl, path: Path = KERNEL) -> None:
    """Take over a killed controller's policies; its loads have ended, so their tags go.

    Args:
        engines: where both are.
        path: the file that it has left.
    """
    try:
        content = json.loads(path.read_bytes())
        mine = [str(name) for name in content["policies"]]
        tags = [(int(a), int(b), int(c), int(d)) for a, b, c, d in content["tags"]]
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError) as error:
        _log.warning("%s cannot be used: %s", path, error)
        return
    for identity in tags:
        engines.untag(PlacedTag(STRUCT_OPS, "", b"", identity))
    attached = engines.attached()
    engines.own.update({name: STRUCT_OPS for name in mine if attached.get(name) == STRUCT_OPS})
    _log.info("took over %d policies, took %d tags of loads away", len(engines.own), len(tags))


def restore(service: Service, path: Path = PATH) -> list[str]:
    """Attach and tag what was written down.

    Args:
        service: where it is attached.
        path: the file.

    Returns:
        A sentence for each thing that failed.
    """
    try:
        content = json.loads(path.read_bytes())
        if content["version"] != VERSION:
            raise ValueError(f"it is of version {content['version']}")
        attached, tags = list(content["policies"]), list(content["tags"])
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{path} cannot be used: {error}"]
    failed = []
    for policy in attached:
        try:
            info = catalog.find(policy["policy"])
            service.attach(policy["policy"], str(catalog.agent_object(info)), policy["knobs"])
        except (PagecacheError, KeyError) as error:
            failed.append(f"the policy {policy.get('name')} was not attached again: {error}")
    for tag in tags:
        try:
            _tag(service, tag)
        except (PagecacheError, OSError, KeyError, ValueError) as error:
            failed.append(f"{tag.get('path')} was not tagged again: {error}")
    _log.info("restored %d policies and %d tags", len(attached), len(tags) - len(failed))
    return failed


def _tag(service: Service, tag: dict[str, Any]) -> None:
    fd = reopen(bytes.fromhex(tag["key"]), tag["path"])
    try:
        service.tag(fd, tag["policy"], tag["model"], tag["path"], False)
    finally:
        os.close(fd)
