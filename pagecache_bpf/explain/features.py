# SPDX-License-Identifier: Apache-2.0
"""What this machine has and lacks: the probe table behind `pagecache-bpf doctor`.

Every answer comes from asking the kernel or looking for the tool.  The kernel's release is
shown and never interpreted: distributions move features between releases.
"""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import re
import shutil
import struct
import subprocess
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from pagecache_bpf.errors import PagecacheError
from pagecache_bpf.kernel import event_sources, kmod
from pagecache_bpf.kernel.cachestat import missing_errno
from pagecache_bpf.kernel.kernelfs import LIVE, KernelFS
from pagecache_bpf.kernel.kmod import load as _load

#: The kernel functions whose readahead the module replaces.
READAHEAD_FUNCTIONS = ("page_cache_sync_ra", "page_cache_async_ra", "page_cache_ra_order")
#: The tracepoints that tell a policy what enters and leaves the page cache.
TRACEPOINTS = ("mm_filemap_add_to_page_cache", "mm_filemap_delete_from_page_cache")
#: The kernel functions through which reclaim asks policies, and tells them that memory is short.
RECLAIM_FUNCTIONS = (
    "folio_referenced",
    "try_to_free_mem_cgroup_pages",
    "truncate_inode_pages_final",
    "clear_inode",
)
RECLAIM_TRACEPOINT = "mm_vmscan_lru_shrink_inactive"
CAPABILITIES = {"CAP_SYS_ADMIN": 21, "CAP_PERFMON": 38, "CAP_BPF": 39}
_CAP_SYS_MODULE = 16

ENGINES = ("struct_ops", "agent")

#: Where tracefs is looked for.
_TRACING = ("/sys/kernel/tracing", "/sys/kernel/debug/tracing")
_DISTRIBUTION_KERNEL = "Boot a distribution kernel (Debian and Ubuntu set it) or rebuild yours with"


@dataclass(frozen=True)
class Feature:
    """One line of the table.

    ok: True, False, or None where it could not be found out; found: what was seen;
    lost: what does not work without it; fix: the next step, empty when there is nothing to do;
    engines: those that cannot run a policy without it.
    """

    name: str
    ok: bool | None
    found: str
    lost: str
    fix: str = ""
    engines: tuple[str, ...] = ()


@dataclass(frozen=True)
class Machine:
    """What the probes ask.  Tests give another root, release or set of capabilities."""

    fs: KernelFS = LIVE
    release: str = field(default_factory=platform.release)
    euid: int = field(default_factory=os.geteuid)
    built: Path = kmod.BUILT

    @cached_property
    def btf(self) -> bytes | None:
        """The string table of the kernel's BTF: every name of a type or function."""
        data = self.fs.read_bytes("/sys/kernel/btf/vmlinux")
        if data is None or len(data) < 24:
            return None
        magic, _, _, header, _, _, start, size = struct.unpack_from("=HBBIIIII", data)
        if magic != 0xEB9F:
            return None
        return data[header + start : header + start + size]

    @cached_property
    def symbols(self) -> frozenset[str]:
        """The kernel's own functions and variables; the names are readable without root."""
        text = self.fs.read("/proc/kallsyms") or ""
        # modules come last and end in [name]; their symbols are not what is asked for
        return frozenset(re.findall(r"^\S+ \w (\S+)$", text, re.M))

    @cached_property
    def config(self) -> dict[str, str]:
        """The kernel's build configuration; empty when it is not published."""
        text = self.fs.read(f"/boot/config-{self.release}")
        packed = self.fs.read_bytes("/proc/config.gz")
        if packed is not None:
            with contextlib.suppress(zlib.error):
                text = zlib.decompress(packed, wbits=31).decode(errors="replace")
        return dict(re.findall(r"^(CONFIG_\w+)=(.*)$", text or "", re.M))

    @cached_property
    def traceable(self) -> frozenset[str] | None:
        """The functions ftrace can reach; None when tracefs is not mounted or not readable."""
        for base in _TRACING:
            text = self.fs.read(f"{base}/available_filter_functions")
            if text:
                return frozenset(line.partition(" ")[0] for line in text.splitlines())
        return None

    @cached_property
    def capabilities(self) -> int:
        """The effective capabilities of this process, as bits."""
        status = self.fs.read("/proc/self/status") or ""
        match = re.search(r"^CapEff:\s*([0-9a-f]+)", status, re.M)
        return int(match[1], 16) if match else 0

    def has_type(self, name: str) -> bool | None:
        """Tell whether the kernel's BTF has a type of a name.

        Args:
            name: the type's name.

        Returns:
            None without BTF.
        """
        return None if self.btf is None else event_sources.has_type(self.btf, name)


