# SPDX-License-Identifier: Apache-2.0
"""pagecache-bpf config: check and show the controller's configuration."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pagecache_bpf.cli.output import Output, pairs, table
from pagecache_bpf.cli.parser import Group
from pagecache_bpf.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from pagecache_bpf.controller.config import Config

GROUP = Group.OPERATE
HELP = "check or show the configuration of the controller"
DESCRIPTION = """\
The controller reads /etc/pagecache-bpf/config.toml, or the file that `serve --config` names.
docs/controller.md explains each setting."""
EXAMPLES = (
    ("pagecache-bpf config check new.toml", "every mistake with its line"),
    ("pagecache-bpf config show", "every setting: its value, its default, its meaning"),
)
_SETTING_JSON = {
    "source": "the file; null for the defaults",
    "settings.*": "each setting of the controller, sizes in bytes",
    "models[].path": "file or directory",
    "models[].name": "its name; null: that of the directory or file",
    "models[].policy": "policy to attach at start; null: none",
    "models[].knobs.*": "knobs of the policy",
    "models[].budget": "bytes of it that may be in the page cache at a time; null: no bound",
    "models[].keep": "whether its pages stay when a load is done",
}
JSON = {
    "config check": {**_SETTING_JSON, "warnings[]": "what does not fit this machine now"},
    "config show": {**_SETTING_JSON, "defaults.*": "each setting's default"},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the commands below config."""
    from pagecache_bpf.cli.parser import add_command

    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, summary, action in (
        ("check", "check a configuration; every mistake is told with its line", _check),
        ("show", "show every setting with its value, its default and its meaning", _show),
    ):
        command = add_command(commands, name, summary)
        command.add_argument(
            "file",
            metavar="FILE",
            nargs="?",
            type=Path,
            help="the configuration (default: /etc/pagecache-bpf/config.toml, if it exists)",
        )
        command.set_defaults(config_run=action)


def run(args: argparse.Namespace, out: Output) -> int:
    """Run the command below config."""
    code: int = args.config_run(args, out)
    return code


def _check(args: argparse.Namespace, out: Output) -> int:
    from pagecache_bpf.controller import config
    from pagecache_bpf.controller.resolved_config import ResolvedConfig

    found = config.load(args.file)
    wrong = config.check_policies(found)
    if wrong:
        raise UsageError(
            f"{found.source} does not fit this machine",
            "; ".join(wrong),
            "See `pagecache-bpf policy list` and `pagecache-bpf policy show NAME`",
        )
    warnings = ResolvedConfig(found).missing

    def human(console: Console) -> None:
        rows = [("correct", str(found.source) if found.source else "no file: defaults")]
        rows += [("warning", text) for text in warnings]
        console.print(pairs(rows))

    out.emit({**_as_json(found), "warnings": warnings}, human)
    return 0


def _show(args: argparse.Namespace, out: Output) -> int:
    from pagecache_bpf.controller import config

    found = config.load(args.file)
    data = _as_json(found)
    defaults = _as_json(config.Config())["settings"]
    keys = {key.label: key for key in config.KEYS if key.table != "model"}

    def human(console: Console) -> None:
        console.print(pairs([("file", str(found.source) if found.source else "none: defaults")]))
        console.print()
        lines = []
        for label, key in keys.items():
            value, default = (_shown(label, settings) for settings in (data["settings"], defaults))
            text = key.help if value == default else f"{key.help} (default: {default or 'empty'})"
            lines.append([label, value, text])
        console.print(table([("setting", "text"), ("value", "text"), ("meaning", "text")], lines))
        for model in data["models"]:
            console.print()
            console.print(pairs([(key, str(value)) for key, value in model.items()]))
        if not data["models"]:
            console.print()
            console.print("no [[model]]; each may have:")
            model_keys = [key for key in config.KEYS if key.table == "model"]
            console.print(pairs([(key.name, key.help) for key in model_keys], indent=2))

    out.emit({**data, "defaults": defaults}, human)
    return 0


def _as_json(found: Config) -> dict[str, Any]:
    from pagecache_bpf.controller.config import KEYS

    settings = {key.label: getattr(found, key.name) for key in KEYS if key.table != "model"}
    settings["socket.mode"] = f"{found.mode:04o}"
    settings["loads.policies"] = list(found.policies)
    names = [key.name for key in KEYS if key.table == "model"]
    return {
        "source": str(found.source) if found.source else None,
        "settings": settings,
        "models": [
            {
                name: dict(value) if name == "knobs" else value
                for name in names
                for value in [getattr(model, name)]
            }
            for model in found.models
        ],
    }


def _shown(label: str, settings: dict[str, Any]) -> str:
    from pagecache_bpf.units import format_size

    value = settings[label]
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return ", ".join(value)
    return format_size(value) if isinstance(value, int) else str(value)
