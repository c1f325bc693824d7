# SPDX-License-Identifier: Apache-2.0
"""pagecache-bpf top: the models, live."""

from __future__ import annotations

import argparse
import os
import re
import select
import shutil
import sys
import termios
import time
import tty
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from pagecache_bpf.cli import views
from pagecache_bpf.cli.output import TROUBLESHOOTING, Output
from pagecache_bpf.cli.parser import Group
from pagecache_bpf.cli.verbs.watch import seconds
from pagecache_bpf.errors import PagecacheError, PrivilegeError, UsageError
from pagecache_bpf.kernel.file_pages import PAGE_SIZE
from pagecache_bpf.units import format_size, plural, printable

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table
    from rich.text import Text

    from pagecache_bpf.cli.views import Row
    from pagecache_bpf.metrics.collect import StatsSnapshot
    from pagecache_bpf.metrics.strips import Strip

GROUP = Group.LOOK
HELP = "show the models live: residency, hit ratio, MB/s, stalls"
_SORTS = "\n".join(f"  {column.key}  by {column.title}: {column.help}" for column in views.COLUMNS)
DESCRIPTION = f"""\
Shows the models on the whole screen, live: what of each is cached, as a bar too, how its readers
find it, what they want and what comes in, how long they sleep for I/O, and the engine. Below stands
a strip for each file, from its first byte to its last: the darker, the more is in the page cache.

Keys:
  q  quits (so does Ctrl-C)
  m  sorts by the model's name
{_SORTS}
  i  turns the order around
  f  shows the files or not
  ?  shows what the columns mean"""
EXAMPLES = (("pagecache-bpf top --interval 0.5", ""),)
JSON: dict[str, dict[str, str]] = {}
_SEQUENCE = re.compile(r"\x1b(\[[0-9;?]*.|O.|)")  # what arrows and the like send
BAR, GAP = 16, 3  # characters; GAP: between two columns
SHADES = "░▒▓█"  # of a strip, from nothing in the cache to all of it
_OTHER_LINES = 9  # of the screen: what is not a model or a file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of top."""
    parser.add_argument(
        "--interval", metavar="S", type=seconds, default=1.0, help="seconds between (default: 1)"
    )


def run(args: argparse.Namespace, out: Output) -> int:
    """Show until q or Ctrl-C; the terminal is left as it was."""
    from pagecache_bpf.cli.tagging import require_root

    if out.json or not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise UsageError(
            "top needs a terminal",
            "--json is given" if out.json else "its input or its output is none",
            "Run `pagecache-bpf watch` for lines, `pagecache-bpf watch --json` for scripts",
            f"{TROUBLESHOOTING}#top-needs-a-terminal",
        )
    require_root("read the counters")
    screen = Screen(args.interval, size=shutil.get_terminal_size())
    screen.look()
    if screen.trouble:
        raise screen.trouble
    with suppress(KeyboardInterrupt):  # the other way to quit
        _show(screen, out.color)
    return 0


def _show(screen: Screen, color: bool) -> None:
    from rich.console import Console
    from rich.live import Live

    console = Console(
        markup=False, highlight=False, emoji=False, no_color=not color, force_terminal=True
    )
    with _keys() as read_key, Live(console=console, screen=True, auto_refresh=False) as live:
        due = time.monotonic() + screen.interval
        while True:
            live.update(screen.render(console), refresh=True)
            key = read_key(max(0.0, due - time.monotonic()))
            if key is None:
                screen.size = os.terminal_size(console.size)
                screen.look()
                due = time.monotonic() + screen.interval
            elif not screen.press(key):
                return


@contextmanager
def _keys() -> Iterator[Any]:
    """Keys one by one, without echo; gives a function that waits for one and may return None."""
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    try:
        tty.setcbreak(fd)
        mode = termios.tcgetattr(fd)
        mode[6][termios.VSUSP] = b"\0"  # Ctrl-Z would leave the screen behind
        termios.tcsetattr(fd, termios.TCSANOW, mode)

        def read(timeout: float) -> str | None:
            ready, _, _ = select.select([fd], [], [], timeout)
            if not ready:
                return None
            data = os.read(fd, 64)
            # The terminal has gone: nobody looks any more.
            return data.decode(errors="replace") if data else "q"

        yield read
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


