# SPDX-License-Identifier: Apache-2.0
"""What is spoken on the controller's public socket, and the client's side of it.

A request is one line of JSON, `{"v": 1, "op": NAME, ...}`; so is the answer, `{"v": 1, "ok":
{...}}` or `{"v": 1, "error": {"class", "what", "why", "fix", "docs"}}`.  Requests of a connection
are answered one by one and in order.  Open files travel beside the line (SCM_RIGHTS): the right
to a file is proved by passing a descriptor of it that is open for reading, and by nothing else.

OPERATIONS says what each operation takes and answers; the server checks requests against it and
docs/controller.md lists it.  Importing this costs no more than json and socket.
"""

from __future__ import annotations

import array
import json
import os
import socket
import struct
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from pagecache_bpf import errors
from pagecache_bpf._run_dir import RUN_DIR
from pagecache_bpf.errors import PagecacheError, PrivilegeError, UnsupportedError, UsageError

VERSION = 1
SOCKET = RUN_DIR / "control.sock"
LINE_BYTES = 64 << 10  # of a request, its newline included
ANSWER_BYTES = 4 << 20
FDS_PER_MESSAGE = 64  # the kernel's own limit is 253 (SCM_MAX_FD)
FILES_PER_LOAD = 4096
EXTENTS_PER_REQUEST = 1024
DEVICES_PER_LOAD = 64
TEMPLATE_BYTES = 64 << 20
TEXT_CHARS = 4096
SECONDS = 60.0
_MAX = (1 << 63) - 1


@dataclass(frozen=True)
class Operation:
    """One operation: members of its request, descriptors that come along, members of its answer.

    arguments: name -> (kind, whether it may be left out, meaning); the kinds are those of
    _CHECKS.  fds: how many descriptors, at least and at most.
    """

    summary: str
    arguments: Mapping[str, tuple[str, bool, str]] = field(default_factory=dict)
    fds: tuple[int, int] = (0, 0)
    fds_are: str = ""
    answer: Mapping[str, str] = field(default_factory=dict)


_LOAD = {"load": ("text", False, "the load's id, of this connection")}
_RANGE = {
    "offset": ("count", True, "bytes, from a page boundary (default: 0)"),
    "length": ("count", True, "bytes; 0, the default, means up to the end"),
}
_REPORT = {
    "load": "its id",
    "model": "the model's name, as counters have it",
    "state": "open or done",
    "policy": "the policy that serves it; null if none does",
    "engine": "struct_ops or agent; null if none serves it",
    "why": "why not a better engine, or why none; empty for the best",
    "files": "number of its files",
    "bytes": "size of its files",
    "budget_bytes": "what of it may be in the page cache at a time; null: no bound",
    "admission": "fits, or stream: it is larger than its budget",
    "message": 'the same for people: "61.0 GB wanted, 40.0 GB budget, will stream"',
    "node": "NUMA node that its pages are meant for, by its devices; null: not known",
    "seconds": "since it was opened; until it was done, if it is",
    "resident_at_open_bytes": "what was in the page cache when it was opened",
    "resident_bytes": "what is now",
    "dropped_bytes": "what `done` has dropped",
    "io_delay_ns": "time that its process waited for the disk since then; null: not known",
    "io_delay_why": "why that is not known; empty if it is",
    "template": "source of the template in use; null: none, or it is not used",
    "template_why": "why the template is not used; empty if it is, or none was given",
    "counters": "what the observer counted for the model since then (see `pagecache-bpf stats`); "
    "null: no observer",
}

