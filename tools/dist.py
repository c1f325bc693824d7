# SPDX-License-Identifier: Apache-2.0
"""Build what is released, into build/dist: `make dist`, or `python -m tools.dist [PART]...`.

All parts have the version of pyproject.toml.  Times in the files are those of the last commit
(SOURCE_DATE_EPOCH), so that the same tree gives the same files as far as the tools allow.  Each
part is a function of this module named build_PART: there is no list.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from tools import archives, image

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "build" / "dist"
VENV = ROOT / "build" / "venv-dist"
PACKAGING = ROOT / "packaging"
DIST_PACKAGES = "usr/lib/python3/dist-packages"
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}  # as wheels and as Debian names them


def version() -> str:
    """Look up the version in pyproject.toml, the one place that has it.

    Returns:
        The version, such as "0.1.0".

    Raises:
        SystemExit: there is none.
    """
    found = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    if not found:
        raise SystemExit("pyproject.toml has no version")
    return found[1]


def build_wheel() -> Path:
    """Build the wheel, with the compiled policies in it.

    Returns:
        The file in build/dist.
    """
    return _built("--wheel", "*.whl")


def build_sdist() -> Path:
    """Build the source distribution.

    Returns:
        The file in build/dist.
    """
    made = _built("--sdist", "*.tar.gz")
    archives.normalize(made, epoch())
    return made


def build_deb() -> list[Path]:
    """Build the Debian packages: pagecache-bpf from the wheel, pagecache-bpf-dkms.

    Returns:
        Both files in build/dist.
    """
    wheel = _wheel()
    with tempfile.TemporaryDirectory(prefix="pagecache-bpf-deb.") as scratch:
        main, dkms = Path(scratch, "main"), Path(scratch, "dkms")
        _stage(wheel, main)
        _stage_dkms(main, dkms)
        architecture = ARCHITECTURES[wheel.stem.partition("manylinux_")[2].split("_", 2)[2]]
        return [
            _nfpm("nfpm.yaml", main, architecture, f"pagecache-bpf_{version()}_{architecture}"),
            _nfpm("nfpm-dkms.yaml", dkms, "all", f"pagecache-bpf-dkms_{version()}_all"),
        ]


def build_chart() -> list[Path]:
    """Pack the Helm chart, and copy the plain manifests beside it.

    Returns:
        The files in build/dist.

    Raises:
        SystemExit: the chart's own version is another.
    """
    chart = [_tool("python"), "-m", "tools.chart"]
    _run(*chart, "--check")
    _run(*chart, "--pack", str(OUT))
    packed = OUT / f"pagecache-bpf-{version()}.tgz"
    if not packed.is_file():
        raise SystemExit(f"the chart has another version than {version()}: see its Chart.yaml")
    archives.normalize(packed, epoch())
    made = [packed]
    for path in sorted((PACKAGING / "kubernetes").glob("*.yaml")):
        made.append(OUT / f"{path.stem.removeprefix('pagecache-bpf-')}-{version()}.yaml")
        shutil.copyfile(path, made[-1])
    return made


def build_sbom() -> Path:
    """Write what an installation with all extras consists of, in the format of CycloneDX.

    Returns:
        The file in build/dist.
    """
    target = OUT / f"pagecache-bpf-{version()}.cdx.json"
    with tempfile.TemporaryDirectory(prefix="pagecache-bpf-sbom.") as scratch:
        python = Path(scratch, "venv", "bin", "python")
        _run(sys.executable, "-m", "venv", str(python.parents[1]))
        _run(str(python), "-m", "pip", "install", "-q", f"{_wheel()}[all]")
        _run(str(python), "-m", "pip", "uninstall", "-q", "-y", "pip", "setuptools")
        command = ["environment", "--output-reproducible", "--output-file", str(target)]
        _run(_tool("cyclonedx-py"), *command, "--pyproject", "pyproject.toml", str(python))
    return target


def build_image() -> Path:
    """Build the container image, as an archive that podman, docker and containerd load.

    Returns:
        The file in build/dist.
    """
    return image.build(_wheel(), version(), OUT, epoch())


def checksums() -> Path:
    """Write SHA256SUMS over all that lies in build/dist.

    Returns:
        The file.
    """
    target = OUT / "SHA256SUMS"
    files = sorted(path for path in OUT.iterdir() if path.is_file() and path != target)
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files]
    target.write_text("".join(lines))
    return target


def _built(kind: str, pattern: str) -> Path:
    for old in OUT.glob(pattern):
        if old.name.startswith("pagecache_bpf-"):
            old.unlink()
    _run(_tool("python"), "-m", "build", "-q", kind, "--outdir", str(OUT), str(ROOT))
    return next(OUT.glob(f"pagecache_bpf-{version()}{pattern}"))


def _wheel() -> Path:
    found = sorted(OUT.glob(f"pagecache_bpf-{version()}-*.whl"))
    return found[-1] if found else build_wheel()


def _stage(wheel: Path, root: Path) -> None:
    """Lay out the package's files as they are installed."""
    modules = root / DIST_PACKAGES
    modules.mkdir(parents=True)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(modules)
    # The system's libelf is used, not the wheel's copy of it.
    shutil.rmtree(modules / "pagecache_bpf.libs")
    library = modules / "pagecache_bpf" / "lib" / "libbpf.so.1"
    shutil.copyfile(_plain_libbpf(), library)
    _run("strip", "--strip-unneeded", str(library))
    for info in modules.glob("*.dist-info"):
        for name in ("RECORD", "sboms", "licenses"):  # of pip's installation, and in doc
            path = info / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    command = root / "usr" / "bin" / "pagecache-bpf"
    command.parent.mkdir(parents=True)
    command.write_text(
        "#!/usr/bin/python3\n"
        "import sys\n\n"
        "from pagecache_bpf.cli.main import main\n\n"
        "sys.exit(main())\n"
    )
    _run(
        *("make", "-s", "-C", str(ROOT), "install-data", f"DESTDIR={root}", "PREFIX=/usr"),
        f"COMMAND={_tool('python')} -m pagecache_bpf",
    )
    completions = root / "usr/share/zsh/site-functions"
    completions.rename(completions.with_name("vendor-completions"))
    doc = root / "usr/share/doc/pagecache-bpf"
    (doc / "LICENSE").unlink()
    _document(doc)
    for page in sorted((root / "usr/share/man").rglob("*.1")):
        _gzip(page)
    overrides = root / "usr/share/lintian/overrides/pagecache-bpf"
    overrides.parent.mkdir(parents=True)
    shutil.copyfile(PACKAGING / "deb" / "lintian-overrides", overrides)
    _modes(root, {command})


