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

import os
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

from pagecache_bpf.errors import PagecacheError, UsageError
from pagecache_bpf.loads.report import NONE, Report

if TYPE_CHECKING:
    from pagecache_bpf.loads.request import ServedLoad
    from pagecache_bpf.topology import Placement
    from pagecache_bpf.weights.models import Model

#: A device by name, or whatever names itself so, as a torch.device does.
Device = object
PathLike = str | os.PathLike[str]

_IN_MEMORY = "has-no-pages-to-read-ahead"
_T = TypeVar("_T")


class Load:
    """A load from its start to done().  Use it as a context manager, or call done().

    Threads may share it.  In a child of fork() it is inert: it stays the parent's.
    """

    def __init__(self, shared: _Shared, keep: bool) -> None:
        self._shared = shared
        self._keep = keep
        self._done = False
        self._pid = os.getpid()

    def __enter__(self) -> Load:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.done()

    def report(self) -> Report:
        """How it goes; after done(), how it went.  Never raises."""
        return self._shared.report()

    def done(self, keep: bool | None = None) -> Report:
        """The weights are where they belong: drop what the load has brought into the cache.

        keep: leave it there (default: as load() was told).  What was in the cache before stays
        in any case, and so does what somebody has mapped.  Calling it again does nothing.  Never
        raises.
        """
        if self._pid != os.getpid():
            return self.report()
        first, self._done = not self._done, True
        if first:
            _close(self._shared, self._keep if keep is None else keep)
        return self.report()


@dataclass
class _Shared:
    """What serves the loads of one set of files in this process: those share it."""

    key: tuple[Path, ...]
    way: ServedLoad
    last: Report
    users: int = 1
    keep: bool = False
    over: bool = False

    def report(self) -> Report:
        with _lock:
            if not self.over:
                self.last = _guarded(self.way.report, self.last)
            return self.last


_lock = threading.RLock()
_open: dict[tuple[Path, ...], _Shared] = {}


def load(
    path: PathLike,
    *,
    devices: Device | Iterable[Device] | None = None,
    policy: str | None = None,
    budget: int | str | None = None,
    template: PathLike | None = None,
    keep: bool = False,
    wait: float = 0.0,
) -> Load:
    """Have the weights at PATH read ahead of whoever loads them, until done().

    path: a weight file, a directory of shards, a Hugging Face snapshot or cache directory, or
    ORG/NAME if that is in the Hugging Face cache.  devices: the accelerators they are for
    ("cuda:0", "rocm:1", "npu:0", a PCI address, a UUID, a torch.device, or several); their pages
    go to the NUMA node next to them.  policy: by default the best there is.  budget: bytes
    ("8GiB") of them that may be in the page cache at a time; by default no bound but the memory.
    template: path of an I/O template, the order in which the loader will want the bytes.  keep:
    leave the pages in the cache at the end.  wait: seconds to queue when other loads have taken
    the controller's budget.

    Raises UsageError, and PrivilegeError for a file that may not be opened.
    """
    from pagecache_bpf.loads.begin import UnservedLoad, begin, check_policy
    from pagecache_bpf.loads.request import LoadRequest

    bound = _budget(budget)
    placed = _placements(devices)
    if policy is not None:
        check_policy(policy)
    if template is not None and not Path(template).is_file():
        raise UsageError(f"there is no template {template}", "it is not a file", "Check the path")
    if not wait >= 0:
        raise UsageError(f"{wait!r} is not a time to wait", "it has to be 0 or more seconds")
    model, why = resolve_model(path)
    from pagecache_bpf.topology import node_of

    request = LoadRequest(
        model,
        policy,
        bound,
        placed,
        node_of(placed),
        None if template is None else os.fspath(template),
        keep,
        wait,
    )
    with _lock:
        shared = _open.get(model.files) if model.files else None
        if shared is not None:
            shared.users += 1
            return Load(shared, keep)
        way: ServedLoad = UnservedLoad(request.blank(NONE, "none", why)) if why else begin(request)
        shared = _Shared(model.files, way, request.blank(NONE, "none", why))
        shared.last = shared.report()
        if model.files:
            _open[model.files] = shared
    return Load(shared, keep)


def _close(shared: _Shared, keep: bool) -> None:
    with _lock:
        shared.users -= 1
        shared.keep |= keep
        if shared.users:
            return
        _open.pop(shared.key, None)
        last = _guarded(lambda: shared.way.finish(shared.keep), shared.report())
        shared.over = True
        shared.last = last if last.done else replace(last, done=True)


def report() -> list[Report]:
    """How the open loads of this process go.  Never raises."""
    with _lock:
        return [each.report() for each in _open.values()]


@dataclass(frozen=True)
class Tagged:
    """What tag() has done: files governed by the policy now; why: the reason if none are."""

    model: str
    policy: str
    files: int
    engine: str
    why: str = ""


