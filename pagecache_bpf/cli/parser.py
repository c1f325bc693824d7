# SPDX-License-Identifier: Apache-2.0
"""Builds the parser.  Help, the manual page and shell completion are all made from it."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
from collections.abc import Sequence
from enum import Enum
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

from pagecache_bpf.cli.output import DOCS
from pagecache_bpf.errors import UsageError
from pagecache_bpf.units import did_you_mean

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[Any]

PROG = "pagecache-bpf"
DESCRIPTION = """\
Attaches eBPF policies that program the page cache for the weight files of models: what is read
ahead, what is kept, what is dropped. A policy governs only files that are tagged; every other file
is read as before. The kernel runs the policy, through a module of ours or on tracepoints (engine
agent: a process of ours reads ahead). `detach` undoes it all."""


class Group(Enum):
    """What a command is for; --help lists the commands by it, in this order.

    A command declares its own: `GROUP = Group.LOOK` in its module.
    """

    USE = "use: load a model, put its files under a policy, take them out"
    LOOK = "look: what is attached, what readers find, what a load would do"
    POLICIES = "policies: what there is, what they can be told, try one on a trace"
    OPERATE = "operate: run the controller, check the machine, export, set up"


COMMON = (
    ("--json", "print JSON (keys: see the command's manual page); errors are JSON on stderr too"),
    ("--no-color", "no colors, even on a terminal (also: NO_COLOR in the environment)"),
)
_VERBOSE = ("-v", "--verbose")
_COMMON_OPTIONS = frozenset([*(option for option, _ in COMMON), *_VERBOSE])


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that reports wrong use as every other error is reported.

    Args:
        args: as argparse.ArgumentParser takes them.
        kwargs: as argparse.ArgumentParser takes them; options are not abbreviated by default.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        kwargs.setdefault("allow_abbrev", False)  # scripts would break when an option is added
        super().__init__(*args, **kwargs)
        self._sorting = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Let options stand between a command's words: `attach POLICY --knob N=V PATH`.

        argparse by itself takes a list of PATHs as finished, though empty, at the first option,
        and so a single PATH that may be left out.

        Args:
            args: the words; None: those of sys.argv.
            namespace: where the values go; None: a new argparse.Namespace.

        Returns:
            The namespace, and an empty list: no word is left, as in argparse's own method.

        Raises:
            UsageError: a word is left that no argument takes.
        """
        # argparse cannot mix where words and options exclude each other, as those of detach do.
        exclusive = {
            id(a) for group in self._mutually_exclusive_groups for a in group._group_actions
        }
        lists = any(
            action.nargs in ("*", "+", "?") and id(action) not in exclusive
            for action in self._get_positional_actions()
        )
        if self._sorting:
            return super().parse_known_args(args, namespace)
        if not lists:
            found, extras = super().parse_known_args(args, namespace)
        else:
            self._sorting = True  # the call below comes back here
            try:
                found, extras = self.parse_known_intermixed_args(args, namespace)
            finally:
                self._sorting = False
        self.refuse_extras(extras)
        return found, extras

    def error(self, message: str) -> NoReturn:
        """Raise UsageError, where argparse would print the usage and exit.

        Args:
            message: what argparse says is wrong.

        Raises:
            UsageError: always.
        """
        raise UsageError(self._only_required(message), "", f"Run `{self.prog} --help`")

    def _only_required(self, message: str) -> str:
        """Leave out of argparse's list of what is missing what may be missing: a list of PATHs."""
        begin = "the following arguments are required: "
        if not message.startswith(begin):
            return message
        optional = {
            str(action.metavar)
            for action in self._get_positional_actions()
            if action.nargs in ("?", "*")
        }
        missing = message[len(begin) :].split(", ")
        return begin + ", ".join(name for name in missing if name not in optional)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Refuse a value that is no choice, and name the choice that was probably meant."""
        if action.choices is None or value in action.choices:
            return
        choices = [str(choice) for choice in action.choices]
        name = action.metavar or "/".join(action.option_strings)
        raise UsageError(
            f"{name}: invalid choice: {value!r}",
            f"there are {', '.join(choices)}",
            did_you_mean(str(value), choices) or f"Run `{self.prog} --help`",
        )

    def refuse_extras(self, extras: Sequence[str]) -> None:
        """Refuse words that no argument takes, and ask whether a similar option was meant.

        Args:
            extras: what parse_known_args() could not place.

        Raises:
            UsageError: there are any.
        """
        if not extras:
            return
        options = [option for action in self._actions for option in action.option_strings]
        wrong = next((word for word in extras if word.startswith("-")), "")
        raise UsageError(
            f"unrecognized arguments: {' '.join(extras)}",
            "",
            did_you_mean(wrong.partition("=")[0], options) or f"Run `{self.prog} --help`",
        )


class _GroupedHelp(argparse.RawDescriptionHelpFormatter):
    """Help that lists the commands by their groups."""

    def _format_action(self, action: argparse.Action) -> str:
        if not isinstance(action, argparse._SubParsersAction):
            return super()._format_action(action)
        parts = []
        for group in Group:
            parts.append(f"\n  {group.value}\n")
            self._indent()
            for summary in action._choices_actions:
                if action.choices[summary.dest].get_default("group") is group:
                    parts.append(super()._format_action(summary))
            self._dedent()
        return "".join(parts).lstrip("\n")


class _Version(argparse.Action):
    """Prints the version, which is looked up only then: that takes reading a file."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        import pagecache_bpf

        print(PROG, pagecache_bpf.__version__)
        parser.exit()


