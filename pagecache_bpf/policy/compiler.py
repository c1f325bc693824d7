# SPDX-License-Identifier: Apache-2.0
"""Compiles the C of a policy with clang, for any of the three engines.

It knows the compiler and its flags; what a policy declares, catalog reads from the object.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

from pagecache_bpf._run_dir import write_log
from pagecache_bpf.errors import PagecacheError, UnsupportedError, UsageError

PACKAGE = Path(__file__).resolve().parents[1]
SOURCE_TREE = PACKAGE.parent
OUR_HEADERS = (PACKAGE / "bpf" / "include", SOURCE_TREE / "bpf" / "include")
LIBBPF_HEADERS = (
    SOURCE_TREE / "build" / "deps" / "usr" / "include",
    PACKAGE / "lib" / "include",  # where `make install` puts them
    Path("/usr/include"),
    Path("/usr/local/include"),
)
SECONDS = 120  # a policy takes less than one; this only ends a compiler that hangs
ERRORS_SHOWN = 3

_ARCH = {"x86_64": "x86", "aarch64": "arm64"}
# The knobs of a policy are described by this attribute: clang 14 and newer have it.
_PROBE = "#if !__has_attribute(btf_decl_tag)\n#error too old\n#endif\n"


class CompileError(PagecacheError):
    """The C of a policy is wrong.

    Args:
        what: which policy was not compiled.
        why: the first error of the compiler.
        fix: the next step for the person reading.
        log_path: the file with all that the compiler said; None: it was not kept.
    """

    def __init__(self, what: str, why: str, fix: str, log_path: Path | None) -> None:
        super().__init__(what, why, fix)
        self.log_path = log_path


@lru_cache(maxsize=1)
def find_clang() -> str:
    """Find the compiler: $CLANG, clang, or the newest clang-NN, the first that can do the job.

    Returns:
        The command.

    Raises:
        UnsupportedError: there is none.
    """
    seen = []
    for clang in _candidates():
        if _can_compile(clang):
            return clang
        seen.append(clang)
    why = f"{', '.join(seen)}: too old, or without the bpf target" if seen else "not found"
    raise UnsupportedError(
        "policies in C need clang 14 or newer", why, "Install clang (apt install clang)"
    )


def _candidates() -> list[str]:
    """Return the compilers that there are, in the order in which they are tried."""
    versions = set()
    for directory in os.environ.get("PATH", "").split(os.pathsep):
        for path in Path(directory or ".").glob("clang-[0-9]*"):
            if re.fullmatch(r"clang-\d+", path.name):
                versions.add(int(path.name[6:]))
    names = [os.environ.get("CLANG", ""), "clang"]
    names += [f"clang-{version}" for version in sorted(versions, reverse=True)]
    return [found for name in names if name and (found := shutil.which(name))]


def _can_compile(clang: str) -> bool:
    """Tell whether a compiler knows the bpf target and the attribute that describes knobs."""
    try:
        probe = subprocess.run(
            [clang, "-target", "bpf", "-E", "-x", "c", "-"],
            input=_PROBE,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return probe.returncode == 0


def include_dirs() -> list[Path]:
    """Return where headers are: ours, then libbpf's unless the compiler finds them by itself.

    Returns:
        The directories, in the order in which the compiler looks.

    Raises:
        UnsupportedError: either is missing.
    """
    dirs = []
    for places, header, what in (
        (OUR_HEADERS, "policy.bpf.h", "pagecache-bpf's"),
        (LIBBPF_HEADERS, "bpf/bpf_helpers.h", "libbpf's"),
    ):
        found = next((place for place in places if (place / header).is_file()), None)
        if found is None:
            raise UnsupportedError(
                f"policies in C need {what} headers",
                f"{header} is not in {', '.join(map(str, places))}",
                "Run `make deps`, or install libbpf-dev",
            )
        dirs.append(found)
    return [place for place in dirs if place != Path("/usr/include")]


def flags() -> list[str]:
    """Return the compiler's flags for a policy, the same as for those of this package.

    Returns:
        The flags.

    Raises:
        UnsupportedError: headers are missing.
    """
    machine = platform.machine()
    if machine not in _ARCH:
        raise UnsupportedError(
            "policies cannot be compiled here",
            f"the architecture {machine} is not known",
            f"Known are: {', '.join(_ARCH)}",
        )
    return [
        *("-O2", "-g", "-Wall", "-Werror", "-target", "bpf", "-mcpu=v3"),
        f"-D__TARGET_ARCH_{_ARCH[machine]}",
        *(word for place in include_dirs() for word in ("-I", str(place))),
    ]


def compile_policy(
    source: Path, out: Path | None = None, log_dir: Path | None = None, engine: str = "struct_ops"
) -> Path:
    """Compile a policy's source.

    Args:
        source: NAME.bpf.c.
        out: the object's path; by default it lies in a temporary directory and goes when this
            process ends.
        log_dir: where the whole of the compiler's complaints goes (default: /run/pagecache-bpf).
        engine: "struct_ops" or "agent".

    Returns:
        The object's path.

    Raises:
        UsageError: there is no such file.
        UnsupportedError: there is no compiler, or headers are missing.
        CompileError: the compiler refuses the source.
    """
    if not source.is_file():
        raise UsageError(f"{source} does not exist", "it is to be compiled", "Check the path")
    suffix = ".o" if engine == "struct_ops" else f".{engine}.o"
    out = out or Path(_scratch().name, source.name.removesuffix(".c") + suffix)
    clang = find_clang()
    define = [] if engine == "struct_ops" else [f"-DPAGECACHE_ENGINE_{engine.upper()}"]
    _compile(source, [clang, *flags(), *define, "-c", str(source), "-o", str(out)], log_dir)
    _strip(clang, out)
    return out


def compile_simulation(source: Path, log_dir: Path | None = None) -> Path:
    """Compile a policy with a model of the page cache, for pagecache_bpf.simulate.

    Args:
        source: NAME.bpf.c.
        log_dir: where the whole of the compiler's complaints goes (default: /run/pagecache-bpf).

    Returns:
        The path of a shared object, which goes when this process ends.

    Raises:
        UsageError: there is no such file.
        UnsupportedError: there is no compiler, or headers are missing.
        CompileError: the compiler refuses the source.
    """
    if not source.is_file():
        raise UsageError(f"{source} does not exist", "it is to be compiled", "Check the path")
    out = Path(_scratch().name, source.name.removesuffix(".bpf.c") + ".simulate.so")
    command = [
        *(find_clang(), "-O2", "-fPIC", "-shared", "-nostdlib", "-Wl,-Bsymbolic"),
        *("-Wall", "-Werror", "-DPAGECACHE_ENGINE_SIMULATE", "-I", str(include_dirs()[0])),
        *(str(source), "-o", str(out)),
    ]
    _compile(source, command, log_dir)
    return out


def _compile(source: Path, command: list[str], log_dir: Path | None) -> None:
    """Run the compiler.  Raises CompileError, or PagecacheError if it hangs."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise PagecacheError(
            f"{source} was not compiled", f"{command[0]} did not finish in {SECONDS} s"
        ) from error
    if done.returncode:
        raise _compile_error(source, command, done.stderr, log_dir)


