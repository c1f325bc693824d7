# SPDX-License-Identifier: Apache-2.0
"""Finds libbpf and declares to ctypes what of it is called: prototypes and structures.

Holds no object, map or program; those are in pagecache_bpf.kernel.libbpf.  A struct_ops type that
lives in a module needs libbpf 1.4: older ones look for it in the kernel's own type information
only.
"""

from __future__ import annotations

import ctypes
import os
from functools import lru_cache
from pathlib import Path

from pagecache_bpf.errors import UnsupportedError

SONAME = "libbpf.so.1"
PATH_VARIABLE = "PAGECACHE_BPF_LIBBPF"
OLDEST = (1, 4)

_PACKAGE = Path(__file__).resolve().parents[1]
SAMPLE_FUNCTION = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
PRINT_FUNCTION = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


class OpenOptions(ctypes.Structure):
    """struct bpf_object_open_opts, of which libbpf reads the first sz bytes."""

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
    """The start of struct bpf_map_info, up to the last member that is used here."""

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


class BtfInfo(ctypes.Structure):
    """struct bpf_btf_info."""

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


class RunOptions(ctypes.Structure):
    """The start of struct bpf_test_run_opts."""

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
    "libbpf_set_print": (_P, (PRINT_FUNCTION,)),
    "bpf_object__open_file": (_P, (_S, ctypes.POINTER(OpenOptions))),
    "bpf_object__load": (_I, (_P,)),
    "bpf_object__close": (None, (_P,)),
    "bpf_object__btf": (_P, (_P,)),
    "bpf_object__next_map": (_P, (_P, _P)),
    "bpf_map__name": (_S, (_P,)),
    "bpf_map__fd": (_I, (_P,)),
    "bpf_map__type": (_I, (_P,)),
    "bpf_map__max_entries": (ctypes.c_uint32, (_P,)),
    "bpf_map__set_max_entries": (_I, (_P, ctypes.c_uint32)),
    "bpf_map__map_flags": (ctypes.c_uint32, (_P,)),
    "bpf_map__set_map_flags": (_I, (_P, ctypes.c_uint32)),
    "bpf_map__initial_value": (_P, (_P, ctypes.POINTER(ctypes.c_size_t))),
    "bpf_map__attach_struct_ops": (_P, (_P,)),
    "bpf_map__reuse_fd": (_I, (_P, _I)),
    "bpf_object__next_program": (_P, (_P, _P)),
    "bpf_program__name": (_S, (_P,)),
    "bpf_program__section_name": (_S, (_P,)),
    "bpf_program__attach": (_P, (_P,)),
    "bpf_program__autoload": (ctypes.c_bool, (_P,)),
    "bpf_program__set_autoload": (_I, (_P, ctypes.c_bool)),
    "bpf_program__fd": (_I, (_P,)),
    "bpf_prog_test_run_opts": (_I, (_I, ctypes.POINTER(RunOptions))),
    "bpf_link__fd": (_I, (_P,)),
    "bpf_link__destroy": (_I, (_P,)),
    "bpf_link_update": (_I, (_I, _I, _P)),
    "btf__raw_data": (_P, (_P, ctypes.POINTER(ctypes.c_uint32))),
    "bpf_obj_pin": (_I, (_I, _S)),
    "bpf_obj_get": (_I, (_S,)),
    "bpf_map_lookup_elem": (_I, (_I, _P, _P)),
    "bpf_map_update_elem": (_I, (_I, _P, _P, ctypes.c_uint64)),
    "bpf_map_delete_elem": (_I, (_I, _P)),
    "bpf_map_get_next_key": (_I, (_I, _P, _P)),
    "bpf_map_lookup_batch": (_I, (_I, _P, _P, _P, _P, _P, _P)),
    "libbpf_num_possible_cpus": (_I, ()),
    "ring_buffer__new": (_P, (_I, SAMPLE_FUNCTION, _P, _P)),
    "ring_buffer__poll": (_I, (_P, _I)),
    "ring_buffer__consume": (_I, (_P,)),
    "ring_buffer__free": (None, (_P,)),
    "bpf_map_get_fd_by_id": (_I, (ctypes.c_uint32,)),
    "bpf_btf_get_fd_by_id": (_I, (ctypes.c_uint32,)),
    "bpf_obj_get_info_by_fd": (_I, (_I, _P, ctypes.POINTER(ctypes.c_uint32))),
}


def candidates() -> list[str]:
    """Return where libbpf is looked for.

    Returns:
        File names and paths, in the order in which they are tried; $PAGECACHE_BPF_LIBBPF alone if
        it is set.
    """
    if chosen := os.environ.get(PATH_VARIABLE):
        return [chosen]
    deps = _PACKAGE.parent / "build" / "deps" / "usr"
    places = [*deps.glob(f"lib*/{SONAME}"), *deps.glob(f"lib/*/{SONAME}")]
    places += [*_PACKAGE.glob(f"lib/{SONAME}")]
    return [*map(str, sorted(places)), SONAME]


def version_of(library: ctypes.CDLL) -> tuple[int, int]:
    """Return the version of a loaded libbpf.

    Args:
        library: the loaded library.

    Returns:
        Major and minor number; (0, 0) for versions that cannot tell.
    """
    try:
        return library.libbpf_major_version(), library.libbpf_minor_version()
    except AttributeError:
        return (0, 0)


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """Return libbpf, loaded and ready to be called.

    Returns:
        The library; it is loaded once.

    Raises:
        UnsupportedError: it is absent or too old.
    """
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
