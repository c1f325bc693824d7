# SPDX-License-Identifier: Apache-2.0
"""The Debian packages in clean systems: installed, upgraded, removed, purged."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.delivery.chroot import Chroot
from tools import dist

CONFIG = "etc/pagecache-bpf/config.toml"
OURS = ("pagecache", "/usr/src/pagecache_bpf")


def older(deb: Path, place: Path) -> Path:
    """The same package with a version before it: what an upgrade starts from."""
    root = place / deb.stem
    subprocess.run(["dpkg-deb", "-R", str(deb), str(root)], check=True)
    control = root / "DEBIAN" / "control"
    version = dist.version()
    text = control.read_text()
    assert f"Version: {version}\n" in text
    control.write_text(text.replace(f"Version: {version}\n", f"Version: {version}~earlier\n"))
    target = place / f"{deb.name.split('_')[0]}_earlier.deb"
    subprocess.run(["dpkg-deb", "-Znone", "-b", str(root), str(target)], check=True)
    return target


def installed(system: Chroot) -> str:
    """The version that dpkg has of the package, with its state."""
    return system.run("dpkg-query -W -f '${db:Status-Abbrev}${Version}' pagecache-bpf").strip()


def test_a_package_is_installed_upgraded_removed_and_purged(
    system: Chroot, debs: list[Path], tmp_path: Path
) -> None:
    main = debs[0]
    before = older(main, tmp_path)
    system.copy(main, before)
    install = "apt-get install -y -qq --no-install-recommends"
    system.run(f"apt-get update -qq && {install} /srv/{before.name}")
    assert installed(system) == f"ii {dist.version()}~earlier"
    assert json.loads(system.run("pagecache-bpf policy list --json"))["policies"]
    assert system.run("pagecache-bpf --version").split()[-1] == dist.version()
    for page in ("pagecache-bpf", "pagecache-bpf-attach"):
        system.run(f"test -e /usr/share/man/man1/{page}.1.gz")
    system.run("getent group pagecache")
    # What Debian's own Python modules cannot do would show at the import.
    system.run("python3 -c 'import pyroute2.netlink.taskstats, pagecache_bpf.controller.daemon'")

    config = system.root / CONFIG
    config.write_text(config.read_text() + "# changed here\n")
    system.run(f"{install} /srv/{main.name}")
    assert installed(system) == f"ii {dist.version()}"
    assert config.read_text().endswith("# changed here\n")

    system.run("apt-get remove -y -qq pagecache-bpf")
    assert config.exists() and not (system.root / "usr/bin/pagecache-bpf").exists()
    system.run("apt-get purge -y -qq pagecache-bpf")
    left = {
        path
        for path in system.files()
        if any(name in path for name in OURS)
        and not path.startswith(("/srv/", "/run/", "/var/log/"))
    }
    assert left == set()


def test_the_module_of_the_package_is_forgotten_with_it(system: Chroot, debs: list[Path]) -> None:
    """There are no headers in a clean system: DKMS knows the sources and builds for no kernel."""
    system.copy(debs[1])
    install = "apt-get install -y -qq --no-install-recommends"
    system.run(f"apt-get update -qq && {install} /srv/{debs[1].name}")
    assert "pagecache_bpf" in system.run("dkms status")
    system.run("apt-get purge -y -qq pagecache-bpf-dkms")
    assert "pagecache_bpf" not in system.run("dkms status")
    assert not list((system.root / "usr/src").glob("pagecache_bpf*"))


def test_lintian_finds_no_error(debs: list[Path]) -> None:
    if shutil.which("lintian") is None:
        pytest.skip("lintian is not installed")
    command = ["lintian", "--allow-root", "--fail-on", "error", "--tag-display-limit", "0"]
    done = subprocess.run([*command, *map(str, debs)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