def _stage_dkms(main: Path, root: Path) -> None:
    source = root / "usr" / "src"
    source.parent.mkdir(parents=True)
    (main / "usr" / "src").rename(source)
    _document(root / "usr/share/doc/pagecache-bpf-dkms")
    scripts = root / "scripts"
    scripts.mkdir()
    for name in ("postinst", "prerm"):
        text = (PACKAGING / "deb" / f"dkms-{name}.in").read_text()
        (scripts / name).write_text(text.replace("@VERSION@", version()))
    _modes(root, set())


def _document(directory: Path) -> None:
    """Put what Debian wants to know of a package into its directory of documents."""
    directory.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(PACKAGING / "deb" / "copyright", directory / "copyright")
    shutil.copyfile(ROOT / "CHANGELOG.md", directory / "changelog")
    (directory / "CHANGELOG.md").unlink(missing_ok=True)
    _gzip(directory / "changelog")


def _gzip(path: Path) -> None:
    packed = gzip.compress(path.read_bytes(), 9, mtime=0)
    path.with_name(path.name + ".gz").write_bytes(packed)
    path.unlink()


def _modes(root: Path, programs: set[Path]) -> None:
    for path in root.rglob("*"):
        path.chmod(0o755 if path.is_dir() or path in programs else 0o644)
        os.utime(path, (epoch(), epoch()))


