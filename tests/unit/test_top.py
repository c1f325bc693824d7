# SPDX-License-Identifier: Apache-2.0
"""The live view, in a terminal of its own."""

from __future__ import annotations

import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from fcntl import ioctl

import pytest
from rich.console import Console

from pagecache_bpf.cli.verbs import top
from pagecache_bpf.cli.views import COLUMNS
from pagecache_bpf.errors import PagecacheError
from pagecache_bpf.metrics.strips import Strip
from tests.unit.command import ROOT, environment, run
from tests.unit.snapshots import GGUF, LLAMA, snapshot
from tests.unit.test_stats import root_only

ALTERNATE, MAIN = "\x1b[?1049h", "\x1b[?1049l"
HIDDEN, SHOWN = "\x1b[?25l", "\x1b[?25h"


class Terminal:
    """A terminal with a command in it."""

    def __init__(
        self,
        *words: str,
        size: tuple[int, int] = (24, 140),
        command: Sequence[str] = (sys.executable, "-m", "tests.unit.snapshots"),
    ) -> None:
        self.master, self.slave = pty.openpty()
        ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("4H", *size, 0, 0))
        self.mode = termios.tcgetattr(self.slave)
        self.text = ""
        self.process = subprocess.Popen(
            [*command, "top", "--interval", "0.1", *words],
            stdin=self.slave,
            stdout=self.slave,
            stderr=self.slave,
            env=environment(TERM="xterm-256color"),
            cwd=ROOT,
            start_new_session=True,
        )
        os.set_blocking(self.master, False)

    def wait(self, condition: Callable[[str], object], what: str) -> None:
        """Read until what was printed since the last wait() fulfils the condition."""
        deadline = time.monotonic() + 30
        text = ""
        while not condition(text):
            assert time.monotonic() < deadline, f"not within 30 s: {what}; there is {text[-300:]!r}"
            try:
                text += os.read(self.master, 1 << 16).decode(errors="replace")
            except BlockingIOError:
                time.sleep(0.01)
        self.text += text

    def press(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def end(self) -> int:
        """Wait for the command's end, reading what it prints."""
        self.wait(lambda _: self.process.poll() is not None, "the end of top")
        with suppress(BlockingIOError):
            self.text += os.read(self.master, 1 << 16).decode(errors="replace")
        return int(self.process.returncode)

    def close(self) -> None:
        """End the command if need be."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.master)
        os.close(self.slave)

    def assert_restored(self) -> None:
        assert self.text.rindex(MAIN) > self.text.rindex(ALTERNATE)
        assert self.text.rindex(SHOWN) > self.text.rindex(HIDDEN)
        assert termios.tcgetattr(self.slave) == self.mode


@contextmanager
def terminal(*words: str, size: tuple[int, int] = (24, 140)) -> Iterator[Terminal]:
    made = Terminal(*words, size=size)
    try:
        yield made
    finally:
        made.close()


@root_only
def test_keys() -> None:
    with terminal() as top:
        top.wait(lambda text: "accessed ↓" in text and "meta-llama" in text, "the first screen")
        top.press("s")
        top.wait(lambda text: "stall ↓" in text, "sorting by stalls")
        top.press("i")
        top.wait(lambda text: "stall ↑" in text, "the order turned around")
        top.press("?")
        top.wait(lambda text: "Size of the model" in text, "the legend")
        top.press("\x1b[A")  # an arrow: means nothing
        top.press("\x1a")  # Ctrl-Z: neither
        top.press("m")
        top.wait(lambda text: "model ↓" in text, "sorting by name")
        top.press("q")
        assert top.end() == 0
        top.assert_restored()


@root_only
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 143)], ids=["ctrl-c", "term"]
)
def test_signals_leave_the_terminal_as_it_was(number: int, code: int) -> None:
    with terminal() as top:
        top.wait(lambda text: "meta-llama" in text, "the first screen")
        top.process.send_signal(number)
        assert top.end() == code
        top.assert_restored()
        assert "Traceback" not in top.text


@root_only
def test_without_colors() -> None:
    with terminal("--no-color") as top:
        top.wait(lambda text: "meta-llama" in text, "the first screen")
        top.press("q")
        assert top.end() == 0
        assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", top.text)


@pytest.mark.parametrize("words", [[], ["--json"]])
def test_without_a_terminal_it_says_what_to_do(words: list[str]) -> None:
    failed = run("top", *words)
    assert failed.code == 2 and failed.out == ""
    assert "top needs a terminal" in failed.err and "pagecache-bpf watch" in failed.err


# --- what is on the screen ---


def screen(width: int, height: int = 30, **changes: object) -> list[str]:
    """The lines of a screen of that size."""
    made = top.Screen(1.0, before=snapshot(), now=snapshot(2000, after_ns=10**9))
    for name, value in changes.items():
        setattr(made, name, value)
    console = Console(width=width, height=height, markup=False, color_system=None)
    with console.capture() as captured:
        console.print(made.render(console))
    return captured.get().splitlines()


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120, 160, 250])
def test_columns_that_fit_are_whole(width: int) -> None:
    lines = screen(width)
    assert all(len(line) <= width for line in lines)
    row = next(line for line in lines if line.startswith("meta-"))
    assert "100.0 MiB" in row
    assert ("sequential" in row) == (width > 160)
    assert ("MB/s" in row) == (width >= 60)
    assert not re.search(r"\d…", row)


def test_all_columns_are_there_when_there_is_room() -> None:
    titles = next(line for line in screen(200) if line.startswith("model"))
    assert all(column.title in titles for column in COLUMNS)
    assert "residency" in titles and "policy" in titles


def test_more_models_than_lines() -> None:
    lines = screen(100, height=9)
    assert any("and 1 more" in line for line in lines)
    assert len(lines) <= 9


@pytest.mark.parametrize(
    ("key", "first"), [("m", "cold"), ("c", "meta"), ("h", "meta"), ("z", "meta")]
)
def test_sorting(key: str, first: str) -> None:
    made = top.Screen(1.0, now=snapshot())
    assert made.press(key)
    assert made.rows()[0].model.model.startswith(first)


def test_what_is_not_known_comes_last_either_way() -> None:
    made = top.Screen(1.0, before=snapshot(), now=snapshot(2000, after_ns=10**9), sort="a")
    assert [row.model.model for row in made.rows()] == [LLAMA, "cold", GGUF]
    made.press("i")
    assert [row.model.model for row in made.rows()] == ["cold", LLAMA, GGUF]
    assert not made.press("xq")


def test_trouble_is_shown_and_goes_away() -> None:
    trouble = PagecacheError("the agent does not answer", "it hung up")
    assert "the agent does not answer: it hung up" in screen(100, trouble=trouble)[0]
    head = screen(150)[0]
    assert "5 events lost" in head and "ended by itself: quitter" in head


KEY = (LLAMA, "sequential", "agent")


@pytest.mark.parametrize("width", [40, 80, 200])
def test_files_have_strips(width: int) -> None:
    """Names of shards keep their numbers; what names may do to a terminal they do not do."""
    parts = top.Screen.strip_width(width)
    size = 4096 * parts
    half = tuple(4096 if part < parts // 2 else 0 for part in range(parts))
    found = [
        Strip(KEY, f"/m/a-long-name-of-a-model-{number:05}-of-00300.safetensors", size, half)
        for number in range(300)
    ]
    found[1] = Strip(KEY, "/m/\x1b[31mred", size, (0,) * parts)
    lines = screen(width, height=30, strips=found)
    assert len(lines) <= 30 and all(len(line) <= width for line in lines)
    shown = [line for line in lines if line.endswith(("█", "░"))]
    assert len(shown) > 10 and not any("\x1b" in line for line in shown)
    assert shown[0].endswith("█" * (parts // 2) + "░" * (parts - parts // 2))
    assert f" {parts // 2 / parts:.0%} " in shown[0] and "tensors" in shown[0]
    assert shown[1].endswith("░" * parts)
    without = top.Screen(1.0, strips=found)
    without.press("f")
    assert not without.strips and not without.files


def test_strips_are_honest() -> None:
    pages = 4096
    found = Strip(KEY, "/m/x", 6 * pages, (0, 1, pages - 1, pages, 2 * pages - 1))
    assert str(top.strip(found)) == "░▒▓█▓"
    assert str(top.strip(Strip(KEY, "/m/x", 1, (pages,)))) == "█"
    assert str(top.strip(Strip(KEY, "/m/empty", 0, ()))) == ""


def test_bars_are_honest() -> None:
    shown = {part: str(top.bar(part)).count("█") for part in (0.0, 1e-9, 0.5, 1 - 1e-9, 1.0, 1.5)}
    assert list(shown.values()) == [0, 1, 8, 15, 16, 16]
