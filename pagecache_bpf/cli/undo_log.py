# SPDX-License-Identifier: Apache-2.0
"""Makes a command's changes all or nothing, also when it is interrupted or killed.

A command that attaches, tags, untags or detaches takes a machine-wide lock, and before it changes
anything it writes into the lock's file which steps lead to a settled state: back for `attach` and
`tag`, onward for `detach` and `untag`.  Whoever ends early takes these steps itself.  After
SIGKILL nobody does, but the lock is free and the file is not empty, so the next command takes
them.  The steps ask for what is there first and can be taken twice.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from pagecache_bpf._run_dir import RUN_DIR
from pagecache_bpf.cli.interrupts import deferred
from pagecache_bpf.cli.output import Output, add_note
from pagecache_bpf.errors import PagecacheError
from pagecache_bpf.kernel.kernelfs import LIVE
from pagecache_bpf.units import plural

if TYPE_CHECKING:
    from pagecache_bpf.kernel.control_device import ExitRecord

PATH = RUN_DIR / "change.lock"
WAIT_SECONDS = 30.0
_WARN_SECONDS = 1.0
_POLL_SECONDS = 0.05


@dataclass
class Steps:
    """What leads to a settled state.

    Args:
        undo: whether the steps take the command back (True) or finish it.
        detach: names of policies to detach if they are attached.
        policy: the policy that the command puts files under; empty for others.
        untag_paths: files whose tag is taken off if they are under `policy` now.
        untag: files whose tag is taken off, as (dev_major, dev_minor, ino, generation).
        retag: tags of other policies that were replaced: path, policy, model.
        release: names of models whose claim on the budget is given up.
        unload: whether the kernel module is unloaded.
    """

    undo: bool
    detach: list[str] = field(default_factory=list)
    policy: str = ""
    untag_paths: list[str] = field(default_factory=list)
    untag: list[tuple[int, int, int, int]] = field(default_factory=list)
    retag: list[dict[str, str]] = field(default_factory=list)
    release: list[str] = field(default_factory=list)
    unload: bool = False


_NOTHING_LEFT = "nothing was left"


class Change:
    """The one change of policies or tags that is under way on this machine.

    Use it as a context manager and call begin() before the first change.  When the block raises,
    the steps that begin() was given are taken and noted on the exception.

    Args:
        command: what the user typed, for messages.
        out: where warnings go.
        required: refuse to go on where the log cannot be written.  False for commands that take
            things away: those have to work when /run is full.

    Attributes:
        recovered: the policies that were detached because a command before this one was killed,
            with the kernel's record of their end.

    Raises:
        PagecacheError: another command has the lock for too long, or the log cannot be written.
    """

    def __init__(self, command: str, out: Output, *, required: bool = True) -> None:
        self._command, self._out, self._required = command, out, required
        self._fd = -1
        self._steps: Steps | None = None
        self.recovered: dict[str, ExitRecord | None] = {}

    def __enter__(self) -> Change:
        with deferred():
            try:
                PATH.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                self._fd = os.open(PATH, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except OSError as error:
                if self._required:
                    raise cannot_write(PATH, error) from error
        if self._fd >= 0:
            try:
                self._wait()
                with deferred():
                    self.recovered = _recover(self._fd, self._out)
            except BaseException:
                os.close(self._fd)
                raise
        return self

    def begin(self, steps: Steps) -> None:
        """Write down the steps; from here on the block may change things.

        Args:
            steps: what takes the change back, should this process not get to its end.

        Raises:
            PagecacheError: they cannot be written, and nothing was changed.
        """
        with deferred():
            record = {"command": self._command, "pid": os.getpid(), **asdict(steps)}
            if self._fd >= 0:
                try:
                    _write(self._fd, json.dumps(record).encode())
                except OSError as error:
                    with suppress(OSError):
                        os.ftruncate(self._fd, 0)
                    if self._required:
                        raise cannot_write(PATH, error) from error
            self._steps = steps

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            # Whether a signal comes before or after this line decides between undone and done.
            self._close()
            return
        with deferred():
            settled = True
            if self._steps is not None:
                text, settled, _ = _take(self._steps)
                # A command that was refused has done nothing; one that was interrupted may have.
                if not (isinstance(error, PagecacheError) and text.endswith(_NOTHING_LEFT)):
                    add_note(error, text)
            self._close(settled)

    def _close(self, settled: bool = True) -> None:
        if self._fd >= 0:
            if settled:  # or else the next command tries again
                os.ftruncate(self._fd, 0)
            os.close(self._fd)
            self._fd = -1

    def _wait(self) -> None:
        """Take the lock.  Raises PagecacheError when its holder does not come to an end."""
        start = time.monotonic()
        told = False
        while not _try_lock(self._fd):
            waited = time.monotonic() - start
            if waited > _WARN_SECONDS:
                from pagecache_bpf.ipc.client import is_stopped

                command, pid = _holder()
                stopped = pid is not None and is_stopped(pid)
                if stopped or waited > WAIT_SECONDS:
                    raise _busy(command, pid, stopped)
                if not told:
                    self._out.warn(f"waiting for process {pid} (`{command}`)")
                    told = True
            time.sleep(_POLL_SECONDS)


def recover(out: Output) -> dict[str, ExitRecord | None]:
    """Settle what a command that was killed has left; nothing while a command is under way.

    Args:
        out: is told what was left and what was done about it.

    Returns:
        The policies that were detached, with the records of their end.
    """
    try:
        if not PATH.stat().st_size:
            return {}
        fd = os.open(PATH, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return {}
    try:
        if _try_lock(fd):
            with deferred():
                return _recover(fd, out)
        return {}
    finally:
        os.close(fd)


def cannot_write(path: Path, error: OSError) -> PagecacheError:
    """Return the error for a file in the run directory that cannot be written.

    Args:
        path: the file.
        error: what writing it raised.

    Returns:
        The error, to raise; it says that nothing was changed.
    """
    return PagecacheError(
        f"{path} cannot be written",
        error.strerror or str(error),
        f"Nothing was changed. Make {path.parent} writable and free some of its space, or name "
        "another place in PAGECACHE_BPF_RUN_DIR",
        "docs/troubleshooting.md#cannot-be-written",
    )


def _recover(fd: int, out: Output) -> dict[str, ExitRecord | None]:
    """Take the steps of a command that did not live to do so.  The lock is held.

    Returns:
        The policies that were detached, with the records of their end.
    """
    data = os.pread(fd, os.fstat(fd).st_size, 0)
    if not data:
        return {}
    try:
        record: dict[str, Any] = json.loads(data)
        command, pid = record.pop("command"), record.pop("pid")
        steps = Steps(**record)
    except (ValueError, TypeError, KeyError, AttributeError):
        os.ftruncate(fd, 0)  # it was killed while it wrote, before its first change
        return {}
    text, settled, detached = _take(steps)
    out.warn(f"`{command}` (process {pid}) came to an end half-way; {text}")
    if settled:
        os.ftruncate(fd, 0)
    return detached


def _take(steps: Steps) -> tuple[str, bool, dict[str, ExitRecord | None]]:
    """Take the steps.

    Returns:
        What was done, in words; whether the state is settled now; and the policies that were
        detached, with the records of their end.

    A file that fails is named and the rest still done.  The state is not settled when an engine
    does not answer.
    """
    from pagecache_bpf.kernel import kmod
    from pagecache_bpf.policy.engines import Engines

    done: list[str] = []
    failed: list[str] = []
    detached: dict[str, ExitRecord | None] = {}
    settled = True
    try:
        with Engines() as engines:
            attached = set(engines.attached())
            for name in steps.detach:
                if name in attached:
                    detached[name] = engines.detach(name)
                    done.append(f"the policy {name} is detached")
            untagged = _untag(engines, steps, failed)
            if untagged:
                again = " again" if steps.undo else ""
                done.append(f"{plural(untagged, 'file')} untagged{again}")
            restored = _retag(engines, steps, failed)
            if restored:
                done.append(f"{restored} of them back under their former policy")
            if engines.agent is not None:
                for name in steps.release:
                    engines.agent.release(name)
        if steps.unload and kmod.unload():
            done.append("the kernel module is unloaded")
    except PagecacheError as error:
        failed.append(str(error))
        settled = False
    text = f"{'rolled back' if steps.undo else 'finished'}: {', '.join(done) or _NOTHING_LEFT}"
    return (f"{text}; not done: {'; '.join(failed)}" if failed else text), settled, detached


def _untag(engines: Any, steps: Steps, failed: list[str]) -> int:
    """Take off the tags that are there; return how many."""
    from pagecache_bpf.kernel.file_key import identity_of, open_to_read

    there = {tag.identity: tag.policy for tag in engines.tags()}
    ours = {identity[:3] for identity, policy in there.items() if policy == steps.policy}
    count = 0
    for path in steps.untag_paths:
        try:
            fd = open_to_read(Path(path))
        except PagecacheError as error:
            failed.append(str(error))
            continue
        try:
            if identity_of(fd)[:3] in ours:
                engines.untag_fd(fd)
                count += 1
        except PagecacheError as error:
            failed.append(f"{path} ({error.why or error.what})")
        finally:
            os.close(fd)
    for identity in map(tuple, steps.untag):
        if identity in there:
            with suppress(PagecacheError):  # it has gone in between
                engines.untag(*identity)
                count += 1
    return count


def _retag(engines: Any, steps: Steps, failed: list[str]) -> int:
    """Put files back under the policies that they were taken from; return how many."""
    from pagecache_bpf.kernel.file_key import open_to_read

    held = {(tag.path, tag.policy) for tag in engines.tags()}
    count = 0
    for tag in steps.retag:
        if (tag["path"], tag["policy"]) in held:
            continue
        try:
            fd = open_to_read(Path(tag["path"]))
            try:
                engines.tag(fd, policy=tag["policy"], model=tag["model"], path=tag["path"])
                count += 1
            finally:
                os.close(fd)
        except PagecacheError as error:
            failed.append(f"{tag['path']} ({error.why or error.what})")
    return count


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _write(fd: int, data: bytes) -> None:
    os.ftruncate(fd, 0)
    view, at = memoryview(data), 0
    while at < len(view):
        at += os.pwrite(fd, view[at:], at)


def _holder() -> tuple[str, int | None]:
    """Return the command that holds the lock and its process, as far as they were written down."""
    try:
        record = json.loads(PATH.read_bytes())
        return str(record["command"]), int(record["pid"])
    except (OSError, ValueError, KeyError, TypeError):
        return "pagecache-bpf", _lock_owner()


def _lock_owner() -> int | None:
    """Return the process that holds the lock, by /proc/locks; None where that does not tell."""
    with suppress(OSError, ValueError, IndexError):
        inode = str(PATH.stat().st_ino)
        for line in (LIVE.read("/proc/locks") or "").splitlines():
            words = line.split()
            if words[1] == "FLOCK" and words[5].split(":")[-1] == inode:
                return int(words[4])
    return None


def _busy(command: str, pid: int | None, stopped: bool) -> PagecacheError:
    if stopped:
        why = f"process {pid} (`{command}`) is changing policies and is stopped"
        fix = f"Let it go on (kill -CONT {pid}), or end it (kill -KILL {pid}): it is undone then"
    else:
        why = (
            f"process {pid or 'unknown'} (`{command}`) has been changing policies for "
            f"{WAIT_SECONDS:.0f} s"
        )
        fix = "Wait for it, or end it (kill): it is undone then"
    return PagecacheError(
        "nothing was changed", why, fix, "docs/troubleshooting.md#nothing-was-changed"
    )
