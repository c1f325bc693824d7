# SPDX-License-Identifier: Apache-2.0
"""The module's control device, /dev/pagecache_bpf: tags, attached policies, how policies ended.

Root only.  The kernel is the only place where this state lives; nothing is kept here.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from pagecache_bpf.errors import PagecacheError, UnsupportedError, UsageError
from pagecache_bpf.kernel import abi
from pagecache_bpf.kernel.abi import COUNTERS as COUNTERS
from pagecache_bpf.kernel.abi import Counter as Counter
from pagecache_bpf.kernel.abi import ExitKind, Hook
from pagecache_bpf.kernel.device_errors import lend_error, open_error, tag_error
from pagecache_bpf.kernel.file_key import identity_at
from pagecache_bpf.kernel.kernelfs import asks_server

PATH = Path("/dev") / abi.DEVICE

_Record = TypeVar(
    "_Record", abi.pagecache_tag_record, abi.pagecache_policy_record, abi.pagecache_exit_record
)


@dataclass(frozen=True)
class Info:
    """What the loaded module can do, and its bounds.

    Attributes:
        abi_version: version of the ABI that it speaks.
        hooks: names of the hooks that it can call.
        policies: how many are attached.
        tags: how many files are tagged.
        max_answer_pages: pages that one answer of a readahead hook may ask for.
        max_extent_pages: pages that one prefetch may ask for.
        max_inflight_pages: pages that a policy may have queued for prefetch.
        workers_per_node: threads that prefetch, by NUMA node.
        max_invalid: invalid answers after which a policy is ended.
        max_keep_pages: pages that one policy may keep from reclaim.
        max_evict_us: microseconds that an evict hook may take, on average.
        lent: how many files sessions lend now; see Device.lend().
    """

    abi_version: int
    hooks: tuple[str, ...]
    policies: int
    tags: int
    max_answer_pages: int
    max_extent_pages: int
    max_inflight_pages: int
    workers_per_node: int
    max_invalid: int
    max_keep_pages: int
    max_evict_us: int
    lent: int


@dataclass(frozen=True)
class Tag:
    """A file that a policy governs.

    Attributes:
        dev_major: major number of the file system's device; part of the identity as the next three.
        dev_minor: its minor number.
        ino: the inode's number.
        generation: the inode's generation.
        policy: the policy's name.
        model: the name that statistics have for the file's model.
        model_id: the number that programs know the model by.
        path: where the file was when it was tagged; for people, and perhaps without its beginning.
        active: whether the policy is attached; if not, it governs the file again once it is.
        resident_pages: pages of the file in the page cache.
        lent: how many sessions lend the file now.
    """

    dev_major: int
    dev_minor: int
    ino: int
    generation: int
    policy: str
    model: str
    model_id: int
    path: str
    active: bool
    resident_pages: int
    lent: int = 0

    @property
    def identity(self) -> tuple[int, int, int, int]:
        """Device, inode and generation, which no other file has."""
        return self.dev_major, self.dev_minor, self.ino, self.generation


@dataclass(frozen=True)
class PolicyStatus:
    """An attached policy.

    Attributes:
        name: the policy's name.
        attached_ns: when it was attached, in nanoseconds since 1970.
        governed_pages: pages of its files in the page cache.
        inflight_pages: pages that are being read ahead for it.
        hooks: names of the hooks that it has.
        tags: how many files it governs.
        kept_pages: pages that it keeps from reclaim.
        keep_max_pages: how many it may keep.
        counters: totals since it was attached, by name, in the ABI's order.
    """

    name: str
    attached_ns: int
    governed_pages: int
    inflight_pages: int
    hooks: tuple[str, ...]
    tags: int
    kept_pages: int
    keep_max_pages: int
    counters: dict[str, int]


@dataclass(frozen=True)
class ExitRecord:
    """How a policy ended.

    Attributes:
        seq: number of the record; later ones are greater.
        time_ns: when, in nanoseconds since 1970.
        policy: the policy's name.
        kind: who ended it, as the names of abi.ExitKind in lower case.
        code: what the policy gave, or a negative errno.
        hook: the hook in which it happened, as the names of abi.Hook in lower case.
        reason: why, in a few words.
        message: what the policy has to say; "" for none.
    """

    seq: int
    time_ns: int
    policy: str
    kind: str
    code: int
    hook: str
    reason: str
    message: str

    def __str__(self) -> str:
        text = f"{self.reason}: {self.message}" if self.message else self.reason
        return f"{text} (code {self.code})" if self.code else text


class Device:
    """The open control device.  A context manager.

    Args:
        path: the device.

    Raises:
        UnsupportedError: the module is not loaded, or speaks another version of the ABI.
        PrivilegeError: the caller may not use it.
    """

    def __init__(self, path: Path = PATH) -> None:
        self._fd = -1
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise open_error(path, error) from error
        try:
            version = self._raw_info().abi_version
            if version != abi.ABI_VERSION:
                raise UnsupportedError(
                    "the loaded module and this package do not fit together",
                    f"the module has ABI version {version}, the package {abi.ABI_VERSION}",
                    "Unload the module (rmmod pagecache_bpf) and load the one built with it",
                )
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Device:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the device."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _ioctl(self, request: int, argument: ctypes.Structure) -> None:
        """Call ioctl(2); what the kernel answers is in the argument afterwards.  Raises OSError."""
        fcntl.ioctl(self._fd, request, argument)

    def _raw_info(self) -> abi.pagecache_info:
        """Ask for the module's version and bounds.  Raises UnsupportedError without an answer."""
        info = abi.pagecache_info()
        try:
            self._ioctl(abi.IOC_INFO, info)
        except OSError as error:
            raise UnsupportedError(
                f"{PATH} does not answer", error.strerror or str(error), "Load the module anew"
            ) from error
        return info

    def info(self) -> Info:
        """Ask the module what it can do and where its bounds are.

        Returns:
            Its version, hooks and bounds.

        Raises:
            PagecacheError: the module refuses.
        """
        raw = self._raw_info()
        return Info(
            abi_version=raw.abi_version,
            hooks=_hook_names(raw.hooks),
            policies=raw.policies,
            tags=raw.tags,
            max_answer_pages=raw.max_answer_pages,
            max_extent_pages=raw.max_extent_pages,
            max_inflight_pages=raw.max_inflight_pages,
            workers_per_node=raw.workers_per_node,
            max_invalid=raw.max_invalid,
            max_keep_pages=raw.max_keep_pages,
            max_evict_us=raw.max_evict_us,
            lent=raw.lent,
        )

    def tag(self, fd: int, *, policy: str, model: str, path: str, replace: bool = False) -> None:
        """Let an attached policy govern an open file.

        Args:
            fd: the file's descriptor.
            policy: the name of the attached policy.
            model: the name that statistics have for the file's model.
            path: for people to read; a longer one than the ABI takes is cut at its front.
            replace: take the file over if another policy governs it.

        Raises:
            UsageError: the file has no pages of its own or is tagged already, the policy is not
                attached, or a name is too long.
            PagecacheError: the module refuses for another reason.
        """
        request = abi.pagecache_tag_request(
            fd=fd,
            flags=abi.TAG_REPLACE if replace else 0,
            policy=_fitting(policy, abi.NAME_LEN, "policy"),
            model=_fitting(model, abi.MODEL_LEN, "model"),
            path=os.fsencode(path)[-(abi.PATH_LEN - 1) :],
        )
        try:
            self._ioctl(abi.IOC_TAG, request)
        except OSError as error:
            raise tag_error(error, path, policy) from error

    def lend(self, fd: int) -> None:
        """Lend a tagged file: its policy can read ahead in it for readers of the model's others.

        Files are lent in the order in which they are read.  The loan ends with take_back(), or when
        this device is closed, which the kernel does for a process that was killed.  Until then the
        file's mount is in use, and the blocks of a file that is deleted are not free.

        Args:
            fd: the file's descriptor, open for reading; it can be closed afterwards.

        Raises:
            UsageError: the file is not tagged, is lent from here already, or cannot be lent.
            PagecacheError: the module refuses for another reason.
        """
        try:
            self._ioctl(abi.IOC_LEND, abi.pagecache_lend_request(fd=fd))
        except OSError as error:
            raise lend_error(error, fd) from error

    def take_back(self, fd: int) -> None:
        """End the loan of one file; what is queued for it is cancelled.

        Args:
            fd: the file's descriptor, perhaps another one than was lent.

        Raises:
            UsageError: this device does not lend it.
            PagecacheError: the module refuses for another reason.
        """
        try:
            self._ioctl(abi.IOC_TAKE_BACK, abi.pagecache_lend_request(fd=fd))
        except OSError as error:
            what = f"file descriptor {fd} was not taken back"
            if error.errno == errno.ENOENT:
                raise UsageError(what, "it was not lent from here") from error
            raise PagecacheError(what, error.strerror or str(error)) from error

    def untag_fd(self, fd: int) -> None:
        """Take the tag off an open file.

        Args:
            fd: the file's descriptor.

        Raises:
            UsageError: it has none.
        """
        self._untag(abi.pagecache_untag_request(fd=fd), f"file descriptor {fd}")

    def untag(self, dev_major: int, dev_minor: int, ino: int, generation: int) -> None:
        """Take the tag off a file that is known by its identity only.

        Args:
            dev_major: major number of the file system's device.
            dev_minor: its minor number.
            ino: the inode's number.
            generation: the inode's generation, as the tag has it.

        Raises:
            UsageError: the file has no tag.
        """
        request = abi.pagecache_untag_request(
            fd=-1, dev_major=dev_major, dev_minor=dev_minor, ino=ino, generation=generation
        )
        self._untag(request, f"inode {ino} of device {dev_major}:{dev_minor}")

    def _untag(self, request: abi.pagecache_untag_request, what: str) -> None:
        """Take a tag off; `what` names the file to people.  Raises PagecacheError."""
        try:
            self._ioctl(abi.IOC_UNTAG, request)
        except OSError as error:
            if error.errno == errno.ENOENT:
                raise UsageError(f"{what} is not tagged") from error
            raise PagecacheError(f"{what} was not untagged", str(error.strerror)) from error

    def _records(self, request: int, kind: type[_Record], since: int = 0) -> Iterator[_Record]:
        """Yield the records of a list, each asked for by the number of the one before it."""
        seq = since
        while True:
            record = kind(seq=seq)
            try:
                self._ioctl(request, record)
            except OSError as error:
                if error.errno == errno.ENOENT:
                    return
                raise PagecacheError(f"{PATH} does not answer", str(error.strerror)) from error
            if record.seq <= seq:  # would go on for ever
                raise PagecacheError(f"{PATH} answers nonsense", "its list goes backwards")
            seq = record.seq
            yield record

    def tags(self) -> Iterator[Tag]:
        """Yield every tagged file.

        Yields:
            Tags, the oldest first.

        Raises:
            PagecacheError: the module refuses.
        """
        for raw in self._records(abi.IOC_TAGS, abi.pagecache_tag_record):
            yield Tag(
                dev_major=raw.dev_major,
                dev_minor=raw.dev_minor,
                ino=raw.ino,
                generation=raw.generation,
                policy=os.fsdecode(raw.policy),
                model=os.fsdecode(raw.model),
                model_id=raw.model_id,
                path=os.fsdecode(raw.path),
                active=bool(raw.active),
                resident_pages=raw.resident_pages,
                lent=raw.lent,
            )

    def policies(self) -> Iterator[PolicyStatus]:
        """Yield every attached policy.

        Yields:
            Policies with their counters, the one that was attached first before the others.

        Raises:
            PagecacheError: the module refuses.
        """
        for raw in self._records(abi.IOC_POLICIES, abi.pagecache_policy_record):
            yield PolicyStatus(
                name=os.fsdecode(raw.name),
                attached_ns=raw.attached_ns,
                governed_pages=raw.governed_pages,
                inflight_pages=raw.inflight_pages,
                hooks=_hook_names(raw.hooks),
                tags=raw.tags,
                kept_pages=raw.kept_pages,
                keep_max_pages=raw.keep_max_pages,
                counters={
                    counter.name: int(value)
                    for counter, value in zip(COUNTERS, raw.counters, strict=True)
                },
            )

    def exits(self, since: int = 0) -> Iterator[ExitRecord]:
        """Yield how the last policies ended.

        Args:
            since: only records whose sequence number is greater than this.

        Yields:
            Records, the oldest first; the module keeps a bounded number of them.

        Raises:
            PagecacheError: the module refuses.
        """
        for raw in self._records(abi.IOC_EXITS, abi.pagecache_exit_record, since):
            yield ExitRecord(
                seq=raw.seq,
                time_ns=raw.time_ns,
                policy=os.fsdecode(raw.policy),
                kind=_name(ExitKind, raw.kind),
                code=raw.code,
                hook=_name(Hook, raw.hook),
                reason=os.fsdecode(raw.reason),
                message=os.fsdecode(raw.message),
            )


