# SPDX-License-Identifier: Apache-2.0
"""The manual pages in roff, made from the parser: pagecache-bpf(1) and one for each command.

Knows the parser and what the modules of the commands declare (HELP, DESCRIPTION, EXAMPLES, JSON),
and no list of the commands.  tools.generate_docs puts the pages into docs/man.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Iterator, Sequence

from pagecache_bpf.cli.parser import PROG, Group, Parser, build_parser, find_verbs
from pagecache_bpf.kernel.abi import COUNTERS, OBSERVED

EXIT_CODES = (
    ("0", "done"),
    ("1", "failed; also: the kernel refused the policy"),
    ("2", "wrong use: an unknown policy or knob, a bad value, a bad path"),
    ("3", "this machine lacks something: the module, a kernel feature, libbpf, clang"),
    ("4", "not enough privilege"),
    ("130", "interrupted by Ctrl-C; what was half done is undone"),
    ("141", "the reader of the output went away"),
    ("143", "ended by SIGTERM; what was half done is undone"),
)
FILES = (
    ("/dev/pagecache_bpf", "the module's control device; root only"),
    ("/sys/fs/bpf/pagecache/POLICY/link", "keeps a policy attached; removing it detaches it"),
    ("/run/pagecache-bpf/", "whole logs of compiler and verifier, named by the error"),
    ("/run/pagecache-bpf/control.sock", "the controller's socket for loads (`serve`)"),
    ("/etc/pagecache-bpf/config.toml", "the controller's configuration (`config show`)"),
)
ENVIRONMENT = (
    ("NO_COLOR", "no colors if it is set to anything"),
    ("CLANG", "the compiler for policies in C (default: clang, or the newest clang-NN)"),
    (
        "PAGECACHE_BPF_API",
        "narrows `run` and the Python API: `alone` to what a process can do by itself, `off` to "
        "nothing",
    ),
    ("PAGECACHE_BPF_LIBBPF", "the libbpf to load, instead of looking for one"),
    ("PAGECACHE_BPF_EVENTS", "kinds of events' sources to use: tracepoint, function"),
    ("PAGECACHE_BPF_OBSERVE", '"off": attach and tag as with --no-observe'),
    ("PAGECACHE_BPF_RUN_DIR", "the place of sockets and logs (default: /run/pagecache-bpf)"),
)
ERRORS = """\
Errors go to stderr: what failed, why, and the next step ("fix"). With --json an error is one
line of JSON on stderr: {"error": {"type", "what", "why", "fix", "docs", "log", "notes",
"exit_code"}}, and a warning is {"warning": TEXT}. Data goes to stdout."""


def manual_pages() -> dict[str, str]:
    """Return every manual page.

    Returns:
        The pages' text in roff by the names of their files, such as "pagecache-bpf-attach.1".
    """
    parser = build_parser()
    pages = {f"{PROG}.1": _main_page(parser)}
    for name, command in _commands(parser):
        if " " not in name:
            pages[f"{PROG}-{name}.1"] = _command_page(name, command)
    return pages


def _main_page(parser: Parser) -> str:
    """Write the page of what holds for all commands, with a pointer to the page of each."""
    verbs = find_verbs()
    lines = [
        *_title(PROG),
        *_section("NAME", _text(f"{PROG} - eBPF policies for the page cache of model weights")),
        *_section("SYNOPSIS", _synopsis(parser)),
        *_section("DESCRIPTION", _text(parser.description or "")),
        *_section("OPTIONS", _arguments(parser)),
        ".SH COMMANDS",
    ]
    for group in Group:
        lines.append(f".SS {_escape(group.value)}")
        for name, verb in sorted(verbs.items()):
            if verb.GROUP is group:
                lines += [".TP", f".BR {_escape(f'{PROG}-{name}')} (1)", _escape(verb.HELP)]
    counters = [(counter.name, f"{counter.help} ({counter.unit})") for counter in COUNTERS]
    lines += _section("COUNTERS", ["What status counts for each policy.", *_terms(counters)])
    observed = [(counter.name, f"{counter.help} ({counter.unit})") for counter in OBSERVED]
    lines += [".PP", "What stats counts for each model, and each process that reads it."]
    lines += _terms(observed)
    lines += _section("ERRORS", _text(ERRORS))
    lines += _section("EXIT STATUS", _terms(EXIT_CODES))
    lines += _section("ENVIRONMENT", _terms(ENVIRONMENT))
    lines += _section("FILES", _terms(FILES))
    lines += _see_also([f"{PROG}-{name}" for name in sorted(verbs)])
    return "\n".join(lines) + "\n"


def _command_page(name: str, command: Parser) -> str:
    """Write the page of one command with all that it holds."""
    verb = find_verbs()[name]
    lines = [
        *_title(f"{PROG}-{name}"),
        *_section("NAME", _text(f"{PROG}-{name} - {verb.HELP}")),
        *_section("SYNOPSIS", _synopsis(command)),
        *_section("DESCRIPTION", _text(command.description or "")),
        *_section("OPTIONS", _arguments(command)),
        ".PP",
        "What every command takes (\\fB\\-\\-json\\fR, \\fB\\-v\\fR and others) is in",
        f".BR {_escape(PROG)} (1).",
    ]
    lines += _json(verb.JSON.get(name, {}))
    inner = list(_commands(command, f"{name} "))
    if inner:
        lines.append(".SH COMMANDS")
    for full_name, subcommand in inner:
        lines += [f".SS {_escape(full_name)}", *_synopsis(subcommand)]
        lines += [".PP", *_text(subcommand.description or ""), *_arguments(subcommand)]
        lines += _json(verb.JSON.get(full_name, {}), ".PP")
    if verb.EXAMPLES:
        lines.append(".SH EXAMPLES")
    for line, meaning in verb.EXAMPLES:
        if meaning:
            lines += [".PP", _escape(f"{meaning[:1].upper()}{meaning[1:]}:")]
        lines += [".RS 4", ".nf", _escape(line), ".fi", ".RE"]
    lines += [".SH EXIT STATUS", f"As for all commands: see\n.BR {_escape(PROG)} (1)."]
    group = [other for other, module in find_verbs().items() if module.GROUP is verb.GROUP]
    lines += _see_also([PROG, *(f"{PROG}-{other}" for other in sorted(group) if other != name)])
    return "\n".join(lines) + "\n"


def _title(page: str) -> list[str]:
    return [
        '.\\" Made by `python -m tools.generate_docs --write`: do not edit.',
        f'.TH {page.upper()} 1 "" "{PROG}" "User Commands"',
    ]


def _json(keys: dict[str, str], heading: str = ".SH JSON OUTPUT") -> list[str]:
    """Write the keys that a command prints with --json, below a heading or a sentence."""
    if not keys:
        return []
    return [heading, "Keys of the JSON output:", *_terms(keys.items())]


def _see_also(pages: Sequence[str]) -> list[str]:
    last = len(pages) - 1
    return [
        ".SH SEE ALSO",
        *(
            f".BR {_escape(page)} (1)" + ("," if index < last else "")
            for index, page in enumerate(pages)
        ),
    ]


def _commands(parser: argparse.ArgumentParser, prefix: str = "") -> Iterator[tuple[str, Parser]]:
    """Every command with its full name; those that only hold others come before them."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, command in action.choices.items():
                yield f"{prefix}{name}", command
                yield from _commands(command, f"{prefix}{name} ")


