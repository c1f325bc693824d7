# SPDX-License-Identifier: Apache-2.0
"""pagecache-bpf tag: put more files under an attached policy."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from pagecache_bpf.cli import interrupts
from pagecache_bpf.cli.budget import ADMISSION_JSON, admission_rows
from pagecache_bpf.cli.output import TROUBLESHOOTING, Output, pairs
from pagecache_bpf.cli.parser import Group
from pagecache_bpf.cli.verbs.attach import MODELS_JSON, add_tag_options, tagged_rows
from pagecache_bpf.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

GROUP = Group.USE
HELP = "put more files under an attached policy"
DESCRIPTION = """\
Tags the weight files that each PATH stands for, so that an attached policy governs them from
now on. A file is known by its device, inode and generation, not by its path. I/O templates are
given by `attach` only: a policy that follows them treats these files as it does without one."""
EXAMPLES = (("pagecache-bpf tag /models/mistral-7b --policy sequential", ""),)
JSON = {
    "tag": {
        "policy": "the policy that governs the files",
        **MODELS_JSON,
        **ADMISSION_JSON,
        "undo": "the command that takes it back",
    }
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of tag."""
    parser.add_argument(
        "paths",
        metavar="PATH",
        nargs="+",
        help="weight file, directory of shards, or Hugging Face snapshot or cache directory",
    )
    parser.add_argument("--policy", metavar="NAME", required=True, help="an attached policy")
    add_tag_options(parser)


def run(args: argparse.Namespace, out: Output) -> int:
    """Tag all files or none."""
    from pagecache_bpf.cli.budget import admit
    from pagecache_bpf.cli.tagging import Tagging, require_root, resolve_all
    from pagecache_bpf.cli.undo_log import Change
    from pagecache_bpf.policy import catalog
    from pagecache_bpf.policy.engines import Engines

    models = resolve_all(args.paths, args.model)
    require_root("tag a file")
    with (
        Change(f"pagecache-bpf tag --policy {args.policy}", out) as change,
        Engines(observe=not args.no_observe) as engines,
    ):
        attached = [policy.name for _, policy in engines.policies()]
        if args.policy not in attached:
            raise UsageError(
                f"the policy {args.policy} is not attached",
                f"attached are {', '.join(attached)}" if attached else "no policy is",
                f"Run `pagecache-bpf attach {args.policy} PATH`",
                f"{TROUBLESHOOTING}#is-not-attached",
            )
        tagging = Tagging(engines, args.policy, args.replace)
        change.begin(tagging.steps_back(models, attached=False))
        admission = admit(engines, models, None)
        for model in models:
            tagging.add(model)
    interrupts.ignore()
    undo = "pagecache-bpf untag " + " ".join(f"--model {name}" for name in tagging.models)
    data = {
        "policy": args.policy,
        "models": tagging.as_json(),
        "admission": admission,
        "undo": undo,
    }

    if args.policy in catalog.names() and catalog.find(args.policy).takes_templates:
        out.warn(
            f"{' '.join(tagging.models)}: no I/O template, since {args.policy} gets them when it "
            f"is attached; detach it and attach it with all PATHs to have them"
        )

    def human(console: Console) -> None:
        rows = [*tagged_rows(tagging), *admission_rows(admission)]
        console.print(pairs([*rows, ("policy", args.policy), ("undo", undo)]))

    out.emit(data, human)
    return 0