Probe = Callable[[Machine], Feature]


def probe(machine: Machine | None = None) -> list[Feature]:
    """Ask a machine for everything that an engine needs; what is missing raises nothing.

    Args:
        machine: what is asked; by default this machine.

    Returns:
        A row for each feature; without root some answers are unknown.
    """
    machine = machine or Machine()
    return [replace(ask(machine), engines=engines) for ask, engines in PROBES.items()]


def lacking(features: Iterable[Feature]) -> dict[str, list[Feature]]:
    """Return what each engine needs and the machine does not have.

    Args:
        features: what probe() returned.

    Returns:
        The missing features by engine; an engine without any can run policies.
    """
    missing = [feature for feature in features if feature.ok is False]
    return {
        engine: [feature for feature in missing if engine in feature.engines] for engine in ENGINES
    }


def load_module() -> None:
    """Load the kernel module for the running kernel unless it is loaded.

    Raises UnsupportedError and PrivilegeError, see kmod.load.
    """
    _load()


def _kernel(m: Machine) -> Feature:
    return Feature("kernel", True, f"{m.release} on {platform.machine()}", "")


def _privileges(m: Machine) -> Feature:
    lost = "attach, detach, status, tag and untag; `policy` and `doctor` work"
    missing = [name for name, bit in CAPABILITIES.items() if not m.capabilities >> bit & 1]
    who = "root" if m.euid == 0 else f"user {m.euid}"
    if m.euid != 0:
        return Feature("privileges", False, who, lost, "Run it with sudo")
    if missing:
        found = f"{who} without {', '.join(missing)}"
        fix = "Run it on the host, or in a container with --privileged"
        return Feature("privileges", False, found, lost, fix)
    # 0 maps to 0 over the whole range only outside user namespaces
    mapping = (m.fs.read("/proc/self/uid_map") or "").split()
    if mapping and mapping != ["0", "0", "4294967295"]:
        found = "root of a user namespace only"
        return Feature("privileges", False, found, lost, "Run it as root of the host")
    return Feature("privileges", True, f"{who} with {', '.join(CAPABILITIES)}", lost)


def _btf(m: Machine) -> Feature:
    lost = "BPF programs cannot be fitted to this kernel: no policy loads"
    if m.btf is not None:
        return Feature("kernel BTF", True, "/sys/kernel/btf/vmlinux", lost)
    fix = f"{_DISTRIBUTION_KERNEL} CONFIG_DEBUG_INFO_BTF=y"
    return Feature("kernel BTF", False, "/sys/kernel/btf/vmlinux is missing", lost, fix)


def _bpffs(m: Machine) -> Feature:
    lost = "the engine struct_ops: a policy would end with the command that attached it"
    for mount in m.fs.mounts():
        if mount.fstype == "bpf":
            return Feature("bpffs", True, f"mounted at {mount.target}", lost)
    if m.fs.exists("/sys/fs/bpf"):
        return Feature("bpffs", True, "not mounted; `attach` mounts it at /sys/fs/bpf", lost)
    fix = f"{_DISTRIBUTION_KERNEL} CONFIG_BPF_SYSCALL=y"
    return Feature("bpffs", False, "the kernel has no bpffs", lost, fix)


def _modules(m: Machine) -> Feature:
    lost = "the kernel module, and with it the engine struct_ops"
    if not m.fs.exists("/proc/modules"):
        fix = f"{_DISTRIBUTION_KERNEL} CONFIG_MODULES=y"
        found = "the kernel cannot load modules (no CONFIG_MODULES)"
        return Feature("loadable modules", False, found, lost, fix)
    if m.fs.read("/proc/sys/kernel/modules_disabled") == "1":
        found = "switched off until the next boot (kernel.modules_disabled=1)"
        fix = "Remove kernel.modules_disabled from the sysctl configuration and reboot"
        return Feature("loadable modules", False, found, lost, fix)
    if m.euid == 0 and not m.capabilities >> _CAP_SYS_MODULE & 1:
        found = "root without CAP_SYS_MODULE"
        fix = "Run it on the host, or in a container with --cap-add SYS_MODULE"
        return Feature("loadable modules", False, found, lost, fix)
    return Feature("loadable modules", True, "yes", lost)


