# SPDX-License-Identifier: Apache-2.0
"""A model of many files is tagged and untagged by few requests, which are counted, not timed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from pagecache_bpf.cli import tagging
from pagecache_bpf.errors import PagecacheError
from pagecache_bpf.ipc import wire
from pagecache_bpf.ipc.client import LineClient
from pagecache_bpf.policy import agent_device, catalog
from pagecache_bpf.policy.engines import Engines
from pagecache_bpf.weights.models import resolve
from tests.native.controller import AGENT, Controller, serving, tagged

pytestmark = pytest.mark.native

FILES = 5 * wire.BATCH_REQUESTS + 3


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Shards of one page each, in a directory."""
    directory = tmp_path / "many"
    directory.mkdir()
    for shard in range(1, FILES + 1):
        path = directory / f"model-{shard:05d}-of-{FILES:05d}.safetensors"
        path.write_bytes(b"x" * 4096)
    return directory


@pytest.fixture
def controller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Controller]:
    """A controller that Engines finds, with a policy attached."""
    with serving(tmp_path / "run", AGENT) as found:
        monkeypatch.setattr(agent_device, "connect", found.root)
        with found.root() as root:
            info = catalog.find("noop")
            root.attach(info, catalog.agent_object(info), {}, {})
        yield found
        with found.root() as root:
            root.detach("noop")


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Write down each request that is made."""
    asked: list[str] = []
    before = LineClient.request_line

    def request_line(
        self: LineClient,
        operation: str,
        fds: Sequence[int],
        seconds: float,
        args: Mapping[str, Any],
    ) -> dict[str, Any]:
        asked.append(operation)
        return before(self, operation, fds, seconds, args)

    with monkeypatch.context() as patch:
        patch.setattr(LineClient, "request_line", request_line)
        yield asked


def test_many_files_take_few_requests(
    controller: Controller, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = resolve(str(model))
    with Engines() as engines, counted(monkeypatch) as asked:
        tagging.Tagging(engines, "noop").add(found)
        assert asked.count("batch") == 6 and len(asked) < 10, asked
        assert tagged(controller) == [(str(path), "noop") for path in sorted(found.files)]
        asked.clear()
        # Once more is no mistake, and nothing is open afterwards.
        before = len(os.listdir("/proc/self/fd"))
        tagging.Tagging(engines, "noop").add(found)
        assert asked.count("batch") == 6 and len(asked) < 10, asked
        assert len(os.listdir("/proc/self/fd")) == before
        there = list(engines.tags())
        assert len(there) == FILES
        asked.clear()
        assert tagging.untag(engines, there) == there
        assert asked == ["batch"] * 6
        assert tagging.untag(engines, there[:3]) == []  # somebody else was faster
    assert tagged(controller) == []


def test_the_first_that_fails_ends_a_batch(controller: Controller, model: Path) -> None:
    paths = sorted(model.iterdir())[:5]
    with controller.root() as root, ExitStack() as stack:
        files = {}
        for path in paths:
            fd = os.open(path, os.O_RDONLY)
            stack.callback(os.close, fd)
            files[fd] = str(path)
        third = list(files)[2]
        wrong = {**files, third: str(paths[0])}  # another file than the one that is open
        with pytest.raises(PagecacheError, match="was not tagged"):
            root.tag_files(wrong, policy="noop", model="m")
        assert tagged(controller) == [(str(path), "noop") for path in paths[:2]]
        for bad, why in (
            ({"requests": 3}, "bad value"),
            ({"requests": [3]}, "bad value"),
            ({"requests": [{}]}, "no such operation"),
            ({"requests": [{"op": "batch", "requests": []}]}, "no such operation"),
            ({"requests": [{"op": "tag", "fd": 0, "policy": "noop"}]}, "not its number"),
        ):
            with pytest.raises(PagecacheError, match=why):
                for answer in root.request("batch", **bad)["answers"]:
                    wire.result_of(answer)
        with pytest.raises(PagecacheError, match="too many descriptors"):
            root.request("untag_fd", list(files)[:2])
