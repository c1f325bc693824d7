# SPDX-License-Identifier: Apache-2.0
"""The controller's configuration: every mistake has its line, and the shipped example none."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagecache_bpf.cli.verbs import config as verb
from pagecache_bpf.controller import config
from pagecache_bpf.controller.config import Config, parse
from pagecache_bpf.controller.model_tagger import knobs_for
from pagecache_bpf.controller.resolved_config import ResolvedConfig
from pagecache_bpf.errors import PagecacheError, UsageError
from pagecache_bpf.kernel.file_key import key_of
from tests.unit.command import ROOT, run, undocumented

SOURCE = Path("config.toml")
EXAMPLE = ROOT / "packaging" / "config.toml"
FULL = """\
total_budget = "120GiB"
admission = "queue"
persist = true

[socket]
listen = "/run/other/control.sock"
mode = "0666"
group = "inference"

[loads]
policies = ["sequential"]
engine = "agent"

[[model]]
path = "/models/a"
name = "a"
policy = "sequential"
budget = "16GiB"
keep = true
knobs = { max_window_mib = 32 }

[[model]]
path = "/models/b"
"""


def lines_of(text: str) -> list[str]:
    """What is wrong with a text, mistake by mistake."""
    with pytest.raises(UsageError) as caught:
        parse(text.encode(), SOURCE)
    assert caught.value.what == "config.toml is not a configuration"
    return caught.value.why.split("; ")


def test_everything_is_read() -> None:
    found = parse(FULL.encode(), SOURCE)
    assert (found.total_budget, found.admission, found.persist) == (120 << 30, "queue", True)
    assert (found.listen, found.mode, found.group) == (
        "/run/other/control.sock",
        0o666,
        "inference",
    )
    assert (found.policies, found.engine) == (("sequential",), "agent")
    first, second = found.models
    assert (first.name, first.budget, first.keep) == ("a", 16 << 30, True)
    assert first.knobs == {"max_window_mib": 32}
    assert (second.path, second.policy, second.budget) == ("/models/b", None, None)


def test_nothing_is_the_defaults() -> None:
    assert parse(b"", SOURCE) == Config(source=SOURCE)


def test_defaults_are_those_of_the_keys() -> None:
    for key in config.KEYS:
        if key.table != "model":
            assert getattr(Config(), key.name) == key.default, key.label


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a = \n", "line 1: it is not TOML"),
        ("persist = true\n\n[socket\n", "line 3: it is not TOML"),
        ("persist = true\npersist = true\n", "line 2: it is not TOML"),
        ("\n\nbudget = 1\n", "line 3: budget: there is no such setting"),
        ("\npersist = 1\n", "line 2: persist: it has to be true or false"),
        ("total_budget = 'much'\n", "line 1: total_budget: 'much' is not a size"),
        ("total_budget = 0\n", "line 1: total_budget: it has to be more than 0"),
        ("admission = 'maybe'\n", "line 1: admission: it has to be one of stream, queue"),
        ("[socket]\n\nmode = 660\n", "line 3: socket.mode: it has to be an octal mode"),
        ("[socket]\nmode = '0999'\n", "line 2: socket.mode: it has to be an octal mode"),
        ("[socket]\nlisten = 'x.sock'\n", "line 2: socket.listen: it has to be an absolute"),
        (f"[socket]\nlisten = '/{'x' * 120}'\n", "line 2: socket.listen: the path of a socket"),
        ("[sockets]\n", "line 1: sockets: there is no such setting"),
        ("socket = 3\n", "line 1: socket: it has to be a table"),
        ("[loads]\nengine = 'best'\n", "line 2: loads.engine: it has to be one of"),
        ("[loads]\npolicies = 'maio'\n", "line 2: loads.policies: it has to be a list"),
        ("[model]\npath = '/x'\n", "line 1: model: write it as [[model]]"),
        ("[[model]]\npath = '/x'\n\n[[model]]\nname = 'b'\n", "line 4: model: it has no path"),
        ("[[model]]\npath = 'x'\n", "line 2: model.path: it has to be an absolute path"),
        ("[[model]]\npath = '/x'\nname = '-'\n", "line 3: model.name: a name has 1 to 63"),
        ("[[model]]\npath='/x'\n[[model]]\npath = '/x'\n", "line 4: model.path: /x has a"),
        ("[[model]]\npath='/x'\nknobs={a=1}\n", "line 3: model.knobs: without a policy"),
        ("[[model]]\npath='/x'\n[model.knobs]\na='1'\n", "line 3: model.knobs: it has to be"),
        (
            "[[model]]\npath='/x'\npolicy='p'\nknobs={a=1}\n"
            "[[model]]\npath='/y'\npolicy='p'\nknobs={a=2}\n",
            "line 8: model.knobs: a policy runs once",
        ),
    ],
)
def test_a_mistake_has_its_line(text: str, told: str) -> None:
    (mistake,) = lines_of(text)
    assert mistake.startswith(told)


def test_all_mistakes_at_once_in_order() -> None:
    found = lines_of("[loads]\nengine = 'x'\nnew = 1\n[socket]\nmode = 1\n")
    assert [complaint.split(":")[0] for complaint in found] == ["line 2", "line 3", "line 5"]


def test_not_utf8() -> None:
    with pytest.raises(UsageError, match="line 2: it is not UTF-8"):
        parse(b"persist = true\nadmission = '\xff'\n", SOURCE)


@given(st.text() | st.from_regex(r"(\[?\[[a-z.]+\]?\]|[a-z_]+ ?= ?(1|'x'|\[\]|\{\}))(\n|$)+"))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        parse(text.encode("utf-8", "surrogatepass"), SOURCE)
    except PagecacheError as error:
        assert "line " in error.why


def test_no_file_is_the_defaults_unless_it_was_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "PATH", tmp_path / "none.toml")
    assert config.load().source is None
    with pytest.raises(UsageError, match="does not exist"):
        config.load(tmp_path / "none.toml")


def test_the_example_is_correct_and_shows_every_setting() -> None:
    text = EXAMPLE.read_text()
    assert parse(text.encode(), EXAMPLE)
    # What is commented out there are the defaults and examples: they have to be right, too.
    whole = "\n".join(line.removeprefix("#") for line in text.splitlines() if line[:2] != "# ")
    found = parse(whole.encode(), EXAMPLE)
    assert found.models
    for key in config.KEYS:
        assert f"{key.name} = " in whole, key.label


def test_budgets_reach_the_knob(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.gguf").write_bytes(b"x" * 4096)
    where = [f"[[model]]\npath = '{tmp_path}/{name}.gguf'\n" for name in ("a", "b")]
    policy = "policy = 'sequential'\nbudget = '1GiB'\n"
    settings = ResolvedConfig(parse("".join(table + policy for table in where).encode(), SOURCE))
    if settings.missing:
        pytest.skip("the temporary directory has no page cache")
    assert knobs_for("sequential", settings) == {"budget_mib": 2048}
    total = "total_budget = '1GiB'\n" + "".join(table + policy for table in where)
    assert knobs_for("sequential", ResolvedConfig(parse(total.encode(), SOURCE))) == {
        "budget_mib": 1024
    }
    assert knobs_for("noop", settings) == {}
    assert settings.budgets == {"a.gguf": 1 << 30, "b.gguf": 1 << 30}


def test_s15_a_model_is_known_by_what_its_files_are(tmp_path: Path) -> None:
    """A hard link is the model's, whatever it is called; another file of its path is not."""
    weights, link = tmp_path / "a.gguf", tmp_path / "other"
    weights.write_bytes(b"x" * 4096)
    link.hardlink_to(weights)
    text = f"[[model]]\npath = '{weights}'\n"
    settings = ResolvedConfig(parse(text.encode(), SOURCE))
    if settings.missing:
        pytest.skip("the temporary directory has no page cache")

    def key(path: Path) -> bytes:
        with path.open("rb") as file:
            return key_of(file.fileno())

    assert (found := settings.model_of([key(link)])) and found.name == "a.gguf"
    weights.unlink()
    weights.write_bytes(b"y" * 4096)
    assert settings.model_of([key(weights)]) is None


