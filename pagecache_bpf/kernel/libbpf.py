# SPDX-License-Identifier: Apache-2.0
"""The part of libbpf that the loader needs, through ctypes.

A struct_ops type that lives in a module needs libbpf 1.4: older ones look for it in the
kernel's own type information only.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path

from pagecache_bpf.errors import PagecacheError, UnsupportedError
from pagecache_bpf.kernel.btf import Btf

SONAME = "libbpf.so.1"
PATH_VARIABLE = "PAGECACHE_BPF_LIBBPF"
OLDEST = (1, 4)
#: The section of constants of a program.
RODATA = ".rodata"
LOG_BYTES = 16 << 20
MESSAGE_BYTES = 64 << 10

_PACKAGE = Path(__file__).resolve().parents[1]
_DEBUG = 2  # enum libbpf_print_level

_SAMPLE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_PRINT = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


class _OpenOptions(ctypes.Structure):
    """struct bpf_object_open_opts, of which libbpf reads the first sz bytes"""

    _fields_ = (
        ("sz", ctypes.c_size_t),
        ("object_name", ctypes.c_char_p),
        ("relaxed_maps", ctypes.c_bool),
        ("pin_root_path", ctypes.c_char_p),
        ("unused", ctypes.c_uint32),
        ("kconfig", ctypes.c_char_p),
        ("btf_custom_path", ctypes.c_char_p),
        ("kernel_log_buf", ctypes.c_void_p),
        ("kernel_log_size", ctypes.c_size_t),
        ("kernel_log_level", ctypes.c_uint32),
    )


class MapInfo(ctypes.Structure):
    """The start of struct bpf_map_info, up to the last member that is used here"""

    type: int
    id: int
    key_size: int
    value_size: int
    max_entries: int
    btf_id: int

    _fields_ = (
        ("type", ctypes.c_uint32),
        ("id", ctypes.c_uint32),
        ("key_size", ctypes.c_uint32),
        ("value_size", ctypes.c_uint32),
        ("max_entries", ctypes.c_uint32),
        ("map_flags", ctypes.c_uint32),
        ("name", ctypes.c_char * 16),
        ("ifindex", ctypes.c_uint32),
        ("btf_vmlinux_value_type_id", ctypes.c_uint32),
        ("netns_dev", ctypes.c_uint64),
        ("netns_ino", ctypes.c_uint64),
        ("btf_id", ctypes.c_uint32),
        ("btf_key_type_id", ctypes.c_uint32),
        ("btf_value_type_id", ctypes.c_uint32),
        ("btf_vmlinux_id", ctypes.c_uint32),
    )


class _BtfInfo(ctypes.Structure):
    """struct bpf_btf_info"""

    btf: int
    btf_size: int

    _fields_ = (
        ("btf", ctypes.c_uint64),
        ("btf_size", ctypes.c_uint32),
        ("id", ctypes.c_uint32),
        ("name", ctypes.c_uint64),
        ("name_len", ctypes.c_uint32),
        ("kernel_btf", ctypes.c_uint32),
    )


class _RunOptions(ctypes.Structure):
    """The start of struct bpf_test_run_opts"""

    retval: int

    _fields_ = (
        ("sz", ctypes.c_size_t),
        ("data_in", ctypes.c_void_p),
        ("data_out", ctypes.c_void_p),
        ("data_size_in", ctypes.c_uint32),
        ("data_size_out", ctypes.c_uint32),
        ("ctx_in", ctypes.c_void_p),
        ("ctx_out", ctypes.c_void_p),
        ("ctx_size_in", ctypes.c_uint32),
        ("ctx_size_out", ctypes.c_uint32),
        ("retval", ctypes.c_uint32),
        ("repeat", ctypes.c_int),
        ("duration", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("cpu", ctypes.c_uint32),
        ("batch_size", ctypes.c_uint32),
    )


_P, _I, _S = ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p
_PROTOTYPES: dict[str, tuple[type | None, tuple[type, ...]]] = {
    "libbpf_set_print": (_P, (_PRINT,)),
    "bpf_object__open_file": (_P, (_S, ctypes.POINTER(_OpenOptions))),
    "bpf_object__load": (_I, (_P,)),
    "bpf_object__close": (None, (_P,)),
    "bpf_object__btf": (_P, (_P,)),
    "bpf_object__next_map": (_P, (_P, _P)),
    "bpf_map__name": (_S, (_P,)),
    "bpf_map__fd": (_I, (_P,)),
    "bpf_map__type": (_I, (_P,)),
    "bpf_map__max_entries": (ctypes.c_uint32, (_P,)),
    "bpf_map__set_max_entries": (_I, (_P, ctypes.c_uint32)),
    "bpf_map__initial_value": (_P, (_P, ctypes.POINTER(ctypes.c_size_t))),
    "bpf_map__attach_struct_ops": (_P, (_P,)),
    "bpf_object__next_program": (_P, (_P, _P)),
    "bpf_program__name": (_S, (_P,)),
    "bpf_program__section_name": (_S, (_P,)),
    "bpf_program__attach": (_P, (_P,)),
    "bpf_program__fd": (_I, (_P,)),
    "bpf_prog_test_run_opts": (_I, (_I, ctypes.POINTER(_RunOptions))),
    "bpf_link__fd": (_I, (_P,)),
    "bpf_link__destroy": (_I, (_P,)),
    "btf__raw_data": (_P, (_P, ctypes.POINTER(ctypes.c_uint32))),
    "bpf_obj_pin": (_I, (_I, _S)),
    "bpf_obj_get": (_I, (_S,)),
    "bpf_map_lookup_elem": (_I, (_I, _P, _P)),
    "bpf_map_update_elem": (_I, (_I, _P, _P, ctypes.c_uint64)),
    "bpf_map_delete_elem": (_I, (_I, _P)),
    "bpf_map_get_next_key": (_I, (_I, _P, _P)),
    "bpf_map_lookup_batch": (_I, (_I, _P, _P, _P, _P, _P, _P)),
    "libbpf_num_possible_cpus": (_I, ()),
    "ring_buffer__new": (_P, (_I, _SAMPLE, _P, _P)),
    "ring_buffer__poll": (_I, (_P, _I)),
    "ring_buffer__consume": (_I, (_P,)),
    "ring_buffer__free": (None, (_P,)),
    "bpf_map_get_fd_by_id": (_I, (ctypes.c_uint32,)),
    "bpf_btf_get_fd_by_id": (_I, (ctypes.c_uint32,)),
    "bpf_obj_get_info_by_fd": (_I, (_I, _P, ctypes.POINTER(ctypes.c_uint32))),
}


def candidates() -> list[str]:
    """Where libbpf is looked for, in this order; $PAGECACHE_BPF_LIBBPF alone if it is set."""
    if chosen := os.environ.get(PATH_VARIABLE):
        return [chosen]
    deps = _PACKAGE.parent / "build" / "deps" / "usr"
    places = [*deps.glob(f"lib*/{SONAME}"), *deps.glob(f"lib/*/{SONAME}")]
    places += [*_PACKAGE.glob(f"lib/{SONAME}")]
    return [*map(str, sorted(places)), SONAME]


def version_of(library: ctypes.CDLL) -> tuple[int, int]:
    """Major and minor version of a loaded libbpf; (0, 0) for those that cannot tell."""
    try:
        return library.libbpf_major_version(), library.libbpf_minor_version()
    except AttributeError:
        return (0, 0)


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """libbpf, ready to be called.  Raises UnsupportedError if it is absent or too old."""
    wanted = ".".join(map(str, OLDEST))
    fix = f"Run `make deps`, or install libbpf {wanted} or newer (libbpf1 of a newer distribution)"
    reasons = []
    for place in candidates():
        try:
            found = ctypes.CDLL(place, use_errno=True)
        except OSError as error:
            reasons.append(str(error))
            continue
        version = version_of(found)
        if version < OLDEST:
            reasons.append(f"{place} is version {version[0]}.{version[1]}")
            continue
        for name, (result, arguments) in _PROTOTYPES.items():
            function = getattr(found, name)
            function.restype, function.argtypes = result, arguments
        return found
    raise UnsupportedError(f"libbpf {wanted} or newer is needed", "; ".join(reasons), fix)


class Messages:
    """Collects what libbpf says in a with block, instead of letting it go to stderr."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._text = ctypes.create_string_buffer(MESSAGE_BYTES)
        self._format = ctypes.CDLL(None).vsnprintf
        self._format.argtypes = (_P, ctypes.c_size_t, _S, _P)
        self._callback = _PRINT(self._print)

    def __enter__(self) -> Messages:
        # The process may use libbpf for other things, so what was set before comes back.
        self._before = library().libbpf_set_print(self._callback)
        return self

    def __exit__(self, *_: object) -> None:
        library().libbpf_set_print(ctypes.cast(self._before, _PRINT))

    def _print(self, level: int, template: bytes, arguments: int) -> int:
        # A va_list is handed on as a pointer: so it is passed on amd64 and on arm64.
        if level < _DEBUG:
            self._format(self._text, MESSAGE_BYTES, template, arguments)
            text = self._text.value.decode("utf-8", "replace")
            self.lines += [line.removeprefix("libbpf: ") for line in text.splitlines()]
        return 0


