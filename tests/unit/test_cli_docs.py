# SPDX-License-Identifier: Apache-2.0
"""The manual pages, the completion scripts and the troubleshooting page fit the code."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pagecache_bpf.cli import parser
from pagecache_bpf.cli.verbs import completion
from pagecache_bpf.errors import UnsupportedError
from tests.unit.command import ROOT, environment, run
from tools import generate_docs, man_pages

TROUBLESHOOTING = ROOT / "docs" / "troubleshooting.md"
SOURCES = sorted((ROOT / "pagecache_bpf").rglob("*.py"))


def anchor(heading: str) -> str:
    """The anchor that Markdown makes of a heading."""
    return re.sub(r"[^a-z0-9_ -]", "", heading.lower()).replace(" ", "-")


def headings() -> list[str]:
    return re.findall(r"^## (.+)$", TROUBLESHOOTING.read_text(), re.M)


def references() -> set[str]:
    """Every anchor of the page that an error names."""
    found = set()
    for path in SOURCES:
        text = path.read_text()
        found.update(
            re.findall(
                r"(?:docs/troubleshooting\.md|\{_DOCS\}|\{TROUBLESHOOTING\})#([a-z0-9_-]+)", text
            )
        )
    return found


def test_errors_lead_to_sections_that_exist() -> None:
    assert len(references()) > 20
    assert references() - {anchor(heading) for heading in headings()} == set()


def test_sections_are_called_as_the_messages_read() -> None:
    # the module's reasons reach people through exit records
    module = sorted((ROOT / "kmod").glob("*.c"))
    messages = "\n".join(path.read_text() for path in [*SOURCES, *module])
    # what is computed or formatted in a message
    messages = messages.replace("{NAME}", "pagecache_bpf").replace("{wanted}", "1.4")
    messages = messages.replace("{MAX_ENTRIES:,}", "100000")
    assert [heading for heading in headings() if heading not in messages] == []


def test_sections_are_there_once() -> None:
    anchors = [anchor(heading) for heading in headings()]
    assert len(anchors) == len(set(anchors))


def test_the_module_that_is_refused_has_its_section() -> None:
    from pagecache_bpf.kernel import kmod

    for what in ("loaded", "unloaded"):
        error = kmod._privilege_or(1, f"module pagecache_bpf cannot be {what}")
        assert error.docs.partition("#")[2] in {anchor(heading) for heading in headings()}


def test_the_generated_pages_are_fresh() -> None:
    assert generate_docs.main(["--check"]) == 0


def test_stale_manual_pages_are_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(generate_docs, "MAN", tmp_path / "man")
    assert generate_docs.main(["--check"]) == 1
    assert "--write" in capsys.readouterr().err
    assert generate_docs.main(["--write"]) == 0
    assert generate_docs.main(["--check"]) == 0
    page = tmp_path / "man" / "pagecache-bpf-attach.1"
    page.write_text(page.read_text().replace("policy", "policeman"))
    assert generate_docs.main(["--check"]) == 1
    assert generate_docs.main(["--write"]) == 0
    gone = tmp_path / "man" / "pagecache-bpf-nothing.1"
    gone.write_text("a command that there is no more")
    assert generate_docs.main(["--check"]) == 1
    assert generate_docs.main(["--write"]) == 0
    assert not gone.exists()


def test_manual_pages_do_not_depend_on_the_terminal() -> None:
    command = [sys.executable, "-m", "tools.generate_docs", "--man", "attach"]
    pages = {
        subprocess.run(
            command, env=environment(COLUMNS=columns), capture_output=True, check=True, cwd=ROOT
        ).stdout
        for columns in ("20", "200")
    }
    assert pages == {man_pages.manual_pages()["pagecache-bpf-attach.1"].encode()}


def test_each_command_has_a_manual_page_with_its_options() -> None:
    pages = {name: page.replace("\\-", "-") for name, page in man_pages.manual_pages().items()}
    verbs = parser.find_verbs()
    assert set(pages) == {"pagecache-bpf.1", *(f"pagecache-bpf-{name}.1" for name in verbs)}
    common = pages["pagecache-bpf.1"]
    for name, command in man_pages._commands(parser.build_parser()):
        verb, _, inner = name.partition(" ")
        page = pages[f"pagecache-bpf-{verb}.1"]
        assert f".SS {name}\n" in page if inner else f".BR pagecache-bpf-{verb} (1)\n" in common
        for action in command._actions:
            assert all(option in common + page for option in action.option_strings)
    for name, module in verbs.items():
        page = pages[f"pagecache-bpf-{name}.1"]
        assert module.EXAMPLES and all(line in page for line, _ in module.EXAMPLES)
        for keys in module.JSON.values():
            assert all(f"\\fB{key}\\fR" in page for key in keys)


@pytest.mark.skipif(shutil.which("groff") is None, reason="groff is not installed")
def test_the_manual_pages_are_good_roff() -> None:
    pages = sorted(generate_docs.MAN.glob("*.1"))
    done = subprocess.run(
        ["groff", "-man", "-Tutf8", "-ww", "-z", *pages], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(shutil.which("lexgrog") is None, reason="lexgrog is not installed")
def test_apropos_finds_the_manual_pages() -> None:
    """man-db takes name and purpose from the section NAME."""
    pages = sorted(generate_docs.MAN.glob("*.1"))
    done = subprocess.run(["lexgrog", *pages], capture_output=True, text=True, check=True)
    found = dict(re.findall(r'^(.+): "(.+?) - .+"$', done.stdout, re.M))
    assert found == {str(page): page.stem for page in pages}


@pytest.mark.skipif(shutil.which("mandoc") is None, reason="mandoc is not installed")
def test_mandoc_finds_no_error() -> None:
    pages = sorted(generate_docs.MAN.glob("*.1"))
    done = subprocess.run(["mandoc", "-Tlint", "-Werror", *pages], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.fixture
def installed(tmp_path: Path) -> str:
    """A PATH that has pagecache-bpf on it."""
    script = tmp_path / "pagecache-bpf"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -m pagecache_bpf "$@"\n')
    script.chmod(0o755)
    return f"{tmp_path}:/usr/bin:/bin"


def bash_offers(path: str, *words: str) -> set[str]:
    """What bash offers for the last of the words."""
    script = completion.script("bash") + (
        '\nCOMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}\n'
        "function=$(complete -p pagecache-bpf | sed 's/.*-F \\([^ ]*\\).*/\\1/')\n"
        '"$function" "$1" "${@: -1}" "${@: -2:1}"\n'
        'printf "%s\\n" "${COMPREPLY[@]}"\n'
    )
    done = subprocess.run(
        ["bash", "-c", script, "bash", "pagecache-bpf", *words],
        env=environment(PATH=path),
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
    )
    return set(done.stdout.split())


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_bash_completes(installed: str) -> None:
    assert {"attach", "detach", "status", "doctor"} <= bash_offers(installed, "")
    assert bash_offers(installed, "statu") == {"status"}
    assert bash_offers(installed, "policy", "") >= {"list", "show"}
    assert "sequential" in bash_offers(installed, "attach", "seq")
    assert "--knob" in bash_offers(installed, "attach", "--k")
    assert "pyproject.toml" in bash_offers(installed, "attach", "sequential", "pypro")


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_completion_scripts_are_made_and_parse(shell: str, tmp_path: Path) -> None:
    text = run("completion", shell).out
    assert "pagecache-bpf policy list --names" in text
    if shutil.which(shell):
        script = tmp_path / f"script.{shell}"
        script.write_text(text)
        subprocess.run([shell, "-n", str(script)], check=True)


def test_completion_without_shtab(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    with pytest.raises(UnsupportedError, match="shtab is not installed"):
        completion.script("bash")