#: Every operation of the public socket.
OPERATIONS: Mapping[str, Operation] = {
    "hello": Operation(
        "say who is there; needs no right",
        answer={
            "protocol": "version of this protocol",
            "version": "of pagecache-bpf",
            "pid": "the controller's process",
            "engines[]": "engines that can serve loads here, the best first",
            "why": "why not a better one",
            "policies[]": "policies that a load may ask for, the default first",
            "process_events": "connector or pidfd: how the end of a process is noticed",
        },
    ),
    "files": Operation(
        "pass files for the next open_load; as often as needed",
        fds=(1, FDS_PER_MESSAGE),
        fds_are="regular files, open for reading",
        answer={"files": "how many are waiting now", "bytes": "their size"},
    ),
    "open_load": Operation(
        "begin a load: tag the files passed before and serve their reader until the connection "
        "or the process ends",
        {
            "model": ("text", False, "the model's name"),
            "policy": ("text", True, "the policy to serve it (default: the controller's)"),
            "budget": ("count", True, "bytes of it that may be in the page cache at a time"),
            "devices": (
                "devices",
                True,
                'accelerators that it is for: [{"name": "cuda:0", "pci": "0000:3b:00.0" or null, '
                '"node": NUMA node or null}]',
            ),
            "keep": ("flag", True, "leave the pages in the cache when it is done"),
            "wait": ("seconds", True, "how long to queue when the budget is taken (default: 0)"),
        },
        (0, 1),
        "the template: a memfd or a regular file with its text, if there is one",
        {**_REPORT},
    ),
    "load_report": Operation("say how a load goes", _LOAD, answer=_REPORT),
    "done": Operation(
        "the load is over: drop what nobody else uses, unless it is to be kept, and close it",
        {**_LOAD, "keep": ("flag", True, "leave the pages in the cache")},
        answer=_REPORT,
    ),
    "close": Operation("end a load and leave the cache as it is", _LOAD, answer=_REPORT),
    "residency": Operation(
        "how much of a file is in the page cache",
        _RANGE,
        (1, 1),
        "the file",
        {
            "bytes": "size of the range",
            "resident_bytes": "bytes of it in the page cache, whole pages counted",
            "governed": "whether a policy governs the file",
        },
    ),
    "drop": Operation(
        "drop clean, unmapped pages of a file, unless a load of somebody else is reading it",
        _RANGE,
        (1, 1),
        "the file",
        {"dropped_bytes": "bytes that went", "in_use": "true: left alone, a load is reading it"},
    ),
    "prefetch": Operation(
        "read ranges of a file into the page cache, in that order; answers at once",
        {
            "extents": ("extents", False, "[[offset, length], ...] in bytes"),
            "node": ("node", True, "NUMA node to place them on; -1, the default: any"),
        },
        (1, 1),
        "the file",
        {"queued_bytes": "bytes that will be read", "refused_bytes": "beyond budget or end"},
    ),
    "topology": Operation(
        "accelerators and NUMA nodes of this machine, as `pagecache-bpf topology --json`",
        answer={"topology": "the machine's"},
    ),
    "status": Operation(
        "loads and budgets: of the caller's user; for root, of everybody",
        answer={
            "loads[]": "reports, as load_report gives them, each with uid and pid",
            "budget.total_bytes": "bound for all loads together; null: none but the memory",
            "budget.claimed_bytes": "what open loads may take of it",
            "budget.headroom_bytes": "what the memory cgroup and the machine leave now",
        },
    ),
}


def check_request(line: bytes, fds: int) -> tuple[str, dict[str, Any]]:
    """The operation and the arguments of a request.  fds: descriptors that came along.

    Raises UsageError, saying what is wrong with it; the arguments are of the right kinds then.
    """
    try:
        request = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _bad("it is not JSON", str(error)) from None
    if not isinstance(request, dict):
        raise _bad("it is not an object", type(request).__name__)
    if request.pop("v", None) != VERSION:
        raise UsageError(
            "the request was refused",
            f"this controller speaks version {VERSION} of the protocol only",
            "Use the pagecache-bpf that the controller is from",
        )
    name = request.pop("op", None)
    operation = OPERATIONS.get(name) if isinstance(name, str) else None
    if operation is None:
        raise _bad("there is no such operation", _short(name))
    for key, value in request.items():
        if key not in operation.arguments:
            raise _bad(f"{name} has no member {_short(key)}")
        if not _CHECKS[operation.arguments[key][0]](value):
            raise _bad(f"{key} of {name} has a bad value", _short(value))
    for key, (_, optional, _) in operation.arguments.items():
        if not optional and key not in request:
            raise _bad(f"{name} needs {key}")
    least, most = operation.fds
    if not least <= fds <= most:
        wanted = f"{least}" if least == most else f"{least} to {most}"
        raise _bad(f"{name} takes {wanted} descriptors", f"{fds} came")
    return str(name), request


