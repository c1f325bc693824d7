# SPDX-License-Identifier: Apache-2.0
"""Builds the parser.  Help, the manual page and shell completion are all made from it."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

from pagecache_bpf.errors import UsageError

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[Any]

PROG = "pagecache-bpf"
DESCRIPTION = """\
Attaches eBPF policies that decide what the kernel reads ahead for the weight files of models.
A policy governs only files that are tagged; every other file is read as before. The kernel
keeps the policy and the tags: no process stays behind, and `detach` undoes it all."""

COMMON = (
    ("--json", "print JSON (keys: see the manual page); errors are JSON on stderr too"),
    ("--no-color", "no colors, even on a terminal (also: NO_COLOR in the environment)"),
)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that reports wrong use as every other error is reported."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        kwargs.setdefault("allow_abbrev", False)  # scripts would break when an option is added
        super().__init__(*args, **kwargs)
        self._sorting = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Let options stand between a command's words: `attach POLICY --knob N=V PATH`.

        argparse by itself takes a list of PATHs as finished, though empty, at the first option.
        """
        lists = any(action.nargs in ("*", "+") for action in self._get_positional_actions())
        if self._sorting or not lists:
            return super().parse_known_args(args, namespace)
        self._sorting = True  # the call below comes back here
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._sorting = False

    def error(self, message: str) -> NoReturn:
        """Raise UsageError."""
        raise UsageError(message, "", f"Run `{self.prog} --help`")


class _Version(argparse.Action):
    """Prints the version, which is looked up only then: that takes reading a file."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        import pagecache_bpf

        print(PROG, pagecache_bpf.__version__)
        parser.exit()


def build_parser() -> Parser:
    """Return a new parser for the whole command line."""
    parser = Parser(prog=PROG, description=DESCRIPTION)
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    _add_common(parser)
    parser.set_defaults(json=False, no_color=False, verbose=False)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, verb in find_verbs().items():
        command = add_command(commands, name, verb.HELP, verb.DESCRIPTION, verb.EXAMPLES)
        verb.add_arguments(command)
        command.set_defaults(run=verb.run)
    return parser


def find_verbs() -> dict[str, ModuleType]:
    """Return the modules of all commands by the command's name."""
    verbs = importlib.import_module("pagecache_bpf.cli.verbs")
    names = sorted(module.name for module in pkgutil.iter_modules(verbs.__path__))
    return {
        name.replace("_", "-"): importlib.import_module(f"{verbs.__name__}.{name}")
        for name in names
    }


def add_command(
    commands: Subparsers,
    name: str,
    summary: str,
    description: str = "",
    examples: tuple[tuple[str, str], ...] = (),
) -> Parser:
    """Add one command (or, below it, one more) with the options that all commands have."""
    epilog = "\n".join(f"  {line}\n      {meaning}" for line, meaning in examples)
    command: Parser = commands.add_parser(
        name,
        help=summary,
        description=description or f"{summary[0].upper()}{summary[1:]}.",
        epilog=f"examples:\n{epilog}" if examples else None,
    )
    _add_common(command)
    return command


def _add_common(parser: Parser) -> None:
    # SUPPRESS: an option given before the command must survive the command's own default.
    group = parser.add_argument_group("output")
    for option, text in COMMON:
        group.add_argument(option, action="store_true", default=argparse.SUPPRESS, help=text)
    group.add_argument(
        "-v",
        "--verbose",
        action="store_true",
        default=argparse.SUPPRESS,
        help="more detail; log what is asked of the kernel; show tracebacks",
    )