def tag(path: PathLike, *, policy: str | None = None, model: str | None = None) -> Tagged:
    """Put the weights at PATH under an attached policy, until they are untagged; takes root.

    policy: by default `sequential`.  Raises UsageError, PrivilegeError.
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


@dataclass(frozen=True)
class Residency:
    """How much of some weights is in the page cache: bytes, None where this user may not know.

    files: bytes by real path.  tensors: by name, where they were asked for.  time_ns: when the
    kernel was asked, in ns since 1970.
    """

    bytes: int
    resident_bytes: int | None
    files: dict[str, int | None]
    tensors: dict[str, int | None]
    time_ns: int

    @property
    def fraction(self) -> float | None:
        """Share of the weights that is in the page cache, from 0 to 1; None if it is not told."""
        if self.resident_bytes is None:
            return None
        return self.resident_bytes / self.bytes if self.bytes else 0.0


def residency(path: PathLike, *, tensors: bool = False) -> Residency:
    """Tell how much of the weights at PATH is in the page cache, in whole pages.

    Users who neither own the files nor may write them learn it from the controller, or not at
    all: the kernel does not tell them.

    Args:
        path: see load().
        tensors: whether to tell it of each tensor, too, which reads the headers.

    Raises:
        UsageError: the path does not lead to weights.
        PrivilegeError: a file may not be opened.
    """
    from pagecache_bpf.explain.residency import look

    model, _ = resolve_model(path)
    found = look(model, tensors, residency_through_controller)
    paths = zip(model.files, found.files, strict=True)
    return Residency(
        found.bytes,
        found.resident_bytes,
        {str(path): file.resident_bytes for path, file in paths},
        {tensor.name: tensor.resident_bytes for tensor in found.tensors},
        found.time_ns,
    )


def residency_through_controller(path: Path) -> int | None:
    """Return the bytes of a file that the controller says are cached; None if it does not."""
    from pagecache_bpf.loads import through_controller

    return _guarded(lambda: through_controller.residency(path), None)


def drop(path: PathLike) -> int | None:
    """Drop the weights at PATH from the page cache; bytes that went, None if that is not known.

    Clean pages that nobody maps go.  With a controller, files that somebody's load is reading
    stay.  Raises UsageError, PrivilegeError.
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
            except (PagecacheError, OSError):
                pass  # it does not let us: as without one
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
    """Read weights into the page cache now, at most a budget of them; bytes asked for.

    extents: (offset, length) of PATH, which has to be one file then; by default all of it, in
    order.  budget: by default half of the memory that is free.  Without a controller it returns
    when they are read.  Raises UsageError, PrivilegeError.
    """
    from pagecache_bpf.ipc.public_client import is_running
    from pagecache_bpf.loads import read_once, through_controller
    from pagecache_bpf.topology import node_of

    bound = _budget(budget)
    node = node_of(_placements(devices))
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
                pass
        total += _guarded(lambda file=file, parts=parts: read_once.read(file, parts, node), 0)  # type: ignore[misc]
    return total


# What the functions share.


def _budget(value: int | str | None) -> int | None:
    if value is None:
        return None
    if isinstance(value, str):
        from pagecache_bpf.units import parse_size

        value = parse_size(value)
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise UsageError(
            f"{value!r} is not a budget", "it has to be more than 0 bytes", 'Write it like "8GiB"'
        )
    return value


def _placements(devices: Device | Iterable[Device] | None) -> tuple[Placement, ...]:
    if devices is None:
        return ()
    if isinstance(devices, str) or not isinstance(devices, Iterable):
        devices = [devices]
    names = [str(each) for each in devices]
    if not names:
        return ()
    from pagecache_bpf import topology

    machine = topology.read()
    return tuple(topology.place_or_unknown(each, machine) for each in names)


def resolve_model(path: PathLike) -> tuple[Model, str]:
    """The model at PATH; and why nothing can be read ahead of it, if so.  Raises as resolve()."""
    from pagecache_bpf.weights.models import Model, resolve

    try:
        return resolve(path), ""
    except UsageError as error:
        # Weights in memory are no mistake: there is nothing to be done for them.
        if not error.docs.endswith(_IN_MEMORY):
            raise
        return Model(Path(path).name or "model", Path(path), ()), str(error)


def _guarded(call: Callable[[], _T], otherwise: _T) -> _T:
    try:
        return call()
    except Exception:  # a server must not end because of us
        return otherwise


def _after_fork() -> None:
    """In a child nothing is open: the loads are the parent's."""
    global _lock
    _lock = threading.RLock()
    for shared in _open.values():
        shared.over = True
        with suppress(Exception):
            shared.way.forget()
    _open.clear()


os.register_at_fork(after_in_child=_after_fork)
