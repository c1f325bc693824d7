# SPDX-License-Identifier: Apache-2.0
"""pagecache-bpf hint: tell an attached policy something, or read what it reports."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pagecache_bpf.cli.output import Output, pairs, table
from pagecache_bpf.cli.parser import Group
from pagecache_bpf.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from pagecache_bpf.policy.hint_maps import HintMap

GROUP = Group.POLICIES
HELP = "tell an attached policy something, or read what it reports"
DESCRIPTION = """\
Some policies have maps for others to write (hints) or to read (reports); `policy show` lists
them. With NAME=VALUE this command writes one element: the members of its key and those of its
value that are to change. Without, it prints the map; without MAP, the names of the maps.

Values are whole numbers. model takes a model's name, cgroup_id a control group's path, members
that end in _ns a duration (5s, 20ms) or + and a duration, which counts from now; file=PATH stands
for the four numbers of a file."""
EXAMPLES = (
    ("pagecache-bpf hint multiplex plans model=llama-3-8b due_ns=+5s", "wanted in 5 seconds"),
    ("pagecache-bpf hint colocate roles cgroup_id=/batch.slice value=2", "offline from now on"),
    ("pagecache-bpf hint multiplex scores", "what it reports"),
    ("pagecache-bpf hint pin hot file=w.safetensors piece=7 --delete", ""),
)
JSON = {
    "hint": {
        "policy": "the policy",
        "map": "the map; null if none was named",
        "maps[].name": "a map, if none was named",
        "maps[].kind": "hint (to write) or report (to read)",
        "maps[].help": "what for",
        "maps[].usage": "the members of its key and value",
        "elements[].key.*": "an element's key, if nothing was written",
        "elements[].value.*": "its value",
        "written": "whether an element was written or removed",
    }
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of hint."""
    parser.add_argument("policy", metavar="POLICY", help="an attached policy")
    parser.add_argument("map", metavar="MAP", nargs="?", help="one of its maps")
    parser.add_argument(
        "settings",
        metavar="NAME=VALUE",
        nargs="*",
        help="members of the key and of the value",
    )
    parser.add_argument("--delete", action="store_true", help="remove the element of that key")


def run(args: argparse.Namespace, out: Output) -> int:
    """Write, remove, print or list."""
    from pagecache_bpf.policy import hints

    data: dict[str, Any] = {"policy": args.policy, "map": args.map, "written": False}
    settings = dict(_setting(text) for text in args.settings)
    if args.map is None:
        found = hints.maps(args.policy)
        data["maps"] = [describe(hint_map) for hint_map in found]
        out.emit(data, lambda console: print_maps(console, found))
        return 0
    if args.delete:
        if not hints.forget(args.policy, args.map, **settings):
            raise UsageError(f"nothing was removed from {args.map}", "it has no such key")
        data["written"] = True
        out.emit(data, lambda console: console.print(f"removed from {args.map}"))
        return 0
    if settings:
        hints.hint(args.policy, args.map, **settings)
        data["written"] = True
        out.emit(data, lambda console: console.print(f"written to {args.map}"))
        return 0
    rows = hints.read_map(args.policy, args.map)
    data["elements"] = rows

    def human(console: Console) -> None:
        if rows:
            print_elements(console, [{**row["key"], **row["value"]} for row in rows])
        else:
            console.print(f"{args.map} is empty")

    out.emit(data, human)
    return 0


def describe(hint_map: HintMap) -> dict[str, Any]:
    """Return what `hint` and `policy show` tell about a map with --json.

    Args:
        hint_map: a map for hints or reports that a policy declares.

    Returns:
        Its name, its kind, its help text and what a hint to it is written like.
    """
    return {
        "name": hint_map.name,
        "kind": hint_map.kind,
        "help": hint_map.help,
        "usage": hint_map.usage(),
    }


def print_elements(console: Console, elements: Sequence[Mapping[str, object]]) -> None:
    """Print the elements of a map: a table, or one element below the other where it is too wide.

    Args:
        console: where to; the human side of Output.emit().
        elements: the members of each, at least one; all have the same members.
    """
    names = list(elements[0])
    lines = [[f"{element[name]}" for name in names] for element in elements]
    widths = [max(map(len, column)) for column in zip(names, *lines, strict=True)]
    if sum(widths) + 3 * (len(widths) - 1) <= console.width:
        console.print(table([(name, "number") for name in names], lines))
        return
    for number, line in enumerate(lines):
        if number:
            console.print()
        console.print(pairs(list(zip(names, line, strict=True))))


def print_maps(console: Console, maps: tuple[HintMap, ...]) -> None:
    """Print one row for each map of a policy, or that it has none.

    Args:
        console: where to; the human side of Output.emit().
        maps: the policy's maps for hints and reports.
    """
    if not maps:
        console.print("it has no maps for hints or reports")
        return
    console.print(
        pairs(
            [
                (f"{hint_map.name} ({hint_map.kind})", f"{hint_map.help}: {hint_map.usage()}")
                for hint_map in maps
            ]
        )
    )


def _setting(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator or not name or not value:
        raise UsageError(f"{text!r} is not NAME=VALUE", "", "Run `pagecache-bpf hint --help`")
    return name, value
