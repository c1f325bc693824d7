# SPDX-License-Identifier: Apache-2.0
"""What tells programs that pages are read, mapped, added and removed: one table for all kernels.

The same program can be called from several places (bpf/include/access_events.bpf.h).  Which of them
this kernel has is asked of its type information; what is no tracepoint is also tried, as a kernel
may have a function and not let programs be attached to it (lockdown, no trampolines).  The kernel's
release is never interpreted.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from pagecache_bpf.errors import PagecacheError, UsageError
from pagecache_bpf.kernel import bpf_object, libbpf
from pagecache_bpf.kernel.kernelfs import LIVE

#: Names the kinds of sources that may be used, separated by commas: to try what older kernels have.
VARIABLE = "PAGECACHE_BPF_EVENTS"
TRACEPOINT, FUNCTION = "tracepoint", "function"
_BTF_MAGIC = 0xEB9F
_KINDS = {"raw_tp": TRACEPOINT, "fentry": FUNCTION, "fexit": FUNCTION}


@dataclass(frozen=True)
class EventSource:
    """A place in the kernel that calls a program at an event.

    Attributes:
        section: the section of the program, which says where libbpf attaches it.
        since: the release that brought it, and the commit.
    """

    section: str
    since: str

    @property
    def place(self) -> str:
        """The tracepoint's or the function's name."""
        return self.section.rpartition("/")[2]

    def __str__(self) -> str:
        """Return its name for messages."""
        return self.place if self.kind == TRACEPOINT else f"function {self.place}"

    @property
    def kind(self) -> str:
        """TRACEPOINT or FUNCTION."""
        return _KINDS[self.section.partition("/")[0]]

    @property
    def type_name(self) -> str:
        """The name by which the kernel's type information has it."""
        return f"btf_trace_{self.place}" if self.kind == TRACEPOINT else self.place


@dataclass(frozen=True)
class CacheEvent:
    """Something that programs are told of.

    Attributes:
        name: that of its tracepoint, which programs and people know it by.
        tells: what happens then.
        sources: what may tell it, the best first.
    """

    name: str
    tells: str
    sources: tuple[EventSource, ...]


_TRACED = "6.12, filemap: add trace events for get_pages, map_pages, and fault"
#: What readers want.
ACCESSES = (
    CacheEvent(
        "mm_filemap_get_pages",
        "read() gets pages",
        (
            EventSource("raw_tp/mm_filemap_get_pages", _TRACED),
            EventSource(
                "fexit/filemap_get_pages",
                "5.12, mm/filemap: rename generic_file_buffered_read subfunctions",
            ),
        ),
    ),
    CacheEvent(
        "mm_filemap_map_pages",
        "pages around a fault are mapped",
        (
            EventSource("raw_tp/mm_filemap_map_pages", _TRACED),
            EventSource(
                "fexit/filemap_map_pages",
                "3.15, mm: implement ->map_pages for page cache",
            ),
        ),
    ),
    CacheEvent(
        "mm_filemap_fault",
        "a page is faulted",
        (
            EventSource("raw_tp/mm_filemap_fault", _TRACED),
            EventSource(
                "fentry/filemap_fault",
                "4.11, mm, fs: reduce fault, page_mkwrite, and pfn_mkwrite to take only vmf",
            ),
        ),
    ),
)
_MOVED = "3.12, mm: track page cache insertions and deletions"
#: Pages that come and go.
MOVES = (
    CacheEvent(
        "mm_filemap_add_to_page_cache",
        "pages come",
        (EventSource("raw_tp/mm_filemap_add_to_page_cache", _MOVED),),
    ),
    CacheEvent(
        "mm_filemap_delete_from_page_cache",
        "pages go",
        (EventSource("raw_tp/mm_filemap_delete_from_page_cache", _MOVED),),
    ),
)
EVENTS = (*ACCESSES, *MOVES)
_EVENT_AT = {source.place: event.name for event in EVENTS for source in event.sources}


#: What all programs use, by its name in the type information: what people call it, its release.
NEEDED = {
    "BPF_FUNC_for_each_map_elem": (
        "bpf_for_each_map_elem() (5.13, bpf: Add bpf_for_each_map_elem() helper)"
    ),
    "BPF_FUNC_task_pt_regs": "bpf_task_pt_regs() (5.15, bpf: Add bpf_task_pt_regs() helper)",
}
#: What to do where one of them is missing.
NEWER = "Boot Linux 5.15 or newer"
#: The map that loops go through where there is no bpf_loop() (bpf/include/loops.bpf.h).
_LOOP_MAP = "loop_numbers"
#: Elements of a map that is allocated as a whole, as kernels want it that have no allocator for
#: programs (6.1, bpf: Introduce any context BPF specific memory allocator): 100 to 700 bytes each.
_PREALLOCATED = 32768
_NO_PREALLOC = 1  # BPF_F_NO_PREALLOC


def lacking(types: bytes | None = None) -> list[str]:
    """List what the programs use and this kernel does not have, so that none of them can run.

    Args:
        types: the kernel's type information; None: the running kernel's.

    Returns:
        What is missing, with the release that brought it; nothing where there is no type
        information to ask.
    """
    types = _type_names() if types is None else types
    if types is None:
        return []
    return [text for name, text in NEEDED.items() if not has_type(types, name)]


def has_type(types: bytes, name: str) -> bool:
    """Tell whether type information has a name.

    Args:
        types: the kernel's type information, or the names in it.
        name: of a type, a function or a member of an enum.

    Returns:
        Whether it is there as a whole name.
    """
    return f"\0{name}\0".encode() in types


