# SPDX-License-Identifier: Apache-2.0
"""Finds, loads and unloads the kernel module pagecache_bpf, and says why a kernel refuses it.

It knows nothing of what the module does; control_device talks to it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from pagecache_bpf.errors import PagecacheError, PrivilegeError, UnsupportedError, UsageError
from pagecache_bpf.kernel.kernelfs import LIVE, KernelFS

NAME = "pagecache_bpf"
#: Where the source tree's `make build` puts the module: RELEASE/pagecache_bpf.ko
BUILT = Path(__file__).resolve().parents[2] / "build" / "kmod"

_DOCS = "docs/troubleshooting.md"
# finit_module(2) and delete_module(2) have no wrapper in the C library.
_SYSCALLS = {"x86_64": (313, 176), "aarch64": (273, 106)}
#: Seconds within which a policy that was just detached, and what is being read for it, let go.
_LETS_GO_S = 2.0
_SIGNATURE = b"~Module signature appended~\n"

#: Takes an open module file, returns 0 or an errno; a parameter so that tests can answer.
Insert = Callable[[int], int]


def takes_modules(fs: KernelFS = LIVE) -> bool:
    """Tell whether this kernel can load modules at all.

    Args:
        fs: where the kernel's files are read.

    Returns:
        False if it was built without CONFIG_MODULES.
    """
    return fs.exists("/proc/modules")


def is_loaded(fs: KernelFS = LIVE) -> bool:
    """Tell whether the module is in the kernel now.

    Args:
        fs: where the kernel's files are read.

    Returns:
        True if it is.
    """
    return fs.exists(f"/sys/module/{NAME}")


def find(release: str, fs: KernelFS = LIVE, built: Path = BUILT) -> Path | None:
    """Return the module file for a kernel release.

    A source tree's own comes first: it has the ABI of the code that asks, what is installed may be
    older.  An installed package has no source tree around it.

    Args:
        release: the release, as `uname -r` prints it.
        fs: where the kernel's files are read.
        built: where a source tree puts the modules it builds.

    Returns:
        The file, None if there is none.
    """
    candidate = built / release / f"{NAME}.ko"
    if candidate.is_file():
        return candidate
    base = fs.path(f"/lib/modules/{release}")
    for line in (fs.read(f"/lib/modules/{release}/modules.dep") or "").splitlines():
        name = line.partition(":")[0]
        if re.fullmatch(rf"(?:.*/)?{NAME}\.ko(?:\.\w+)?", name):
            return base / name
    return None


def releases(fs: KernelFS = LIVE, built: Path = BUILT) -> list[str]:
    """Return the kernel releases that there is a module file for.

    Args:
        fs: where the kernel's files are read.
        built: where a source tree puts the modules it builds.

    Returns:
        The releases, sorted.
    """
    known = {*fs.entries("/lib/modules")}
    if built.is_dir():
        known.update(entry.name for entry in built.iterdir())
    return sorted(release for release in known if find(release, fs, built))


def vermagic(module: Path) -> str | None:
    """Return what a module file was built for.

    Args:
        module: the file.

    Returns:
        A text such as "6.12.1-amd64 SMP ...", None if the file does not say so.
    """
    try:
        match = re.search(rb"\0vermagic=([^\0]+)", module.read_bytes())
    except OSError:
        return None
    return match[1].decode(errors="replace") if match else None


def is_signed(module: Path) -> bool:
    """Tell whether a module file carries a signature, not whether this kernel trusts it.

    Args:
        module: the file.

    Returns:
        True if it ends with one.
    """
    try:
        return module.read_bytes().endswith(_SIGNATURE)
    except OSError:
        return False


def load(
    module: Path | None = None,
    *,
    fs: KernelFS = LIVE,
    built: Path = BUILT,
    release: str | None = None,
    insert: Insert | None = None,
) -> Path | None:
    """Load the module unless it is loaded.

    Args:
        module: the file to load; by default the one for the running kernel.
        fs: where the kernel's files are read.
        built: where a source tree puts the modules it builds.
        release: the running kernel's; by default what `uname -r` prints.
        insert: what puts a file into the kernel; by default finit_module(2).

    Returns:
        The file it came from, None if the module was there.

    Raises:
        UnsupportedError: there is no module for this kernel, it is for another one, or the kernel
            refuses it (lockdown, no trusted signature).
        PrivilegeError: the caller is not root.
        UsageError: there is no such file.
    """
    if is_loaded(fs):
        return None
    release = release or platform.release()
    if not takes_modules(fs):
        raise UnsupportedError(
            "this kernel cannot load modules",
            "it was built without CONFIG_MODULES",
            "Boot a distribution kernel; `pagecache-bpf doctor` shows what it has to have",
            f"{_DOCS}#this-kernel-cannot-load-modules",
        )
    if module is None:
        module = find(release, fs, built)
        if module is None:
            raise _no_module(release, fs, built)
    if not module.is_file():
        raise UsageError(
            f"{module} does not exist", "", "Check the path", f"{_DOCS}#does-not-exist"
        )
    if module.suffix != ".ko":  # compressed: modprobe knows every compression there is
        _modprobe(module)
        return module
    with module.open("rb") as file:
        code = (insert or _finit_module)(file.fileno())
    if code and not (code == errno.EEXIST and is_loaded(fs)):  # another loader was faster
        raise _refused(module, code, release, fs)
    return module


def unload() -> bool:
    """Unload the module.

    Returns:
        False when it was not loaded.

    Raises:
        PagecacheError: policies are attached.
        PrivilegeError: the caller is not root.
    """
    if not is_loaded():
        return False
    in_use = (errno.EAGAIN, errno.EWOULDBLOCK, errno.EBUSY)
    deadline = time.monotonic() + _LETS_GO_S
    while True:
        code = _syscall(1, ctypes.c_char_p(NAME.encode()), ctypes.c_uint(os.O_NONBLOCK))
        if code not in in_use or time.monotonic() >= deadline:
            break
        time.sleep(0.02)
    if code == errno.ENOENT:  # another process was faster
        return False
    if code in in_use:
        raise PagecacheError(
            f"module {NAME} cannot be unloaded",
            "it is in use: a policy is attached or its device is open",
            "Run `pagecache-bpf detach --all`, then try again",
            f"{_DOCS}#module-pagecache_bpf-cannot-be-unloaded",
        )
    if code:
        raise _privilege_or(code, f"module {NAME} cannot be unloaded")
    return True


def _syscall(which: int, *arguments: object) -> int:
    """Call finit_module (0) or delete_module (1); return 0 or the errno."""
    numbers = _SYSCALLS.get(platform.machine())
    if numbers is None:
        raise UnsupportedError(
            f"module {NAME} cannot be loaded or unloaded",
            f"the system calls of {platform.machine()} are not known here",
            f"Run `modprobe {NAME}` or `rmmod {NAME}`",
            f"{_DOCS}#module-pagecache_bpf-cannot-be-loaded",
        )
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(ctypes.c_long(numbers[which]), *arguments) == 0:
        return 0
    return ctypes.get_errno()


def _finit_module(fd: int) -> int:
    """Load the module from an open file; return 0 or the errno."""
    return _syscall(0, ctypes.c_int(fd), ctypes.c_char_p(b""), ctypes.c_int(0))


def _modprobe(module: Path) -> None:
    """Load an installed, compressed module."""
    what = f"module {NAME} cannot be loaded"
    docs = f"{_DOCS}#module-pagecache_bpf-cannot-be-loaded"
    try:
        done = subprocess.run(["modprobe", NAME], capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        raise UnsupportedError(
            what,
            f"{module.name} is compressed and modprobe is not installed",
            "Install kmod (apt install kmod)",
            docs,
        ) from None
    if done.returncode:
        why = done.stderr.strip().splitlines()
        raise UnsupportedError(
            what, why[-1] if why else "modprobe gave no reason", "Read the end of `dmesg`", docs
        )


def _no_module(release: str, fs: KernelFS, built: Path) -> UnsupportedError:
    """Make the error for a kernel that there is no module file for."""
    others = releases(fs, built)
    why = f"there is one for {', '.join(others)}" if others else "there is none for any kernel"
    return UnsupportedError(
        f"no module {NAME} for this kernel ({release})",
        why,
        f"Install the headers (apt install linux-headers-{release}) and run `make build` (or "
        "`dkms autoinstall`), or boot a kernel that there is a module for",
        f"{_DOCS}#no-module-pagecache_bpf-for-this-kernel",
    )


def _refused(module: Path, code: int, release: str, fs: KernelFS) -> PagecacheError:
    """Turn the errno of finit_module into what to do about it."""
    magic = vermagic(module)
    # ENOENT and EINVAL are what a kernel says whose symbols differ from those built against.
    foreign = magic is not None and magic.split()[0] != release
    if magic is not None and (
        code == errno.ENOEXEC or (foreign and code in (errno.ENOENT, errno.EINVAL))
    ):
        return UnsupportedError(
            "module for another kernel",
            f"{module} is built for {magic.strip()!r}, this kernel is {release}",
            "Run `make build` on this machine, with the running kernel's headers installed",
            f"{_DOCS}#module-for-another-kernel",
        )
    if code == errno.ENOEXEC:
        return UnsupportedError(
            f"{module} is not a kernel module",
            os.strerror(code),
            "Build it again: `make build`",
            f"{_DOCS}#is-not-a-kernel-module",
        )
    what = f"module {NAME} cannot be loaded"
    docs = f"{_DOCS}#module-pagecache_bpf-cannot-be-loaded"
    barrier = signature_barrier(fs)
    if code in (errno.EPERM, errno.EKEYREJECTED, errno.ENOKEY) and os.geteuid() == 0 and barrier:
        return UnsupportedError(
            what,
            barrier,
            "Sign the module with a key this machine trusts (docs/troubleshooting.md says how), "
            "or turn that protection off",
            docs,
        )
    if code == errno.EPERM and fs.read("/proc/sys/kernel/modules_disabled") == "1":
        return UnsupportedError(
            what, "kernel.modules_disabled is 1, until the next boot", "Reboot", docs
        )
    return _privilege_or(code, what)


def _privilege_or(code: int, what: str) -> PagecacheError:
    """Make the error for an errno: a missing right, or what dmesg may explain."""
    docs = f"{_DOCS}#{re.sub(r'[^a-z0-9_ -]', '', what.lower()).replace(' ', '-')}"
    if code in (errno.EPERM, errno.EACCES):
        return PrivilegeError(
            what, "the right to load modules (CAP_SYS_MODULE) is missing", "Run it with sudo", docs
        )
    return UnsupportedError(what, os.strerror(code), "Read the end of `dmesg`", docs)


def signature_barrier(fs: KernelFS = LIVE) -> str | None:
    """Say what makes this kernel refuse unsigned modules.

    Args:
        fs: where the kernel's files are read.

    Returns:
        The reason, None when nothing is known to.
    """
    lockdown = lockdown_state(fs)
    if lockdown not in (None, "none"):
        return f"the kernel is locked down ({lockdown}) and takes signed modules only"
    if fs.read("/sys/module/module/parameters/sig_enforce") == "Y":
        return "module signatures are enforced (module.sig_enforce)"
    return None


def lockdown_state(fs: KernelFS = LIVE) -> str | None:
    """Return how far the kernel is locked down.

    Args:
        fs: where the kernel's files are read.

    Returns:
        "none", "integrity" or "confidentiality"; None when the kernel does not tell.
    """
    text = fs.read("/sys/kernel/security/lockdown")
    match = re.search(r"\[(\w+)\]", text or "")
    return match[1] if match else None


def secure_boot(fs: KernelFS = LIVE) -> bool | None:
    """Tell whether the firmware booted with Secure Boot.

    Args:
        fs: where the kernel's files are read.

    Returns:
        None when there is no EFI to ask.
    """
    data = fs.read_bytes(
        "/sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"
    )
    return None if not data else data[-1] == 1
