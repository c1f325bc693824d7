# SPDX-License-Identifier: Apache-2.0
"""Writes the pages that are made from the code: `python -m tools.generate_docs`.

The manual page comes from the parser, docs/metrics.md from the declaration of the metrics.

--man prints the first, --write puts both where they are kept in the source tree, --check fails
when one kept there is stale.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from pagecache_bpf.cli.parser import PROG, Parser, build_parser, find_verbs
from pagecache_bpf.kernel.abi import COUNTERS, OBSERVED
from pagecache_bpf.metrics import declarations

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE = DOCS / "man" / f"{PROG}.1"
METRICS = DOCS / "metrics.md"

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
    ("PAGECACHE_BPF_OBSERVE", '"off": attach and tag as with --no-observe'),
    ("PAGECACHE_BPF_RUN_DIR", "the place of sockets and logs (default: /run/pagecache-bpf)"),
)
ERRORS = """\
Errors go to stderr: what failed, why, and the next step ("fix"). With --json an error is one
line of JSON on stderr: {"error": {"type", "what", "why", "fix", "docs", "log", "notes",
"exit_code"}}, and a warning is {"warning": TEXT}. Data goes to stdout."""


def manual_page() -> str:
    """Return the manual page in roff."""
    parser = build_parser()
    lines = [
        '.\\" Made by `python -m tools.generate_docs --write`: do not edit.',
        f'.TH {PROG.upper()} 1 "" "{PROG}" "User Commands"',
        *_section("NAME", _text(f"{PROG} - eBPF policies for the page cache of model weights")),
        *_section("SYNOPSIS", _synopsis(parser)),
        *_section("DESCRIPTION", _text(parser.description or "")),
        *_section("OPTIONS", _arguments(parser)),
        ".SH COMMANDS",
    ]
    verbs = find_verbs()
    for name, command in _commands(parser):
        verb = verbs[name.split()[0]]
        lines += [f".SS {_escape(name)}", *_synopsis(command)]
        lines += [".PP", *_text(command.description or "")]
        lines += _arguments(command)
        if name in verb.JSON:
            lines += [".PP", "Keys of the JSON output:", *_terms(verb.JSON[name].items())]
        if name in verbs:
            for line, meaning in verb.EXAMPLES:
                lines += [".PP", "Example:" if not meaning else _escape(f"Example, {meaning}:")]
                lines += [".PP", ".RS 4", ".nf", _escape(line), ".fi", ".RE"]
    counters = [(counter.name, f"{counter.help} ({counter.unit})") for counter in COUNTERS]
    lines += _section("COUNTERS", ["What status counts for each policy.", *_terms(counters)])
    observed = [(counter.name, f"{counter.help} ({counter.unit})") for counter in OBSERVED]
    lines += [".PP", "What stats counts for each model, and each process that reads it."]
    lines += _terms(observed)
    lines += _section("ERRORS", _text(ERRORS))
    lines += _section("EXIT STATUS", _terms(EXIT_CODES))
    lines += _section("ENVIRONMENT", _terms(ENVIRONMENT))
    lines += _section("FILES", _terms(FILES))
    return "\n".join(lines) + "\n"


def metrics_page() -> str:
    """Write the page about all metrics, docs/metrics.md.

    Returns:
        The page, in Markdown.
    """
    lines = [
        "<!-- Made by `python -m tools.generate_docs --write`: do not edit. -->",
        "",
        "# Metrics",
        "",
        "What `pagecache-bpf export` serves. [Monitoring](monitoring.md) says how to collect it.",
        "`pagecache-bpf stats --json` has the same numbers under the kernel's names.",
        "",
        "Counters of a policy begin at 0 when it is attached. Counters of a model only grow while",
        "the agent's process runs, over any number of attachments, and are told while the model is",
        "tagged; what `stats`, `watch` and `top` show, and `hit_ratio`, begins at 0 when the model",
        "is tagged. Sizes are bytes of whole pages. There is no histogram of the time that hooks",
        "take: neither engine measures it (`python -m benchmarks.overhead` does).",
        "",
    ]
    for kind in ("counter", "gauge"):
        lines += [f"## {kind.title()}s", "", "| name | labels | meaning |", "| --- | --- | --- |"]
        for metric in declarations.METRICS:
            if metric.kind == kind:
                labels = ", ".join(metric.labels)
                lines.append(f"| `{metric.name}` | {labels} | {metric.help} |")
        lines.append("")
    lines += ["## Labels", "", "| label | values |", "| --- | --- |"]
    used = {label for metric in declarations.METRICS for label in metric.labels}
    lines += [
        f"| `{label}` | {text} |" for label, text in declarations.LABELS.items() if label in used
    ]
    return "\n".join(lines) + "\n"


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
    """How a command is called; written here, as argparse's own differs between Pythons."""
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
    """One argument as the synopsis shows it: brackets where it may be left out."""
    if isinstance(action, argparse._SubParsersAction):
        return "COMMAND ..."
    value = action.metavar if isinstance(action.metavar, str) else ""
    if not action.option_strings:
        shape = {"?": "[{}]", "*": "[{}...]", "+": "{}..."}.get(str(action.nargs), "{}")
        return value if bare else shape.format(value)
    text = f"{action.option_strings[-1]} {value}".rstrip()
    if bare or action.required:
        return text
    repeated = "..." if isinstance(action, argparse._AppendAction) else ""
    return f"[{text}]{repeated}"


def _own(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """A command's arguments without those that every command has."""
    common = {"-h", "--json", "--no-color", "-v"}
    return (action for action in parser._actions if not common & set(action.option_strings))


def _arguments(parser: argparse.ArgumentParser) -> list[str]:
    """The arguments of a command; those that every command has are only in OPTIONS."""
    rows = []
    for action in parser._actions if parser.prog == PROG else _own(parser):
        if isinstance(action, argparse._SubParsersAction):
            continue
        value = action.metavar if isinstance(action.metavar, str) else ""
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


def main(argv: Sequence[str] | None = None) -> int:
    """Print, write or check the manual page; 1 when the kept one is stale."""
    parser = argparse.ArgumentParser(prog="python -m tools.generate_docs", description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--man", action="store_true", help="print the manual page")
    what.add_argument("--write", action="store_true", help="write the pages in docs/")
    what.add_argument("--check", action="store_true", help="fail if one of them is stale")
    args = parser.parse_args(argv)
    pages = {PAGE: manual_page(), METRICS: metrics_page()}
    if args.man:
        print(pages[PAGE], end="")
        return 0
    stale = [
        path
        for path, text in pages.items()
        if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]
    if args.write:
        for path in stale:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(pages[path], encoding="utf-8")
        return 0
    for path in stale:
        print(
            f"docs/{path.relative_to(DOCS) if path.is_relative_to(DOCS) else path.name} is stale: "
            "run `python -m tools.generate_docs --write` and commit the result",
            file=sys.stderr,
        )
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
