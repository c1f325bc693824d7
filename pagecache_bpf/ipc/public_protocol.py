# SPDX-License-Identifier: Apache-2.0
"""What may be asked on the controller's public socket, and that a request asks nothing else.

The right to a file is proved by passing a descriptor of it that is open for reading (SCM_RIGHTS),
and by nothing else; no operation takes a path.  OPERATIONS says what each operation takes and
answers; the server checks requests against it and docs/controller.md lists it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pagecache_bpf.ipc import wire
from pagecache_bpf.ipc.wire import refused, shortened

LINE_BYTES = 64 << 10  # of a request, its newline included
FDS_PER_MESSAGE = 64  # the kernel's own limit is 253 (SCM_MAX_FD)
FILES_PER_LOAD = 4096
EXTENTS_PER_REQUEST = 1024
DEVICES_PER_LOAD = 64
TEMPLATE_BYTES = 64 << 20
TEXT_CHARS = 4096
_MAX = (1 << 63) - 1


@dataclass(frozen=True)
class PublicOperation:
    """One operation of the public socket.

    Attributes:
        summary: what it does, for the documentation.
        arguments: for each member of its request: the kind of value (a key of _CHECKS), whether it
            may be left out, and what it means.
        fds: how many descriptors come along, at least and at most.
        fds_are: what these are.
        answer: what the members of its answer mean, by name.
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
    "keep": "whether its pages stay in the cache when it is over",
    "admission": "fits, or stream: it is larger than its budget",
    "message": 'the same for people: "61.0 GB wanted, 40.0 GB budget, will stream"',
    "node": "NUMA node that its pages are meant for, by its devices; null: not known",
    "seconds": "since it was opened; until it was done, if it is",
    "resident_at_open_bytes": "what was in the page cache when it was opened; null in this "
    "and the next two where the client may not know it (socket.residency)",
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
OPERATIONS: Mapping[str, PublicOperation] = {
    "hello": PublicOperation(
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
    "files": PublicOperation(
        "pass files for the next open_load; as often as needed",
        fds=(1, FDS_PER_MESSAGE),
        fds_are="regular files, open for reading",
        answer={"files": "how many are waiting now", "bytes": "their size"},
    ),
    "open_load": PublicOperation(
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
    "load_report": PublicOperation("say how a load goes", _LOAD, answer=_REPORT),
    "done": PublicOperation(
        "the load is over: drop what nobody else uses, unless it is to be kept, and close it",
        {**_LOAD, "keep": ("flag", True, "leave the pages in the cache")},
        answer=_REPORT,
    ),
    "close": PublicOperation("end a load and leave the cache as it is", _LOAD, answer=_REPORT),
    "residency": PublicOperation(
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
    "drop": PublicOperation(
        "drop clean, unmapped pages of a file, unless a load of somebody else is reading it",
        _RANGE,
        (1, 1),
        "the file",
        {"dropped_bytes": "bytes that went", "in_use": "true: left alone, a load is reading it"},
    ),
    "prefetch": PublicOperation(
        "read ranges of a file into the page cache, in that order; answers at once",
        {
            "extents": ("extents", False, "[[offset, length], ...] in bytes"),
            "node": ("node", True, "NUMA node to place them on; -1, the default: any"),
        },
        (1, 1),
        "the file",
        {"queued_bytes": "bytes that will be read", "refused_bytes": "beyond budget or end"},
    ),
    "topology": PublicOperation(
        "accelerators and NUMA nodes of this machine, as `pagecache-bpf topology --json`",
        answer={"topology": "the machine's"},
    ),
    "status": PublicOperation(
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
    """Read a request and compare it with what its operation takes.

    Args:
        line: the request, without its newline.
        fds: how many descriptors came along.

    Returns:
        The operation and its arguments, which are of the right kinds.

    Raises:
        UsageError: what is wrong with it.
    """
    name, request = wire.decode_request(line)
    operation = OPERATIONS.get(name)
    if operation is None:
        raise refused("there is no such operation", shortened(name))
    for key, value in request.items():
        if key not in operation.arguments:
            raise refused(f"{name} has no member {shortened(key)}")
        if not _CHECKS[operation.arguments[key][0]](value):
            raise refused(f"{key} of {name} has a bad value", shortened(value))
    for key, (_, optional, _) in operation.arguments.items():
        if not optional and key not in request:
            raise refused(f"{name} needs {key}")
    least, most = operation.fds
    if not least <= fds <= most:
        wanted = f"{least}" if least == most else f"{least} to {most}"
        raise refused(f"{name} takes {wanted} descriptors", f"{fds} came")
    return name, request


def _is_text(value: object) -> bool:
    """Tell whether a value is a printable text of 1 to TEXT_CHARS characters."""
    return (
        isinstance(value, str) and 0 < len(value) <= TEXT_CHARS and value.isprintable()
    )  # no lone surrogates, no control characters


def _is_count(value: object, most: int = _MAX) -> bool:
    """Tell whether a value is a whole number from 0 to `most`; true and false are none."""
    return type(value) is int and 0 <= value <= most


def _is_node(value: object) -> bool:
    """Tell whether a value can be the number of a NUMA node, or -1."""
    return type(value) is int and -1 <= value <= 1023


def _is_seconds(value: object) -> bool:
    """Tell whether a value is a number of seconds up to an hour."""
    return type(value) in (int, float) and 0 <= value <= 3600  # type: ignore[operator]


def _is_device(value: object) -> bool:
    """Tell whether a value describes a device: a name, and a PCI address and a node or null."""
    if not isinstance(value, dict) or value.keys() - {"name", "pci", "node"}:
        return False
    pci, node = value.get("pci"), value.get("node")
    return (
        _is_text(value.get("name"))
        and (pci is None or _is_text(pci))
        and (node is None or _is_node(node))
    )


def _is_extent(value: object) -> bool:
    """Tell whether a value is an offset and a length that can be those of a file."""
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(_is_count(bound) for bound in value)
        and value[0] + value[1] <= _MAX
    )


def _is_list(value: object, of: Any, most: int) -> bool:
    """Tell whether a value is a list of at most so many values of a kind."""
    return isinstance(value, list) and len(value) <= most and all(of(member) for member in value)


_CHECKS: Mapping[str, Any] = {
    "text": _is_text,
    "count": _is_count,
    "flag": lambda value: isinstance(value, bool),
    "seconds": _is_seconds,
    "node": _is_node,
    "devices": lambda value: _is_list(value, _is_device, DEVICES_PER_LOAD),
    "extents": lambda value: _is_list(value, _is_extent, EXTENTS_PER_REQUEST),
}
