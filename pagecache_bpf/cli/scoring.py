# SPDX-License-Identifier: Apache-2.0
"""What the commands that score models have in common: their options, and what they look at."""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pagecache_bpf.units import parse_size

if TYPE_CHECKING:
    from pagecache_bpf.placement.node_watch import NodeWatch
    from pagecache_bpf.weights.models import Model


def add_score_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the speeds that a score is made of: --device-speed, --host-to-device-speed, --no-probe.

    Args:
        parser: the command's own parser.
    """
    group = parser.add_argument_group("speeds that scores are made of")
    group.add_argument(
        "--device-speed",
        metavar="SIZE",
        type=parse_size,
        help="bytes a second that the devices with the models give (default: the last measured, or "
        "measured once by reading past the page cache for half a second)",
    )
    group.add_argument(
        "--host-to-device-speed",
        metavar="SIZE",
        type=parse_size,
        help="bytes a second from the page cache to the accelerator (default: what one thread "
        "copies out of the page cache, measured)",
    )
    group.add_argument(
        "--no-probe", action="store_true", help="do not measure devices; take the last measured"
    )


def watch_of(args: argparse.Namespace, paths: Sequence[str]) -> NodeWatch:
    """Return the watch over models that a command line asks for.

    Args:
        args: with what add_score_arguments() has added.
        paths: of models; what is tagged is watched beside them, as far as this user may know it.

    Returns:
        The watch; it has looked at nothing yet.
    """
    from pagecache_bpf.loads.through_controller import residency_or_none
    from pagecache_bpf.placement.node_watch import NodeWatch, Speeds

    speeds = Speeds(args.device_speed, args.host_to_device_speed, not args.no_probe)
    return NodeWatch(paths, speeds=speeds, tagged=tagged_models, ask=residency_or_none)


def tagged_models() -> Iterable[Model]:
    """Ask the engines for the models whose files are tagged.

    Yields:
        A model for each name, with the tagged files whose path is known; none for a user who may
        not ask the engines.
    """
    import os

    if os.geteuid() != 0:
        return
    from pagecache_bpf.policy.engines import Engines
    from pagecache_bpf.weights.models import Model

    files: dict[str, list[Path]] = defaultdict(list)
    with Engines() as engines:
        for tag in engines.tags():
            if tag.path:
                files[tag.model].append(Path(tag.path))
    for name, paths in files.items():
        yield Model(name, paths[0].parent, tuple(dict.fromkeys(paths)))