def _section(title: str, body: Sequence[str]) -> list[str]:
    return [f".SH {title}", *body]


def _synopsis(parser: argparse.ArgumentParser) -> list[str]:
    """Write how a command is called; done here, as argparse's own differs between Pythons."""
    exclusive = {
        id(action): group
        for group in parser._mutually_exclusive_groups
        for action in group._group_actions
    }
    words = []
    for action in _own(parser):
        group = exclusive.pop(id(action), None)
        if group is None:
            words.append(_word(action))
        elif action is group._group_actions[0]:
            choices = " | ".join(
                _word(alternative, bare=True) for alternative in group._group_actions
            )
            words.append(f"{{{choices}}}" if group.required else f"[{choices}]")
    words.sort(key=lambda word: not word.lstrip("[{").startswith("-"))  # options come first
    line = _escape(" ".join(words))
    return [f"\\fB{_escape(parser.prog)}\\fR [\\fIOPTION\\fR]... {line}".rstrip()]


def _word(action: argparse.Action, bare: bool = False) -> str:
    """Write one argument as the synopsis shows it: brackets where it may be left out."""
    if isinstance(action, argparse._SubParsersAction):
        return "COMMAND ..."
    value = _value(action)
    if not action.option_strings:
        shape = {"?": "[{}]", "*": "[{}...]", "+": "{}..."}.get(str(action.nargs), "{}")
        return value if bare else shape.format(value)
    text = f"{action.option_strings[-1]} {value}".rstrip()
    if bare or action.required:
        return text
    repeated = "..." if isinstance(action, argparse._AppendAction) else ""
    return f"[{text}]{repeated}"


def _value(action: argparse.Action) -> str:
    """Return what stands for an argument's value: its metavar, or what there is to choose from."""
    if isinstance(action.metavar, str):
        return action.metavar
    return f"{{{','.join(map(str, action.choices))}}}" if action.choices else ""


def _own(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Yield a command's arguments without those that every command has."""
    common = {"-h", "--json", "--no-color", "-v"}
    return (action for action in parser._actions if not common & set(action.option_strings))


def _arguments(parser: argparse.ArgumentParser) -> list[str]:
    """Write the arguments of a command; those that every command has are only in OPTIONS."""
    rows = []
    for action in parser._actions if parser.prog == PROG else _own(parser):
        if isinstance(action, argparse._SubParsersAction):
            continue
        value = _value(action)
        names = ", ".join(f"{option} {value}".rstrip() for option in action.option_strings)
        rows.append((names or value, action.help or ""))
    return _terms(rows)


def _terms(rows: Iterable[tuple[str, str]]) -> list[str]:
    lines = []
    for term, meaning in rows:
        lines += [".TP", f"\\fB{_escape(term)}\\fR", _escape(meaning)]
    return lines


def _text(text: str) -> list[str]:
    return [_escape(line) for line in text.splitlines()]


def _escape(text: str) -> str:
    """Make text safe for roff: backslashes, hyphens that are typed, leading control letters."""
    text = text.replace("\\", "\\e").replace("-", "\\-")
    text = re.sub(r"`([^`]*)`", r"\\fB\1\\fR", text)
    return f"\\&{text}" if text[:1] in (".", "'") else text
