# SPDX-License-Identifier: Apache-2.0
"""BPF objects and what is in them, through libbpf: maps, programs, links, ring buffers.

Knows no policy: what an object means is said by its callers.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from pagecache_bpf.errors import PagecacheError
from pagecache_bpf.kernel.btf import Btf
from pagecache_bpf.kernel.libbpf_library import (
    PATH_VARIABLE,
    SAMPLE_FUNCTION,
    BtfInfo,
    MapInfo,
    OpenOptions,
    RunOptions,
    library,
    version_of,
)
from pagecache_bpf.kernel.libbpf_messages import Messages

__all__ = [
    "PATH_VARIABLE",
    "RODATA",
    "Link",
    "MapInfo",
    "Messages",
    "Object",
    "ObjectMap",
    "Program",
    "RingBuffer",
    "library",
    "map_info",
    "open_pinned",
    "pin",
    "read_pinned",
    "version_of",
]

#: The section of constants of a program.
RODATA = ".rodata"
LOG_BYTES = 16 << 20


class ObjectMap:
    """A map of an open object, to be set up before it is loaded; valid while the object is.

    What is in a loaded one is read and written by kernel.bpf_maps.BpfMap, by its descriptor.

    Args:
        pointer: address of the struct bpf_map; Object.maps() gives it.
    """

    def __init__(self, pointer: int) -> None:
        self._pointer = pointer

    @property
    def pointer(self) -> int:
        """Address of its struct bpf_map."""
        return self._pointer

    @property
    def name(self) -> str:
        """The map's name; that of a data section starts with a part of the object's."""
        return str(library().bpf_map__name(self._pointer).decode())

    @property
    def fd(self) -> int:
        """The map's file descriptor, negative before it is loaded."""
        return int(library().bpf_map__fd(self._pointer))

    @property
    def type(self) -> int:
        """The map's type, a number of enum bpf_map_type."""
        return int(library().bpf_map__type(self._pointer))

    def write_initial(self, offset: int, data: bytes) -> None:
        """Change the data that a section's map will have when it is loaded.

        Args:
            offset: where, in bytes from the start of the section.
            data: the new bytes.

        Raises:
            PagecacheError: the map has no initial data, or less of it.
        """
        size = ctypes.c_size_t()
        start = library().bpf_map__initial_value(self._pointer, ctypes.byref(size))
        if not start or offset + len(data) > size.value:
            raise PagecacheError(f"{self.name} cannot be set", "its data is not as described")
        ctypes.memmove(start + offset, data, len(data))

    @property
    def max_entries(self) -> int:
        """How many elements the map has room for."""
        return int(library().bpf_map__max_entries(self._pointer))

    def resize(self, entries: int) -> None:
        """Set how many elements the map will have when it is loaded.

        Args:
            entries: the number.

        Raises:
            OSError: the object is loaded already.
        """
        _check(library().bpf_map__set_max_entries(self._pointer, entries))

    def reuse(self, fd: int) -> None:
        """Take a map that is there already in the place of this one.

        Args:
            fd: its descriptor, which the caller keeps; a map of the same type and sizes.

        Raises:
            OSError: this object is loaded already, or the descriptor is no map.
        """
        _check(library().bpf_map__reuse_fd(self._pointer, fd))

    def attach_struct_ops(self) -> Link:
        """Attach a map of type struct_ops: the kernel begins to call its programs.

        Returns:
            What keeps it attached.

        Raises:
            OSError: the kernel refuses.
        """
        return Link(_checked(library().bpf_map__attach_struct_ops(self._pointer)))


class Program:
    """A program of an open object; valid while the object is.

    Args:
        pointer: address of the struct bpf_program; Object.programs() gives it.
    """

    def __init__(self, pointer: int) -> None:
        self._pointer = pointer

    @property
    def name(self) -> str:
        """The name of the program's function."""
        return str(library().bpf_program__name(self._pointer).decode())

    @property
    def section(self) -> str:
        """The program's section, which says what it attaches to."""
        return str(library().bpf_program__section_name(self._pointer).decode())

    @property
    def autoload(self) -> bool:
        """Whether it is loaded with its object."""
        return bool(library().bpf_program__autoload(self._pointer))

    def set_autoload(self, load: bool) -> None:
        """Say whether it is loaded with its object.

        Args:
            load: False leaves it out.

        Raises:
            OSError: the object is loaded already.
        """
        _check(library().bpf_program__set_autoload(self._pointer, load))

    def run(self, arguments: ctypes.Structure | None = None) -> int:
        """Run a program of section "syscall" now.

        Args:
            arguments: its context, if it takes one; what it writes there comes back.

        Returns:
            What the program returned.

        Raises:
            OSError: the kernel refuses.
        """
        options = RunOptions()
        options.sz = ctypes.sizeof(options)
        if arguments is not None:
            options.ctx_in = ctypes.addressof(arguments)
            options.ctx_size_in = ctypes.sizeof(arguments)
        fd = library().bpf_program__fd(self._pointer)
        _check(library().bpf_prog_test_run_opts(fd, ctypes.byref(options)))
        return ctypes.c_int32(options.retval).value

    def attach(self) -> Link:
        """Attach the program where its section says.

        Returns:
            What keeps it attached.

        Raises:
            OSError: the kernel refuses.
        """
        return Link(_checked(library().bpf_program__attach(self._pointer)))


