# SPDX-License-Identifier: Apache-2.0
"""Loads, attaches, pins and detaches policies.  Root only.

A policy is attached as long as its link lives, and the link lives as long as a process holds it
or it has a name in bpffs.  So the state is the link's name and nothing else:

    /sys/fs/bpf/pagecache/NAME/link      the policy is attached
    /sys/fs/bpf/pagecache/NAME/maps/MAP  its maps, to look into

The link is pinned last and unpinned first.  A loader that dies, wherever it is, leaves either
an attached policy or a directory without a link, which means nothing and is removed by the next
attach or detach of that name.  Loaders take turns by a lock on the directory, which the kernel
releases when they die.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from pagecache_bpf.errors import (
    PagecacheError,
    PolicyRejected,
    PrivilegeError,
    UnsupportedError,
    UsageError,
)
from pagecache_bpf.kernel import libbpf
from pagecache_bpf.kernel.control_device import Device, ExitRecord
from pagecache_bpf.kernel.kernelfs import LIVE
from pagecache_bpf.policy import objects
from pagecache_bpf.policy.catalog import RODATA, PolicyInfo, check_knobs

BPFFS = Path("/sys/fs/bpf")
PIN_ROOT = BPFFS / "pagecache"
LOCK_SECONDS = 30.0
EXIT_SECONDS = 5.0


_Answer = TypeVar("_Answer")


class Attachment:
    """An attached policy.  A context manager: leaving it detaches the policy, unless it is pinned.

    Args:
        name: the policy's name.
        link: its attachment; None: it is pinned.
    """

    def __init__(self, name: str, link: libbpf.Link | None) -> None:
        self.name = name
        self._link = link

    @property
    def pinned(self) -> bool:
        """Whether the policy stays attached when this process ends."""
        return self._link is None

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Detach the policy; one that is pinned stays attached until detach()."""
        if self._link:
            self._link.close()


def attach(
    info: PolicyInfo,
    knobs: Mapping[str, int] | None = None,
    *,
    pin: bool = True,
    log_dir: Path | None = None,
    sizes: Mapping[str, int] | None = None,
) -> Attachment:
    """Load a policy into the kernel and attach it on engine struct_ops.

    Args:
        info: what catalog.find() returned.
        knobs: numbers by the knobs' names; the others have their defaults.
        pin: keep it attached when this process ends.
        log_dir: where the verifier's whole log goes if the policy is refused (default:
            /run/pagecache-bpf).
        sizes: elements that maps must have room for, by name.

    Returns:
        The attached policy.

    Raises:
        PrivilegeError: the caller is not root.
        UnsupportedError: there is no module or no libbpf.
        UsageError: a knob is wrong, or the object is damaged.
        PolicyRejected: the verifier or the policy's own init refuses, or a hook cannot be attached.
        PagecacheError: the policy is attached already.
    """
    knobs, sizes = knobs or {}, sizes or {}
    _require_root("attach a policy")
    check_knobs(info, knobs)
    objects.built(info)
    libbpf.library()
    with Device() as device:
        if not pin:
            return Attachment(info.name, _load_and_attach(info, knobs, sizes, device, log_dir))
        with locked():
            _remove_stale_pins(info.name, device)
            _attach_pinned(info, knobs, sizes, device, log_dir)
            return Attachment(info.name, None)


def detach(name: str) -> ExitRecord | None:
    """Detach a pinned policy; one that has ended by itself is cleaned up after.

    Args:
        name: the policy's.

    Returns:
        How it ended; None if the kernel did not report that within EXIT_SECONDS, for instance
        because another process holds the link.

    Raises:
        UsageError: there is no such policy.
        PrivilegeError: the caller is not root.
    """
    _require_root("detach a policy")
    with locked():
        if name not in pinned():
            # Compared with what is there, never joined to a path: it may be anything.
            if name in (path.name for path in PIN_ROOT.iterdir()):
                _remove_pins(name)
            known = ", ".join(pinned())
            raise UsageError(
                f"the policy {name} is not attached",
                f"attached are {known}" if known else "no policy is",
            )
        with Device() as device:
            since = last_exit(device)
            pinned_ns = (PIN_ROOT / name / "link").stat().st_ctime_ns
            _remove_pins(name)

            def ended() -> ExitRecord | None:
                # A record older than the pin is of an earlier attachment of that name.
                return newest_exit(
                    device,
                    name,
                    lambda record: (
                        record.kind != "replaced"
                        and (record.seq > since or record.time_ns >= pinned_ns)
                    ),
                )

            return _wait(ended, EXIT_SECONDS)