@dataclass
class Screen:
    """What is shown: the last two snapshots, and how they are sorted."""

    interval: float
    sort: str = "a"
    reverse: bool = False
    legend: bool = False
    trouble: PagecacheError | None = None
    before: StatsSnapshot | None = None
    now: StatsSnapshot | None = None
    files: bool = True
    size: os.terminal_size = field(default=os.terminal_size((80, 24)))
    strips: list[Strip] = field(default_factory=list)

    def look(self) -> None:
        """Take a new snapshot of the counters and, if files are shown, of what is cached of them.

        What fails is kept for the screen to show, and the last snapshot stays: it may come back.

        Raises:
            PrivilegeError: this user may not look, and waiting does not change that.
        """
        from pagecache_bpf.metrics import collect

        try:
            self.before, self.now = self.now, collect.take()
            self.strips = self._look_at_files() if self.files else []
            self.trouble = None
        except PrivilegeError:
            raise
        except PagecacheError as error:
            self.trouble = error

    def _look_at_files(self) -> list[Strip]:
        """Ask what of the files that there is room for is in the page cache."""
        from pagecache_bpf.metrics import strips
        from pagecache_bpf.policy.engines import Engines

        keys = [row.model.key for row in self.rows()]
        room = self.size.lines - _OTHER_LINES - len(keys)
        if room <= 0 or not keys:
            return []
        with Engines() as engines:
            return strips.of_files(engines, self.strip_width(self.size.columns), keys, room)

    @staticmethod
    def strip_width(columns: int) -> int:
        """Tell how wide the strip of a file can be.

        Args:
            columns: width of the screen in characters.

        Returns:
            Characters that its name, its size and its share leave, at least 8.
        """
        return max(8, columns - name_width(columns) - 21)

    def press(self, keys: str) -> bool:
        """Act on what was typed.

        Args:
            keys: the characters that came, escape sequences (of arrow keys, for one) among them.

        Returns:
            False if one of them was q: the command is to end.
        """
        for key in _SEQUENCE.sub("", keys):
            if key in "qQ":
                return False
            if key in "?":
                self.legend = not self.legend
            elif key == "f":
                self.files = not self.files
                self.strips = []
            elif key == "i":
                self.reverse = not self.reverse
            elif key == "m" or any(column.key == key for column in views.COLUMNS):
                self.sort, self.reverse = key, False
        return True

    def rows(self) -> list[Row]:
        """Put the models into the order that was asked for.

        Returns:
            A row a model; those whose value in the sorted column is not known come last, in either
            direction.  Nothing before the first look().
        """
        if self.now is None:
            return []
        rows = views.rows(self.before, self.now)
        rows.sort(key=lambda row: row.model.key)
        column = next(
            (candidate for candidate in views.COLUMNS if candidate.key == self.sort), None
        )
        if column is None:
            return rows[::-1] if self.reverse else rows
        known = [row for row in rows if column.value(row) is not None]
        known.sort(key=lambda row: column.value(row) or 0.0, reverse=not self.reverse)
        return known + [row for row in rows if column.value(row) is None]

    def render(self, console: Console) -> RenderableType:
        """Lay out the whole screen.

        Args:
            console: gives the size, in characters; nothing is printed to it.

        Returns:
            What rich is to show; rows that do not fit are counted in a line of their own.
        """
        from rich.console import Group
        from rich.text import Text

        parts: list[RenderableType] = [self._head(), ""]
        rows = self.rows()
        room = max(1, console.size.height - 7 - (len(views.COLUMNS) + 2 if self.legend else 0))
        if rows:
            parts.append(self._table(rows[:room], console.size.width))
            if len(rows) > room:
                parts.append(Text(f"and {len(rows) - room:,} more", style="dim"))
        elif not self.trouble:
            parts.append(Text(views.NOTHING))
        room -= len(rows) + 2
        if self.strips and room > 0 and not self.legend:
            parts += ["", self._files(self.strips[:room], console.size.width)]
        if self.legend:
            parts += ["", *(Text(f"{column.title:>8}  {column.help}") for column in views.COLUMNS)]
        keys = "".join(column.key for column in views.COLUMNS)
        parts += [
            "",
            Text(f"q quit   m {' '.join(keys)} sort   i invert   f files   ? meaning", style="dim"),
        ]
        return Group(*parts)

    def _head(self) -> RenderableType:
        from rich.text import Text

        line = Text.assemble(("pagecache-bpf top", "bold"), "  ", no_wrap=True, overflow="ellipsis")
        if self.trouble:
            return line.append(f"{self.trouble.what}: {self.trouble.why}", style="bold red")
        assert self.now is not None
        line.append(time.strftime("%H:%M:%S", time.localtime(self.now.time_ns / 1e9)))
        there = [name for name, is_there in self.now.engines.items() if is_there]
        line.append(f"  engines: {', '.join(there) or 'none'}")
        line.append(f"  {plural(len(self.now.models), 'model')}")
        observer = self.now.observer
        if observer and observer.level != "full":
            line.append(f"  observer {observer.level}", style="yellow")
        if observer and observer.lost_events:
            line.append(f"  {plural(observer.lost_events, 'event')} lost", style="bold red")
        ended = [policy.name for policy in self.now.policies if policy.ended]
        if ended:
            line.append(f"  ended by itself: {', '.join(ended)}", style="bold red")
        return line

    def _table(self, rows: list[Row], width: int) -> Table:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        # What there is room for: title, key, width, rank, how a cell is made.
        extra: list[tuple[str, str, int, float, Any]] = [
            ("policy", "", 12, 8, lambda row: Text(row.model.policy or views.UNKNOWN)),
            ("engine", "", 10, 3.5, lambda row: Text(row.model.engine or views.UNKNOWN)),
            ("residency", "", BAR, 4.5, lambda row: bar(_resident(row))),
        ]
        extra += [
            (column.title, column.key, column.width, column.rank, partial(_cell, column))
            for column in views.COLUMNS
        ]
        name = min(max(len(row.model.model) for row in rows), max(12, width // 4))
        left, shown = width - name, []
        for cell in sorted(extra, key=lambda cell: cell[3]):
            if cell[2] + GAP <= left:
                left -= cell[2] + GAP
                shown.append(cell)
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
        table.add_column(self._title("model", "m"), no_wrap=True, max_width=name + left)
        for cell in extra:
            if cell in shown:
                justify: Any = "right" if cell[1] else "left"
                title = self._title(cell[0], cell[1])
                table.add_column(title, justify=justify, no_wrap=True, min_width=cell[2])
        for row in rows:
            cells = [cell[4](row) for cell in extra if cell in shown]
            table.add_row(Text(row.model.model), *cells)
        return table

    def _files(self, strips: list[Strip], width: int) -> Table:
        """Make the table with one row a file."""
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 1))
        name = name_width(width)
        table.add_column(width=name, no_wrap=True)
        for wide in (10, 5):
            table.add_column(width=wide, justify="right", no_wrap=True)
        table.add_column(no_wrap=True, width=self.strip_width(width))
        for found in strips:
            text = printable(os.path.basename(found.path))
            if len(text) > name:  # numbers of shards are at the end
                text = f"{text[: name // 2 - 1]}…{text[-(name - name // 2) :]}"
            share = found.resident_bytes / found.bytes if found.bytes else 0.0
            table.add_row(
                Text(text),
                Text(format_size(found.bytes), style="dim"),
                Text(f"{min(share, 1.0):.0%}"),
                strip(found),
            )
        return table

    def _title(self, title: str, key: str) -> str:
        return f"{title} {'↑' if self.reverse else '↓'}" if key == self.sort else title


