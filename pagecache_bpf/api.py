# SPDX-License-Identifier: Apache-2.0
"""The Python API: what an inference server calls when it starts.

    import pagecache_bpf as pc

    with pc.load("/models/llama-3-8b", devices=["cuda:0"]) as load:
        model = AutoModelForCausalLM.from_pretrained("/models/llama-3-8b")
    print(load.report())

Nothing here raises because the kernel, the controller or this user's rights do not suffice: the
load goes on as without it, and the report says why.  A mistake of the caller (a path that leads
to no weights, a device that is not there, a budget that is none) does raise UsageError, and a
file that may not be opened PrivilegeError.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from pagecache_bpf.errors import PagecacheError, UsageError
from pagecache_bpf.loads.arguments import (
    Device,
    PathLike,
    guarded,
    output_path,
    parse_budget,
    placements_of,
    resolve_model,
)
from pagecache_bpf.loads.report import NONE, Report
from pagecache_bpf.loads.residency_answer import Residency as Residency

if TYPE_CHECKING:
    from pagecache_bpf.loads.open_load import OpenLoad
    from pagecache_bpf.loads.request import LoadRequest
    from pagecache_bpf.weights.models import Model


_log = logging.getLogger(__name__)


class Load:
    """A load from its start to done().  Use it as a context manager, or call done().

    Threads may share it.  In a child of fork() it is inert: it stays the parent's.
    """

    def __init__(self, shared: OpenLoad, request: LoadRequest) -> None:
        """Take part in a load; load() does that.

        Args:
            shared: the load, which others of this process may take part in, too.
            request: what was asked for here; where it differs from the load's own, a note says so.
        """
        self._shared = shared
        self._keep = request.keep
        self._done = False
        self._pid = os.getpid()
        differing = shared.request.differences(request)
        self._notes: tuple[str, ...] = ()
        if differing:
            self._notes = (
                "this process is loading the same files already: "
                f"what was asked for here as {', '.join(differing)} is not followed",
            )

    def __enter__(self) -> Load:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.done()

    def ready(self, timeout: float | None = None) -> bool:
        """Wait until the load is served, or known not to be.

        Nobody has to: load() returns at once and until then the kernel reads as ever.  What serves
        it is then started at once; otherwise when the load shows that it lasts long enough.

        Args:
            timeout: seconds to wait at most; None: as long as it takes.

        Returns:
            Whether it is; `report()` says by what.
        """
        return self._pid != os.getpid() or self._shared.wait(timeout)

    def report(self) -> Report:
        """Tell how the load goes; after done(), how it went.  Never raises.

        Returns:
            What serves it, what came from the cache and from the device, and why it is not better.
        """
        found = self._shared.report()
        return replace(found, notes=(*self._notes, *found.notes)) if self._notes else found

    def done(self, keep: bool | None = None) -> Report:
        """Drop what the load has brought into the cache: the weights are where they belong.

        What was in the cache before stays, and so does what somebody has mapped.  Calling it
        again does nothing.  Never raises.

        Args:
            keep: leave the pages in the cache; None: as load() was told.

        Returns:
            How it went.
        """
        if self._pid != os.getpid():
            return self.report()
        with _lock:
            first, self._done = not self._done, True
        if first:
            _close(self._shared, self._keep if keep is None else keep)
        return self.report()


#: Held for moments only, and by the registry alone: no load waits for another one.
_lock = threading.Lock()
_open: dict[tuple[Path, ...], OpenLoad] = {}
_ending: dict[tuple[Path, ...], OpenLoad] = {}


def load(
    path: PathLike,
    *,
    devices: Device | Iterable[Device] | None = None,
    policy: str | None = None,
    budget: int | str | None = None,
    template: PathLike | None = None,
    keep: bool = False,
    wait: float = 0.0,
    record: PathLike | None = None,
    prefetch: bool = False,
) -> Load:
    """Have the weights at PATH read ahead of whoever loads them, until done().

    It returns at once.  What serves the load starts in the background, and the kernel reads as
    ever until it is ready.

    Args:
        path: a weight file, a directory of shards, a Hugging Face snapshot or cache directory, or
            ORG/NAME if that is in the Hugging Face cache.
        devices: the accelerators the weights are for ("cuda:0", "rocm:1", "npu:0", a PCI address,
            a UUID, a torch.device, or several); pages go to the NUMA node next to them.
        policy: name of a policy; by default the best there is.
        budget: bytes ("8GiB") of the weights that may be in the page cache at a time; by default
            no bound but the memory.
        template: path of an I/O template, the order in which the loader will want the bytes.
        keep: leave the pages in the cache at the end.
        wait: seconds to queue, in the background, when other loads have taken the controller's
            budget.
        record: where a recording of the load goes when it is done, for `pagecache-bpf report`;
            takes root.  load() then returns when it is being recorded, about a second later.
        prefetch: read the files from now on, in order, and do not wait for their reader: for what
            takes seconds to start before it opens them.  As much as the budget allows, or half of
            the memory that is free.

    Returns:
        The load.  A second one of the same files in this process shares the first one's.

    Raises:
        UsageError: an argument is wrong.
        PrivilegeError: a file may not be opened.
    """
    from pagecache_bpf.loads.begin import check_policy
    from pagecache_bpf.loads.open_load import OpenLoad
    from pagecache_bpf.loads.request import LoadRequest, device_limit

    bound = parse_budget(budget)
    placed = placements_of(devices)
    if policy is not None:
        check_policy(policy)
    if template is not None and not Path(template).is_file():
        raise UsageError(f"there is no template {template}", "it is not a file", "Check the path")
    if not wait >= 0:
        raise UsageError(f"{wait!r} is not a time to wait", "it has to be 0 or more seconds")
    model, why = resolve_model(path)
    node = None
    if placed:
        from pagecache_bpf.topology import node_of

        node = node_of(placed)
    output = None if record is None else output_path(record)
    request = LoadRequest(
        model,
        policy,
        bound,
        placed,
        node,
        None if template is None else os.fspath(template),
        keep,
        wait,
        output,
        None if output is None else device_limit(model),
        prefetch,
    )
    if not model.files:
        return Load(OpenLoad(request, why), request)
    with _lock:
        shared = _open.get(model.files)
        if shared is not None:
            shared.users += 1
        else:
            shared = OpenLoad(request, why, _ending.get(model.files))
            _open[model.files] = shared
    shared.start()
    return Load(shared, request)


def _close(shared: OpenLoad, keep: bool) -> None:
    """Take note that one user of a load is done with it; the last one ends it."""
    with _lock:
        shared.users -= 1
        shared.keep |= keep
        if shared.users:
            return
        if _open.get(shared.files) is shared:
            del _open[shared.files]
            _ending[shared.files] = shared
    shared.finish(shared.keep)
    with _lock:
        if _ending.get(shared.files) is shared:
            del _ending[shared.files]


def report() -> list[Report]:
    """Tell how the open loads of this process go.  Never raises.

    Returns:
        A report a load, in the order in which they began.
    """
    with _lock:
        loads = list(_open.values())
    return [shared.report() for shared in loads]


@dataclass(frozen=True)
class Tagged:
    """What tag() or untag() has done.

    Attributes:
        model: name of the model.
        policy: the policy that governs the files now; untag(): that did.
        files: how many of them.
        engine: the engine that the policy runs on, or "none".
        why: the reason if it is not all of them.
    """

    model: str
    policy: str
    files: int
    engine: str
    why: str = ""


def tag(path: PathLike, *, policy: str | None = None, model: str | None = None) -> Tagged:
    """Put the weights at PATH under an attached policy, until they are untagged; takes root.

    Args:
        path: as for load().
        policy: name of the policy; by default `sequential`.
        model: name of the model, a label of counters; by default that of the files.

    Returns:
        What was done; what this user or this machine cannot do is told there.

    Raises:
        UsageError: the path leads to no weights.
        PrivilegeError: a file may not be opened.
    """
    from pagecache_bpf.loads.attached import DEFAULT_POLICY
    from pagecache_bpf.loads.residency_snapshot import opened
    from pagecache_bpf.policy.engines import Engines
    from pagecache_bpf.weights.models import resolve

    found = resolve(path, model)
    name = policy or DEFAULT_POLICY
    if os.geteuid() != 0:
        why = "tags that outlive a process take root; load() governs files while it lasts"
        return Tagged(found.name, name, 0, NONE, why)
    done = 0
    try:
        with Engines() as engines:
            engine = engines.engine_of(name)
            if engine is None:
                why = f"the policy {name} is not attached (pagecache-bpf attach {name})"
                return Tagged(found.name, name, 0, NONE, why)
            for file in found.files:
                with opened(file) as fd:
                    engines.tag(fd, policy=name, model=found.name, path=str(file), replace=True)
                done += 1
    except (PagecacheError, OSError) as error:
        return Tagged(found.name, name, done, NONE if not done else engine or NONE, str(error))
    return Tagged(found.name, name, done, engine)


def untag(path: PathLike) -> Tagged:
    """Take the weights at PATH from the policies that govern them; takes root.

    Args:
        path: as for load().

    Returns:
        What was done: how many files were tagged and are no more.

    Raises:
        UsageError: the path leads to no weights.
        PrivilegeError: a file may not be opened.
    """
    from pagecache_bpf.loads.residency_snapshot import opened
    from pagecache_bpf.policy.engines import Engines

    model, _ = resolve_model(path)
    if os.geteuid() != 0:
        return Tagged(model.name, "", 0, NONE, "tags are root's")
    done, names, why = 0, set(), ""
    try:
        with Engines() as engines:
            places = {(tag.dev_major, tag.dev_minor, tag.ino): tag for tag in engines.tags()}
            for file in model.files:
                with opened(file) as fd:
                    status = os.fstat(fd)
                    device = status.st_dev
                    tag = places.get((os.major(device), os.minor(device), status.st_ino))
                    try:
                        engines.untag_fd(fd)
                    except UsageError as error:
                        why = str(error)
                        continue
                done += 1
                if tag is not None:
                    names.add(tag.policy)
    except (PagecacheError, OSError) as error:
        why = str(error)
    return Tagged(model.name, ", ".join(sorted(names)), done, NONE, why)


def residency(path: PathLike, *, tensors: bool = False) -> Residency:
    """Tell how much of the weights at PATH is in the page cache, in whole pages.

    Users who neither own the files nor may write them learn it from the controller, or not at
    all: the kernel does not tell them.

    Args:
        path: see load().
        tensors: whether to tell it of each tensor, too, which reads the headers.

    Returns:
        Bytes and resident bytes of all, of each file and of each tensor; None for what nobody tells
        this user.

    Raises:
        UsageError: the path does not lead to weights.
        PrivilegeError: a file may not be opened.
    """
    model, _ = resolve_model(path)
    return _residency(model, tensors)


def _residency(model: Model, tensors: bool) -> Residency:
    from pagecache_bpf.explain.model_residency import look

    found = look(model, tensors, _controller_says)
    paths = zip(model.files, found.files, strict=True)
    return Residency(
        found.bytes,
        found.resident_bytes,
        {str(path): file.resident_bytes for path, file in paths},
        {tensor.name: tensor.resident_bytes for tensor in found.tensors},
        found.time_ns,
        lambda: _residency(model, tensors),
    )


def _controller_says(path: Path) -> int | None:
    """Ask the controller what of a file is cached."""
    # Late: the kernel tells most callers itself.
    from pagecache_bpf.loads.through_controller import residency_or_none

    return residency_or_none(path)


def drop(path: PathLike) -> int | None:
    """Drop the weights at PATH from the page cache.

    Clean pages that nobody maps go.  With a controller, files that somebody's load is reading
    stay.

    Args:
        path: as for load().

    Returns:
        Bytes that went; None if that is not known.

    Raises:
        UsageError: the path leads to no weights.
        PrivilegeError: a file may not be opened.
    """
    from pagecache_bpf.ipc.public_client import is_running
    from pagecache_bpf.loads import through_controller
    from pagecache_bpf.loads.residency_snapshot import opened, resident_bytes

    model, _ = resolve_model(path)
    asked = is_running()
    total: int | None = 0
    for file in model.files:
        if asked:
            try:
                gone = through_controller.drop(file)
                total = None if total is None else total + (gone or 0)
                continue
            except (PagecacheError, OSError):  # it does not let us: as without one
                _log.debug("the controller did not drop %s", file, exc_info=True)
        with suppress(OSError), opened(file) as fd:
            before = resident_bytes(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            after = resident_bytes(fd)
            if total is not None:
                known = before is not None and after is not None
                total = total + max(0, (before or 0) - (after or 0)) if known else None
    return total


def prefetch(
    path: PathLike,
    *,
    extents: Sequence[tuple[int, int]] | None = None,
    devices: Device | Iterable[Device] | None = None,
    budget: int | str | None = None,
) -> int:
    """Read weights into the page cache now, at most as many bytes as a budget allows.

    Without a controller it returns when they are read.

    Args:
        path: as for load().
        extents: (offset, length) in bytes of PATH, which has to be one file then; by default all
            of it, in order.
        devices: as for load().
        budget: bytes ("8GiB") at most; by default half of the memory that is free.

    Returns:
        Bytes that were asked for.

    Raises:
        UsageError: an argument is wrong.
        PrivilegeError: a file may not be opened.
    """
    from pagecache_bpf.ipc.public_client import is_running
    from pagecache_bpf.loads import read_once, through_controller
    from pagecache_bpf.topology import node_of

    bound = parse_budget(budget)
    node = node_of(placements_of(devices))
    model, _ = resolve_model(path)
    if extents is not None and len(model.files) != 1:
        raise UsageError(
            f"extents of {path} are ambiguous", "it is more than one file", "Name one file"
        )
    wanted = read_once.wanted(model.files, extents, bound)
    total = 0
    for file, parts in wanted:
        if is_running():
            try:
                total += through_controller.prefetch(file, parts, node)
                continue
            except (PagecacheError, OSError):
                _log.debug("the controller did not prefetch %s", file, exc_info=True)
        total += guarded(lambda file=file, parts=parts: read_once.read(file, parts, node), 0)  # type: ignore[misc]
    return total


def _after_fork() -> None:
    """Forget all loads in a child of fork(): they are the parent's."""
    global _lock
    _lock = threading.Lock()
    for shared in [*_open.values(), *_ending.values()]:
        shared.forget()
    _open.clear()
    _ending.clear()


os.register_at_fork(after_in_child=_after_fork)