def test_the_socket_may_be_named_by_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "c.toml"
    file.write_text("[socket]\nlisten = '/run/a.sock'\n")
    assert config.load(file).listen == "/run/a.sock"
    monkeypatch.setenv("PAGECACHE_BPF_SOCKET", "/run/b.sock")
    assert config.load(file).listen == "/run/b.sock"
    monkeypatch.setenv("PAGECACHE_BPF_SOCKET", "b.sock")
    with pytest.raises(UsageError, match="PAGECACHE_BPF_SOCKET"):
        config.load(file)


# --- the command ---


def test_check_and_show(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text(FULL)
    for command in ("check", "show"):
        done = run("config", command, file, "--json")
        assert (done.code, done.err) == (0, ""), command
        assert not undocumented(done.data, verb.JSON[f"config {command}"])
    shown = run("config", "show", file).out
    assert "120.0 GiB" in shown and "(default: 0660)" in shown and "/models/b" in shown
    assert run("config", "check", file).out.startswith("correct")


def test_check_tells_every_mistake(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text("persist = 1\nx = 2\n")
    done = run("config", "check", file)
    assert done.code == 2 and "line 1: persist" in done.err and "line 2: x" in done.err
    file.write_text("[[model]]\npath='/x'\npolicy='nosuch'\n")
    done = run("config", "check", file)
    assert done.code == 2 and "there is no policy nosuch" in done.err