def _resident(row: Row) -> float:
    return min(1.0, row.model.resident_bytes / row.model.bytes) if row.model.bytes else 0.0


def bar(part: float) -> RenderableType:
    """Draw a share as a bar of BAR characters.

    Args:
        part: from 0 to 1; what is outside is clamped.

    Returns:
        The bar.  What is there is never shown as nothing, nor a part as all.
    """
    from rich.text import Text

    part = min(max(part, 0.0), 1.0)
    filled = round(part * BAR)
    if 0 < part < 1:
        filled = min(max(filled, 1), BAR - 1)
    return Text.assemble(("█" * filled, "green"), ("░" * (BAR - filled), "dim"))


def name_width(columns: int) -> int:
    """Tell how much of a line the name of a file may take.

    Args:
        columns: width of the screen in characters.

    Returns:
        Characters: a third of the screen, at most 44.
    """
    return min(44, columns // 3)


def strip(found: Strip) -> Text:
    """Draw what is cached of a file, from its first byte to its last.

    Args:
        found: the file's resident bytes in as many equal parts as the strip has characters.

    Returns:
        One of SHADES for each part; a few pages are never shown as nothing, nor most as all.
    """
    from rich.text import Text

    text = Text(no_wrap=True)
    parts = len(found.resident)
    pages = -(-found.bytes // PAGE_SIZE)
    for at, resident in enumerate(found.resident):
        size = ((at + 1) * pages // parts - at * pages // parts) * PAGE_SIZE
        if resident <= 0:
            level = 0
        elif resident >= size:
            level = 3
        else:
            level = 1 if resident * 2 < size else 2
        text.append(SHADES[level], style="green" if level else "dim")
    return text


def _cell(column: views.Column, row: Row) -> RenderableType:
    from rich.text import Text

    text = column.text(row)
    stalled = column.key == "s" and (column.value(row) or 0.0) > 0.1
    return Text(text, style="yellow" if stalled else "")
