# SPDX-License-Identifier: Apache-2.0
"""Every command that documents and messages show is one that the parser takes.

And what the documents quote is what the code says.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import io
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from pagecache_bpf.cli.parser import build_parser, find_verbs
from pagecache_bpf.errors import UsageError
from tests.unit.command import ROOT

DOCUMENTS = sorted([*(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md"), ROOT / "examples/README.md"])
_END = re.compile(r"\s(\||>|>>|&&|;|#|&|2>)(\s|/|$)|\s#")
_TOO_FEW = ("required", "nothing to", "expected")


def shown(text: str) -> Iterator[tuple[str, bool]]:
    """Each command line of a document, and whether it stands in a block and so is complete."""
    for line in text.replace("\\\n", " ").splitlines():
        found = re.match(r"\s*(?:\$ |# )?(?:sudo )?(pagecache-bpf (?!template 1$).*)$", line)
        if found and re.match(r"\s{4}|\s*\$ |sudo |pagecache-bpf [a-z]+ [-./~\w]", line):
            yield found[1], line.startswith("    ")
    # "pagecache-bpf template 1" is the first line of a file format.
    for code in re.findall(r"`(?:sudo )?(pagecache-bpf (?!template 1`)[^`]*)`", text):
        yield " ".join(code.split()), False


def commands() -> list[tuple[str, str, bool]]:
    """Every command line of all documents with the name of its document."""
    return [
        (path.name, line, complete)
        for path in DOCUMENTS
        if path.exists() and path.name != "CHANGELOG.md"
        for line, complete in shown(path.read_text(encoding="utf-8"))
    ]


def words_of(line: str) -> list[str]:
    """The words of a command line without what the shell does with it, and without brackets."""
    line = re.sub(r"\bSIZE\b", "1GiB", _END.split(f"{line} ")[0])
    return shlex.split(re.sub(r"[\[\]…]|\.\.\.", "", line))[1:]


def prose(text: str) -> str:
    """A document without its blocks."""
    return re.sub(r"^ {4}.*$", "", re.sub(r"```.*?```", "", text, flags=re.S), flags=re.M)


def mentions() -> Iterator[tuple[str, str, bool]]:
    """Every command in a document's text that stands there without the program's name."""
    for path in DOCUMENTS:
        if path.name == "CHANGELOG.md":
            continue
        for code in re.findall(r"`([^`]+)`", prose(path.read_text(encoding="utf-8"))):
            code = " ".join(code.split())
            first, _, rest = code.partition(" ")
            if first in find_verbs() and rest:
                yield path.name, f"pagecache-bpf {code}", False


@functools.cache
def texts() -> list[tuple[str, str]]:
    """Every text of the code, docstrings too, with its file; what is computed in it is a NUL."""
    found = []
    for path in sorted((ROOT / "pagecache_bpf").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append((path.name, node.value))
            elif isinstance(node, ast.JoinedStr):
                parts = (
                    part.value if isinstance(part, ast.Constant) else "\0" for part in node.values
                )
                found.append((path.name, "".join(map(str, parts))))
    return found


def named_by_messages() -> Iterator[tuple[str, str, bool]]:
    """Every command line that a text of the code tells people to type."""
    for name, text in texts():
        for pattern in (r"`(pagecache-bpf [^`]+)`", r"\((pagecache-bpf [^()]+)\)"):
            for code in re.findall(pattern, text):
                yield name, " ".join(code.replace("\0", "1").split()), False


@pytest.mark.parametrize(
    ("document", "line", "complete"), [*commands(), *sorted({*mentions(), *named_by_messages()})]
)
def test_commands_of_the_documents_are_taken(document: str, line: str, complete: bool) -> None:
    words = words_of(line)
    if not words or words[0] == "--version":
        return
    assert words[0].startswith("-") or words[0] in find_verbs(), f"{document}: {line}"
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            build_parser().parse_args(words)
        except SystemExit as end:  # --help
            assert end.code == 0, f"{document}: {line}"
        except UsageError as error:
            # A mention of a command leaves its arguments out; a block shows what to type.
            few = any(word in error.what for word in _TOO_FEW)
            assert few and not complete, f"{document}: {line}: {error.what}"


def test_there_are_commands_in_the_documents() -> None:
    assert len(commands()) > 60
    assert len({words_of(line)[0] for _, line, _ in commands() if words_of(line)}) > 15


#: Quoted, but not from the program.
_NO_MESSAGES = {"how long until this model serves"}


def says(quote: str) -> bool:
    """Whether the code says so: as it stands, or with values in the place of what is computed."""
    for _, text in texts():
        text = " ".join(text.split())
        if quote in text:
            return True
        fixed = [re.escape(part) for part in text.split("\0")]
        if len(fixed) > 1 and max(map(len, fixed)) > 8 and re.search(".+".join(fixed), quote):
            return True
    return False


def test_what_the_documents_quote_is_what_the_code_says() -> None:
    """Words in straight quotation marks are a message, a part of one, or the document's own."""
    found = {
        (path.name, " ".join(quote.split()).rstrip(".,"))
        for path in DOCUMENTS
        if path.name != "CHANGELOG.md"
        for quote in re.findall(
            r'"([^"]{12,160})"', re.sub(r"`[^`]*`", "", prose(path.read_text(encoding="utf-8")))
        )
    }
    assert len(found) > 3
    own = {path.name: " ".join(path.read_text(encoding="utf-8").split()) for path in DOCUMENTS}
    wrong = {
        (name, quote)
        for name, quote in found
        if quote not in own[name].replace(f'"{quote}"', "") and not says(quote)
    }
    assert {quote for _, quote in wrong} <= _NO_MESSAGES, wrong


def test_commands_that_need_root_are_named() -> None:
    """docs/troubleshooting.md says which; the code asks for root where it says so."""
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    section = " ".join(text.partition("## only root can")[2].partition("\n## ")[0].split())
    needing, _, free = section.partition("need root")
    for name, verb in find_verbs().items():
        assert verb.__file__ is not None
        asks = "require_root(" in Path(verb.__file__).read_text(encoding="utf-8")
        named = f"`{name}`" in needing
        assert named or not asks, f"{name} needs root, and the section does not say so"
        assert not (asks and f"`{name}`" in free), name
