# SPDX-License-Identifier: Apache-2.0
"""pagecache-bpf untag: take files out of their policy."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from pagecache_bpf.cli import interrupts
from pagecache_bpf.cli.output import TROUBLESHOOTING, Output, pairs
from pagecache_bpf.cli.parser import Group
from pagecache_bpf.errors import PagecacheError, UsageError
from pagecache_bpf.units import plural

if TYPE_CHECKING:
    from rich.console import Console

    from pagecache_bpf.kernel.control_device import Tag

GROUP = Group.USE
HELP = "take files out of their policy"
DESCRIPTION = """\
Takes the tags off files; the kernel's own readahead takes over for them at once, and what is
in the page cache stays there. A PATH is what it is for `tag`, or a path as `tags` prints it,
which works also for a file that has been deleted since."""
EXAMPLES = (
    ("pagecache-bpf untag /models/llama-3-8b", ""),
    ("pagecache-bpf untag --all", "the policies stay attached and govern nothing"),
)
JSON = {
    "untag": {
        "untagged[].path": "a file that is no longer tagged, as it was tagged",
        "untagged[].model": "its model",
        "untagged[].policy": "the policy that it was under",
    }
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of untag."""
    parser.add_argument("paths", metavar="PATH", nargs="*", help="a tagged file or directory")
    parser.add_argument(
        "--model",
        metavar="NAME",
        action="append",
        default=[],
        help="all files of a model; may be given several times",
    )
    parser.add_argument("--all", action="store_true", help="every tagged file")


def run(args: argparse.Namespace, out: Output) -> int:
    """Untag what was named; a name that stands for no tagged file is an error."""
    from pagecache_bpf.cli.tagging import require_root, untag
    from pagecache_bpf.cli.undo_log import Change, Steps
    from pagecache_bpf.policy.engines import Engines

    if not (args.paths or args.model or args.all):
        raise UsageError(
            "nothing to untag was named",
            "",
            "Give a PATH, --model NAME or --all; `pagecache-bpf tags` lists what is tagged",
            f"{TROUBLESHOOTING}#nothing-to-untag-was-named",
        )
    require_root("untag a file")
    with Change("pagecache-bpf untag", out, required=False) as change, Engines() as engines:
        before = list(engines.tags())
        named = before if args.all else []
        for path in args.paths:
            named = named + _at_path(path, before)
        for model in args.model:
            named = named + _of_model(model, before)
        named = list({tag.identity: tag for tag in named}.values())
        change.begin(Steps(undo=False, untag=[tag.identity for tag in named]))
        with interrupts.deferred():
            gone = untag(engines, named)
    interrupts.ignore()
    data = {
        "untagged": [{"path": tag.path, "model": tag.model, "policy": tag.policy} for tag in gone]
    }

    def human(console: Console) -> None:
        if not gone:
            console.print("no file is tagged")
        models = {tag.model for tag in gone}
        rows = [
            (
                "untagged",
                f"model {model}: {plural(sum(tag.model == model for tag in gone), 'file')}",
            )
            for model in sorted(models)
        ]
        console.print(pairs(rows))

    out.emit(data, human)
    return 0


def _at_path(path: str, tags: list[Tag]) -> list[Tag]:
    """Return the tags of files recorded at or below a path, and of those it leads to now.

    The two differ after a rename, through symbolic links, and for deleted files.
    """
    from pagecache_bpf.kernel.file_key import identity_at
    from pagecache_bpf.weights.models import resolve

    recorded = os.path.abspath(path)
    found = [tag for tag in tags if tag.path == recorded or tag.path.startswith(f"{recorded}/")]
    try:
        files = resolve(path).files
    except PagecacheError:
        if not found:
            raise
        files = ()
    by_inode = {tag.identity[:3]: tag for tag in tags}
    for file in files:
        inode = identity_at(file)[:3]
        if inode in by_inode:
            found.append(by_inode[inode])
    if not found:
        raise UsageError(
            f"{path} is not tagged",
            "no tagged file lies there",
            "`pagecache-bpf tags` lists what is tagged",
            f"{TROUBLESHOOTING}#is-not-tagged",
        )
    return found


def _of_model(model: str, tags: list[Tag]) -> list[Tag]:
    found = [tag for tag in tags if tag.model == model]
    if not found:
        known = sorted({tag.model for tag in tags})
        raise UsageError(
            f"the model {model} is not tagged",
            f"tagged are {', '.join(known)}" if known else "no file is",
            "`pagecache-bpf tags` lists what is tagged",
            f"{TROUBLESHOOTING}#is-not-tagged",
        )
    return found
