# SPDX-License-Identifier: Apache-2.0
"""pagecache-bpf doctor: what this machine has, what it lacks, and the next step for each."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from pagecache_bpf.cli.output import Output, pairs, table
from pagecache_bpf.cli.parser import Group
from pagecache_bpf.errors import PrivilegeError, UnsupportedError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from pagecache_bpf.explain.features import Feature

GROUP = Group.OPERATE
HELP = "check what this machine has and lacks, with the next step for each"
DESCRIPTION = """\
Asks the kernel and looks for tools, changes nothing, and prints for each thing whether it is
there, what is lost without it and the next step to gain it; at the end, which engines can run
policies here. Without root some answers are unknown. The exit code is 0 when one of the engines
can, 3 when none can, and 4 when only the privilege is missing.

With --container it looks at the container that it runs in: what the agent would lack in it, right
by right and mount by mount, and whether models that are loaded in it reach an agent elsewhere."""
EXAMPLES = (
    ("sudo pagecache-bpf doctor", ""),
    ("pagecache-bpf doctor --container", "in a container: what the agent or a client lacks there"),
)
JSON = {
    "doctor": {
        "ready": "whether policies can be attached on one of the engines, as far as can be known",
        "engines.struct_ops[]": "what that engine needs and is not there; empty if it can run",
        "engines.agent[]": "the same of engine agent; with --container, of an agent in it",
        "engines.client[]": "what loads in this container lack for an agent; null otherwise",
        "features[].name": "what was looked for",
        "features[].ok": "true, false, or null where it could not be found out",
        "features[].engines[]": "the engines that cannot run a policy without it",
        "features[].found": "what was seen",
        "features[].lost": "what does not work without it",
        "features[].fix": "the next step; empty if there is nothing to do",
    }
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --container."""
    parser.add_argument(
        "--container",
        action="store_true",
        help="look at the container that this runs in, for an agent or a client in it",
    )


def run(args: argparse.Namespace, out: Output) -> int:
    """Probe the machine's features and print what each engine lacks."""
    from pagecache_bpf.explain import accelerators, container, features

    if args.container:
        table_of = container.probe()
        lacking = container.lacking(table_of)
    else:
        table_of = [*features.probe(), accelerators.probe()]
        lacking = features.lacking(table_of)
    ready = not all(lacking.values())
    engines: dict[str, list[str] | None] = {} if args.container else {"client": None}
    engines |= {
        engine: [feature.name for feature in features] for engine, features in lacking.items()
    }
    data = {
        "ready": ready,
        "engines": engines,
        "features": [
            {
                "name": feature.name,
                "ok": feature.ok,
                "engines": list(feature.engines),
                "found": feature.found,
                "lost": feature.lost,
                "fix": feature.fix,
            }
            for feature in table_of
        ],
    }
    title = "in this container:" if args.container else "engine"
    out.emit(data, lambda console: _human(console, table_of, lacking, title))
    if ready:
        return 0
    only_privilege = any(
        [feature.name for feature in features] == ["privileges"] for features in lacking.values()
    )
    return (PrivilegeError if only_privilege else UnsupportedError).exit_code


def _human(
    console: Console, features: list[Feature], lacking: dict[str, list[Feature]], title: str
) -> None:
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
    for engine, features in lacking.items():
        names = ", ".join(feature.name for feature in features)
        verdict = (
            Text(f"not here: {names}", "bold red") if features else Text("ready", "bold green")
        )
        console.print(Text.assemble((f"{title} {engine}  ", "bold"), verdict))
