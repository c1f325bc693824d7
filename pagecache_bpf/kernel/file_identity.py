# SPDX-License-Identifier: Apache-2.0
"""Which file the kernel's events name when the pages of an open file come and go.

It is asked of the kernel (bpf/files/identity.bpf.c), as stat() does not tell it on overlayfs: the
pages are those of a file in a layer, on another device and, once it was copied up, with another
number.  A mapping of the file has that other file; no page of it is touched for this.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from dataclasses import dataclass

from pagecache_bpf.errors import PrivilegeError, UnsupportedError
from pagecache_bpf.kernel import abi, bpf_object, libbpf
from pagecache_bpf.kernel.file_pages import PAGE_SIZE, mapped
from pagecache_bpf.kernel.kernelfs import LIVE

#: Numbers of file systems, of include/uapi/linux/magic.h.
FUSE, OVERLAY = 0x65735546, 0x794C7630
_BTRFS = 0x9123683E
#: tmpfs, ramfs and hugetlbfs: what is in memory anyway is not read from anywhere.
_IN_MEMORY = frozenset({0x01021994, 0x858458F6, 0x958458F6})
#: File systems whose pages and attributes a server gives, which may not answer: FUSE, NFS, SMB (two
#: numbers), Ceph, 9p, AFS, Lustre, GPFS, BeeGFS.
_SERVED = frozenset(
    {FUSE, 0x6969, 0xFF534D42, 0xFE534D42, 0x00C36400, 0x01021997, 0x5346414F}
    | {0x0BD00BD0, 0x47504653, 0x19830326}
)
DOCS = "docs/filesystems.md#how-a-file-is-known"
_TRIES = 1000  # another thread of this process maps or unmaps something at that moment


@dataclass(frozen=True)
class PagesOf:
    """The file that has the pages of an open file.

    Attributes:
        key: the bytes of its struct pagecache_file_key.
        magic: the number of its file system.
        pages: how many pages of it are in the page cache.
    """

    key: bytes
    magic: int
    pages: int

    @property
    def in_memory(self) -> bool:
        """Whether its file system is in memory, so that nothing of it can be read ahead."""
        return self.magic in _IN_MEMORY

    @property
    def served(self) -> bool:
        """Whether a server is asked for its pages, which may not answer."""
        return self.magic in _SERVED

    def is_known(self, types: frozenset[str] | None) -> bool:
        """Tell whether programs name it by this key.

        Args:
            types: what module_types() returned when the programs were loaded; None: they know no
                types of modules at all.

        Returns:
            False for a file on btrfs where the programs do not tell its subvolumes apart.
        """
        if self.magic != _BTRFS:
            return True
        return types is not None and ("btrfs" in types or "btrfs" not in module_types())


@dataclass(frozen=True)
class MountOf:
    """The file system that a file was opened on, which may take its pages from another.

    Attributes:
        magic: its number.
        by_root: whether it was mounted in the initial user namespace, not in a user's own.
    """

    magic: int
    by_root: bool


def module_types() -> frozenset[str]:
    """List whose types programs can use that are loaded now.

    Returns:
        Names of kernel modules, and "vmlinux".
    """
    return frozenset(LIVE.entries("/sys/kernel/btf"))


class _Programs:
    """The programs, loaded at the first question and kept as long as the process lives."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._object: libbpf.Object | None = None
        self.types: frozenset[str] = frozenset()

    def get(self, name: str) -> libbpf.Program:
        """Return a program.  Raises PagecacheError if the kernel cannot be asked."""
        with self._lock:
            if self._object is None:
                self.types = module_types()
                self._object = _load()
            return self._object.program(name)

    def again(self) -> None:
        """Load them anew at the next question; who is asking at this moment still can."""
        with self._lock:
            self._object = None


_programs = _Programs()


