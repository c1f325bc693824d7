# SPDX-License-Identifier: Apache-2.0
"""Finding and loading the module: which file, and what each refusal of the kernel means.

The kernel's answer is given by the test; tests/vm/test_cli.py has the real one.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from pagecache_bpf.errors import PagecacheError, PrivilegeError, UnsupportedError, UsageError
from pagecache_bpf.kernel import kmod
from pagecache_bpf.kernel.kernelfs import KernelFS

RELEASE = "6.12.1-test"


@pytest.fixture
def fs(tmp_path: Path) -> KernelFS:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "modules").touch()
    return KernelFS(tmp_path)


@pytest.fixture
def built(tmp_path: Path) -> Path:
    build(tmp_path / "built", RELEASE)
    return tmp_path / "built"


def build(built: Path, release: str, vermagic: str | None = None) -> Path:
    module = built / release / "pagecache_bpf.ko"
    module.parent.mkdir(parents=True)
    module.write_bytes(b"\x7fELF\0vermagic=" + (vermagic or f"{release} SMP ").encode() + b"\0")
    return module


def put(fs: KernelFS, name: str, text: str) -> None:
    path = fs.path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def refusal(fs: KernelFS, built: Path, code: int, module: Path | None = None) -> PagecacheError:
    with pytest.raises(PagecacheError) as caught:
        kmod.load(module, fs=fs, built=built, release=RELEASE, insert=lambda fd: code)
    assert caught.value.docs.startswith("docs/troubleshooting.md#")
    return caught.value


def test_the_built_module_goes_before_the_installed_one(fs: KernelFS, built: Path) -> None:
    put(
        fs,
        f"/lib/modules/{RELEASE}/modules.dep",
        "x/not_pagecache_bpf.ko:\nextra/pagecache_bpf.ko.xz: a\n",
    )
    expected = fs.path(f"/lib/modules/{RELEASE}/extra/pagecache_bpf.ko.xz")
    assert kmod.find(RELEASE, fs, built) == built / RELEASE / "pagecache_bpf.ko"
    assert kmod.find(RELEASE, fs, built / "nowhere") == expected


def test_loading_gives_the_kernel_the_open_file(fs: KernelFS, built: Path) -> None:
    given = []

    def insert(fd: int) -> int:
        given.append(os.readlink(f"/proc/self/fd/{fd}"))
        return 0

    loaded = kmod.load(fs=fs, built=built, release=RELEASE, insert=insert)
    assert loaded == built / RELEASE / "pagecache_bpf.ko"
    assert given == [str(loaded)]


def test_a_loaded_module_is_left_alone(fs: KernelFS, built: Path) -> None:
    put(fs, "/sys/module/pagecache_bpf/refcnt", "0")
    assert kmod.load(fs=fs, built=built, release=RELEASE, insert=lambda fd: 1 // 0) is None


def test_another_loader_may_be_faster(fs: KernelFS, built: Path) -> None:
    def insert(fd: int) -> int:
        put(fs, "/sys/module/pagecache_bpf/refcnt", "0")
        return errno.EEXIST

    assert kmod.load(fs=fs, built=built, release=RELEASE, insert=insert)


def test_a_kernel_without_modules(fs: KernelFS, built: Path) -> None:
    fs.path("/proc/modules").unlink()
    error = refusal(fs, built, 0)
    assert isinstance(error, UnsupportedError)
    assert "this kernel cannot load modules: it was built without CONFIG_MODULES" in str(error)


def test_no_module_for_this_kernel_names_those_there_are(fs: KernelFS, tmp_path: Path) -> None:
    empty = tmp_path / "none"
    error = refusal(fs, empty, 0)
    assert error.what == f"no module pagecache_bpf for this kernel ({RELEASE})"
    assert "none for any kernel" in error.why
    build(empty, "6.1.0-other")
    build(empty, "6.8.0-other")
    error = refusal(fs, empty, 0)
    assert "there is one for 6.1.0-other, 6.8.0-other" in error.why
    assert f"linux-headers-{RELEASE}" in error.fix
    assert error.exit_code == 3


def test_a_file_that_is_not_there(fs: KernelFS, built: Path) -> None:
    assert isinstance(refusal(fs, built, 0, built / "absent.ko"), UsageError)


@pytest.mark.parametrize("code", [errno.ENOEXEC, errno.EINVAL, errno.ENOENT])
def test_a_module_for_another_kernel(fs: KernelFS, tmp_path: Path, code: int) -> None:
    module = build(tmp_path / "b", RELEASE, "5.10.0-old SMP mod_unload ")
    error = refusal(fs, tmp_path / "b", code)
    assert error.what == "module for another kernel"
    assert str(module) in error.why
    assert "5.10.0-old" in error.why and RELEASE in error.why
    assert error.exit_code == 3


def test_a_module_with_other_options(fs: KernelFS, tmp_path: Path) -> None:
    """The same release may be built another way; the kernel says ENOEXEC for that too."""
    build(tmp_path / "b", RELEASE, f"{RELEASE} UP ")
    assert refusal(fs, tmp_path / "b", errno.ENOEXEC).what == "module for another kernel"


def test_what_is_no_module(fs: KernelFS, tmp_path: Path) -> None:
    file = tmp_path / "x.ko"
    file.write_text("not a module")
    assert "is not a kernel module" in refusal(fs, tmp_path, errno.ENOEXEC, file).what


@pytest.mark.parametrize("code", [errno.EPERM, errno.EKEYREJECTED, errno.ENOKEY])
@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("/sys/kernel/security/lockdown", "none [integrity] confidentiality", "locked down"),
        ("/sys/module/module/parameters/sig_enforce", "Y", "signatures are enforced"),
    ],
)
def test_an_unsigned_module_refused(
    fs: KernelFS,
    built: Path,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    name: str,
    text: str,
    said: str,
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    put(fs, name, text)
    error = refusal(fs, built, code)
    assert isinstance(error, UnsupportedError)
    assert said in error.why
    assert "Sign the module" in error.fix


def test_modules_switched_off_until_reboot(fs: KernelFS, built: Path) -> None:
    put(fs, "/proc/sys/kernel/modules_disabled", "1")
    error = refusal(fs, built, errno.EPERM)
    assert isinstance(error, UnsupportedError)
    assert "modules_disabled" in error.why


def test_the_right_is_missing(fs: KernelFS, built: Path) -> None:
    error = refusal(fs, built, errno.EPERM)
    assert isinstance(error, PrivilegeError)
    assert "CAP_SYS_MODULE" in error.why


def test_any_other_refusal_is_named(fs: KernelFS, built: Path) -> None:
    error = refusal(fs, built, errno.ENOMEM)
    assert "Cannot allocate memory" in error.why
    assert "dmesg" in error.fix


def test_a_compressed_module_needs_modprobe(
    fs: KernelFS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "pagecache_bpf.ko.xz"
    file.write_text("x")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "modprobe is not installed" in refusal(fs, tmp_path, 0, file).why
    tool = tmp_path / "modprobe"
    tool.write_text("#!/bin/sh\necho 'modprobe: FATAL: no such thing' >&2\nexit 1\n")
    tool.chmod(0o755)
    assert "FATAL: no such thing" in refusal(fs, tmp_path, 0, file).why
    tool.write_text("#!/bin/sh\n")
    assert kmod.load(file, fs=fs, built=tmp_path, release=RELEASE) == file