class RingBuffer:
    """The reader's side of a BPF_MAP_TYPE_RINGBUF.

    Args:
        fd: the map's descriptor.
        receive: called with the bytes of each record, from poll().

    Raises:
        OSError: the descriptor is of no ring buffer.
    """

    def __init__(self, fd: int, receive: Callable[[bytes], None]) -> None:
        def _called_back(_: int, data: int, size: int) -> int:
            receive(ctypes.string_at(data, size))
            return 0

        self._callback = SAMPLE_FUNCTION(_called_back)
        new = library().ring_buffer__new
        self._pointer: int | None = _checked(new(fd, self._callback, None, None))

    def poll(self, milliseconds: int) -> int:
        """Wait for records and hand them over.

        Args:
            milliseconds: how long to wait at most; 0 not at all.

        Returns:
            How many records there were.

        Raises:
            OSError: the wait failed.
        """
        return _check(library().ring_buffer__poll(self._pointer, milliseconds))

    def close(self) -> None:
        """Free the memory that the ring buffer is mapped to; the map stays."""
        pointer, self._pointer = self._pointer, None
        if pointer:
            library().ring_buffer__free(pointer)


class Link:
    """An attachment.  It ends when it is closed, unless it is pinned.

    Args:
        pointer: address of the struct bpf_link, which is this object's from now on.
    """

    def __init__(self, pointer: int) -> None:
        self._pointer: int | None = pointer

    def pin(self, path: Path) -> None:
        """Keep the link alive by a name in bpffs, beyond this process.

        Args:
            path: the name, below a mounted bpffs.

        Raises:
            OSError: the name is taken, or this is no bpffs.
        """
        pin(int(library().bpf_link__fd(self._pointer)), path)

    def close(self) -> None:
        """Detach the program, unless the link is pinned."""
        pointer, self._pointer = self._pointer, None
        if pointer:
            library().bpf_link__destroy(pointer)


class Object:
    """An object file, opened and not loaded yet.  A context manager.

    Args:
        path: the file.
        name: what the kernel's lists will call it.

    Raises:
        OSError: it cannot be opened, with libbpf's errno.
    """

    def __init__(self, path: Path, name: str) -> None:
        # Mapped, not allocated: only what the verifier writes takes memory.
        self._log = mmap.mmap(-1, LOG_BYTES)
        options = OpenOptions(
            object_name=name.encode(),
            kernel_log_buf=ctypes.addressof(ctypes.c_char.from_buffer(self._log)),
            kernel_log_size=LOG_BYTES,
        )
        options.sz = ctypes.sizeof(options)
        call = library().bpf_object__open_file
        self._pointer: int | None = _checked(call(os.fsencode(path), ctypes.byref(options)))

    def __enter__(self) -> Object:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the object; what is pinned or attached stays."""
        pointer, self._pointer = self._pointer, None
        if pointer:
            library().bpf_object__close(pointer)

    def load(self) -> None:
        """Create the maps and have the programs verified.

        Raises:
            OSError: the kernel refuses; kernel_log says why.
        """
        _check(library().bpf_object__load(self._pointer))

    def set_constants(self, values: Mapping[str, int]) -> None:
        """Set `const volatile` variables of the programs before they are loaded.

        Args:
            values: by the variable's name; names that the object does not have are left out.

        Raises:
            OverflowError: a value does not fit its variable.
        """
        btf = self.btf()
        known = [variable for variable in btf.variables(RODATA) if variable.name in values]
        if not known:
            return
        section = next(section for section in self.maps() if section.name.endswith(RODATA))
        for variable in known:
            signed = btf.int_signed(variable.type_id)
            value = values[variable.name]
            data = value.to_bytes(btf.size(variable.type_id), sys.byteorder, signed=signed)
            section.write_initial(variable.offset, data)

    @property
    def kernel_log(self) -> str:
        """The verifier's log of the program that was refused."""
        return self._log[: max(0, self._log.find(b"\0", 0))].decode("utf-8", "replace")

    def maps(self) -> Iterator[ObjectMap]:
        """Yield the object's maps, those of data sections and struct_ops included.

        Yields:
            Maps, in the object's order.
        """
        pointer = library().bpf_object__next_map(self._pointer, None)
        while pointer:
            yield ObjectMap(pointer)
            pointer = library().bpf_object__next_map(self._pointer, pointer)

    def programs(self) -> Iterator[Program]:
        """Yield the object's programs.

        Yields:
            Programs, in the object's order.
        """
        pointer = library().bpf_object__next_program(self._pointer, None)
        while pointer:
            yield Program(pointer)
            pointer = library().bpf_object__next_program(self._pointer, pointer)

    def program(self, name: str) -> Program:
        """Return the program whose function has a name.

        Args:
            name: the function's.

        Returns:
            The program.

        Raises:
            LookupError: there is none.
        """
        for program in self.programs():
            if program.name == name:
                return program
        raise LookupError(f"the object has no program {name}")

    def btf(self) -> Btf:
        """Return the object's type information, in which variables of data sections have offsets.

        Returns:
            The type information, read anew.
        """
        size = ctypes.c_uint32()
        raw = library().btf__raw_data(library().bpf_object__btf(self._pointer), ctypes.byref(size))
        return Btf(ctypes.string_at(raw, size.value) if raw else b"")


