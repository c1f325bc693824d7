# SPDX-License-Identifier: Apache-2.0
"""The process in which bytes of a client's files are read: headers and templates.

It runs as the client's user, without capabilities, opens no path, and is bounded in memory, time
and descriptors; whoever takes it over gets what the client has already.  It answers jobs on
descriptors that come along.  controller.inspectors starts it and believes nothing that it says.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pagecache_bpf.controller import seccomp
from pagecache_bpf.errors import PagecacheError, UsageError
from pagecache_bpf.ipc.public_protocol import TEMPLATE_BYTES
from pagecache_bpf.ipc.wire import error_fields

if TYPE_CHECKING:
    from pagecache_bpf.templates.template import Extents, Template

#: Bounds of this process: address space, and CPU seconds of one job.
MEMORY_BYTES = 1 << 30
JOB_CPU_SECONDS = 10
#: Descriptors that are sent at once; SCM_MAX_FD is 253.
FDS_AT_ONCE = 64
#: Stands in for a user who has none here: root of a container, and root itself.
NOBODY = 65534
_HEADER_BYTES = 16 << 20  # of a job or an answer: names of 4096 files
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NAME, _PR_SET_NO_NEW_PRIVS = 1, 4, 15, 38
_SIGKILL = 9

#: What a job gives back: members of the answer, and bytes that follow it.
Outcome = tuple[dict[str, Any], bytes]


def derive(fds: Sequence[int], names: Sequence[str]) -> Outcome:
    """Derive the order of a load from the headers of its files.

    Args:
        fds: the files.
        names: how messages call them.

    Returns:
        The kind of the order, and an array of template.EXTENT whose files are numbers of fds.

    Raises:
        PagecacheError: a header is damaged or of no known format.
    """
    from pagecache_bpf.templates.derive import derive_open
    from pagecache_bpf.weights.headers import parse_open
    from pagecache_bpf.weights.models import Model

    contents = [parse_open(fd, Path(name)) for fd, name in zip(fds, names, strict=True)]
    paths = tuple(Path(name) for name in names)
    # One reader that takes whole files: nothing beside them is looked for.
    model = Model("load", Path("/nonexistent"), paths, tuple(names), Path("/nonexistent"))
    return _told(derive_open(model, contents), range(len(fds)))


def fit(fds: Sequence[int], names: Sequence[str]) -> Outcome:
    """Read the text of a template and find the files that it is for.

    Args:
        fds: the text, then the files.
        names: how messages call the files.

    Returns:
        As derive().

    Raises:
        PagecacheError: the text is none, or a file of it is not among these.
    """
    from pagecache_bpf import templates

    copy = os.memfd_create("template", os.MFD_CLOEXEC)
    try:
        at = 0
        while data := os.pread(fds[0], 1 << 20, at):
            os.write(copy, data)
            at += len(data)
        # The one path that is opened: it leads to a file of this process's own.
        path = f"/proc/self/fd/{copy}"
        try:
            template = templates.read(Path(path))
        except PagecacheError as error:
            texts = (text.replace(path, "the file") for text in (error.what, error.why, error.fix))
            raise type(error)(*texts) from None
    finally:
        os.close(copy)
    return _told(template, _match(template, fds[1:]))


def recognize(fds: Sequence[int]) -> Outcome:
    """Read the headers of files, and tell nothing but that they are weights.

    Args:
        fds: the files.

    Returns:
        Nothing.

    Raises:
        PagecacheError: a header is damaged or of no known format.
    """
    from pagecache_bpf.weights.headers import parse_open

    for fd in fds:
        parse_open(fd, Path("the file"))
    return {}, b""


JOBS: dict[str, Callable[..., Outcome]] = {job.__name__: job for job in (derive, fit, recognize)}


def _match(template: Template, fds: Sequence[int]) -> list[int]:
    """Find which of these files each file of the template is, by size and header, not by name."""
    from pagecache_bpf.weights.identity import identify

    by_size: dict[int, list[int]] = {}
    for number, fd in enumerate(fds):
        by_size.setdefault(os.fstat(fd).st_size, []).append(number)
    found = []
    for file in template.files:
        for number in by_size.get(file.size, ()):
            with suppress(OSError, EOFError):
                digest = identify(fds[number], file.size, file.hashed_from, file.hashed_bytes)
                if digest == file.digest:
                    found.append(number)
                    break
        else:
            raise UsageError(
                "the template does not fit the files",
                f"none of them has the {file.size:,} bytes and the header of {file.path}",
                "Make it anew for these files: pagecache-bpf template derive",
            )
    return found


def _told(template: Template, numbers: Sequence[int]) -> Outcome:
    import numpy as np

    from pagecache_bpf.templates.template import STRIDED

    extents: Extents = template.extents.copy()
    extents["file"] = np.array(numbers, np.uint32)[extents["file"]]
    facts = {
        "source": template.source,
        "loader": template.loader,
        "tp": template.tp,
        "consumers": len(template.consumers),
        "strided": extents.dtype == STRIDED,
    }
    return facts, extents.tobytes()


# --- the process ---


def give_up_rights(uid: int, gid: int) -> None:
    """Become a user for good: no groups, no capabilities, nothing to regain them by.

    Args:
        uid: the user; root becomes nobody.
        gid: the group.

    Raises:
        OSError: the kernel refuses; the process must not go on.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    for limit, bound in (
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_FSIZE, TEMPLATE_BYTES),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (bound, bound))
    os.setgroups([])
    os.setresgid(gid or NOBODY, gid or NOBODY, gid or NOBODY)
    os.setresuid(uid or NOBODY, uid or NOBODY, uid or NOBODY)
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))  # no process and no thread more
    for option, value in (
        (_PR_SET_NO_NEW_PRIVS, 1),
        (_PR_SET_DUMPABLE, 0),  # processes of the same user cannot look in
        (_PR_SET_PDEATHSIG, _SIGKILL),
    ):
        if libc.prctl(option, value, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "the rights could not be given up")
    seccomp.deny()  # where the kernel has it; the rest does not rely on it