def pinned() -> list[str]:
    """Return the names of the policies whose links are pinned.

    Returns:
        The names, sorted.

    Raises:
        PrivilegeError: the caller is not root.
    """
    try:
        return sorted(path.parent.name for path in PIN_ROOT.glob("*/link"))
    except PermissionError as error:
        raise PrivilegeError(f"{PIN_ROOT} cannot be read", "this needs root") from error


def knobs_of(name: str) -> dict[str, int]:
    """Return the knobs of an attached policy as the kernel has them, in its own memory.

    Args:
        name: the policy's.

    Returns:
        Numbers by the knobs' names.

    Raises:
        UsageError: there is no such policy.
        PrivilegeError: the caller is not root.
        UnsupportedError: there is no libbpf.
        PagecacheError: the kernel does not let the policy's constants be read.
    """
    _require_root("read a policy's knobs")
    if name not in pinned():
        raise UsageError(f"the policy {name} is not attached")
    path = PIN_ROOT / name / "maps" / RODATA.strip(".")
    if not path.exists():
        return {}
    try:
        data, btf = libbpf.read_pinned(path)
    except OSError as error:
        raise PagecacheError(f"{path} cannot be read", error.strerror or str(error)) from error
    return {
        knob.name: int.from_bytes(
            data[knob.offset : knob.offset + knob.size],
            sys.byteorder,
            signed=btf.int_signed(knob.type_id),
        )
        for knob in objects.knob_variables(btf)
    }


# Loading.


def _attach_pinned(
    info: PolicyInfo,
    knobs: Mapping[str, int],
    sizes: Mapping[str, int],
    device: Device,
    log_dir: Path | None,
) -> None:
    """Attach a policy and pin its link and maps; after a failure nothing is pinned."""
    directory = PIN_ROOT / info.name
    (directory / "maps").mkdir(parents=True, mode=0o700)
    try:
        link = _load_and_attach(info, knobs, sizes, device, log_dir, directory / "maps")
        try:
            link.pin(directory / "link")
        finally:
            # From here on only the pin holds it, so that unpinning detaches.
            link.close()
    except OSError as error:
        _remove_pins(info.name)
        raise PagecacheError(
            f"the policy {info.name} cannot be pinned", f"{error.filename}: {error.strerror}"
        ) from error
    except BaseException:
        _remove_pins(info.name)
        raise


def _load_and_attach(
    info: PolicyInfo,
    knobs: Mapping[str, int],
    sizes: Mapping[str, int],
    device: Device,
    log_dir: Path | None,
    maps: Path | None = None,
) -> libbpf.Link:
    """Load a policy, pin its maps in the directory `maps` if one is given, and attach it."""

    def prepare(opened: libbpf.Object) -> None:
        objects.set_knobs(opened, knobs)
        objects.enlarge_maps(opened, sizes)

    refused = f"the kernel refused to load the policy {info.name}"
    with objects.load(info, prepare, log_dir, refused) as opened, libbpf.Messages() as messages:
        if maps:
            objects.pin_maps(opened, maps)
        return _attach_table(info, opened, device, messages.lines)


def _attach_table(
    info: PolicyInfo, opened: libbpf.Object, device: Device, messages: list[str]
) -> libbpf.Link:
    """Attach the struct_ops map of an object.  Raises PagecacheError."""
    since = last_exit(device)
    table = objects.table_of(info, opened)
    try:
        return table.attach_struct_ops()
    except OSError as error:
        raise _attach_error(info, device, since, messages, error) from error


def _attach_error(
    info: PolicyInfo, device: Device, since: int, messages: list[str], error: OSError
) -> PagecacheError:
    """Turn the errno of attaching into why, with what the module has recorded about it."""
    if error.errno == errno.EEXIST:
        return _already_attached(info.name)
    what = f"the policy {info.name} was not attached"
    # The reason is in the record that the module has written, if the policy got that far.
    record = newest_exit(device, info.name, lambda record: record.seq > since)
    if record:
        return PolicyRejected(what, str(record))
    if error.errno == errno.EPROTO:
        return UnsupportedError(
            what,
            "it was built for another version of the module",
            "Build the policy anew (make bpf), or load the module that goes with it",
        )
    return PolicyRejected(what, "; ".join([*messages[:2], error.strerror or str(error)]))


# Pins.


