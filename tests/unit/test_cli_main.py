# SPDX-License-Identifier: Apache-2.0
"""How a command ends, what it prints where, and that --json is what the manual page says."""

from __future__ import annotations

import argparse
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

import pagecache_bpf
from pagecache_bpf.cli import interrupts, output
from pagecache_bpf.cli.main import main
from pagecache_bpf.cli.output import Output, add_note
from pagecache_bpf.cli.parser import build_parser, find_verbs
from pagecache_bpf.errors import PagecacheError, UsageError
from tests.unit.command import COMMAND, ROOT, environment, key_paths, run, undocumented

ESCAPE = "\033["


def on_a_terminal(*words: str, columns: int = 80, **env: str) -> str:
    """What a command prints to a terminal of that width."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, *words],
        cwd=ROOT,
        env=environment(COLUMNS=str(columns), TERM="xterm-256color", **env),
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    pieces = []
    while True:
        try:
            piece = os.read(ours, 1 << 16)
        except OSError:  # how a terminal says that its last writer is gone
            break
        if not piece:
            break
        pieces.append(piece)
    os.close(ours)
    process.wait(timeout=60)
    return b"".join(pieces).decode()


def test_version() -> None:
    assert run("--version").out == f"pagecache-bpf {pagecache_bpf.__version__}\n"


@pytest.mark.parametrize("name", sorted(find_verbs()))
def test_every_command_explains_itself(name: str) -> None:
    result = run(name, "--help")
    assert (result.code, result.err) == (0, "")
    assert f"usage: pagecache-bpf {name}" in result.out
    assert "examples:" in result.out
    assert f"    {name}" in run("--help").out


def test_examples_can_be_parsed() -> None:
    parser = build_parser()
    for name, verb in find_verbs().items():
        for line, _ in verb.EXAMPLES:
            words = re.sub(r"^source <\(|\)$|^sudo |^[A-Z_]+=\S+ | >.*$", "", line).split()
            assert words[:2] == ["pagecache-bpf", name]
            assert parser.parse_args(words[1:]).run is verb.run


def test_a_command_imports_no_other_command_and_no_numpy() -> None:
    """Each import is felt at every call: numpy's takes longer than all else that these do."""
    program = (
        "import sys; from pagecache_bpf.cli.main import main; main(sys.argv[1:]); "
        "print(*sys.modules, file=sys.stderr)"
    )
    verbs = "pagecache_bpf.cli.verbs."
    for command in ("status", "tags"):
        words = [sys.executable, "-c", program, "--json", command]
        loaded = subprocess.run(words, capture_output=True, text=True, check=True).stderr.split()
        assert verbs + command in loaded and verbs + "export" not in loaded
        assert "numpy" not in loaded and "elftools" not in loaded


@pytest.mark.parametrize("words", [("--json", "policy", "list"), ("policy", "list", "--json")])
def test_options_may_stand_before_and_after_the_command(words: tuple[str, ...]) -> None:
    assert run(*words).data["policies"]


def test_options_may_stand_between_the_words_of_a_command() -> None:
    words = ["attach", "p", "one", "--knob", "a=1", "two", "--model", "m", "three"]
    words += ["--knob", "b=2", "-v"]
    args = build_parser().parse_args(words)
    assert (args.policy, args.paths) == ("p", ["one", "two", "three"])
    assert (args.knob, args.model, args.verbose) == ([("a", "1"), ("b", "2")], "m", True)
    args = build_parser().parse_args(["attach", "p", "--knob", "a=1", "one"])
    assert (args.policy, args.paths) == ("p", ["one"])
    args = build_parser().parse_args(["template", "export", "t", "-o", "trace", "here"])
    assert (str(args.template), args.path, str(args.output)) == ("t", "here", "trace")
    assert build_parser().parse_args(["template", "export", "t", "-o", "trace"]).path == "."


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (("policy", "list"), "policy list"),
        (("policy", "show", "pin"), "policy show"),
        (("doctor",), "doctor"),
        (("completion", "bash"), "completion"),
    ],
)
def test_json_is_what_the_manual_says(words: tuple[str, ...], command: str) -> None:
    documented = find_verbs()[words[0]].JSON[command]
    data = run(*words, "--json").data
    assert undocumented(data, documented) == set()
    # and nothing is documented that is not there; an empty list stands for what it would hold
    there = set(key_paths(data))
    assert {key for key in documented if not {key, key.removesuffix("[]")} & there} == set()


