# SPDX-License-Identifier: Apache-2.0
"""pagecache-bpf module: load and unload the kernel module by hand."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from pagecache_bpf.cli.output import Output
from pagecache_bpf.cli.parser import Group

if TYPE_CHECKING:
    from rich.console import Console

GROUP = Group.OPERATE
HELP = "load or unload the kernel module"
DESCRIPTION = """\
Loads or unloads the kernel module. `attach` loads it by itself; unloading it takes all tags
away and is refused while a policy is attached."""
EXAMPLES = (
    ("pagecache-bpf module load", "the module for the running kernel"),
    ("pagecache-bpf module unload", "after `detach --all`"),
)
JSON = {
    "module load": {"loaded_from": "the module file, null if it was loaded already"},
    "module unload": {"unloaded": "false if it was not loaded"},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add load and unload."""
    from pagecache_bpf.cli.parser import add_command

    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    load = add_command(commands, "load", "load the kernel module unless it is loaded")
    load.add_argument(
        "file",
        metavar="FILE",
        nargs="?",
        type=Path,
        help="module file (default: the installed or built one for the running kernel)",
    )
    load.set_defaults(unload=False)
    unload = add_command(commands, "unload", "unload the kernel module if it is loaded")
    unload.set_defaults(unload=True)


def run(args: argparse.Namespace, out: Output) -> int:
    """Load or unload; what is so already is no error."""
    from pagecache_bpf.cli.tagging import require_root
    from pagecache_bpf.kernel import kmod

    require_root("load or unload the kernel module")
    if args.unload:
        unloaded = kmod.unload()
        text = "unloaded" if unloaded else "the module is not loaded"
        out.emit({"unloaded": unloaded}, lambda console: console.print(text))
        return 0
    loaded_from = kmod.load(args.file)

    def human(console: Console) -> None:
        done = f"loaded {loaded_from}" if loaded_from else "the module is loaded already"
        console.print(done, soft_wrap=True)

    out.emit({"loaded_from": str(loaded_from) if loaded_from else None}, human)
    return 0