def _compile_error(
    source: Path, command: list[str], said: str, log_dir: Path | None
) -> CompileError:
    """Make the error for a source that does not compile, and keep the compiler's whole output."""
    text = f"$ {' '.join(command)}\n{said}"
    log = write_log(f"{source.name.removesuffix('.bpf.c')}-compile.log", text, log_dir)
    errors = [line for line in said.splitlines() if re.search(r"\b(fatal )?error: ", line)]
    shown = errors[:ERRORS_SHOWN] or said.splitlines()[-ERRORS_SHOWN:] or ["no reason given"]
    if len(errors) > ERRORS_SHOWN:
        shown.append(f"and {len(errors) - ERRORS_SHOWN} more errors")
    where = f"The compiler's whole output is in {log}" if log else ""
    return CompileError(f"{source} does not compile", "\n  ".join(["", *shown]), where, log)


def _strip(clang: str, out: Path) -> None:
    """Remove the debug information (DWARF), which nobody reads, if there is an llvm-strip.

    The type information (BTF) stays.
    """
    version = re.search(r"(-\d+)?$", clang)
    strip = shutil.which(f"llvm-strip{version.group() if version else ''}")
    strip = strip or shutil.which("llvm-strip")
    if strip:
        subprocess.run([strip, "-g", str(out)], check=False, timeout=SECONDS)


@lru_cache(maxsize=1)
def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="pagecache-bpf-")