def test_json_keys_are_documented_for_every_command() -> None:
    for name, verb in find_verbs().items():
        assert all(command.split()[0] == name for command in verb.JSON)
        assert all(text for keys in verb.JSON.values() for text in keys.values())


def test_undocumented_keys_would_be_seen() -> None:
    """The check above can fail."""
    assert undocumented({"a": [{"b": 1}], "c": {"d": 2}}, {"a[].b": "x"}) == {"c.d"}
    assert undocumented({"a": [], "c": {"d": 2}}, {"a[].b": "x", "c.*": "y"}) == set()


def test_tables_in_a_pipe_are_plain_and_narrow() -> None:
    for words in (("doctor",), ("policy", "list"), ("policy", "show", "sequential")):
        out = run(*words).out
        assert ESCAPE not in out
        lines = out.splitlines()
        assert max(map(len, lines)) < 100
        assert not [line for line in lines if line != line.rstrip()]


@pytest.mark.parametrize("columns", [80, 120])
def test_tables_on_a_terminal_fit_it(columns: int) -> None:
    out = on_a_terminal("doctor", columns=columns)
    assert ESCAPE in out
    plain = re.sub(r"\033\[[0-9;]*m", "", out).replace("\r", "")
    assert max(map(len, plain.splitlines())) <= columns


def test_colors_can_be_switched_off() -> None:
    assert ESCAPE in on_a_terminal("policy", "list")
    assert ESCAPE not in on_a_terminal("policy", "list", "--no-color")
    assert ESCAPE not in on_a_terminal("policy", "list", NO_COLOR="1")
    assert ESCAPE in on_a_terminal("attach", "nothing")
    assert ESCAPE not in on_a_terminal("attach", "nothing", "--no-color")


def test_names_only_for_scripts() -> None:
    names = run("policy", "list", "--names").out.split()
    assert names == [policy["name"] for policy in run("policy", "list", "--json").data["policies"]]


