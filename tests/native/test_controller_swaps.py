# SPDX-License-Identifier: Apache-2.0
"""Files that are replaced by something else before, during and after each request about them.

What takes their place is each of SWAPS: a FIFO, a terminal, a device, a directory, a socket, a
link to what only root may read ...  The controller is a real one with the default policy, and the
files are those of another user's, who replaces them.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pagecache_bpf.ipc.public_client import PublicClient
from tests.native.controller import NOBODY, Controller, as_user
from tests.native.test_controller_hostile import (
    controller,
    mine,
    place,
    root_is_answered,
    safetensors,
    templates,
    terminal_of,
)
from tests.unit.test_file_key import SWAPS, at_once
from tests.vm.kernel import wait_for

__all__ = ["controller", "mine", "place"]  # fixtures
pytestmark = pytest.mark.native

REQUESTS = ("files", "open_load", "load_report", "residency", "prefetch", "drop", "done")
SIDES = ("config.json", "model.safetensors.index.json", "tokenizer.json")
ROOTS = "link to what only root may read"
DURING = 30  # conversations while somebody swaps as fast as he can


def conversation(
    client: PublicClient, fd: int, before: Callable[[str], None] = lambda request: None
) -> dict[str, Any]:
    """Everything that one may ask about a file, with something done before each request."""
    answers: dict[str, Any] = {}

    def ask(request: str, *fds: int, **arguments: Any) -> None:
        before(request)
        answers[request] = client.request(request, fds, **arguments)

    ask("files", fd)
    ask("open_load", model="m")
    load = answers["open_load"]["load"]
    ask("load_report", load=load)
    ask("residency", fd)
    ask("prefetch", fd, extents=[[0, 1 << 20]])
    ask("drop", fd)
    ask("done", load=load)
    before("end")
    assert tuple(answers) == REQUESTS
    return answers


def check(answers: dict[str, Any], size: int) -> None:
    """What is told is of the file that was passed, and of nothing else."""
    opened = answers["open_load"]
    assert (opened["policy"], opened["template"], opened["template_why"]) == ("maio", "derived", "")
    for request in ("files", "open_load", "load_report", "residency", "done"):
        assert answers[request]["bytes"] == size, (request, answers[request])
    assert answers["prefetch"] == {"queued_bytes": size, "refused_bytes": (1 << 20) - size}
    assert answers["done"]["state"] == "done"
    assert "root:" not in str(answers)


def warm_up(controller: Controller, directory: Path) -> None:
    """Have what is made once for a user be there: a process for headers, one that prefetches."""

    def once() -> None:
        fd = os.open(safetensors(directory / "warm.safetensors"), os.O_RDONLY)
        with PublicClient(controller.socket) as client:
            conversation(client, fd)

    as_user(NOBODY, once)


def nothing_has_happened(controller: Controller, descriptors: int) -> None:
    """Root is answered, nothing of the client's is left, and the terminal is nobody's."""
    root_is_answered(controller)
    assert terminal_of(controller.process.pid) == 0
    assert templates(controller) == ["roots"]
    with controller.root() as root:
        wait_for(lambda: [tag.model for tag in root.tags()] == ["roots"], "the tags to go")
    wait_for(lambda: controller.descriptors() <= descriptors, "descriptors to be closed")


@pytest.mark.parametrize("what", ["file", "directory"])
def test_s1_s2_s3_a_swap_before_each_request(controller: Controller, mine: Path, what: str) -> None:
    """Of the file itself, or of the directory that it lies in; and after the last request."""

    def attack(request: str, swap: str) -> tuple[dict[str, Any], int]:
        home = mine / f"{request}-{swap}"
        home.mkdir()
        path = safetensors(home / "w.safetensors")
        victim = path if what == "file" else home
        effects: list[object] = []

        def before(asked: str) -> None:
            if asked == request:
                victim.rename(mine / f"kept-{request}-{swap}")
                effects.append(SWAPS[swap](victim))

        fd = os.open(path, os.O_RDONLY)
        try:
            with at_once(), PublicClient(controller.socket) as client:
                return conversation(client, fd, before), os.fstat(fd).st_size
        finally:
            os.close(fd)

    def all_attacks() -> list[tuple[dict[str, Any], int]]:
        swaps = SWAPS if what == "file" else ("fifo", "another file", ROOTS)
        return [attack(request, swap) for request in (*REQUESTS, "end") for swap in swaps]

    warm_up(controller, mine)
    descriptors = controller.descriptors()
    for answers, size in as_user(NOBODY, all_attacks):
        check(answers, size)
    nothing_has_happened(controller, descriptors)


def test_s4_side_files_of_every_kind(controller: Controller, mine: Path) -> None:
    """What lies beside the weights, and what a loader would read first, is not opened at all."""

    def attack() -> list[tuple[dict[str, Any], int]]:
        found = []
        for swap in SWAPS:
            home = mine / swap
            home.mkdir()
            effects = [SWAPS[swap](home / side) for side in SIDES]
            path = safetensors(home / "model.safetensors")
            fd = os.open(path, os.O_RDONLY)
            with at_once(), PublicClient(controller.socket) as client:
                found.append((conversation(client, fd), path.stat().st_size))
            del effects
        return found

    warm_up(controller, mine)
    descriptors = controller.descriptors()
    for answers, size in as_user(NOBODY, attack):
        check(answers, size)
    nothing_has_happened(controller, descriptors)


def test_s1_s2_s3_swaps_during_the_requests(controller: Controller, mine: Path) -> None:
    """Somebody replaces the file and puts it back as fast as he can."""
    path = safetensors(mine / "w.safetensors")
    os.chown(path, NOBODY, NOBODY)
    size = path.stat().st_size

    def attack() -> tuple[list[dict[str, Any]], int]:
        over = threading.Event()
        rounds = 0

        def swap_for_ever() -> None:
            nonlocal rounds
            number = 0
            while not over.is_set():
                for swap in SWAPS.values():
                    number += 1
                    path.rename(mine / "kept")
                    effect = swap(path)
                    if os.path.lexists(path):
                        path.rename(mine / f"swap-{number}")
                    (mine / "kept").rename(path)
                    if isinstance(effect, tuple):  # a terminal
                        for end in effect:
                            os.close(end)
                rounds += 1

        fd = os.open(path, os.O_RDONLY)
        thread = threading.Thread(target=swap_for_ever, daemon=True)
        thread.start()
        found: list[dict[str, Any]] = []
        with PublicClient(controller.socket) as client:
            while len(found) < DURING or not rounds:
                found.append(conversation(client, fd))
        over.set()
        thread.join()
        return found, rounds

    warm_up(controller, mine)
    descriptors = controller.descriptors()
    found, rounds = as_user(NOBODY, attack)
    assert rounds >= 1
    for answers in found:
        check(answers, size)
    nothing_has_happened(controller, descriptors)


def test_s1_s2_s3_what_root_has_tagged_is_swapped(controller: Controller, mine: Path) -> None:
    """Root governs a file of somebody's, who replaces it: what root asks is answered."""
    descriptors = controller.descriptors()
    with controller.root() as root:
        for number, swap in enumerate(SWAPS):
            path = safetensors(mine / f"{number}.safetensors")
            kept = mine / f"kept-{number}"
            with path.open("rb") as file:
                root.tag(file.fileno(), policy="maio", model="theirs", path=str(path))
            path.rename(kept)
            effect = SWAPS[swap](path)
            with at_once():
                assert sorted(tag.model for tag in root.tags()) == ["roots", "theirs"]
                assert "maio" in [policy.name for policy in root.policies()]
                if swap in ("fifo", "terminal"):
                    assert controller.run("status", "--json").code == 0
                with kept.open("rb") as file:
                    root.untag_fd(file.fileno())
            del effect
    nothing_has_happened(controller, descriptors)
