# SPDX-License-Identifier: Apache-2.0
"""pagecache-bpf policy: what policies there are and what they can be told."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from pagecache_bpf.cli.output import Output, pairs, table
from pagecache_bpf.cli.parser import Group

if TYPE_CHECKING:
    from rich.console import Console

    from pagecache_bpf.policy.catalog import Knob, PolicyInfo

GROUP = Group.POLICIES
HELP = "list policies, or show one with its knobs"
DESCRIPTION = """\
Lists the policies that come with this package, or shows what one of them does, when to use
it, its limits and its knobs. Needs no root."""
EXAMPLES = (
    ("pagecache-bpf policy list", ""),
    ("pagecache-bpf policy show sequential", ""),
    ("pagecache-bpf policy show ./mine.bpf.c", "compiles it first"),
)
_POLICY_JSON = {
    "name": "name, as attach takes it",
    "purpose": "what it does, in one line",
    "hooks[]": "the hooks it defines",
    "source": "its C source; null if it is not at hand",
    "object": "the compiled object; null if it is not built",
}
_KNOB_JSON = {
    "name": "name, as --knob takes it",
    "type": "its C type",
    "default": "value if it is not set",
    "minimum": "smallest value it takes",
    "maximum": "largest value it takes",
    "unit": "unit of the values",
    "help": "what it does",
}
JSON = {
    "policy list": {f"policies[].{key}": text for key, text in _POLICY_JSON.items()},
    "policy show": {
        **_POLICY_JSON,
        "when": "when to use it",
        "limits": "what it does not do",
        **{f"knobs[].{key}": text for key, text in _KNOB_JSON.items()},
        "maps[].name": "a map for `hint`",
        "maps[].kind": "hint (others write it) or report (others read it)",
        "maps[].help": "what for",
        "maps[].usage": "the members of its key and value",
        "gauges[].name": "a number it keeps, which `status` shows",
        "gauges[].unit": "its unit",
        "gauges[].help": "what it is",
    },
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add list and show."""
    from pagecache_bpf.cli.parser import add_command

    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    listing = add_command(commands, "list", "list the policies")
    listing.add_argument("--names", action="store_true", help="print names only, one a line")
    listing.set_defaults(show=None)
    show = add_command(commands, "show", "show a policy and its knobs")
    show.add_argument("show", metavar="POLICY", help="name, or the path of a .bpf.c or .bpf.o file")


def run(args: argparse.Namespace, out: Output) -> int:
    """List the policies or show one."""
    from pagecache_bpf.policy import catalog

    if args.show is not None:
        info = catalog.find(args.show)
        out.emit(_details(info), lambda console: _print_details(console, info, args.show))
        return 0
    known = catalog.discover()

    def human(console: Console) -> None:
        if args.names:
            for info in known:
                print(info.name)
            return
        lines = [
            [info.name, info.purpose, ", ".join(info.hooks) if info.object else "not built"]
            for info in known
        ]
        console.print(table([("policy", "text"), ("purpose", "text"), ("hooks", "text")], lines))

    out.emit({"policies": [_summary(info) for info in known]}, human)
    return 0


def _summary(info: PolicyInfo) -> dict[str, Any]:
    return {
        "name": info.name,
        "purpose": info.purpose,
        "hooks": list(info.hooks),
        "source": str(info.source) if info.source else None,
        "object": str(info.object) if info.object else None,
    }


def _details(info: PolicyInfo) -> dict[str, Any]:
    from pagecache_bpf.cli.verbs.hint import describe
    from pagecache_bpf.policy.hint_maps import gauges_of, maps_of

    return {
        **_summary(info),
        "when": info.when,
        "limits": info.limits,
        "knobs": [
            {
                "name": knob.name,
                "type": knob.ctype,
                "default": knob.default,
                "minimum": knob.minimum,
                "maximum": knob.maximum,
                "unit": knob.unit,
                "help": knob.help,
            }
            for knob in info.knobs
        ],
        "maps": [describe(hint_map) for hint_map in maps_of(info)],
        "gauges": [
            {"name": gauge.name, "unit": gauge.unit, "help": gauge.help}
            for gauge in gauges_of(info)
        ],
    }


def _print_details(console: Console, info: PolicyInfo, given: str) -> None:
    from pagecache_bpf.cli.verbs.hint import print_maps
    from pagecache_bpf.policy.hint_maps import maps_of

    rows = [
        ("policy", info.name),
        ("purpose", info.purpose),
        ("when to use", info.when),
        ("limits", info.limits),
        ("hooks", ", ".join(info.hooks)),
        ("source", str(info.source or "not at hand")),
    ]
    console.print(pairs([(name, text) for name, text in rows if text]))
    console.print()
    if found := maps_of(info):
        print_maps(console, found)
        console.print()
    if not info.knobs:
        console.print("It has no knobs.")
        return
    columns = [("knob", "text"), ("default", "number"), ("range", "number"), ("", "text")]
    lines = [[knob.name, _default(knob), _range(knob), knob.help] for knob in info.knobs]
    console.print(table(columns, lines))
    knob = info.knobs[0]
    console.print(
        f"\nSet a knob: pagecache-bpf attach {given} --knob {knob.name}={knob.default} PATH",
        soft_wrap=True,
    )


def _default(knob: Knob) -> str:
    return f"{knob.default} {knob.unit}".rstrip()


def _range(knob: Knob) -> str:
    return f"{knob.minimum} to {knob.maximum}"