def _plain_libbpf() -> Path:
    """Find the libbpf that went into the wheel, before auditwheel changed where it looks."""
    found = sorted((ROOT / "build" / "deps").rglob("libbpf.so.1"))
    if found:
        return found[0].resolve()
    listed = subprocess.run(["ldconfig", "-p"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"libbpf\.so\.1 .*=> (\S+)", listed)
    if not match:
        raise SystemExit("libbpf.so.1 cannot be found: run tools/deps.sh wheel")
    return Path(match[1]).resolve()


def _nfpm(config: str, stage: Path, architecture: str, name: str) -> Path:
    target = OUT / f"{name}.deb"
    variables = {"STAGE": str(stage), "ARCH": architecture, "VERSION": version()}
    # nfpm puts variables into some fields only.
    text = (PACKAGING / "deb" / config).read_text()
    for key, value in {**variables, "MAINTAINER": _maintainer()}.items():
        text = text.replace("${" + key + "}", value)
    filled = stage / "nfpm.yaml"
    filled.write_text(text)
    _run(_tool("nfpm"), "package", "-f", str(filled), "-p", "deb", "-t", str(target))
    return target


def _maintainer() -> str:
    """Say who made the package: whoever sets MAINTAINER, else nobody that could be written to."""
    return os.environ.get("MAINTAINER", "The authors of pagecache-bpf <nobody@localhost.invalid>")


def _tool(name: str) -> str:
    """Return the path of a program of build/venv-dist, which is made from the extra `dist`."""
    stamp = VENV / ".installed"
    if not stamp.exists() or stamp.stat().st_mtime < (ROOT / "pyproject.toml").stat().st_mtime:
        _run(sys.executable, "-m", "venv", str(VENV))
        pip = [str(VENV / "bin" / "python"), "-m", "pip", "install", "-q"]
        _run(*pip, "--disable-pip-version-check", "-e", f"{ROOT}[all,dist]")
        stamp.touch()
    return str(VENV / "bin" / name)


@cache
def epoch() -> int:
    """Look up the time that all files get: SOURCE_DATE_EPOCH, or that of the last commit.

    Returns:
        Seconds since 1970.
    """
    if "SOURCE_DATE_EPOCH" in os.environ:
        return int(os.environ["SOURCE_DATE_EPOCH"])
    command = ["git", "-C", str(ROOT), "log", "-1", "--format=%ct"]
    done = subprocess.run(command, capture_output=True, text=True)
    return int(done.stdout) if done.returncode == 0 else 1_000_000_000


def _run(*command: str, env: Mapping[str, str] | None = None) -> None:
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "SOURCE_DATE_EPOCH": str(epoch()), **(env or {})}
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: failed with exit code {done.returncode}")


def parts() -> list[str]:
    """List what can be built: what is named build_PART here.

    Returns:
        The parts, in the order in which they are built.
    """
    return [name.removeprefix("build_") for name in globals() if name.startswith("build_")]


def main(argv: Sequence[str] | None = None) -> int:
    """Build the parts that are named, all by default, and the checksums.

    Args:
        argv: the command line, without the program's name; None: sys.argv's.

    Returns:
        The exit status, 0: what fails raises.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("part", nargs="*", metavar="PART", help=f"of {', '.join(parts())}")
    parser.add_argument("--tools", action="store_true", help="only install what it needs itself")
    args = parser.parse_args(argv)
    if args.tools:
        _tool("python")
        return 0
    if unknown := sorted(set(args.part) - set(parts())):
        parser.error(f"no such part: {', '.join(unknown)}")
    OUT.mkdir(parents=True, exist_ok=True)
    for part in args.part or parts():
        result = globals()[f"build_{part}"]()
        for path in result if isinstance(result, list) else [result]:
            print(f"{path.stat().st_size / 1e6:8.2f} MB  {path.relative_to(ROOT)}", flush=True)
    print(f"             {checksums().relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
