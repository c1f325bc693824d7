# SPDX-License-Identifier: Apache-2.0
"""pagecache-bpf serve: run the controller."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pagecache_bpf.cli.output import Output, pairs
from pagecache_bpf.cli.parser import Group

if TYPE_CHECKING:
    from rich.console import Console

GROUP = Group.OPERATE
HELP = "run the controller: policies, budgets, and a socket for those who load models"
DESCRIPTION = """\
Runs the controller in the foreground until SIGTERM or Ctrl-C. It attaches what the configuration
names and opens a socket on which processes that load models ask to be served; they prove their
right to a file by passing its open descriptor. SIGHUP has the configuration read again. systemd
runs it as pagecache-bpf.service and is told when it is ready (systemctl enable --now
pagecache-bpf).

When it ends, loads end with it and so do policies of engine agent and those that it attached for
loads or the configuration. With --persist policies and tags are taken up again by the next
serve."""
EXAMPLES = (("pagecache-bpf serve", "with /etc/pagecache-bpf/config.toml, if there is one"),)
JSON = {
    "serve": {
        "listen": "the public socket; printed when it answers",
        "pid": "the controller's process",
        "config": "the configuration file; null for the defaults",
        "persist": "whether policies and tags are taken up again by the next serve",
        "process_events": "connector or pidfd: how the end of a client's process is noticed",
        "policies.*": "each policy that is attached now, with its engine",
        "failed[]": "what of the configuration could not be done",
    }
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of serve."""
    parser.add_argument(
        "--config",
        metavar="FILE",
        type=Path,
        help="the configuration (default: /etc/pagecache-bpf/config.toml, if it exists)",
    )
    parser.add_argument(
        "--persist",
        action="store_true",
        help="leave policies and tags for the next serve (also: persist = true)",
    )


def run(args: argparse.Namespace, out: Output) -> int:
    """Serve; a clean end is a success."""
    import logging

    from pagecache_bpf.cli.tagging import require_root
    from pagecache_bpf.controller import config
    from pagecache_bpf.controller.daemon import Daemon, serve
    from pagecache_bpf.kernel import libbpf

    settings = config.load(args.config)
    require_root("run the controller")
    libbpf.library()
    if not args.verbose:
        logging.getLogger("pagecache_bpf").setLevel(logging.INFO)

    def ready(daemon: Daemon) -> None:
        data: dict[str, Any] = daemon.describe()

        def human(console: Console) -> None:
            attached = ", ".join(f"{name} ({engine})" for name, engine in data["policies"].items())
            rows = [
                ("listening", data["listen"]),
                ("config", data["config"] or "none: defaults"),
                ("attached", attached or "nothing yet"),
                *(("failed", text) for text in data["failed"]),
            ]
            console.print(pairs(rows))

        out.emit(data, human)
        import sys

        sys.stdout.flush()

    serve(settings, args.persist, ready)
    return 0