class ObjectMap:
    """A map of an open object, to be set up before it is loaded; valid while the object is.

    What is in a loaded one is read and written by kernel.bpf_maps.BpfMap, by its descriptor.
    """

    def __init__(self, pointer: int) -> None:
        self._pointer = pointer

    @property
    def name(self) -> str:
        """Its name; that of a data section starts with a part of the object's."""
        return str(library().bpf_map__name(self._pointer).decode())

    @property
    def fd(self) -> int:
        """Its file descriptor, negative before it is loaded."""
        return int(library().bpf_map__fd(self._pointer))

    @property
    def type(self) -> int:
        """Its type, as enum bpf_map_type."""
        return int(library().bpf_map__type(self._pointer))

    def write_initial(self, offset: int, data: bytes) -> None:
        """Change the data that a section's map will have when it is loaded."""
        size = ctypes.c_size_t()
        start = library().bpf_map__initial_value(self._pointer, ctypes.byref(size))
        if not start or offset + len(data) > size.value:
            raise PagecacheError(f"{self.name} cannot be set", "its data is not as described")
        ctypes.memmove(start + offset, data, len(data))

    @property
    def max_entries(self) -> int:
        """How many elements it has room for."""
        return int(library().bpf_map__max_entries(self._pointer))

    def resize(self, entries: int) -> None:
        """Set how many elements it will have when it is loaded.  Raises OSError."""
        _check(library().bpf_map__set_max_entries(self._pointer, entries))

    def attach_struct_ops(self) -> Link:
        """Attach it.  Raises OSError."""
        return Link(_checked(library().bpf_map__attach_struct_ops(self._pointer)))


