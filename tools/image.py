# SPDX-License-Identifier: Apache-2.0
"""Build the container image with buildah, without a registry: part of tools/dist.py."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONTAINER = ROOT / "packaging" / "container"
BASES = ROOT / "build" / "chroots"
SCRIPTS = Path("/usr/share/debootstrap/scripts")
NAME = "localhost/pagecache-bpf"
SUITE = "trixie"
PYTHON = "3.13"  # of that suite
# Not needed to run anything; most of a minimal system's size.
LEAVE_OUT = ("usr/share/doc", "usr/share/locale", "usr/share/man", "var/lib/apt/lists", "var/cache")


def build(wheel: Path, version: str, out: Path, epoch: int) -> Path:
    """Build the image from a wheel.

    Args:
        wheel: the wheel of this package.
        version: its version, which becomes the image's tag.
        out: where the archive goes.
        epoch: the time of all that is in it, in seconds since 1970.

    Returns:
        An archive that `podman load`, `docker load` and `ctr images import` take.
    """
    target = out / f"pagecache-bpf-image-{version}.tar"
    target.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="pagecache-bpf-image.") as scratch:
        context = Path(scratch)
        _collect(wheel, context / "wheels")
        for name, mode in (("entrypoint", 0o755), ("config.toml", 0o644)):
            shutil.copyfile(CONTAINER / name, context / name)
            (context / name).chmod(mode)
        base = _base(epoch)
        buildah = ("buildah", "--storage-driver", "vfs")
        common = ("--isolation", "chroot", "--layers=false")
        _run(
            *(
                *buildah,
                "build",
                *common,
                f"--timestamp={epoch}",
                "-f",
                str(CONTAINER / "Containerfile"),
            ),
            *("--build-arg", f"BASE={base}", "--build-arg", f"VERSION={version}"),
            *("--tag", f"{NAME}:{version}", str(context)),
        )
        _run(*buildah, "push", f"{NAME}:{version}", f"docker-archive:{target}:{NAME}:{version}")
    return target


def root_file_system(suite: str) -> Path:
    """Make a minimal Debian with debootstrap, once; it is kept in build/chroots.

    Args:
        suite: name of the release, such as "trixie".

    Returns:
        The folder that is its root.
    """
    place = BASES / suite
    if not (place / ".complete").exists():
        shutil.rmtree(place, ignore_errors=True)
        place.parent.mkdir(parents=True, exist_ok=True)
        command = ["debootstrap", "--variant=minbase", suite, str(place)]
        # An older debootstrap does not know the names of newer releases; sid's script makes them.
        if not (SCRIPTS / suite).exists():
            command += ["", str(SCRIPTS / "sid")]
        _run(*command)
        (place / ".complete").touch()
    return place


def _base(epoch: int) -> str:
    """Import Debian with Python as an image and return its name."""
    name = "localhost/pagecache-bpf-base:latest"
    place = BASES / f"{SUITE}-python"
    if not (place / ".complete").exists():
        shutil.rmtree(place, ignore_errors=True)
        packages = "--include=python3,python3-venv"
        place.parent.mkdir(parents=True, exist_ok=True)
        _run("debootstrap", "--variant=minbase", packages, SUITE, str(place))
        for path in LEAVE_OUT:
            shutil.rmtree(place / path, ignore_errors=True)
            (place / path).mkdir(parents=True)
        (place / ".complete").touch()
    buildah = ("buildah", "--storage-driver", "vfs")
    container = subprocess.run(
        [*buildah, "from", "scratch"], capture_output=True, text=True, check=True
    ).stdout.strip()
    _run(*buildah, "add", "-q", container, str(place), "/")
    _run(*buildah, "commit", "-q", "--rm", f"--timestamp={epoch}", container, name)
    return name


def _collect(wheel: Path, place: Path) -> None:
    """Download the wheels that the image's Python needs."""
    _run(
        *(sys.executable, "-m", "pip", "download", "-q", "--only-binary=:all:"),
        *("--python-version", PYTHON, "-d", str(place), f"{wheel}[all]"),
    )


def _run(*command: str) -> None:
    done = subprocess.run(command, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: failed with exit code {done.returncode}")