def _struct_ops(m: Machine) -> Feature:
    # "bpf, net: switch to dynamic registration" (f6be98d19985, v6.9) lets modules register one
    known = m.has_type("bpf_struct_ops_desc")
    if known is None:
        known = "__register_bpf_struct_ops" in m.symbols or None
    lost = "the engine struct_ops: the module has nothing to offer its hooks through"
    found = {True: "yes", False: "the kernel keeps struct_ops to itself", None: "no BTF to ask"}
    fix = "" if known else "Boot a kernel with struct_ops in modules (Linux 6.9 brought it)"
    return Feature("struct_ops in modules", known, found[known], lost, fix)


def _ftrace(m: Machine) -> Feature:
    lost = "the engine struct_ops: its readahead hook cannot be attached"
    name = "ftrace with IPMODIFY"
    fix = f"{_DISTRIBUTION_KERNEL} CONFIG_FUNCTION_TRACER=y and CONFIG_LIVEPATCH=y"
    if m.symbols and "register_ftrace_function" not in m.symbols:
        return Feature(name, False, "the kernel has no function tracer", lost, fix)
    able, how = _ipmodify(m)
    if able is False:
        return Feature(name, False, how, lost, fix)
    if m.traceable is None:
        mounted = any(
            mount.fstype == "tracefs" and mount.target in _TRACING for mount in m.fs.mounts()
        )
        missing = [f for f in READAHEAD_FUNCTIONS if m.symbols and f not in m.symbols]
        if missing:
            found = f"the kernel has no function {', '.join(missing)}"
            return Feature(name, False, found, lost, "Report this kernel to the project")
        step = "Run doctor as root" if mounted else "Run `mount -t tracefs x /sys/kernel/tracing`"
        found = f"{how}; the list of traceable functions cannot be read"
        return Feature(name, None, found, lost, step + " to see it all")
    missing = [function for function in READAHEAD_FUNCTIONS if function not in m.traceable]
    if missing:
        found = f"ftrace cannot reach {', '.join(missing)}"
        return Feature(name, False, found, lost, "Report this kernel to the project")
    found = f"{how}; reaches {', '.join(READAHEAD_FUNCTIONS)}"
    return Feature(name, able, found, lost, "" if able else "Attach a policy: that tells")


def _ipmodify(m: Machine) -> tuple[bool | None, str]:
    """Tell whether ftrace callbacks may redirect a function, and how that is known."""
    if m.fs.exists("/sys/kernel/livepatch"):
        return True, "live patching is there"
    options = ("CONFIG_DYNAMIC_FTRACE_WITH_REGS", "CONFIG_DYNAMIC_FTRACE_WITH_ARGS")
    if any(m.config.get(option) == "y" for option in options):
        return True, "the kernel's configuration has it"
    if m.config:
        return False, f"the kernel's configuration has neither {' nor '.join(options)}"
    return None, "the kernel's configuration is not published"


def _kprobes(m: Machine) -> Feature:
    lost = "the module cannot find the functions it has to replace, and does not load"
    if not m.symbols:
        fix = "Check for CONFIG_KPROBES=y in the kernel's configuration"
        return Feature("kprobes", None, "/proc/kallsyms cannot be read", lost, fix)
    if "register_kprobe" in m.symbols:
        return Feature("kprobes", True, "yes", lost)
    fix = f"{_DISTRIBUTION_KERNEL} CONFIG_KPROBES=y"
    return Feature("kprobes", False, "the kernel has none (no CONFIG_KPROBES)", lost, fix)


def _tracepoints(m: Machine) -> Feature:
    lost = "the hooks added and removed, and the count of resident bytes"
    known = [m.has_type(f"btf_trace_{name}") for name in TRACEPOINTS]
    if None in known:
        return Feature("tracepoints", None, "no BTF to ask", lost, "See kernel BTF")
    missing = [name for name, there in zip(TRACEPOINTS, known, strict=True) if not there]
    if missing:
        fix = f"{_DISTRIBUTION_KERNEL} CONFIG_TRACEPOINTS=y"
        return Feature("tracepoints", False, f"missing: {', '.join(missing)}", lost, fix)
    return Feature("tracepoints", True, ", ".join(TRACEPOINTS), lost)


