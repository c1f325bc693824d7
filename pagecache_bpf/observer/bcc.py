# SPDX-License-Identifier: Apache-2.0
"""The observer compiled by BCC, on the machine: for kernels that have headers and no BTF.

The same programs; what they stand on is bpf/include/observer_bcc.bpf.h.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import importlib.util
import os
import re
import sys
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pagecache_bpf._run_dir import write_log
from pagecache_bpf.errors import UnsupportedError
from pagecache_bpf.kernel import libbpf
from pagecache_bpf.kernel.bpf_maps import BpfMap, close_all
from pagecache_bpf.observer.count_maps import MAPS, RING
from pagecache_bpf.observer.programs import FAULTS, check_tracepoints, constants

#: Where distributions put it; a virtual environment does not look there.
PLACES = ("/usr/lib/python3/dist-packages", "/usr/lib/python3/site-packages")
FIX = "Install BCC (Debian: python3-bpfcc) and the headers of the running kernel"
_RING_BYTES = 1 << 20
_RINGBUF = 27  # BPF_MAP_TYPE_RINGBUF
_HERE = Path(__file__).resolve().parent.parent
_OBSERVE = re.compile(r"^OBSERVE\((\w+), (\w+)\)$", re.M)


def import_bcc() -> Any:
    """Import BCC, of this Python or of the distribution's, which virtual environments lack.

    Returns:
        The module bcc.

    Raises:
        UnsupportedError: it is not installed, does not load, or is another package of that name.
    """
    if "bcc" in sys.modules:
        return sys.modules["bcc"]
    spec = importlib.util.find_spec("bcc") or importlib.machinery.PathFinder.find_spec(
        "bcc", list(PLACES)
    )
    if spec is None or spec.loader is None:
        where = ", ".join(PLACES)
        raise UnsupportedError("BCC is not installed", f"no module bcc here or in {where}", FIX)
    module = importlib.util.module_from_spec(spec)
    sys.modules["bcc"] = module
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, "BPF"):
            raise ImportError(f"{spec.origin} is another package of that name")
    except (ImportError, OSError) as error:
        del sys.modules["bcc"]
        raise UnsupportedError("BCC does not work", str(error), FIX) from error
    return module


class BccPrograms:
    """The observer's programs, compiled and run by BCC; used as observer.programs.Programs is.

    Args:
        moves: which cursor moves are told: 0, 1 or 2, as in bpf/include/observer_core.bpf.h.
        without: tracepoints to leave out.
        log_dir: where what the compiler says goes; None: the run directory.

    Raises:
        UnsupportedError: there is no BCC, or it or the kernel refuses the programs.
    """

    backend = "bcc"

    def __init__(
        self, moves: int, without: Collection[str] = (), log_dir: Path | None = None
    ) -> None:
        bcc = import_bcc()
        # Without callbacks areas of memory cannot be searched.
        self.missing: list[str] = sorted(FAULTS)
        self.maps = {name: BpfMap(_create(name, *shape)) for name, shape in MAPS.items()}
        self.ring_fd = _create(RING, _RINGBUF, 0, 0, _RING_BYTES, 0)
        flags = _flags(self.maps, self.ring_fd, moves)
        with _stderr() as said:
            try:
                self._bpf = bcc.BPF(text=_source().encode(), cflags=flags)
                self._attach(bcc.BPF, without)
            except Exception as error:
                self.close()
                raise _refused(bcc, said(), str(error), log_dir) from error
        check_tracepoints(self.missing)

    def _attach(self, kind: Any, without: Collection[str]) -> None:
        for tracepoint, function in _OBSERVE.findall(_programs()):
            if tracepoint in FAULTS:
                continue
            if tracepoint in without:
                self.missing.append(tracepoint)
                continue
            name = function.encode()
            self._bpf.load_func(name, kind.RAW_TRACEPOINT)
            try:
                self._bpf.attach_raw_tracepoint(tp=tracepoint.encode(), fn_name=name)
            except Exception:
                self.missing.append(tracepoint)

    def close(self) -> None:
        """Detach and free everything."""
        bpf = getattr(self, "_bpf", None)
        if bpf is not None:
            bpf.cleanup()
        close_all(self.maps)
        os.close(self.ring_fd)
        self.maps, self._bpf = {}, None


def _create(name: str, kind: int, key: int, value: int, entries: int, flags: int) -> int:
    class _Options(ctypes.Structure):
        _fields_ = (
            *(("sz", ctypes.c_size_t), ("btf_fd", ctypes.c_uint32), ("btf_key", ctypes.c_uint32)),
            *(("btf_value", ctypes.c_uint32), ("btf_vmlinux", ctypes.c_uint32)),
            *(("inner", ctypes.c_uint32), ("flags", ctypes.c_uint32)),
            *(("extra", ctypes.c_uint64), ("node", ctypes.c_uint32), ("device", ctypes.c_uint32)),
        )

    options = _Options(flags=flags)
    options.sz = ctypes.sizeof(options)
    call = libbpf.library().bpf_map_create
    call.restype = ctypes.c_int
    call.argtypes = (
        *(ctypes.c_int, ctypes.c_char_p, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_uint32),
        ctypes.c_void_p,
    )
    fd = int(call(kind, name[:15].encode(), key, value, entries, ctypes.byref(options)))
    if fd < 0:
        raise UnsupportedError(f"the map {name} was not made", os.strerror(-fd))
    return fd


def _place(*parts: str) -> Path:
    for top in (_HERE.parent / "bpf", _HERE / "bpf"):
        if (found := top.joinpath(*parts)).exists():
            return found
    raise UnsupportedError("the observer's source is not here", f"no {_HERE / 'bpf'}", "Reinstall")


def _programs() -> str:
    return _place("observer", "observer.bpf.c").read_text()


def _source() -> str:
    """Return the programs' source for BCC, which names a program's function by its first line."""
    return _OBSERVE.sub(
        lambda found: "" if found[1] in FAULTS else f"int {found[2]}(u64 *args)", _programs()
    )


def _flags(maps: dict[str, BpfMap], ring: int, moves: int) -> list[str]:
    values = {**constants(moves), "observer_silent_ns": 10_000_000}
    values |= {f"FD_{name}": bpf_map.fd for name, bpf_map in maps.items()}
    values |= {f"FD_{RING}": ring, "PAGECACHE_BCC": 1}
    return [
        f"-I{_place('include')}",
        *(f"-D{name}={value}" for name, value in values.items()),
        *("-Wno-everything", "-g"),
    ]


@contextmanager
def _stderr() -> Iterator[Any]:
    """Catch what the compiler writes to file descriptor 2, wherever it comes from."""
    sys.stderr.flush()
    before = os.dup(2)
    with tempfile.TemporaryFile() as caught:
        os.dup2(caught.fileno(), 2)

        def said() -> str:
            caught.seek(0)
            return caught.read().decode(errors="replace")

        try:
            yield said
        finally:
            os.dup2(before, 2)
            os.close(before)


def _refused(bcc: Any, said: str, error: str, log_dir: Path | None) -> UnsupportedError:
    log = write_log("observer-bcc.log", said, log_dir)
    lines = [line for line in said.splitlines() if re.search(r"\b(fatal )?error: ", line)]
    version = getattr(bcc, "__version__", "of unknown version")
    return UnsupportedError(
        f"BCC {version} cannot make the observer for this kernel",
        "; ".join(lines[:3]) or error,
        f"Everything it said is in {log}" if log else FIX,
    )