def _bad(why: str, detail: str = "") -> UsageError:
    return UsageError("the request was refused", f"{why}: {detail}" if detail else why)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _is_text(value: object) -> bool:
    return (
        isinstance(value, str) and 0 < len(value) <= TEXT_CHARS and value.isprintable()
    )  # no lone surrogates, no control characters


def _is_count(value: object, most: int = _MAX) -> bool:
    return type(value) is int and 0 <= value <= most


def _is_node(value: object) -> bool:
    return type(value) is int and -1 <= value <= 1023


def _is_seconds(value: object) -> bool:
    return type(value) in (int, float) and 0 <= value <= 3600  # type: ignore[operator]


def _is_device(value: object) -> bool:
    if not isinstance(value, dict) or value.keys() - {"name", "pci", "node"}:
        return False
    pci, node = value.get("pci"), value.get("node")
    return (
        _is_text(value.get("name"))
        and (pci is None or _is_text(pci))
        and (node is None or _is_node(node))
    )


def _is_extent(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(_is_count(each) for each in value)
        and value[0] + value[1] <= _MAX
    )


def _is_list(value: object, of: Any, most: int) -> bool:
    return isinstance(value, list) and len(value) <= most and all(of(each) for each in value)


_CHECKS: Mapping[str, Any] = {
    "text": _is_text,
    "count": _is_count,
    "flag": lambda value: isinstance(value, bool),
    "seconds": _is_seconds,
    "node": _is_node,
    "devices": lambda value: _is_list(value, _is_device, DEVICES_PER_LOAD),
    "extents": lambda value: _is_list(value, _is_extent, EXTENTS_PER_REQUEST),
}


def encode(message: Mapping[str, Any]) -> bytes:
    """A message as its line."""
    return json.dumps({"v": VERSION, **message}, separators=(",", ":")).encode() + b"\n"


def encode_error(error: PagecacheError) -> bytes:
    """An error as its line."""
    fields = {"what": error.what, "why": error.why, "fix": error.fix, "docs": error.docs}
    return encode({"error": {**fields, "class": type(error).__name__}})


def is_running(path: Path = SOCKET) -> bool:
    """Whether a controller answers there and lets this process talk to it."""
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(SECONDS)
            probe.connect(str(path))
    except OSError:
        return False
    return True