def build_parser(words: Sequence[str] = ()) -> Parser:
    """Make the parser for the command line, with every command that find_verbs() finds.

    Args:
        words: what is going to be parsed.  If it calls a command, the parser has no other one:
            importing them all takes longer than most of them run.

    Returns:
        A new parser.  What it has parsed says in `run` which function runs the command.
    """
    docs = next((root for root in DOCS if root.is_dir()), None)
    parser = Parser(
        prog=PROG,
        description=DESCRIPTION,
        formatter_class=_GroupedHelp,
        epilog=f"What texts name as docs/PAGE.md is here:\n  {docs}" if docs else None,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    _add_common(parser)
    parser.set_defaults(json=False, no_color=False, verbose=False)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    called = next((word for word in words if word not in _COMMON_OPTIONS), "")
    for name, verb in (find_verbs(called) or find_verbs()).items():
        command = add_command(commands, name, verb.HELP, verb.DESCRIPTION, verb.EXAMPLES)
        verb.add_arguments(command)
        command.set_defaults(run=verb.run, group=verb.GROUP)
    return parser


def find_verbs(only: str | None = None) -> dict[str, ModuleType]:
    """Import the modules of all commands.

    Args:
        only: the command whose module is wanted; None: all of them.

    Returns:
        The modules by the command's name, sorted; pagecache_bpf/cli/verbs/__init__.py says what
        each of them has.
    """
    verbs = importlib.import_module("pagecache_bpf.cli.verbs")
    names = sorted(module.name for module in pkgutil.iter_modules(verbs.__path__))
    commands = {name.replace("_", "-"): f"{verbs.__name__}.{name}" for name in names}
    return {
        command: importlib.import_module(module)
        for command, module in commands.items()
        if only is None or command == only
    }


def add_command(
    commands: Subparsers,
    name: str,
    summary: str,
    description: str = "",
    examples: tuple[tuple[str, str], ...] = (),
) -> Parser:
    """Add one command (or, below it, one more) with the options that all commands have.

    Args:
        commands: what add_subparsers() of the parser above returned.
        name: the word that calls the command.
        summary: one line in the list of commands, without a full stop.
        description: what --help says on top; by default the summary.
        examples: (command line, what it does) pairs for the end of --help.

    Returns:
        The parser of the command, to add its own arguments to.
    """
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
        *_VERBOSE,
        action="store_true",
        default=argparse.SUPPRESS,
        help="more detail; log what is asked of the kernel; show tracebacks",
    )