class Program:
    """A program of an open object; valid while the object is."""

    def __init__(self, pointer: int) -> None:
        self._pointer = pointer

    @property
    def name(self) -> str:
        """Its function's name."""
        return str(library().bpf_program__name(self._pointer).decode())

    @property
    def section(self) -> str:
        """Its section, which says what it attaches to."""
        return str(library().bpf_program__section_name(self._pointer).decode())

    def run(self, arguments: ctypes.Structure | None = None) -> int:
        """Run a program of section "syscall" now; what it returned.  Raises OSError."""
        options = _RunOptions()
        options.sz = ctypes.sizeof(options)
        if arguments is not None:
            options.ctx_in = ctypes.addressof(arguments)
            options.ctx_size_in = ctypes.sizeof(arguments)
        fd = library().bpf_program__fd(self._pointer)
        _check(library().bpf_prog_test_run_opts(fd, ctypes.byref(options)))
        return ctypes.c_int32(options.retval).value

    def attach(self) -> Link:
        """Attach it where its section says.  Raises OSError."""
        return Link(_checked(library().bpf_program__attach(self._pointer)))


class RingBuffer:
    """The reader's side of a BPF_MAP_TYPE_RINGBUF; `receive` gets each record's bytes."""

    def __init__(self, fd: int, receive: Callable[[bytes], None]) -> None:
        def sample(_: int, data: int, size: int) -> int:
            receive(ctypes.string_at(data, size))
            return 0

        self._callback = _SAMPLE(sample)
        new = library().ring_buffer__new
        self._pointer: int | None = _checked(new(fd, self._callback, None, None))

    def poll(self, milliseconds: int) -> int:
        """Wait for records and hand them over; how many there were.  Raises OSError."""
        return _check(library().ring_buffer__poll(self._pointer, milliseconds))

    def close(self) -> None:
        """Free it."""
        pointer, self._pointer = self._pointer, None
        if pointer:
            library().ring_buffer__free(pointer)