def _load() -> libbpf.Object:
    if os.geteuid() != 0:
        raise PrivilegeError(
            "the kernel was not asked whose pages a file has", f"this is user {os.geteuid()}"
        )
    try:
        path = bpf_object.compiled(
            "files/identity.bpf.o", "the kernel cannot be asked whose pages a file has"
        )
        return bpf_object.load(path, "files", lambda opened: None, "files-load.log")
    except bpf_object.ProgramsRefused as error:
        raise UnsupportedError(
            "the kernel cannot be asked whose pages a file has",
            error.why,
            "It takes Linux 5.15 or newer with BTF, and root with CAP_BPF and CAP_PERFMON",
            DOCS,
        ) from error


def prepare() -> None:
    """Load the programs, so that the first question does not wait for them.

    Raises:
        PrivilegeError: this is not root.
        UnsupportedError: the kernel refuses them.
    """
    _programs.get("pages_of")


def pages_of(fd: int) -> PagesOf:
    """Ask the kernel which file has the pages of an open file.

    Args:
        fd: a regular file, open for reading.

    Returns:
        That file, which may be the same.

    Raises:
        PrivilegeError: this is not root.
        UnsupportedError: the kernel cannot be asked, or the file has no pages: it cannot be mapped.
        OSError: the descriptor is none.
    """
    program = _programs.get("pages_of")
    try:
        with mapped(fd, 0, PAGE_SIZE) as address:
            asked = _ask(program, abi.pagecache_file_question(address=address))
    except OSError as error:
        if error.errno == errno.EBADF:
            raise
        raise UnsupportedError(
            "nobody knows by what name the kernel tells of the file's pages",
            f"its file system does not let it be mapped: {error.strerror}",
            "Name a file that is kept in the page cache",
            DOCS,
        ) from error
    found = PagesOf(bytes(asked.key), asked.magic, asked.pages)
    if not found.is_known(_programs.types):
        _programs.again()
        return pages_of(fd)
    return found


def is_served(fd: int) -> bool:
    """Tell whether the pages of an open file come from a server, which may not answer.

    Args:
        fd: a regular file, open for reading.

    Returns:
        False also where the kernel cannot be asked.
    """
    try:
        return pages_of(fd).served
    except (PrivilegeError, UnsupportedError):
        return False


def check_told(fd: int, key: bytes, types: frozenset[str] | None, what: str) -> None:
    """Refuse a file whose events programs would not know to be its.

    Args:
        fd: the file, open for reading.
        key: by what it would be looked for.
        types: as PagesOf.is_known() takes them.
        what: what cannot be done then, for people.

    Raises:
        UnsupportedError: the kernel's events name it otherwise or not at all, or it is in memory.
    """
    try:
        found = pages_of(fd)
    except PrivilegeError:
        return  # nothing is told to whoever may not ask
    if found.in_memory:
        raise UnsupportedError(
            what,
            "its pages are in memory already (tmpfs)",
            "Name the copy on disk, if there is one",
            "docs/troubleshooting.md#has-no-pages-to-read-ahead",
        )
    if not found.is_known(types):
        raise UnsupportedError(
            what,
            "it is on btrfs, whose subvolumes these programs cannot tell apart: btrfs was loaded "
            "after them, or they were compiled by BCC",
            "Detach the policy and attach it again",
            DOCS,
        )
    if found.key != key:
        raise UnsupportedError(
            what,
            "the kernel's events name it otherwise than its file system",
            "Report this file system to the project",
            DOCS,
        )


def mount_of(fd: int) -> MountOf | None:
    """Ask the kernel on what file system a file was opened; nothing is asked of that.

    Args:
        fd: the open file.

    Returns:
        The file system; None where the kernel cannot be asked.

    Raises:
        OSError: the descriptor is none.
    """
    try:
        program = _programs.get("mount_of")
    except (PrivilegeError, UnsupportedError):
        return None
    asked = _ask(program, abi.pagecache_file_question(fd=fd))
    return MountOf(asked.mount_magic, asked.level == 0)


def _ask(
    program: libbpf.Program, question: abi.pagecache_file_question
) -> abi.pagecache_file_question:
    """Put a question to a program until it has an answer.  Raises OSError."""
    for _ in range(_TRIES):
        code = program.run(question)
        if code == 0:
            return question
        if code != -errno.EBUSY:
            break
        time.sleep(0.001)
    raise OSError(-code, os.strerror(-code))