def status() -> list[PolicyStatus]:
    """Return the attached policies with their counters.

    Returns:
        The policies, the one that was attached first before the others.

    Raises:
        UnsupportedError: the module is not loaded.
        PrivilegeError: the caller is not root.
    """
    with Device() as device:
        return list(device.policies())


def _name(enum: type[ExitKind] | type[Hook], value: int) -> str:
    """Return the name of a value in lower case; its number if a newer module has added it."""
    try:
        return enum(value).name.lower()
    except ValueError:
        return str(value)


def _hook_names(bits: int) -> tuple[str, ...]:
    """Return the names of the hooks whose bits are set."""
    return tuple(hook.name.lower() for hook in Hook if hook is not Hook.NR and bits >> hook & 1)


def _fitting(text: str, size: int, what: str) -> bytes:
    """Return a name as bytes, if the ABI has room for it.  Raises UsageError."""
    data = os.fsencode(text)
    if not data or len(data) >= size or b"\0" in data:
        raise UsageError(
            f"{text!r} cannot be the name of a {what}", f"it has to have 1 to {size - 1} bytes"
        )
    return data


def size_on_disk(tag: Tag) -> int | None:
    """Return the size of a tagged file.

    The file is compared by its inode number only: the device number of its pages is not always that
    of its path (overlayfs, btrfs).  Where the number is another, too, the kernel is asked.

    Args:
        tag: a tag with the file's path and inode number.

    Returns:
        Bytes; None when the path leads to another file by now, and where it is asked of a server,
        which may not answer.
    """
    if asks_server(tag.path):
        return None
    try:
        status = os.stat(tag.path)
    except OSError:
        return None
    if status.st_ino != tag.ino:
        try:
            if identity_at(tag.path)[2:] != tag.identity[2:]:
                return None
        except (PagecacheError, OSError):
            return None
    return status.st_size
