# SPDX-License-Identifier: Apache-2.0
"""Whom the controller tells what of a file is in the page cache: no more than is documented."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks.cachestat import resident_pages
from pagecache_bpf.errors import PrivilegeError
from pagecache_bpf.ipc.public_client import PublicClient
from tests.native.controller import AGENT, NOBODY, as_user, serving
from tests.vm.kernel import make_file

pytestmark = pytest.mark.native

PAGES = 211


def safetensors() -> bytes:
    """A small file with one tensor."""
    header = b'{"w":{"dtype":"U8","shape":[4096],"data_offsets":[0,4096]}}'
    return len(header).to_bytes(8, "little") + header + bytes(4096)


def test_the_page_cache_of_a_library_is_not_told(place: Path) -> None:
    """The kernel does not tell it either (CVE-2019-5489); to its owner both do."""
    library = make_file(place / "libx.so.6", PAGES)
    # Readable by all, of root's; names that a user can make count for nothing.
    linked = place / "linked.gguf"
    os.link(make_file(place / "libtwo.so", PAGES), linked)
    owned = make_file(place / "notes.txt", PAGES)
    os.chown(owned, NOBODY, NOBODY)
    weights = place / "0123abcd"  # as blobs of the Hugging Face cache are called
    with weights.open("wb") as out:
        out.write(safetensors())
        out.flush()
        os.fsync(out.fileno())  # dirty pages cannot be dropped
    for path in (library, linked, owned, weights):
        path.chmod(0o644)
        path.read_bytes()

    def ask(listen: Path, path: Path) -> list[str]:
        fd = os.open(path, os.O_RDONLY)
        told = []
        with PublicClient(listen) as client:
            for call in (client.residency, client.drop):
                try:
                    told.append(f"{call(fd)}")
                except PrivilegeError as error:
                    told.append(error.why)
            report = client.open_load([fd], model="m", policy="sequential")
            last = client.done(report["load"])
            told.append(str((report["resident_at_open_bytes"], last["dropped_bytes"])))
        os.close(fd)
        return told

    with serving(place / "run", AGENT) as controller:
        for path in (library, linked):
            told = as_user(NOBODY, lambda path=path: ask(controller.socket, path))  # type: ignore[misc]
            assert ["neither yours nor weights" in text for text in told] == [True, True, False]
            assert told[2] == "(None, None)"
            assert resident_pages(path) > PAGES // 2  # the kernel may take some at any time
        for path in (owned, weights):
            told = as_user(NOBODY, lambda path=path: ask(controller.socket, path))  # type: ignore[misc]
            assert "resident_bytes" in told[0] and "None" not in told[2]
            assert resident_pages(path) == 0
        assert "resident_bytes" in ask(controller.socket, library)[0]  # root


def test_with_the_rule_owner_others_are_told_of_named_files_only(place: Path) -> None:
    paths = [make_file(place / f"{name}.safetensors", PAGES) for name in ("named", "other")]
    for path in paths:
        path.chmod(0o644)
    config = (
        f'{AGENT}[socket]\nmode = "0666"\nresidency = "owner"\n[[model]]\npath = "{paths[0]}"\n'
    )

    def ask(socket_path: Path) -> list[bool]:
        told = []
        for path in paths:
            fd = os.open(path, os.O_RDONLY)
            with PublicClient(socket_path) as client:
                try:
                    told.append("resident_bytes" in client.residency(fd))
                except PrivilegeError as error:
                    assert "nor a model of root's" in error.why
                    told.append(False)
            os.close(fd)
        return told

    with serving(place / "run", config) as controller:
        assert as_user(NOBODY, lambda: ask(controller.socket)) == [True, False]