def _access_events(m: Machine) -> Feature:
    name = "access events"
    lost = "the engine agent does not see what readers want"
    if m.btf is None:
        return Feature(name, None, "no BTF to ask", lost, "See kernel BTF")
    if needed := event_sources.lacking(m.btf):
        lost = "the engine agent: no policy and no observer can be loaded"
        text = f"programs need {', '.join(needed)}"
        return Feature(name, False, text, lost, event_sources.NEWER)
    # Whether programs can be attached to functions only the running kernel tells, and only root.
    here = m.fs is LIVE and m.euid == 0
    sources = event_sources.sources_here(types=None if here else m.btf)
    found: list[str] = []
    missing: list[str] = []
    for event in event_sources.ACCESSES:
        source = sources.get(event.name)
        if source:
            found.append(str(source))
        else:
            missing.append(event.name)
    if not found:
        fix = "Boot Linux 6.12 or newer, or one that lets programs be attached to its functions"
        return Feature(name, False, f"missing: {', '.join(missing)}", lost, fix)
    untried = not here and any(s.kind != event_sources.TRACEPOINT for s in sources.values())
    text = ", ".join(found) + (f"; missing: {', '.join(missing)}" if missing else "")
    if untried:
        return Feature(name, None, f"{text}; not tried", lost, "Run doctor as root")
    return Feature(name, True, text, lost)


def _reclaim(m: Machine) -> Feature:
    name, lost = "hooks in reclaim", "policies with the hooks evict or pressure do not attach"
    known = m.symbols if m.traceable is None else m.traceable
    if not known:
        fix = "Run doctor as root"
        return Feature(name, None, "the list of functions is not readable", lost, fix)
    missing = [function for function in RECLAIM_FUNCTIONS if function not in known]
    if m.has_type(f"btf_trace_{RECLAIM_TRACEPOINT}") is False:
        missing.append(f"tracepoint {RECLAIM_TRACEPOINT}")
    if missing:
        found = f"ftrace cannot reach {', '.join(missing)}"
        fix = "Use policies without them; report this kernel to the project"
        return Feature(name, False, found, lost, fix)
    return Feature(name, True, f"reaches {', '.join(RECLAIM_FUNCTIONS)}", lost)


def _lockdown(m: Machine) -> Feature:
    lost = "unsigned modules: the module has to be signed with a key this machine trusts"
    secure = {True: "on", False: "off", None: "no EFI"}[kmod.secure_boot(m.fs)]
    state = kmod.lockdown_state(m.fs)
    found = f"lockdown {state or 'unknown'}, Secure Boot {secure}"
    barrier = kmod.signature_barrier(m.fs)
    if barrier:
        fix = "Sign the module (docs/troubleshooting.md), or switch Secure Boot off"
        return Feature("unsigned modules", False, f"{found}: {barrier}", lost, fix)
    if state is None and m.config.get("CONFIG_SECURITY_LOCKDOWN_LSM") == "y":
        fix = "Run `mount -t securityfs x /sys/kernel/security` to see it"
        return Feature("unsigned modules", None, found, lost, fix)
    return Feature("unsigned modules", True, found, lost)


def _no_use(m: Machine) -> str:
    """Name the feature that rules out any module on this kernel; empty if a module may serve it."""
    if not m.fs.exists("/proc/modules"):
        return "See loadable modules"
    return "See struct_ops in modules" if _struct_ops(m).ok is False else ""


def _headers(m: Machine) -> Feature:
    lost = "the module cannot be built for this kernel here"
    base = f"/lib/modules/{m.release}/build"
    if m.fs.exists(f"{base}/Makefile"):
        return Feature("kernel headers", True, base, lost)
    fix = _no_use(m) or f"Install them (apt install linux-headers-{m.release})"
    return Feature("kernel headers", False, f"{base} is missing", lost, fix)