def _already_attached(name: str) -> PagecacheError:
    """Make the error for a name that an attached policy has."""
    fix = f"Detach it first (pagecache-bpf detach {name})"
    if name not in pinned():
        fix = "It is not pinned: end the process that holds it"
    return PagecacheError(
        f"the policy {name} was not attached", "a policy of that name is attached already", fix
    )


def _remove_stale_pins(name: str, device: Device) -> None:
    """Remove the pins that a dead loader, or a policy that has ended by itself, has left.

    Raises PagecacheError if a policy of that name is attached.
    """
    if any(policy.name == name for policy in device.policies()):
        raise _already_attached(name)
    if (PIN_ROOT / name).is_dir():
        _remove_pins(name)


def _remove_pins(name: str) -> None:
    """Unpin a policy's link, which detaches it, and then its maps."""
    directory = PIN_ROOT / name
    (directory / "link").unlink(missing_ok=True)
    # "new" is what a process has left that died while it replaced the policy.
    for maps in (directory / "maps", directory / "new"):
        remove_directory(maps)
    with suppress(FileNotFoundError):
        directory.rmdir()


def remove_directory(directory: Path) -> None:
    """Remove a directory of pins, if it is there.

    Args:
        directory: of pins alone.
    """
    with suppress(FileNotFoundError):
        for path in list(directory.iterdir()):
            path.unlink(missing_ok=True)
        directory.rmdir()


@contextmanager
def locked() -> Iterator[None]:
    """Hold a lock, so that no other process attaches, replaces or detaches meanwhile.

    Raises:
        PagecacheError: another one holds it for LOCK_SECONDS.
        PrivilegeError: the directory of the pins is not root's.
    """
    _mount_bpffs()
    PIN_ROOT.mkdir(mode=0o700, exist_ok=True)
    fd = os.open(PIN_ROOT, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        status = os.fstat(fd)
        if status.st_uid != os.getuid() or status.st_mode & 0o002:
            raise PrivilegeError(
                f"{PIN_ROOT} is not root's alone",
                f"it is of user {status.st_uid}, with mode {stat.S_IMODE(status.st_mode):o}: "
                "somebody made it where bpffs was mounted for everybody",
                f"Look at what is in it, and remove it: rm -r {PIN_ROOT}",
            )

        def taken() -> bool | None:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return None
            return True

        if not _wait(taken, LOCK_SECONDS):
            raise PagecacheError(
                "nothing was changed",
                f"another process has been attaching or detaching for {LOCK_SECONDS:.0f} s",
                f"See who holds {PIN_ROOT} (fuser -v {PIN_ROOT})",
            )
        yield
    finally:
        os.close(fd)


def _mount_bpffs() -> None:
    """Mount bpffs for root alone, unless it is mounted.  Raises UnsupportedError."""
    kinds = [mount.fstype for mount in LIVE.mounts() if mount.target == str(BPFFS)]
    if kinds and kinds[-1] == "bpf":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"bpf", os.fsencode(BPFFS), b"bpf", 0, b"mode=0700"):
        raise UnsupportedError(
            f"the BPF file system cannot be mounted at {BPFFS}",
            os.strerror(ctypes.get_errno()),
            f"Mount it by hand: mount -t bpf bpf {BPFFS}",
        )


# Records and waiting.


def last_exit(device: Device) -> int:
    """Return the number of the newest exit record.

    Args:
        device: the module's.

    Returns:
        The number; 0 if there is no record.
    """
    return max((record.seq for record in device.exits()), default=0)


def newest_exit(
    device: Device, name: str, wanted: Callable[[ExitRecord], bool]
) -> ExitRecord | None:
    """Return the newest exit record of a policy that is wanted.

    Args:
        device: the module's.
        name: the policy's.
        wanted: which records count.

    Returns:
        The record; None if there is none.
    """
    found = [record for record in device.exits() if record.policy == name and wanted(record)]
    return found[-1] if found else None


def _wait(ask: Callable[[], _Answer | None], seconds: float) -> _Answer | None:
    """Ask again and again, ever more slowly, until there is an answer or the time is over."""
    deadline, pause = time.monotonic() + seconds, 0.001
    while (answer := ask()) is None and time.monotonic() < deadline:
        time.sleep(pause)
        pause = min(pause * 2, 0.1)
    return answer


def _require_root(what: str) -> None:
    """Check that this process is root.  Raises PrivilegeError."""
    if os.geteuid() != 0:
        raise PrivilegeError(f"only root can {what}", "", "Run the command with sudo")
