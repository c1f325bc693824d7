# SPDX-License-Identifier: Apache-2.0
"""pagecache-bpf doctor: what this machine has, what it lacks, and the next step for each."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from pagecache_bpf.cli.output import Output, pairs, table
from pagecache_bpf.errors import PrivilegeError, UnsupportedError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from pagecache_bpf.features import Feature

HELP = "check what this machine has and lacks, with the next step for each"
DESCRIPTION = """\
Asks the kernel and looks for tools, changes nothing, and prints for each thing whether it is
there, what is lost without it and the next step to gain it. Without root some answers are
unknown. The exit code is 0 when policies can be attached, 3 when this machine lacks something
that they need, and 4 when only the privilege is missing."""
EXAMPLES = (("sudo pagecache-bpf doctor", ""),)
JSON = {
    "doctor": {
        "ready": "whether policies can be attached, as far as can be known",
        "features[].name": "what was looked for",
        "features[].ok": "true, false, or null where it could not be found out",
        "features[].needed": "whether policies cannot be attached without it",
        "features[].found": "what was seen",
        "features[].lost": "what does not work without it",
        "features[].fix": "the next step; empty if there is nothing to do",
    }
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Doctor has no arguments of its own."""


def run(args: argparse.Namespace, out: Output) -> int:
    """Probe and print."""
    from pagecache_bpf import features

    table_of = features.probe()
    missing = [feature for feature in table_of if feature.needed and feature.ok is False]
    data = {
        "ready": not missing,
        "features": [
            {
                "name": feature.name,
                "ok": feature.ok,
                "needed": feature.needed,
                "found": feature.found,
                "lost": feature.lost,
                "fix": feature.fix,
            }
            for feature in table_of
        ],
    }
    out.emit(data, lambda console: _human(console, table_of, missing))
    if not missing:
        return 0
    only_privilege = [feature.name for feature in missing] == ["privileges"]
    return (PrivilegeError if only_privilege else UnsupportedError).exit_code


def _human(console: Console, features: list[Feature], missing: list[Feature]) -> None:
    from rich.text import Text

    marks = {
        True: Text("yes", "green"),
        False: Text("no", "bold red"),
        None: Text("unknown", "yellow"),
    }
    lines: list[list[RenderableType]] = [
        [feature.name, marks[feature.ok], feature.found] for feature in features
    ]
    console.print(table([("feature", "text"), ("there", "text"), ("found", "text")], lines))
    for feature in features:
        if feature.ok:
            continue
        console.print()
        console.print(Text.assemble((feature.name, "bold"), f"  {feature.found}"))
        rows = [("lost", feature.lost), ("next", feature.fix)]
        console.print(pairs([(name, text) for name, text in rows if text], indent=2))
    console.print()
    if missing:
        names = ", ".join(feature.name for feature in missing)
        console.print(Text.assemble(("Policies cannot be attached here: ", "bold red"), names))
    else:
        console.print(Text("Policies can be attached here.", "bold green"))