class Client:
    """A connection to the controller.  A context manager; loads end with it.

    Threads may share one: requests take turns.  Answers are dicts, as OPERATIONS describes them.
    Every method raises PagecacheError, in the class that the controller gave; PrivilegeError:
    this user may not talk to it; UnsupportedError: no controller runs, or it is another version.
    """

    def __init__(self, path: Path = SOCKET, seconds: float = SECONDS) -> None:
        self._seconds = seconds
        self._lock = threading.Lock()
        self._buffer = b""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._socket.settimeout(seconds)
        try:
            self._socket.connect(str(path))
        except OSError as error:
            self._socket.close()
            raise _connect_error(path, error) from error

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.disconnect()

    def disconnect(self) -> None:
        """Hang up; the loads of this connection end."""
        self._socket.close()

    def hello(self) -> dict[str, Any]:
        """Who is there."""
        return self._ask("hello")

    def open_load(
        self,
        fds: Sequence[int],
        *,
        model: str,
        policy: str | None = None,
        budget: int | None = None,
        devices: Iterable[Mapping[str, Any]] = (),
        template: str | bytes | None = None,
        keep: bool = False,
        wait: float = 0.0,
    ) -> dict[str, Any]:
        """Begin a load of the open files; returns its first report, `load` being its id.

        fds: regular files, open for reading; they may be closed afterwards.  template: its text.
        """
        for at in range(0, len(fds), FDS_PER_MESSAGE):
            self._ask("files", fds[at : at + FDS_PER_MESSAGE])
        arguments: dict[str, Any] = {"model": model, "keep": keep}
        if policy is not None:
            arguments["policy"] = policy
        if budget is not None:
            arguments["budget"] = budget
        if wait:
            arguments["wait"] = wait
        if listed := [dict(each) for each in devices]:
            arguments["devices"] = listed
        if template is None:
            return self._ask("open_load", (), wait, **arguments)
        memory = os.memfd_create("template", os.MFD_CLOEXEC)
        with os.fdopen(memory, "wb") as out:
            out.write(template.encode() if isinstance(template, str) else template)
            out.flush()
            return self._ask("open_load", (memory,), wait, **arguments)

    def load_report(self, load: str) -> dict[str, Any]:
        """How a load goes."""
        return self._ask("load_report", load=load)

    def done(self, load: str, *, keep: bool = False) -> dict[str, Any]:
        """End a load and drop its pages, unless they are to be kept; returns the last report."""
        return self._ask("done", load=load, keep=keep)

    def close(self, load: str) -> dict[str, Any]:
        """End a load and leave the cache as it is; returns the last report."""
        return self._ask("close", load=load)

    def residency(self, fd: int, offset: int = 0, length: int = 0) -> dict[str, Any]:
        """How much of an open file is in the page cache."""
        return self._ask("residency", (fd,), offset=offset, length=length)

    def drop(self, fd: int, offset: int = 0, length: int = 0) -> dict[str, Any]:
        """Drop pages of an open file."""
        return self._ask("drop", (fd,), offset=offset, length=length)

    def prefetch(
        self, fd: int, extents: Sequence[tuple[int, int]], node: int = -1
    ) -> dict[str, Any]:
        """Read (offset, length) ranges of an open file into the page cache."""
        total = {"queued_bytes": 0, "refused_bytes": 0}
        for at in range(0, len(extents), EXTENTS_PER_REQUEST):
            part = [list(each) for each in extents[at : at + EXTENTS_PER_REQUEST]]
            answer = self._ask("prefetch", (fd,), extents=part, node=node)
            total = {key: total[key] + answer[key] for key in total}
        return total

    def topology(self) -> dict[str, Any]:
        """Accelerators and NUMA nodes of this machine."""
        return dict(self._ask("topology")["topology"])

    def status(self) -> dict[str, Any]:
        """Loads and budgets that the caller may know of."""
        return self._ask("status")

    def _ask(
        self, operation: str, fds: Sequence[int] = (), wait: float = 0.0, /, **arguments: Any
    ) -> dict[str, Any]:
        line = encode({"op": operation, **arguments})
        with self._lock:
            self._socket.settimeout(self._seconds + wait)
            try:
                self._send(line, fds)
                answer = json.loads(self._line())
            except (OSError, ValueError) as error:
                self._socket.close()  # what comes next would answer something else
                raise PagecacheError(
                    "the controller does not answer", str(error) or "it hung up"
                ) from error
        if "error" in answer:
            fields = dict(answer["error"])
            kind = getattr(errors, str(fields.pop("class", "")), PagecacheError)
            raise kind(**fields)
        return dict(answer["ok"])

    def _send(self, line: bytes, fds: Sequence[int]) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        sent = self._socket.sendmsg([line], rights)
        if sent < len(line):
            self._socket.sendall(line[sent:])

    def _line(self) -> bytes:
        while b"\n" not in self._buffer:
            data = self._socket.recv(1 << 16)
            if not data:
                raise OSError("it hung up")
            self._buffer += data
            if len(self._buffer) > ANSWER_BYTES:
                raise OSError("its answer is too long")
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line


def peer_of(connection: socket.socket) -> tuple[int, int, int]:
    """Process, user and group of the other side, as they were when it connected."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, gid = struct.unpack("3i", raw)
    return pid, uid, gid


def _connect_error(path: Path, error: OSError) -> PagecacheError:
    if isinstance(error, PermissionError):
        return PrivilegeError(
            "this user may not talk to the controller",
            f"{path}: {error.strerror}",
            "Join the group that the socket belongs to, or ask for another `socket.mode`",
        )
    return UnsupportedError(
        "no controller runs",
        f"{path}: {error.strerror or error}",
        "Start it: pagecache-bpf serve (or: systemctl start pagecache-bpf)",
    )