def test_a_reader_that_goes_away_is_no_error() -> None:
    process = subprocess.Popen(
        [*COMMAND, "policy", "list"],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout and process.stderr
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert (process.wait(timeout=60), err) == (141, b"")


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
def test_signals_end_it_quietly(tmp_path: Path, number: int, code: int, said: str) -> None:
    """The command waits for a compiler that never ends."""
    started = tmp_path / "started"
    compiler = tmp_path / "clang"
    compiler.write_text(f"#!/bin/sh\ntouch {started}\nexec sleep 60\n")
    compiler.chmod(0o755)
    source = tmp_path / "mine.bpf.c"
    source.touch()
    process = subprocess.Popen(
        [*COMMAND, "policy", "show", source],
        cwd=ROOT,
        env=environment(CLANG=str(compiler)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not started.exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (code, "", f"pagecache-bpf: error: {said}\n")


def fake_verb(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Add a command `fake` that raises."""

    def fail(args: argparse.Namespace, out: Output) -> int:
        raise error

    from pagecache_bpf.cli import parser as parser_module

    verb = ModuleType("fake")
    verb.HELP, verb.DESCRIPTION, verb.EXAMPLES = "fail", "", ()  # type: ignore[attr-defined]
    verb.GROUP = parser_module.Group.OPERATE  # type: ignore[attr-defined]
    verb.add_arguments, verb.run = lambda parser: None, fail  # type: ignore[attr-defined]
    monkeypatch.setattr(parser_module, "find_verbs", lambda *_: {"fake": verb})
    monkeypatch.setattr(signal, "signal", lambda *_: None)


def test_a_bug_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_verb(monkeypatch, ValueError("it broke"))
    assert main(["fake"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("pagecache-bpf: error: unexpected ValueError: it broke\n")
    assert "run again with -v" in err and "Traceback" not in err
    assert main(["fake", "-v"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_notes_are_printed_with_their_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = PagecacheError("it failed", "because", "Do this")
    add_note(error, "rolled back: all of it")
    add_note(error, "another")
    fake_verb(monkeypatch, error)
    assert main(["fake"]) == 1
    assert capsys.readouterr().err == (
        "pagecache-bpf: error: it failed: because\n"
        "  note: rolled back: all of it\n"
        "  note: another\n"
        "  fix:  Do this\n"
    )
    assert main(["fake", "--json"]) == 1
    assert '"notes": ["rolled back: all of it", "another"]' in capsys.readouterr().err


def test_an_interrupt_tells_what_was_undone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = KeyboardInterrupt()
    add_note(error, "rolled back: all of it")
    fake_verb(monkeypatch, error)
    assert main(["fake"]) == 130
    assert capsys.readouterr().err == (
        "pagecache-bpf: error: interrupted\n  note: rolled back: all of it\n"
    )


def test_verbose_shows_where_an_error_comes_from(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_verb(monkeypatch, UsageError("wrong"))
    assert main(["fake"]) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert main(["fake", "--verbose"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_verbose_tells_what_the_kernel_was_asked() -> None:
    assert "pagecache_bpf.kernel.kernelfs: read " in run("doctor", "-v").err
    assert run("doctor").err == ""


def test_the_command_starts_without_what_it_does_not_need() -> None:
    """Help must not pay for tables, ELF files or the kernel."""
    code = (
        "import sys; from pagecache_bpf.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'rich', 'elftools', 'shtab'}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, cwd=ROOT
    )
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_a_long_table_is_laid_out_as_a_short_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    columns = [("file", "path"), ("policy", "text"), ("size", "number")]
    rows = [[f"/m/\N{CJK UNIFIED IDEOGRAPH-6A21}{n}\x1b", "p" * n, str(n)] for n in range(12)]
    shown = []
    for long_rows in (500, 3):
        monkeypatch.setattr(output, "LONG_ROWS", long_rows)
        output.Output().emit({}, lambda console: console.print(output.table(columns, rows)))
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] and len(shown[0].splitlines()) == 14


CALLED_BACK = """
import os, signal, time
from pagecache_bpf.cli import interrupts
from pagecache_bpf.kernel import libbpf
interrupts.install()
COMPARE = libbpf.ctypes.CFUNCTYPE(libbpf.ctypes.c_int, libbpf.ctypes.c_void_p,
                                  libbpf.ctypes.c_void_p)
calls = []
def _called_back(one, other):
    calls.append(1)
    if len(calls) == 1:
        os.kill(os.getpid(), signal.SIGNUMBER)
    return 0
try:
    libbpf.ctypes.CDLL(None).qsort(b"dcba", 4, 1, COMPARE(_called_back))
    print("sorted", len(calls) > 1, flush=True)
    while True:
        time.sleep(60)
except BaseException as error:
    print(type(error).__name__)
"""


@pytest.mark.parametrize(
    ("number", "raised"), [("INT", "KeyboardInterrupt"), ("TERM", "Terminated")]
)
def test_a_signal_while_libbpf_calls_back_is_not_lost(number: str, raised: str) -> None:
    """What is raised there goes nowhere: it is raised when the library has returned."""
    done = subprocess.run(
        [sys.executable, "-c", CALLED_BACK.replace("NUMBER", number)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(),
        timeout=60,
    )
    assert (done.stdout, done.stderr) == (f"sorted True\n{raised}\n", "")


AT_THE_VERY_END = """
import os, signal, sys
from pagecache_bpf import __main__ as start
from pagecache_bpf.cli import interrupts, main

class Late:
    # Python takes the modules apart after it has given signals back their default actions.
    def __del__(self, kill=os.kill, own=os.getpid()):
        for number in (2, 15, 1):
            kill(own, number)

def run():
    interrupts.install()
    WHEN
    return 130

main.main = run
sys.late = Late()
sys.exit(start.main())
"""


@pytest.mark.parametrize(
    "when",
    [
        "try: os.kill(os.getpid(), signal.SIGINT)\n    except KeyboardInterrupt: pass",
        "interrupts.ignore()",
    ],
    ids=["one has arrived", "all is done"],
)
def test_a_signal_while_python_ends_does_not_change_the_status(when: str) -> None:
    script = AT_THE_VERY_END.replace("WHEN", when)
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, timeout=30)
    assert (done.returncode, done.stderr) == (130, b"")


def test_the_functions_that_libbpf_calls_are_known_by_their_name() -> None:
    """cli.interrupts looks for it: a callback of another name would lose a signal."""
    for path in (ROOT / "pagecache_bpf").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for function in re.findall(r"\b(?:SAMPLE|PRINT)_FUNCTION\((\S+?)\)", text):
            assert function.endswith("_called_back") or function.startswith("ctypes."), path
    assert interrupts._CALLED_BACK == "_called_back"
