# SPDX-License-Identifier: Apache-2.0
"""What goes over the wire: answers that are none, errors of others, operations that are marked."""

from __future__ import annotations

import json
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from pagecache_bpf.errors import PagecacheError, PolicyRejected, PrivilegeError, UsageError
from pagecache_bpf.ipc import wire
from pagecache_bpf.ipc.client import LineClient
from pagecache_bpf.ipc.operations import collect, operation


@pytest.mark.parametrize(
    "line",
    [
        b"7",
        b"[]",
        b"{}",
        b'{"v": 1, "ok": 7}',
        b'{"v": 1, "ok": null}',
        b'{"v": 1, "error": 7}',
        b'{"v": 1, "error": null}',
        b"[" * 100_000,
        b"\xff",
    ],
)
def test_s16_an_answer_that_is_none_is_an_error_of_ours(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "server"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(line + b"\n")

        thread = threading.Thread(target=serve)
        thread.start()
        with LineClient(path, 20) as asked, pytest.raises(PagecacheError, match="does not answer"):
            asked.request("x")
        thread.join(20)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("UsageError", UsageError),
        ("PrivilegeError", PrivilegeError),
        ("PolicyRejected", PolicyRejected),
        ("PagecacheError", PagecacheError),
        ("Path", PagecacheError),  # a name of the module that is no error
        ("annotations", PagecacheError),
        ("__doc__", PagecacheError),
        ("SystemExit", PagecacheError),
        (None, PagecacheError),
        (["UsageError"], PagecacheError),
    ],
)
def test_s16_errors_are_of_our_classes_only(name: Any, kind: type[PagecacheError]) -> None:
    fields = {"class": name, "what": "it failed", "why": 7, "more": "x"}
    with pytest.raises(PagecacheError) as caught:
        wire.decode_answer(json.dumps({"v": 1, "error": fields}).encode())
    assert type(caught.value) is kind and str(caught.value) == "it failed: 7"


def test_an_error_comes_back_as_it_went() -> None:
    error = PrivilegeError("it failed", "for a reason", "do this", "docs/x.md#y")
    with pytest.raises(PrivilegeError) as caught:
        wire.decode_answer(wire.encode_error(error).rstrip(b"\n"))
    assert vars(caught.value) == vars(error)


class Operations:
    """Two operations, and a method that is none."""

    @operation(changes=True)
    def put(
        self, fd: int, name: str, sizes: dict[str, int] | None = None, force: bool = False
    ) -> dict[str, Any]:
        return {"fd": fd, "name": name, "sizes": sizes, "force": force}

    @operation()
    def get(self) -> dict[str, Any]:
        return {}

    def secret(self) -> dict[str, Any]:
        raise AssertionError


def test_only_marked_methods_are_operations() -> None:
    found = collect(Operations())
    assert sorted(found) == ["get", "put"]
    assert (found["put"].changes, found["get"].changes) == (True, False)
    assert (found["put"].takes_file, found["get"].takes_file) == (True, False)
    answer = found["put"]({"fd": 3, "name": "x", "sizes": {"a": 1}})
    assert answer == {"fd": 3, "name": "x", "sizes": {"a": 1}, "force": False}


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"fd": 3}, "needs name"),
        ({"fd": 3, "name": 7}, "name of put has a bad value"),
        ({"fd": "3", "name": "x"}, "fd of put has a bad value"),
        ({"fd": True, "name": "x"}, "fd of put has a bad value"),
        ({"fd": 3, "name": "x", "force": 1}, "force of put has a bad value"),
        ({"fd": 3, "name": "x", "sizes": {"a": "b"}}, "sizes of put has a bad value"),
        ({"fd": 3, "name": "x", "self": 1}, "has no member"),
    ],
)
def test_arguments_are_compared_with_the_hints(arguments: dict[str, Any], why: str) -> None:
    with pytest.raises(UsageError, match=why):
        collect(Operations())["put"](arguments)