def warm_up() -> None:
    """Import what jobs need: afterwards nothing can be opened, and the first job is quick."""
    header = b'{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    fd = os.memfd_create("warm-up", os.MFD_CLOEXEC)
    try:
        os.write(fd, len(header).to_bytes(8, "little") + header + b"w")
        derive([fd], ["w.safetensors"])
        with suppress(PagecacheError):
            fit([fd, fd], ["w.safetensors"])
    finally:
        os.close(fd)


def receive(sock: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """Take a job: its length, its descriptors, then its text.

    Args:
        sock: the connection to the controller.

    Returns:
        The job and its descriptors, which are the caller's; None: the other side is gone.
    """
    fds: list[int] = []
    head = b""
    while len(head) < 8:
        data = sock.recv(8 - len(head))
        if not data:
            return None
        head += data
    size, count = int.from_bytes(head[:4], "little"), int.from_bytes(head[4:], "little")
    if size > _HEADER_BYTES:
        return None
    while len(fds) < count:
        data, more, _, _ = socket.recv_fds(sock, 1, FDS_AT_ONCE)
        if not data:
            return None
        fds += more
    text = b""
    while len(text) < size:
        data = sock.recv(min(size - len(text), 1 << 16))
        if not data:
            return None
        text += data
    return json.loads(text), fds


def answer(job: dict[str, Any], fds: Sequence[int]) -> Outcome:
    """Do a job; what fails is told, and so is that it took too much memory.

    Args:
        job: its name and its arguments.
        fds: its descriptors; they stay the caller's.

    Returns:
        Members of the answer, and bytes that follow it.
    """
    spent = resource.getrusage(resource.RUSAGE_SELF)
    bound = int(spent.ru_utime + spent.ru_stime) + 1 + JOB_CPU_SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (bound, resource.RLIM_INFINITY))
    try:
        name = job.pop("job")
        return JOBS[name](fds, **job)
    except PagecacheError as error:
        return {"error": error_fields(error)}, b""
    except MemoryError:
        bound = MEMORY_BYTES >> 20
        memory = PagecacheError("the files were not read", f"over {bound} MiB")
        return {"error": error_fields(memory)}, b""
    except Exception as bug:
        why = f"{type(bug).__name__}: {bug}"[:300]
        return {"error": error_fields(PagecacheError("the files could not be read", why))}, b""


def main() -> int:
    """Serve the socket whose number is the first argument.

    Returns:
        The exit code of the process.
    """
    ctypes.CDLL(None).prctl(_PR_SET_NAME, b"pagecache-files", 0, 0, 0)
    sock = socket.socket(fileno=int(sys.argv[1]))
    os.nice(5)
    warm_up()
    whose = receive(sock)
    if whose is None:
        return 0
    give_up_rights(int(whose[0]["uid"]), int(whose[0]["gid"]))
    while (received := receive(sock)) is not None:
        job, fds = received
        facts, data = answer(job, fds)
        for fd in fds:
            os.close(fd)
        text = json.dumps(facts).encode()
        sizes = len(text).to_bytes(4, "little") + len(data).to_bytes(4, "little")
        sock.sendall(sizes + text)
        sock.sendall(data)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (OSError, KeyboardInterrupt):
        os._exit(1)  # the controller is gone
