# SPDX-License-Identifier: Apache-2.0
"""A load served by the controller: needs no right but that of reading the files."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from pagecache_bpf.errors import UnsupportedError
from pagecache_bpf.ipc.public_client import PublicClient
from pagecache_bpf.loads.arguments import guarded
from pagecache_bpf.loads.report import NONE, Report
from pagecache_bpf.loads.request import LoadRequest, Starting, numbers
from pagecache_bpf.loads.residency_snapshot import Snapshot, opened, resident_of


class ControllerLoad:
    """A connection to the controller with one load on it, which ends with the connection."""

    def __init__(self, request: LoadRequest, snapshot: Snapshot, starting: Starting) -> None:
        """Open the load.

        Args:
            request: what is asked for.
            snapshot: what of its files was cached before.
            starting: tells when nobody waits for it any more.

        Raises:
            PagecacheError: there is no controller, or it refuses.
            UnsupportedError: it has no engine to serve the load with.
            LoadOver: the load is over already.
            OSError: a file cannot be opened.
        """
        self._request, self._snapshot = request, snapshot
        with ExitStack() as undo:
            self._client = undo.enter_context(PublicClient())
            starting.waits_for(self._client)
            first = self._open()
            self._id = str(first["load"])
            if first.get("engine") is None:
                raise UnsupportedError(
                    "the controller cannot serve it", str(first.get("why") or "it has no engine")
                )
            undo.pop_all()

    def _open(self) -> dict[str, Any]:
        """Pass the open files and what is asked for to the controller; return its answer."""
        request = self._request
        template = None if request.template is None else Path(request.template).read_text("utf-8")
        with ExitStack() as files:
            return self._client.open_load(
                [files.enter_context(opened(path)) for path in request.model.files],
                model=request.model.name,
                policy=request.policy,
                budget=request.budget,
                devices=[
                    {
                        "name": device.name,
                        "pci": device.accelerator.pci if device.accelerator else None,
                        "node": device.node,
                    }
                    for device in request.devices
                ],
                template=template,
                keep=request.keep,
                wait=request.wait,
            )

    def report(self) -> Report:
        """Ask the controller how the load goes.

        Returns:
            The report.

        Raises:
            PagecacheError: the controller has ended, or refuses.
        """
        return self._read(self._client.load_report(self._id))

    def finish(self, keep: bool) -> Report:
        """Tell the controller that the load is over, and close the connection.

        The controller drops what nobody else uses, but it looked at the page cache only when the
        load was opened there.  This process has looked earlier, so it drops what was read in
        between.

        Args:
            keep: leave the load's pages in the page cache.

        Returns:
            The last report.

        Raises:
            PagecacheError: the controller has ended, or refuses.
        """
        try:
            answer = self._client.done(self._id, keep=keep)
        finally:
            self._client.disconnect()
        last = self._read(answer)
        if keep or answer.get("keep"):
            return last
        early = self._snapshot.drop_rest()
        if not early:
            return last
        return replace(
            last,
            evicted_bytes=(last.evicted_bytes or 0) + early,
            resident_bytes=resident_of(self._request.model.files),
        )

    def forget(self) -> None:
        """Close the child's end of the connection; the load stays the parent's."""
        self._client.disconnect()

    def _read(self, answer: dict[str, Any]) -> Report:
        """Convert what the controller answers about a load into a report."""
        counters = answer.get("counters") or {}
        wanted = numbers(counters, "read_bytes", "mmap_bytes")
        found = numbers(
            counters, "read_hit_bytes", "read_ahead_bytes", "mmap_hit_bytes", "mmap_ahead_bytes"
        )
        stalled = answer.get("io_delay_ns")
        if stalled is None and counters:
            stalled = numbers(counters, "read_stall_ns", "mmap_stall_ns")
        notes = [answer[key] for key in ("message", "template_why") if answer.get(key)]
        return replace(
            self._request.blank(
                answer.get("engine") or NONE, "controller", answer.get("why") or ""
            ),
            policy=answer.get("policy"),
            done=answer.get("state") == "done",
            seconds=float(answer.get("seconds") or 0),
            budget_bytes=answer.get("budget_bytes"),
            prefetched_bytes=numbers(counters, "prefetched_bytes") if counters else None,
            hit_ratio=found / wanted if wanted else None,
            stall_seconds=None if stalled is None else stalled / 1e9,
            resident_before_bytes=answer.get("resident_at_open_bytes"),
            resident_bytes=answer.get("resident_bytes"),
            evicted_bytes=answer.get("dropped_bytes"),
            notes=tuple(notes),
        )


def residency(path: Path) -> int:
    """Ask the controller how much of a file is in the page cache.

    It tells whoever can open the file, also where the kernel tells only the owner.

    Args:
        path: the file.

    Returns:
        Bytes.

    Raises:
        PagecacheError: no controller runs, or it refuses.
        OSError: the file cannot be opened.
    """
    with PublicClient() as client, opened(path) as fd:
        return int(client.residency(fd)["resident_bytes"])


def residency_or_none(path: Path) -> int | None:
    """Ask the controller what of a file is cached, where the kernel does not tell this user.

    Args:
        path: the file; this user has to be able to open it.

    Returns:
        Bytes; None where no controller runs, or it does not say.
    """
    return guarded(lambda: residency(path), None)


def drop(path: Path) -> int | None:
    """Drop a file's pages from the page cache through the controller.

    Args:
        path: the file.

    Returns:
        Bytes that went; None: the file was left alone, as a load reads it.

    Raises:
        PagecacheError: no controller runs, or it refuses.
        OSError: the file cannot be opened.
    """
    with PublicClient() as client, opened(path) as fd:
        answer = client.drop(fd)
        return None if answer["in_use"] else int(answer["dropped_bytes"])


def prefetch(path: Path, extents: list[tuple[int, int]], node: int | None) -> int:
    """Have the controller read ranges of a file.

    Args:
        path: the file.
        extents: (offset, length) in bytes.
        node: the NUMA node to place the pages on; None: any.

    Returns:
        Bytes that it will read.

    Raises:
        PagecacheError: no controller runs, or it refuses.
        OSError: the file cannot be opened.
    """
    with PublicClient() as client, opened(path) as fd:
        answer = client.prefetch(fd, extents, -1 if node is None else node)
        return int(answer["queued_bytes"])
