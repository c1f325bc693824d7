# SPDX-License-Identifier: Apache-2.0
"""Prints: data to stdout (tables or JSON), messages for people to stderr.

Tables are as wide as the terminal; where there is none they stay below 100 columns and have
no colors.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pagecache_bpf.errors import PagecacheError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

WIDTH = 96  # without a terminal
PREFIX = "pagecache-bpf: "
TROUBLESHOOTING = "docs/troubleshooting.md"


def add_note(error: BaseException, text: str) -> None:
    """Attach a sentence to an error that is on its way up; it is printed below the error.

    The same as BaseException.add_note, which Python 3.10 does not have.
    """
    error.__notes__ = [*_notes(error), text]  # type: ignore[attr-defined]


def _notes(error: BaseException) -> list[str]:
    return list(getattr(error, "__notes__", []))


class Output:
    """Where a command's results and errors go."""

    def __init__(self, *, json: bool = False, color: bool = True) -> None:
        self.json = json
        self.color = color and not os.environ.get("NO_COLOR")

    def emit(self, data: Mapping[str, Any], human: Callable[[Console], None]) -> None:
        """Print a command's result: DATA with --json, otherwise what HUMAN prints."""
        if self.json:
            print(json.dumps(data, indent=2))
        else:
            console = self._console()
            if console.is_terminal:
                human(console)
                return
            with console.capture() as captured:
                human(console)
            # tables are padded to their width, which is noise in files and pipes
            for line in captured.get().splitlines():
                print(line.rstrip())

    def _console(self) -> Console:
        from rich.console import Console

        tty = sys.stdout.isatty()
        return Console(
            width=None if tty else WIDTH,
            # what comes from the system (paths, messages) is text, never markup
            markup=False,
            highlight=False,
            emoji=False,
            no_color=not self.color,
            color_system="auto" if tty and self.color else None,
        )

    def error(self, error: PagecacheError) -> None:
        """Print an error that says what, why and what to do."""
        log = getattr(error, "log_path", None)
        if self.json:
            content = {
                "type": type(error).__name__,
                "what": error.what,
                "why": error.why,
                "fix": error.fix,
                "docs": error.docs,
                "log": str(log) if log else None,
                "notes": _notes(error),
                "exit_code": error.exit_code,
            }
            self._stderr(json.dumps({"error": content}))
            return
        self._stderr(
            f"{PREFIX}{self._red('error:')} {error.what}{f': {error.why}' if error.why else ''}"
        )
        for note in _notes(error):
            self._stderr(f"  note: {note}")
        if error.fix:
            self._stderr(f"  fix:  {error.fix}")
        if log and str(log) not in error.fix:
            self._stderr(f"  log:  {log}")
        if error.docs:
            self._stderr(f"  see:  {error.docs}")

    def failure(self, text: str, error: BaseException, *, report: bool = False) -> None:
        """Print what ended the command and is no PagecacheError; report: ask for a report."""
        notes = _notes(error)
        if report:
            notes.append(
                "this is a bug of pagecache-bpf; run again with -v and report what it says"
            )
        if self.json:
            content = {"type": type(error).__name__, "what": text, "notes": notes}
            self._stderr(json.dumps({"error": content}))
            return
        self._stderr(f"{PREFIX}{self._red('error:')} {text}")
        for note in notes:
            self._stderr(f"  note: {note}")

    def warn(self, text: str) -> None:
        """Print a warning to stderr."""
        self._stderr(json.dumps({"warning": text}) if self.json else f"{PREFIX}warning: {text}")

    def _red(self, text: str) -> str:
        return f"\033[1;31m{text}\033[0m" if self.color and sys.stderr.isatty() else text

    @staticmethod
    def _stderr(text: str) -> None:
        # file names may hold bytes that are no text
        print(text.encode("utf-8", "backslashreplace").decode(), file=sys.stderr)


def table(columns: Sequence[tuple[str, str]], rows: Sequence[Sequence[RenderableType]]) -> Table:
    """Make a table; a column is (title, kind): text, path (folds anywhere) or number."""
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    for title, kind in columns:
        made.add_column(
            title,
            justify="right" if kind == "number" else "left",
            overflow="fold",
            no_wrap=kind == "number",
        )
    for row in rows:
        made.add_row(*row)
    return made


def pairs(rows: Sequence[tuple[str, RenderableType]], indent: int = 0) -> Table:
    """Make a grid of names and values without lines."""
    from rich.table import Table

    made = Table.grid(padding=(0, 2, 0, 0))
    made.add_column(style="bold", no_wrap=True)
    made.add_column(overflow="fold")
    for name, value in rows:
        made.add_row(" " * indent + name, value)
    return made
