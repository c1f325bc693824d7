# SPDX-License-Identifier: Apache-2.0
"""pagecache-bpf tags: list the files that policies govern."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from pagecache_bpf.cli.output import Output, table
from pagecache_bpf.cli.parser import Group
from pagecache_bpf.units import format_cached, format_size

if TYPE_CHECKING:
    from rich.console import Console

GROUP = Group.LOOK
HELP = "list the tagged files"
DESCRIPTION = """\
Lists the tagged files, oldest tag first: their model, their policy and how much of each is in
the page cache. A tag is inactive while its policy is not attached."""
EXAMPLES = (("pagecache-bpf tags --policy sequential", ""),)
JSON = {
    "tags": {
        "tags[].path": "where the file was when it was tagged",
        "tags[].model": "its model",
        "tags[].policy": "its policy",
        "tags[].active": "whether that policy is attached",
        "tags[].resident_bytes": "bytes of it in the page cache",
        "tags[].size_bytes": "its size now; null if its path leads elsewhere or a server is asked",
        "tags[].dev_major": "device of its pages",
        "tags[].dev_minor": "device of its pages",
        "tags[].ino": "inode number",
        "tags[].generation": "inode generation: numbers are reused",
    }
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of tags."""
    parser.add_argument("--policy", metavar="NAME", help="only files of this policy")
    parser.add_argument("--model", metavar="NAME", help="only files of this model")


def run(args: argparse.Namespace, out: Output) -> int:
    """List; that nothing governs anything here is no error."""
    from pagecache_bpf.cli.tagging import require_root
    from pagecache_bpf.kernel.control_device import size_on_disk
    from pagecache_bpf.kernel.file_pages import PAGE_SIZE
    from pagecache_bpf.kernel.kernelfs import asks_server
    from pagecache_bpf.policy.engines import Engines

    require_root("list tags")
    rows: list[dict[str, Any]] = []
    with Engines() as engines:
        for tag in engines.tags():
            if args.policy not in (None, tag.policy) or args.model not in (None, tag.model):
                continue
            rows.append(
                {
                    "path": tag.path,
                    "model": tag.model,
                    "policy": tag.policy,
                    "active": tag.active,
                    "resident_bytes": tag.resident_pages * PAGE_SIZE,
                    "size_bytes": size_on_disk(tag),
                    "dev_major": tag.dev_major,
                    "dev_minor": tag.dev_minor,
                    "ino": tag.ino,
                    "generation": tag.generation,
                }
            )

    def human(console: Console) -> None:
        if not rows:
            console.print("no file is tagged")
            return
        columns = [
            ("file", "text"),
            ("model", "text"),
            ("policy", "text"),
            ("cached", "number"),
            ("size", "number"),
        ]
        lines = []
        for row in rows:
            size = row["size_bytes"]
            lines.append(
                [
                    row["path"],
                    row["model"],
                    f"{row['policy']}{'' if row['active'] else ' (inactive)'}",
                    format_size(row["resident_bytes"])
                    if size is None
                    else format_cached(row["resident_bytes"], size),
                    ("not asked" if asks_server(row["path"]) else "gone")
                    if size is None
                    else format_size(size),
                ]
            )
        console.print(table(columns, lines))

    out.emit({"tags": rows}, human)
    return 0