def open_pinned(path: Path) -> int:
    """Open what has a name in bpffs.

    Args:
        path: the name.

    Returns:
        A descriptor, which the caller closes.

    Raises:
        OSError: there is nothing of that name.
    """
    return _check(library().bpf_obj_get(os.fsencode(path)), path)


def pin(fd: int, path: Path) -> None:
    """Give a map or a link a name in bpffs.

    Args:
        fd: its descriptor.
        path: the name, below a mounted bpffs.

    Raises:
        OSError: the name is taken, or this is no bpffs.
    """
    _check(library().bpf_obj_pin(fd, os.fsencode(path)), path)


def read_pinned(path: Path) -> tuple[bytes, Btf]:
    """Read the first element of a pinned map.

    Args:
        path: the map's name in bpffs.

    Returns:
        The element, and the types that the map was made with.

    Raises:
        OSError: there is no such map, or it has no types.
    """
    fd = open_pinned(path)
    try:
        info = map_info(fd)
        key, value = ctypes.c_uint32(0), ctypes.create_string_buffer(info.value_size)
        _check(library().bpf_map_lookup_elem(fd, ctypes.byref(key), value), path)
        return value.raw, _kernel_btf(info.btf_id)
    finally:
        os.close(fd)


def map_info(fd: int) -> MapInfo:
    """Ask the kernel about an open map.

    Args:
        fd: its descriptor.

    Returns:
        Its type, sizes, name and number.

    Raises:
        OSError: the descriptor is no map.
    """
    info = MapInfo()
    _info(fd, info)
    return info


def _kernel_btf(btf_id: int) -> Btf:
    """Return the type information that has a number in the kernel.  Raises OSError."""
    fd = _check(library().bpf_btf_get_fd_by_id(btf_id))
    try:
        info = BtfInfo()
        _info(fd, info)
        data = ctypes.create_string_buffer(info.btf_size)
        info = BtfInfo(btf=ctypes.addressof(data), btf_size=len(data))
        _info(fd, info)
        return Btf(data.raw)
    finally:
        os.close(fd)


def _info(fd: int, info: ctypes.Structure) -> None:
    """Fill a structure with what the kernel tells about an open object.  Raises OSError."""
    size = ctypes.c_uint32(ctypes.sizeof(info))
    _check(library().bpf_obj_get_info_by_fd(fd, ctypes.byref(info), ctypes.byref(size)))


def _checked(pointer: int | None) -> int:
    """Return a pointer of libbpf's, which reports failure by NULL and errno.  Raises OSError."""
    if not pointer:
        code = ctypes.get_errno() or errno.EINVAL
        raise OSError(code, os.strerror(code))
    return pointer


def _check(result: int, path: Path | None = None) -> int:
    """Return a result of libbpf's, which reports failure by a negative errno.  Raises OSError."""
    if result < 0:
        raise OSError(-result, os.strerror(-result), None if path is None else str(path))
    return result
