# SPDX-License-Identifier: Apache-2.0
"""How policies ended, kept in a file that outlives the agent."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest

from pagecache_bpf.policy import exit_history
from pagecache_bpf.policy.exit_history import EXITS_KEPT, read, write


def record(number: int) -> dict[str, Any]:
    found: dict[str, Any] = {"seq": number, "time_ns": number, "policy": f"p{number}"}
    return found | {"kind": "detached", "code": 0, "hook": "init", "reason": "", "message": ""}


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "exits.json"
    write([], [record(1), record(2)], path)
    assert read(path) == [record(1), record(2)]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_the_last_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "exits.json"
    write([], [record(number) for number in range(EXITS_KEPT + 3)], path)
    assert [kept["seq"] for kept in read(path)] == list(range(3, EXITS_KEPT + 3))


def test_what_was_attached_when_the_agent_was_killed_has_ended(tmp_path: Path) -> None:
    path = tmp_path / "exits.json"
    write(["maio", "mru"], [record(5)], path)
    found = read(path)
    assert [(ended["seq"], ended["policy"], ended["kind"]) for ended in found] == [
        (5, "p5", "detached"),
        (6, "maio", exit_history.KILLED),
        (7, "mru", exit_history.KILLED),
    ]
    assert found[1]["code"] == -9 and found[1]["time_ns"] == path.stat().st_mtime_ns


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "{}"),
        '{"exits": [{"seq": 1}], "attached": []}',
        '{"exits": 3, "attached": []}',
        json.dumps({"exits": [{**record(1), "more": 1}], "attached": []}),
    ],
)
def test_a_damaged_file_is_no_history(tmp_path: Path, text: str) -> None:
    path = tmp_path / "exits.json"
    path.write_text(text)
    assert read(path) == []
    assert read(tmp_path / "none.json") == []


def test_a_history_that_cannot_be_written_is_only_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(["maio"], [], tmp_path / "absent" / "exits.json")
    assert "cannot be written" in caplog.text