def event_of(program: libbpf.Program) -> str | None:
    """Tell of which event a program is told.

    Args:
        program: of an opened object.

    Returns:
        The event's name; that of the tracepoint for one that is not in the table; None for a
        program that is run, not called by the kernel.
    """
    if program.section == "syscall":
        return None
    place = program.section.rpartition("/")[2]
    return _EVENT_AT.get(place, place)


def sources_here(
    allowed: Collection[str] | None = None, types: bytes | None = None
) -> dict[str, EventSource]:
    """Find what tells of each event on this kernel.

    Args:
        allowed: kinds of sources for accesses; None: what $PAGECACHE_BPF_EVENTS names, or all.
        types: the kernel's type information; None: the running kernel's.

    Returns:
        Sources by the event's name, without the events that nothing tells of.

    Raises:
        UsageError: the variable names another kind.
    """
    allowed = _allowed() if allowed is None else allowed
    live = types is None
    if types is None:
        types = _type_names()
    found = {}
    for event in EVENTS:
        for source in event.sources:
            if event in ACCESSES and source.kind not in allowed:
                continue
            there = types is None or has_type(types, source.type_name)
            if not there or (types is None and source.kind != TRACEPOINT):
                continue
            if source.kind != TRACEPOINT and live and source.section not in _attachable():
                continue
            found[event.name] = source
            break
    return found


def choose(opened: libbpf.Object, sources: Mapping[str, EventSource] | None = None) -> None:
    """Have an opened object load one program for each event, that of the source that works here.

    Its maps are set up as this kernel takes them.

    Args:
        opened: an object that is not loaded yet.
        sources: what tells of each event; None: what does here.

    Raises:
        UsageError: $PAGECACHE_BPF_EVENTS names no kind of source.
    """
    sections = {event.name: {s.section for s in event.sources} for event in EVENTS}
    sources = sources_here() if sources is None else sources
    chosen = {source.section for source in sources.values()}
    for program in opened.programs():
        if program.section in sections.get(event_of(program) or "", ()):
            program.set_autoload(program.section in chosen)
    _fit_maps(opened)


def attach(
    programs: Iterable[libbpf.Program], links: list[libbpf.Link], without: Collection[str] = ()
) -> tuple[dict[str, str], list[str]]:
    """Have the loaded programs of an object called.

    Args:
        programs: all programs of the object.
        links: gets what keeps them attached, also of those before one that raises.
        without: events to leave out.

    Returns:
        By the name of each event that is heard the section of its program, and the names of those
        that are not heard.
    """
    heard: dict[str, str] = {}
    events: dict[str, None] = {}
    with libbpf.Messages():
        for program in programs:
            event = event_of(program)
            if event is None:
                continue
            events[event] = None
            if event in without or not program.autoload:
                continue
            try:
                links.append(program.attach())
                heard[event] = program.section
            except OSError:
                continue
    return heard, [event for event in events if event not in heard]


def _fit_maps(opened: libbpf.Object) -> None:
    """Set maps up as this kernel takes them, and without what it does not need of them."""
    types = _type_names() or b""
    for found in opened.maps():
        if found.name == _LOOP_MAP and has_type(types, "BPF_FUNC_loop"):
            found.resize(1)
        elif not has_type(types, "bpf_mem_alloc"):
            flags = int(libbpf.library().bpf_map__map_flags(found.pointer))
            if flags & _NO_PREALLOC:
                libbpf.library().bpf_map__set_map_flags(found.pointer, flags & ~_NO_PREALLOC)
                found.resize(min(_PREALLOCATED, found.max_entries))


@lru_cache(maxsize=1)
def _type_names() -> bytes | None:
    """Read the names in the kernel's type information; None: it has none."""
    try:
        with LIVE.path("/sys/kernel/btf/vmlinux").open("rb") as file:
            magic, _, _, header, _, _, start, size = struct.unpack("=HBBIIIII", file.read(24))
            if magic != _BTF_MAGIC:
                return None
            file.seek(header + start)
            return file.read(size)
    except (OSError, struct.error):
        return None


def _allowed() -> frozenset[str]:
    kinds = frozenset(_KINDS.values())
    text = os.environ.get(VARIABLE, "")
    named = frozenset(filter(None, text.split(",")))
    if named - kinds:
        raise UsageError(
            f"{VARIABLE}={text} is not understood",
            f"{', '.join(sorted(named - kinds))} is no kind of source",
            f"Name some of {', '.join(sorted(kinds))}, or unset it",
        )
    return named or kinds


@lru_cache(maxsize=1)
def _attachable() -> frozenset[str]:
    """List sections of functions that programs can be attached to; it is tried."""
    sections = {
        source.section
        for event in ACCESSES
        for source in event.sources
        if source.kind != TRACEPOINT
    }
    found = _try(sections)
    if found is None:
        # One that is refused has the whole object refused.
        found = {section for section in sections if _try({section})}
    return frozenset(found)


def _try(sections: Collection[str]) -> set[str] | None:
    """Attach programs that do nothing for a moment.  Returns where it worked; None: none loads."""
    found = set()
    try:
        with (
            libbpf.Messages(),
            libbpf.Object(
                bpf_object.compiled("files/events.bpf.o", "nothing was tried"), "events"
            ) as opened,
        ):
            for program in opened.programs():
                program.set_autoload(program.section in sections)
            opened.load()
            for program in opened.programs():
                if program.autoload:
                    try:
                        program.attach().close()
                        found.add(program.section)
                    except OSError:
                        continue
    except (OSError, PagecacheError):
        return None
    return found