class Link:
    """An attachment.  It ends when it is closed, unless it is pinned."""

    def __init__(self, pointer: int) -> None:
        self._pointer: int | None = pointer

    def pin(self, path: Path) -> None:
        """Keep it alive by a name in bpffs.  Raises OSError."""
        pin(int(library().bpf_link__fd(self._pointer)), path)

    def close(self) -> None:
        """Let go of it."""
        pointer, self._pointer = self._pointer, None
        if pointer:
            library().bpf_link__destroy(pointer)


class Object:
    """An object file, opened and not loaded yet.  Use it as a context manager.

    Raises OSError, with libbpf's errno, when it cannot be opened.
    """

    def __init__(self, path: Path, name: str) -> None:
        self._log = ctypes.create_string_buffer(LOG_BYTES)
        options = _OpenOptions(
            object_name=name.encode(),
            kernel_log_buf=ctypes.addressof(self._log),
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
        """Free it; what is pinned or attached stays."""
        pointer, self._pointer = self._pointer, None
        if pointer:
            library().bpf_object__close(pointer)

    def load(self) -> None:
        """Create the maps and have the programs verified.  Raises OSError."""
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
        return self._log.value.decode("utf-8", "replace")

    def maps(self) -> Iterator[ObjectMap]:
        """Its maps, those of data sections and struct_ops included."""
        pointer = library().bpf_object__next_map(self._pointer, None)
        while pointer:
            yield ObjectMap(pointer)
            pointer = library().bpf_object__next_map(self._pointer, pointer)

    def programs(self) -> Iterator[Program]:
        """Its programs."""
        pointer = library().bpf_object__next_program(self._pointer, None)
        while pointer:
            yield Program(pointer)
            pointer = library().bpf_object__next_program(self._pointer, pointer)

    def program(self, name: str) -> Program:
        """The program whose function has a name.  Raises LookupError."""
        for program in self.programs():
            if program.name == name:
                return program
        raise LookupError(f"the object has no program {name}")

    def btf(self) -> Btf:
        """Its type information, in which the variables of data sections have their offsets."""
        size = ctypes.c_uint32()
        raw = library().btf__raw_data(library().bpf_object__btf(self._pointer), ctypes.byref(size))
        return Btf(ctypes.string_at(raw, size.value) if raw else b"")


def pin(fd: int, path: Path) -> None:
    """Give a map or a link a name in bpffs.  Raises OSError."""
    _check(library().bpf_obj_pin(fd, os.fsencode(path)), path)


def read_pinned(path: Path) -> tuple[bytes, Btf]:
    """The first element of a pinned map, and the types it was made with.  Raises OSError."""
    fd = _check(library().bpf_obj_get(os.fsencode(path)), path)
    try:
        info = map_info(fd)
        key, value = ctypes.c_uint32(0), ctypes.create_string_buffer(info.value_size)
        _check(library().bpf_map_lookup_elem(fd, ctypes.byref(key), value), path)
        return value.raw, _kernel_btf(info.btf_id)
    finally:
        os.close(fd)


def map_info(fd: int) -> MapInfo:
    """What the kernel says about an open map.  Raises OSError."""
    info = MapInfo()
    _info(fd, info)
    return info


def _kernel_btf(btf_id: int) -> Btf:
    fd = _check(library().bpf_btf_get_fd_by_id(btf_id))
    try:
        info = _BtfInfo()
        _info(fd, info)
        data = ctypes.create_string_buffer(info.btf_size)
        info = _BtfInfo(btf=ctypes.addressof(data), btf_size=len(data))
        _info(fd, info)
        return Btf(data.raw)
    finally:
        os.close(fd)


def _info(fd: int, info: ctypes.Structure) -> None:
    size = ctypes.c_uint32(ctypes.sizeof(info))
    _check(library().bpf_obj_get_info_by_fd(fd, ctypes.byref(info), ctypes.byref(size)))


def _checked(pointer: int | None) -> int:
    """A pointer that libbpf returned: it reports failure by NULL and errno."""
    if not pointer:
        code = ctypes.get_errno() or errno.EINVAL
        raise OSError(code, os.strerror(code))
    return pointer


def _check(result: int, path: Path | None = None) -> int:
    """A result of libbpf: it reports failure by a negative errno."""
    if result < 0:
        raise OSError(-result, os.strerror(-result), None if path is None else str(path))
    return result
