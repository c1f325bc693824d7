# SPDX-License-Identifier: Apache-2.0
"""README's and docs/install.md's commands, typed as they stand, in clean systems; then undone."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.delivery.chroot import Chroot
from tests.delivery.conftest import write_down
from tests.unit.command import ROOT
from tools import dist

TREE = "/srv/pagecache-bpf"
# What apt, dpkg, Python and the build keep for themselves.
NOT_OURS = re.compile(
    r"/(root|srv|tmp|run|var|proc|sys|dev|etc/ld\.so\.cache|etc/alternatives)(/|$)|__pycache__"
)
DEVELOPMENT = ("qemu-system-x86_64", "prometheus", "gcc-12", "pahole", "vmlinux")


def typed(document: str, heading: str) -> list[str]:
    """The commands that stand in the blocks of a section, without their comments."""
    text = (ROOT / document).read_text()
    section = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    assert section, f"{document} has no section {heading!r}"
    joined = section[1].replace("\\\n", " ")
    lines = [line.strip() for line in re.findall(r"^ {4}(.+)$", joined, re.M)]
    return [re.split(r"\s+#\s", line)[0] for line in lines]


@pytest.fixture
def clone(system: Chroot) -> Chroot:
    """A clean system with a clone in it, and nothing installed that no document names."""
    tree = system.root / TREE.lstrip("/")
    tree.mkdir()
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, check=True
    )
    command = ["cpio", "-0pdm", "--quiet", str(tree)]
    subprocess.run(command, input=listed.stdout, cwd=ROOT, check=True)
    system.run("apt-get update -qq")
    system.give_pip_what_this_machine_has()
    return system


def test_what_the_documents_say_is_typed_and_undone(clone: Chroot) -> None:
    wheel = typed("docs/install.md", "The wheel")
    assert [line.split()[0] for line in wheel[:2]] == ["tools/deps.sh", "python3"]
    assert wheel[-1].endswith("pagecache-bpf doctor")
    for line in wheel[:-1]:
        clone.run(f"cd {TREE} && {line}")
    _diagnosed(clone, wheel[-1])
    own = re.match(r"\S+/bin", wheel[-1])
    assert own
    readme = typed("README.md", "Install")
    assert readme[0] == wheel[0]
    for line in readme[:-1]:
        clone.run(f"cd {TREE} && . {own[0]}/activate && {line}")
    _diagnosed(clone, f". {own[0]}/activate && {readme[-1]}")
    for unwanted in DEVELOPMENT:
        assert clone.run(f"command -v {unwanted} || echo none").strip() == "none"

    system = typed("docs/install.md", "A whole system")
    assert system[0] == "make install"
    before = clone.files()
    clone.run(f"cd {TREE} && {system[0]}")
    assert clone.run("pagecache-bpf --version").split()[-1] == dist.version()
    assert "sequential" in clone.run("pagecache-bpf policy list")
    # Other users can run it, whoever installed it.
    clone.run("setpriv --reuid=65534 --clear-groups pagecache-bpf policy show sequential")
    assert system[-1] == "make uninstall"
    clone.run(f"cd {TREE} && {system[-1]}")
    left = {path for path in clone.files() - before if not NOT_OURS.search(path)}
    assert left == set()
    assert before - clone.files() == set()


@pytest.mark.parametrize("system", ["trixie"], indirect=True)
def test_a_build_says_which_tool_is_missing(clone: Chroot) -> None:
    """One after the other, until the wheel is built without any script of ours."""
    clone.run(
        "apt-get install -y -qq --no-install-recommends python3-venv && python3 -m venv /opt/v"
    )
    build = f"/opt/v/bin/pip wheel -q --no-deps -w /srv/made {TREE}"
    for missing, package in (
        ("libbpf's headers are missing", "libbpf-dev"),
        ("make is missing", "make"),
        ("clang is missing", "clang"),
    ):
        told = clone.run(build, code=1)
        assert f"pagecache-bpf cannot be built: {missing}" in told
        clone.run(f"apt-get install -y -qq --no-install-recommends {package}")
    clone.run(build)
    (made,) = (clone.root / "srv/made").iterdir()
    assert "manylinux" in made.name


@pytest.mark.parametrize("system", ["trixie"], indirect=True)
def test_the_module_is_taken_out_of_dkms_before_its_sources_go(clone: Chroot) -> None:
    """Debian 13 has a kernel that the module is for; its headers are enough to build it."""
    steps = typed("docs/install.md", "A whole system")
    dkms = f"dkms install pagecache_bpf/{dist.version()}"
    assert dkms in steps
    clone.run(
        "apt-get install -y -qq --no-install-recommends make dkms dwarves linux-headers-amd64"
    )
    (release,) = [path.name for path in (clone.root / "lib/modules").iterdir()]
    # DKMS builds for the kernel that runs, and that is this machine's.
    uname = clone.root / "usr/local/sbin/uname"
    uname.write_text(f'#!/bin/sh\n[ "$*" = -r ] && echo {release} || exec /usr/bin/uname "$@"\n')
    uname.chmod(0o755)
    clone.run(f"cd {TREE} && make install")
    clone.run(dkms)
    assert "installed" in clone.run("dkms status")
    modules = list((clone.root / "lib/modules" / release).rglob("pagecache_bpf.ko*"))
    assert len(modules) == 1
    write_down("bytes of the module", modules[0].stat().st_size)
    clone.run(f"cd {TREE} && make uninstall")
    assert clone.run("dkms status").strip() == ""
    assert not list((clone.root / "lib/modules" / release).rglob("pagecache_bpf.ko*"))
    assert not list((clone.root / "usr/src").glob("pagecache*"))


def _diagnosed(system: Chroot, command: str) -> None:
    """`doctor` ends with 0, or with 3 where the kernel of this machine lacks something."""
    told = system.run(f"{command}; echo $?").split()
    assert told[-1] in ("0", "3"), told


def test_packages_are_installed_as_the_document_says(system: Chroot, debs: list[Path]) -> None:
    system.copy(*debs)
    system.run("apt-get update -qq")
    (system.root / "etc/apt/apt.conf.d/99yes").write_text('APT::Get::Assume-Yes "true";\n')
    lines = typed("docs/install.md", "Debian packages")
    assert len(lines) == len(debs)
    for line in lines:
        system.run(f"cd /srv && {line}")
    assert "pagecache_bpf" in system.run("dkms status")
    # Recommended packages are what `apt install` brings by itself.
    system.run("pagecache-bpf export --help && python3 -c 'import prometheus_client'")
