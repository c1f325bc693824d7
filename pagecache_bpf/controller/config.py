# SPDX-License-Identifier: Apache-2.0
"""The controller's configuration: one TOML file, every mistake told with its line.

KEYS is the one list of what may be set; checking, defaults, `config show` and docs/controller.md
come from it.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pagecache_bpf._run_dir import RUN_DIR, SOCKET_VARIABLE
from pagecache_bpf.controller.admission import RULES
from pagecache_bpf.errors import PagecacheError, PrivilegeError, UsageError
from pagecache_bpf.units import parse_size
from pagecache_bpf.weights.models import check_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PATH = Path("/etc/pagecache-bpf/config.toml")
ENGINES = ("auto", "struct_ops", "agent")
#: Whose files the public socket tells the residency of.
RESIDENCY_RULES = ("weights", "owner")
_DOCS = "docs/troubleshooting.md"


class _Bad(Exception):
    """A value that does not do; its text says why."""


@dataclass(frozen=True)
class Key:
    """One setting: its table ("" for the top), how its value is read, default and meaning."""

    table: str
    name: str
    read: Callable[[Any], Any]
    default: Any
    help: str

    @property
    def label(self) -> str:
        """Return it as messages and `config show` write it, like socket.mode."""
        return f"{self.table}.{self.name}" if self.table else self.name


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise _Bad("it has to be a text")
    return value


def _path(value: Any) -> str:
    if not _text(value).startswith("/"):
        raise _Bad("it has to be an absolute path")
    return str(value)


def _socket(value: Any) -> str:
    if len(_path(value).encode()) > 107:  # sun_path of struct sockaddr_un
        raise _Bad("the path of a socket has at most 107 bytes")
    return str(value)


def _group(value: Any) -> str:
    if not isinstance(value, str):
        raise _Bad("it has to be the name of a group")
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise _Bad("it has to be true or false")
    return value


def _size(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise _Bad('it has to be a size, like "40GiB"')
    try:
        size = parse_size(str(value))
    except UsageError as error:
        raise _Bad(f"{error.what}: {error.why}") from None
    if not size:
        raise _Bad("it has to be more than 0")
    return size


def _mode(value: Any) -> int:
    if not isinstance(value, str) or not re.fullmatch(r"0?[0-7]{3}", value):
        raise _Bad('it has to be an octal mode in quotes, like "0660"')
    return int(value, 8)


def _choice(*choices: str) -> Callable[[Any], str]:
    def read(value: Any) -> str:
        if value not in choices:
            raise _Bad(f"it has to be one of {', '.join(choices)}")
        return str(value)

    return read


def _names(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(text, str) and text for text in value):
        raise _Bad("it has to be a list of texts")
    return tuple(value)


def _model_name(value: Any) -> str:
    try:
        check_name(_text(value))
    except UsageError as error:
        raise _Bad(error.why) from None
    return str(value)


def _knobs(value: Any) -> dict[str, int]:
    if not isinstance(value, dict) or not all(type(number) is int for number in value.values()):
        raise _Bad("it has to be a table of whole numbers, like { max_window_mib = 64 }")
    return dict(value)


KEYS = (
    Key("", "total_budget", _size, None, "bound for all loads together (none: the memory's)"),
    Key("", "user_budget", _size, None, "bound for all loads of one user (none: total_budget)"),
    Key("", "admission", _choice(*RULES), "stream", "what to do with a load beyond what is left"),
    Key(
        "",
        "persist",
        _flag,
        False,
        "take policies and tags up again after a restart; without it engine agent leaves nothing",
    ),
    Key("socket", "listen", _socket, str(RUN_DIR / "control.sock"), "the public socket"),
    Key("socket", "mode", _mode, 0o660, "who may connect"),
    Key(
        "socket",
        "group",
        _group,
        "",
        "group of the socket (empty: pagecache if there is such a group, else root)",
    ),
    Key(
        "socket",
        "trust_containers",
        _flag,
        False,
        "take user 0 of a container (another user or PID namespace) for root of this machine",
    ),
    Key(
        "socket",
        "residency",
        _choice(*RESIDENCY_RULES),
        RESIDENCY_RULES[0],
        "files of others whose residency is told and which are dropped: weights, or owner (none)",
    ),
    Key(
        "loads",
        "policies",
        _names,
        ("maio", "sequential"),
        "policies that loads may ask for, the default first; those that do not exist are skipped",
    ),
    Key("loads", "engine", _choice(*ENGINES), "auto", "engine that these policies run on"),
    Key("model", "path", _path, None, "file or directory; needed"),
    Key("model", "name", _model_name, None, "its name (default: that of the directory or file)"),
    Key("model", "policy", _text, None, "policy to attach at start; without it only its budget"),
    Key("model", "knobs", _knobs, {}, "knobs of the policy; the same for all of its models"),
    Key("model", "budget", _size, None, "bytes of it that may be in the page cache at a time"),
    Key("model", "keep", _flag, False, "leave its pages in the cache when a load is done"),
)
TABLES = {"": "", "socket": "socket", "loads": "loads", "model": "[model]"}


@dataclass(frozen=True)
class ModelSection:
    """One [[model]] table of the configuration."""

    path: str
    name: str | None = None
    policy: str | None = None
    knobs: Mapping[str, int] = field(default_factory=dict)
    budget: int | None = None
    keep: bool = False


@dataclass(frozen=True)
class Config:
    """The whole configuration; source: the file, None for the defaults."""

    total_budget: int | None = None
    user_budget: int | None = None
    admission: str = "stream"
    persist: bool = False
    listen: str = str(RUN_DIR / "control.sock")
    mode: int = 0o660
    group: str = ""
    trust_containers: bool = False
    residency: str = RESIDENCY_RULES[0]
    policies: tuple[str, ...] = ("maio", "sequential")
    engine: str = "auto"
    models: tuple[ModelSection, ...] = ()
    source: Path | None = None


def load(path: Path | None = None) -> Config:
    """Read the configuration.

    Args:
        path: the file; None for /etc/pagecache-bpf/config.toml, which may be absent.

    Returns:
        The configuration, with defaults for what the file leaves out.

    Raises:
        UsageError: every mistake in it, with its line.
        PrivilegeError: the file may not be read.
    """
    found = _read(path)
    # As everywhere, what the environment says goes before what a file says.
    named = os.environ.get(SOCKET_VARIABLE)
    if not named:
        return found
    try:
        return replace(found, listen=_socket(named))
    except _Bad as error:
        raise UsageError(f"{SOCKET_VARIABLE} is not the path of a socket", str(error)) from None


def _read(path: Path | None) -> Config:
    """Read the configuration from its file."""
    chosen = PATH if path is None else path
    try:
        data = chosen.read_bytes()
    except FileNotFoundError:
        if path is None:
            return Config()
        raise UsageError(f"{chosen} does not exist", "", "Check the path") from None
    except PermissionError:
        raise PrivilegeError(f"{chosen} cannot be read", "permission denied") from None
    except OSError as error:
        raise UsageError(f"{chosen} cannot be read", error.strerror or str(error)) from None
    return parse(data, chosen)


def parse(data: bytes, source: Path) -> Config:
    """Read a configuration from its text.

    Args:
        data: the text, in TOML.
        source: the file that it is from; None: from none.

    Returns:
        The configuration.

    Raises:
        UsageError: every mistake in it, with its line.
    """
    try:
        text = data.decode()
        content = tomllib.loads(text)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise _mistakes(source, [(line, "it is not UTF-8")]) from None
    except tomllib.TOMLDecodeError as error:
        found = re.search(r"\(at line (\d+), column \d+\)|\(at end of document\)", str(error))
        line = int(found[1]) if found and found[1] else text.count("\n") + 1
        why = re.sub(r" \(at .*\)$", "", str(error))
        raise _mistakes(source, [(line, f"it is not TOML: {why}")]) from None
    except RecursionError:
        raise _mistakes(source, [(1, "it is nested too deeply")]) from None
    reader = _Reader(text)
    top = reader.table("", 0, content)
    tables = {name: reader.table(name, 0, content.get(name, {})) for name in ("socket", "loads")}
    listed = content.get("model", [])
    if not isinstance(listed, list):
        reader.mistake("model", 0, "", "write it as [[model]]")
        listed = []
    models = [reader.table("model", at, content) for at, content in enumerate(listed)]
    _check_models(reader, models)
    if reader.mistakes:
        raise _mistakes(source, sorted(reader.mistakes))
    return Config(
        **top,
        **tables["socket"],
        **tables["loads"],
        models=tuple(ModelSection(**model) for model in models),
        source=source,
    )


class _Reader:
    """Reads tables and notes mistakes with the line of the key."""

    def __init__(self, text: str) -> None:
        self.mistakes: list[tuple[int, str]] = []
        self._lines = _places(text)

    def table(self, name: str, at: int, content: Any) -> dict[str, Any]:
        """Return the valid settings of one table; note what is wrong with the others."""
        if not isinstance(content, dict):
            self.mistake("", 0, name, "it has to be a table")
            return {}
        keys = {key.name: key for key in KEYS if key.table == name}
        found = {}
        for key, value in content.items():
            if name == "" and key in TABLES:
                continue
            if key not in keys:
                self.mistake(name, at, key, f"there is no such setting (known: {', '.join(keys)})")
                continue
            try:
                found[key] = keys[key].read(value)
            except _Bad as error:
                self.mistake(name, at, key, str(error))
        if name == "model" and "path" not in content:
            self.mistake(name, at, "", "it has no path")
        return found

    def mistake(self, table: str, at: int, key: str, why: str) -> None:
        """Note a mistake in the file."""
        line = self._lines.get((table, at, key)) or self._lines.get((table, at, "")) or 1
        label = ".".join(part for part in (table, key) if part)
        self.mistakes.append((line, f"{label}: {why}"))


def _places(text: str) -> dict[tuple[str, int, str], int]:
    """Find the line of each table, (name, index, ""), and of each key in it, (name, index, key).

    The TOML reader does not tell lines; a text that it accepts is simple enough for this.
    """
    places: dict[tuple[str, int, str], int] = {}
    counts: dict[str, int] = {}
    table, at = "", 0
    for number, line in enumerate(text.splitlines(), 1):
        header = re.match(r"\s*\[(\[?)\s*([^\]]+?)\s*\]", line)
        if header:
            table = header[2].strip("\"'")
            at = counts.get(table, 0)
            if header[1]:
                counts[table] = at + 1
            places.setdefault((table, at, ""), number)
            places.setdefault(("", 0, table), number)
            parent, _, key = table.rpartition(".")
            if parent:  # [model.knobs] is the knobs of the last [[model]]
                places.setdefault((parent, max(0, counts.get(parent, 1) - 1), key), number)
            continue
        setting = re.match(r"\s*([A-Za-z0-9_-]+|\"[^\"]*\"|'[^']*')\s*[.=]", line)
        if setting:
            places.setdefault((table, at, setting[1].strip("\"'")), number)
    return places


def _check_models(reader: _Reader, models: list[dict[str, Any]]) -> None:
    """Check what no model can see by itself: the same path twice, knobs that differ."""
    paths: dict[str, int] = {}
    knobs: dict[str, tuple[int, Mapping[str, int]]] = {}
    for at, model in enumerate(models):
        path, policy = model.get("path"), model.get("policy")
        if path is not None and paths.setdefault(path, at) != at:
            reader.mistake("model", at, "path", f"{path} has a [[model]] already")
        if policy is None and model.get("knobs"):
            reader.mistake("model", at, "knobs", "without a policy there are no knobs")
        if policy is not None:
            _, first = knobs.setdefault(policy, (at, model.get("knobs", {})))
            if model.get("knobs", {}) != first:
                why = f"a policy runs once, and an earlier model gives {policy} other knobs"
                reader.mistake("model", at, "knobs", why)


def _mistakes(source: Path, mistakes: list[tuple[int, str]]) -> PagecacheError:
    return UsageError(
        f"{source} is not a configuration",
        "; ".join(f"line {line}: {text}" for line, text in mistakes),
        "Correct it; `pagecache-bpf config show` lists every setting",
        f"{_DOCS}#is-not-a-configuration",
    )


def check_policies(config: Config) -> list[str]:
    """Compare a configuration with the policies of this machine.

    Args:
        config: the configuration.

    Returns:
        A sentence for each thing that does not fit; empty if all does.
    """
    from pagecache_bpf.policy import catalog

    found = []
    for model in config.models:
        try:
            if model.policy is not None:
                info = catalog.find(model.policy)
                catalog.check_knobs(info, model.knobs)
        except PagecacheError as error:
            found.append(f"model {model.path}: {error}")
    return found
