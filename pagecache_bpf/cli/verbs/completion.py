# SPDX-License-Identifier: Apache-2.0
"""pagecache-bpf completion: print a completion script for a shell."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from pagecache_bpf.cli.output import TROUBLESHOOTING, Output
from pagecache_bpf.cli.parser import Group
from pagecache_bpf.errors import UnsupportedError

GROUP = Group.OPERATE
HELP = "print a completion script for bash, zsh or fish"
DESCRIPTION = """\
Prints a script that lets a shell complete commands, options, policies and paths. It is made
from the parser, so it fits this version."""
EXAMPLES = (
    ("source <(pagecache-bpf completion bash)", "for this shell only"),
    (
        "pagecache-bpf completion bash > /etc/bash_completion.d/pagecache-bpf",
        "for every shell from now on",
    ),
    ("pagecache-bpf completion zsh > /usr/local/share/zsh/site-functions/_pagecache-bpf", ""),
    ("pagecache-bpf completion fish > ~/.config/fish/completions/pagecache-bpf.fish", ""),
)
SHELLS = ("bash", "zsh", "fish")
JSON = {"completion": {"shell": "the shell", "script": "the script"}}

_POLICIES = "pagecache-bpf policy list --names 2>/dev/null"
_PREAMBLE = {
    "bash": f'_pagecache_bpf_policies() {{ compgen -f -W "$({_POLICIES})" -- "$1"; }}\n',
    "zsh": f"_pagecache_bpf_policies() {{ compadd $({_POLICIES}); _files -g '*.bpf.[co]'; }}\n",
    "fish": "",
}
_COMPLETE_POLICY = {
    "bash": "_pagecache_bpf_policies",
    "zsh": "_pagecache_bpf_policies",
    "fish": f"({_POLICIES})",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of completion."""
    parser.add_argument("shell", choices=SHELLS, metavar="SHELL", help=", ".join(SHELLS))


def run(args: argparse.Namespace, out: Output) -> int:
    """Print the completion script for a shell."""
    text = script(args.shell)
    if out.json:
        out.emit({"shell": args.shell, "script": text}, lambda console: None)
    else:
        print(text)
    return 0


def script(shell: str) -> str:
    """Make the completion script for a shell out of the parser.

    Args:
        shell: one of SHELLS.

    Returns:
        The script, which the shell is to source.

    Raises:
        UnsupportedError: the Python package shtab is not installed.
    """
    try:
        import shtab
    except ImportError:
        raise UnsupportedError(
            "completion scripts cannot be made",
            "the Python package shtab is not installed",
            "Install it (pip install shtab)",
            f"{TROUBLESHOOTING}#completion-scripts-cannot-be-made",
        ) from None
    from pagecache_bpf.cli.parser import build_parser

    parser = build_parser()
    for action in _actions(parser):
        if isinstance(action, argparse._SubParsersAction):
            # shtab shows the description's first line, which is half a sentence
            for summary in action._choices_actions:
                action.choices[summary.dest].description = summary.help
        elif action.metavar in ("PATH", "FILE"):
            action.complete = shtab.FILE  # type: ignore[attr-defined]
        elif action.metavar == "POLICY" or action.option_strings == ["--policy"]:
            action.complete = _COMPLETE_POLICY  # type: ignore[attr-defined]
    text: str = shtab.complete(parser, shell, preamble=_PREAMBLE[shell])
    return text


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Every action of a parser and of the commands below it."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)
