# SPDX-License-Identifier: Apache-2.0
"""Prints: data to stdout (tables or JSON), messages for people to stderr.

Tables are as wide as the terminal; where there is none they stay below 100 columns and have
no colors.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pagecache_bpf.errors import PagecacheError
from pagecache_bpf.units import printable

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table
    from rich.text import Text

LONG_ROWS = 500  # of a table that is not folded to the width
WIDTH = 96  # without a terminal, unless COLUMNS says otherwise
PREFIX = "pagecache-bpf: "
TROUBLESHOOTING = "docs/troubleshooting.md"
_PACKAGE = Path(__file__).resolve().parents[1]
#: Where the documents are: in the package wherever it is installed, else beside it in its sources.
DOCS = (_PACKAGE / "docs", _PACKAGE.parent / "docs")


def where(docs: str) -> str:
    """Return where a section of the documents can be read on this machine.

    Args:
        docs: what an error names, like docs/troubleshooting.md#is-not-attached; may be empty.

    Returns:
        The path of the document in the installed package or in the source tree, with the section.
    """
    name, mark, section = docs.partition("#")
    for root in DOCS:
        path = root / name.removeprefix("docs/")
        if name and path.is_file():
            return f"{path}{mark}{section}"
    return docs


def _columns() -> int:
    """Return the width, in columns, of output that goes to a pipe or a file."""
    text = os.environ.get("COLUMNS", "")
    return int(text) if text.isascii() and text.isdigit() and 20 <= int(text) <= 1000 else WIDTH


def add_note(error: BaseException, text: str) -> None:
    """Attach a sentence to an error that is on its way up; it is printed below the error.

    The same as BaseException.add_note, which Python 3.10 does not have.

    Args:
        error: the error; where it is caught has to raise it again.
        text: a sentence without a full stop at its end.
    """
    error.__notes__ = [*_notes(error), text]  # type: ignore[attr-defined]


def _notes(error: BaseException) -> list[str]:
    return list(getattr(error, "__notes__", []))


class Output:
    """Where a command's results and errors go.

    Args:
        json: print JSON: results on stdout, errors on stderr.
        color: whether a terminal gets colors; NO_COLOR in the environment forbids them.
    """

    def __init__(self, *, json: bool = False, color: bool = True) -> None:
        self.json = json
        self.color = color and not os.environ.get("NO_COLOR")

    def emit(self, data: Mapping[str, Any], human: Callable[[Console], None]) -> None:
        """Print the result of a command, once, in the form that was asked for.

        Args:
            data: what --json prints, made of what the json module can write.
            human: called without --json; prints the same for people.  Into a pipe or a file its
                lines go without colors and without blanks at their ends.

        Raises:
            PagecacheError: stdout does not take it; the command itself is done.
        """
        if self.json:
            self._print(json.dumps(data, indent=2))
        else:
            console = self._console()
            if console.is_terminal:
                with self._told():
                    human(console)
                return
            with self._told(), console.capture() as captured:
                human(console)
            # tables are padded to their width, which is noise in files and pipes
            lines = captured.get().split("\n")
            self._print("\n".join(line.rstrip() for line in lines).rstrip("\n"))

    def _print(self, text: str) -> None:
        if text:
            with self._told():
                print(text)
        self.flush()

    def flush(self) -> None:
        """Hand everything that was printed to the system.

        Raises:
            PagecacheError: the system does not take it; the command itself is done.
        """
        with self._told():
            sys.stdout.flush()

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            raise
        except OSError as error:
            self.discard()
            raise PagecacheError(
                "the output cannot be written",
                error.strerror or str(error),
                "The command itself is done. Free some space, or write the output elsewhere",
                f"{TROUBLESHOOTING}#the-output-cannot-be-written",
            ) from error

    def discard(self) -> None:
        """Let stdout lead nowhere, so that the end of the process does not try to flush it."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def _console(self) -> Console:
        from rich.console import Console

        class SafeConsole(Console):
            """A console on which no name can send sequences to the terminal."""

            def print(self, *objects: Any, **options: Any) -> None:
                safe = [
                    printable(text, keep="\n") if isinstance(text, str) else text
                    for text in objects
                ]
                super().print(*safe, **options)

        tty = sys.stdout.isatty()
        return SafeConsole(
            width=None if tty else _columns(),
            # what comes from the system (paths, messages) is text, never markup
            markup=False,
            highlight=False,
            emoji=False,
            no_color=not self.color,
            color_system="auto" if tty and self.color else None,
        )

    def error(self, error: PagecacheError) -> None:
        """Print an error to stderr: what failed, why, its notes, what to do, where to read more.

        Args:
            error: the error that ended the command.
        """
        log = getattr(error, "log_path", None)
        if self.json:
            content = {
                "type": type(error).__name__,
                "what": error.what,
                "why": error.why,
                "fix": error.fix,
                "docs": where(error.docs),
                "log": str(log) if log else None,
                "notes": _notes(error),
                "exit_code": error.exit_code,
            }
            self._stderr(json.dumps({"error": content}))
            return
        self._stderr(
            f"{PREFIX}{self._red('error:')} "
            + printable(f"{error.what}{f': {error.why}' if error.why else ''}")
        )
        for note in _notes(error):
            self._stderr(f"  note: {printable(note)}")
        if error.fix:
            self._stderr(f"  fix:  {printable(error.fix)}")
        if log and str(log) not in error.fix:
            self._stderr(f"  log:  {printable(str(log))}")
        if error.docs:
            self._stderr(f"  see:  {where(error.docs)}")

    def failure(self, text: str, error: BaseException, *, report: bool = False) -> None:
        """Print to stderr what ended the command and is no PagecacheError.

        Args:
            text: what happened, such as "interrupted".
            error: the exception; its notes are printed below.
            report: whether it is a bug of this package, which people are asked to report.
        """
        notes = _notes(error)
        if report:
            notes.append(
                "this is a bug of pagecache-bpf; run again with -v and report what it says"
            )
        if self.json:
            content = {"type": type(error).__name__, "what": text, "notes": notes}
            self._stderr(json.dumps({"error": content}))
            return
        self._stderr(f"{PREFIX}{self._red('error:')} {printable(text)}")
        for note in notes:
            self._stderr(f"  note: {printable(note)}")

    def warn(self, text: str) -> None:
        """Print a warning to stderr.

        Args:
            text: a sentence.
        """
        shown = f"{PREFIX}warning: {printable(text)}"
        self._stderr(json.dumps({"warning": text}) if self.json else shown)

    def remark(self, text: str) -> None:
        """Print lines for people to stderr, where stdout belongs to another program.

        Args:
            text: the lines; a name in them must not have line feeds.
        """
        self._stderr(f"{PREFIX}{printable(text, keep=chr(10))}")

    def _red(self, text: str) -> str:
        return f"\033[1;31m{text}\033[0m" if self.color and sys.stderr.isatty() else text

    @staticmethod
    def _stderr(text: str) -> None:
        # Nobody can be told that stderr does not take anything; the exit code stays what it is.
        with suppress(OSError):
            print(text.encode("utf-8", "backslashreplace").decode(), file=sys.stderr, flush=True)


