# SPDX-License-Identifier: Apache-2.0
"""What README and docs/install.md say to type, in clean systems; `make uninstall` undoes it."""

from __future__ import annotations

import re
import subprocess

from tests.delivery.chroot import Chroot
from tests.unit.command import ROOT

# What apt, dpkg, Python and the build keep for themselves.
NOT_OURS = re.compile(
    r"/(root|srv|tmp|run|var|proc|sys|dev|etc/ld\.so\.cache|etc/alternatives)(/|$)|__pycache__"
)


def test_make_install_leaves_nothing_behind(system: Chroot) -> None:
    tree = system.root / "srv" / "pagecache-bpf"
    tree.mkdir()
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, check=True
    )
    subprocess.run(
        ["cpio", "-0pdm", "--quiet", str(tree)], input=listed.stdout, cwd=ROOT, check=True
    )
    system.run("apt-get update -qq && apt-get install -y -qq --no-install-recommends make python3")
    _give_pip_what_this_machine_has(system)
    system.run("cd /srv/pagecache-bpf && tools/deps.sh wheel")
    for unwanted in ("qemu-system-x86_64", "prometheus", "gcc-12", "pahole"):
        assert system.run(f"command -v {unwanted} || echo none").strip() == "none"
    before = system.files()
    system.run("cd /srv/pagecache-bpf && make install")
    assert system.run("pagecache-bpf --version").startswith("pagecache-bpf ")
    assert "sequential" in system.run("pagecache-bpf policy list")
    # Other users can run it, whoever installed it.
    system.run("setpriv --reuid=65534 --clear-groups pagecache-bpf policy show sequential")
    system.run("cd /srv/pagecache-bpf && make uninstall")
    left = {path for path in system.files() - before if not NOT_OURS.search(path)}
    assert left == set()
    assert before - system.files() == set()


def _give_pip_what_this_machine_has(system: Chroot) -> None:
    """Certificates, and what pip is told of where packages are."""
    system.run("apt-get install -y -qq --no-install-recommends ca-certificates")
    listed = subprocess.run(["pip", "config", "list"], capture_output=True, text=True).stdout
    lines = ["[global]"]
    for line in listed.splitlines():
        name, _, value = line.partition("=")
        option = name.rpartition(".")[2]
        if option in ("index-url", "timeout", "default-timeout", "proxy"):
            lines.append(f"{option} = {value.strip(chr(39))}")
    (system.root / "etc" / "pip.conf").write_text("\n".join(lines) + "\n")
    certificates = system.root / "etc/ssl/certs/ca-certificates.crt"
    with open("/etc/ssl/certs/ca-certificates.crt", encoding="utf-8") as ours:
        certificates.write_text(ours.read())