def _module(m: Machine) -> Feature:
    lost = "the engine struct_ops"
    name = f"module {kmod.NAME}"
    if kmod.is_loaded(m.fs):
        version = m.fs.read(f"/sys/module/{kmod.NAME}/version")
        return Feature(name, True, f"loaded{f', version {version}' if version else ''}", lost)
    path = kmod.find(m.release, m.fs, m.built)
    if path is None:
        others = kmod.releases(m.fs, m.built)
        found = "none for this kernel" + (
            f"; there is one for {', '.join(others)}" if others else ""
        )
        fix = _no_use(m) or "Run `make build` with the kernel headers installed"
        return Feature(name, False, found, lost, fix)
    if not m.fs.exists("/proc/modules"):
        return Feature(name, False, f"not loadable: {path}", lost, "See loadable modules")
    barrier = kmod.signature_barrier(m.fs)
    if barrier and not kmod.is_signed(path):
        return Feature(
            name, False, f"{path} is not signed; {barrier}", lost, "See unsigned modules"
        )
    magic = kmod.vermagic(path)
    built = f", built for {magic.split()[0]}" if magic else ""
    return Feature(name, True, f"{path}{built}; `attach` loads it", lost)


def _libbpf(m: Machine) -> Feature:
    lost = "policies cannot be loaded: older ones do not know struct_ops in modules"
    from pagecache_bpf.kernel import libbpf

    try:
        major, minor = libbpf.version_of(libbpf.library())
    except PagecacheError as error:
        return Feature("libbpf", False, error.why or error.what, lost, error.fix)
    return Feature("libbpf", True, f"version {major}.{minor}", lost)


def _clang(m: Machine) -> Feature:
    from pagecache_bpf.policy import compiler

    lost = "policies given as C source; compiled ones still load"
    try:
        return Feature("clang", True, compiler.find_clang(), lost)
    except PagecacheError as error:
        return Feature("clang", False, error.why, lost, error.fix)


def _pahole(m: Machine) -> Feature:
    lost = "the module cannot be built here; one that is built still loads"
    path = shutil.which("pahole")
    if path is None:
        fix = "Install it (apt install dwarves)"
        return Feature("pahole", False, "not found", lost, fix)
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10)
        version = done.stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        version = ""
    return Feature("pahole", True, f"{path} {version}".rstrip(), lost)


def _cachestat(m: Machine) -> Feature:
    lost = "what is cached is asked of mincore(2): slower, for root and a file's owner only"
    name = "cachestat(2)"
    code = missing_errno()
    if code == errno.ENOSYS:
        return Feature(name, False, "the kernel has none", lost, "Boot Linux 6.5 or newer")
    if code == errno.EPERM:
        fix = "Allow it in the container's seccomp profile"
        return Feature(name, False, "blocked by a seccomp profile", lost, fix)
    return Feature(name, True, "yes", lost)


def _memcg(m: Machine) -> Feature:
    lost = "prefetched bytes are not charged to the reader's container"
    name = "memory cgroup"
    if "memory" in (m.fs.read("/sys/fs/cgroup/cgroup.controllers") or "").split():
        return Feature(name, True, "v2", lost)
    if any(line.split()[0] == "memory" and line.split()[1] != "0" for line in _controllers(m)):
        return Feature(name, True, "v1", lost)
    fix = "Boot without cgroup_disable=memory, on a kernel with CONFIG_MEMCG=y"
    return Feature(name, False, "there is no memory controller", lost, fix)


def _controllers(m: Machine) -> list[str]:
    lines = (m.fs.read("/proc/cgroups") or "").splitlines()
    return [line for line in lines if len(line.split()) >= 2 and not line.startswith("#")]


_STRUCT_OPS = ("struct_ops",)
_AGENT = ("agent",)

#: The whole table, in the order in which a person would fix things; which engines need it.
PROBES: dict[Probe, tuple[str, ...]] = {
    _kernel: (),
    _privileges: ENGINES,
    _modules: _STRUCT_OPS,
    _module: _STRUCT_OPS,
    _headers: (),
    _pahole: (),
    _lockdown: (),
    _btf: ENGINES,
    _struct_ops: _STRUCT_OPS,
    _ftrace: _STRUCT_OPS,
    _kprobes: _STRUCT_OPS,
    _tracepoints: (),
    _reclaim: (),
    _access_events: _AGENT,
    _bpffs: _STRUCT_OPS,
    _libbpf: ENGINES,
    _clang: (),
    _cachestat: (),
    _memcg: (),
}
#: Those that a container is asked, too, and whether there is no agent in it without.
OF_CONTAINERS = {_btf: True, _access_events: True, _libbpf: True, _cachestat: False}