def table(
    columns: Sequence[tuple[str, str]], rows: Sequence[Sequence[RenderableType]]
) -> RenderableType:
    """Make a table.

    A long table of texts is laid out here, each row on a line of its own whatever its width: rich
    takes two milliseconds for a row, which is 20 s for a model of 10,000 files.

    Args:
        columns: (title, kind) of each; a kind is "text", "path", which may be folded anywhere, or
            "number", which is set to the right and never folded.
        rows: the cells of each row, one a column.  Control characters in them are escaped.

    Returns:
        What a console prints.
    """
    from rich import box
    from rich.table import Table

    if len(rows) > LONG_ROWS and all(isinstance(cell, str) for row in rows for cell in row):
        return _long_table(columns, [[printable(str(cell)) for cell in row] for row in rows])
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    for title, kind in columns:
        made.add_column(
            title,
            justify="right" if kind == "number" else "left",
            overflow="fold",
            no_wrap=kind == "number",
        )
    for row in rows:
        made.add_row(*map(_safe, row))
    return made


def _long_table(columns: Sequence[tuple[str, str]], rows: Sequence[Sequence[str]]) -> Text:
    """Lay a table out as table() does, with its columns as wide as their widest cell."""
    from rich.cells import cell_len
    from rich.text import Text

    titles = [title for title, _ in columns]
    widths = [
        max(map(cell_len, (title, *cells)))
        for title, cells in zip(titles, zip(*rows, strict=True), strict=True)
    ]

    def line(cells: Sequence[str]) -> str:
        parts = []
        for cell, width, (_, kind) in zip(cells, widths, columns, strict=True):
            fill = " " * (width - cell_len(cell))
            parts.append(fill + cell if kind == "number" else cell + fill)
        return "   ".join(parts)

    made = Text(no_wrap=True, overflow="ignore", end="")
    made.append(line(titles) + "\n", style="bold")
    made.append("\u2500" * len(line(titles)) + "\n")
    made.append("".join(f"{line(row)}\n" for row in rows))
    return made


def _safe(cell: RenderableType) -> RenderableType:
    return printable(cell) if isinstance(cell, str) else cell


def pairs(rows: Sequence[tuple[str, RenderableType]], indent: int = 0) -> Table:
    """Make a grid of names and values without lines.

    Args:
        rows: (name, value) of each.  Control characters in them are escaped.
        indent: blanks in front of each name.

    Returns:
        What a console prints.
    """
    from rich.table import Table

    made = Table.grid(padding=(0, 2, 0, 0))
    made.add_column(style="bold", no_wrap=True)
    made.add_column(overflow="fold")
    for name, value in rows:
        made.add_row(" " * indent + printable(name), _safe(value))
    return made
