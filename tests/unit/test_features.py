# SPDX-License-Identifier: Apache-2.0
"""The probe table against kernels made of files: each thing there, missing, and unknown."""

from __future__ import annotations

import gzip
import os
import platform
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from pagecache_bpf.errors import UnsupportedError
from pagecache_bpf.explain import features
from pagecache_bpf.explain.features import Feature, Machine
from pagecache_bpf.kernel import event_sources, kmod
from pagecache_bpf.kernel.kernelfs import KernelFS

RELEASE = "6.12.1-test"
ALL_CAPABILITIES = "000001ffffffffff"


def btf(*names: str, needed: bool = True) -> bytes:
    """Type information with these names, and by default with what all programs use."""
    known = (*names, *event_sources.NEEDED) if needed else names
    strings = b"\0" + b"".join(name.encode() + b"\0" for name in known)
    return struct.pack("=HBBIIIII", 0xEB9F, 1, 0, 24, 0, 0, 0, len(strings)) + strings


class Kernel:
    """A kernel's files below a directory; starts as one that has everything."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.put("proc/modules", "")
        self.put("proc/sys/kernel/modules_disabled", "0\n")
        self.put("proc/self/status", f"Name:\tx\nCapEff:\t{ALL_CAPABILITIES}\n")
        self.put("proc/self/uid_map", "         0          0 4294967295\n")
        self.mounts("bpf /sys/fs/bpf", "tracefs /sys/kernel/tracing")
        functions = (*features.READAHEAD_FUNCTIONS, *features.RECLAIM_FUNCTIONS)
        self.symbols("register_kprobe", "register_ftrace_function", *functions)
        traceable = "".join(f"{name}\n" for name in functions)
        self.put("sys/kernel/tracing/available_filter_functions", traceable)
        self.put("sys/kernel/livepatch/.keep", "")
        self.put("sys/kernel/security/lockdown", "[none] integrity confidentiality\n")
        self.put("sys/module/module/parameters/sig_enforce", "N\n")
        self.put("sys/fs/cgroup/cgroup.controllers", "cpu memory io\n")
        tracepoints = (
            f"btf_trace_{name}"
            for name in (
                *features.TRACEPOINTS,
                *(event.name for event in event_sources.ACCESSES),
                features.RECLAIM_TRACEPOINT,
            )
        )
        self.put("sys/kernel/btf/vmlinux", btf("bpf_struct_ops_desc", *tracepoints))
        self.put(f"lib/modules/{RELEASE}/build/Makefile", "")
        self.put(f"lib/modules/{RELEASE}/modules.dep", "updates/dkms/pagecache_bpf.ko:\n")
        self.module(f"{RELEASE} SMP mod_unload")

    def put(self, name: str, content: str | bytes) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    def remove(self, name: str) -> None:
        path = self.root / name
        if path.is_dir():
            for child in path.iterdir():
                self.remove(str(child.relative_to(self.root)))
            path.rmdir()
        else:
            path.unlink()

    def mounts(self, *mounts: str) -> None:
        lines = (
            f"2{i} 1 0:2{i} / {mount.split()[1]} rw shared:{i} - {mount.split()[0]} none rw\n"
            for i, mount in enumerate(mounts)
        )
        self.put("proc/self/mountinfo", "".join(lines))

    def symbols(self, *names: str) -> None:
        self.put("proc/kallsyms", "".join(f"0000000000000000 T {name}\n" for name in names))

    def module(self, vermagic: str, tail: bytes = b"") -> None:
        content = b"\x7fELF\0vermagic=" + vermagic.encode() + b"\0" + tail
        self.put(f"lib/modules/{RELEASE}/updates/dkms/pagecache_bpf.ko", content)

    def machine(self, euid: int = 0) -> Machine:
        # what this source tree has built must not leak in
        return Machine(KernelFS(self.root), RELEASE, euid, built=self.root / "built")

    def probe(self, name: str, euid: int = 0) -> Feature:
        found = [feature for feature in features.probe(self.machine(euid)) if feature.name == name]
        assert len(found) == 1, f"{len(found)} features are called {name}"
        return found[0]


@pytest.fixture
def kernel(tmp_path: Path) -> Kernel:
    return Kernel(tmp_path)


def test_a_kernel_that_has_everything(kernel: Kernel) -> None:
    tools = {"libbpf", "clang", "pahole", "cachestat(2)"}  # of this machine, not of that kernel
    table = [feature for feature in features.probe(kernel.machine()) if feature.name not in tools]
    assert [feature for feature in table if not feature.ok] == []
    assert len(table) == len(features.PROBES) - len(tools)


def test_what_an_engine_lacks_is_told_apart(kernel: Kernel) -> None:
    """A locked kernel still runs the agent; one without its tracepoints still takes the module."""
    kernel.remove("proc/modules")
    lacking = features.lacking(features.probe(kernel.machine()))
    assert "loadable modules" in [feature.name for feature in lacking["struct_ops"]]
    assert not [feature for feature in lacking["agent"] if feature.name != "libbpf"]
    names = (
        "bpf_struct_ops_desc",
        *(f"btf_trace_{tracepoint}" for tracepoint in features.TRACEPOINTS),
    )
    kernel.put("sys/kernel/btf/vmlinux", btf(*names))
    lacking = features.lacking(features.probe(kernel.machine()))
    assert "access events" in [feature.name for feature in lacking["agent"]]
    assert "access events" not in [feature.name for feature in lacking["struct_ops"]]


def test_a_kernel_that_can_take_no_program_of_ours(kernel: Kernel) -> None:
    """Linux 5.10 tells of accesses, and lacks what every program needs: no engine is ready."""
    names = [source.type_name for event in event_sources.EVENTS for source in event.sources]
    kernel.put("sys/kernel/btf/vmlinux", btf(*names, needed=False))
    table = features.probe(kernel.machine())
    (found,) = (feature for feature in table if feature.name == "access events")
    assert found.ok is False and "bpf_task_pt_regs() (5.15" in found.found and "5.15" in found.fix
    assert found in features.lacking(table)["agent"]


def test_every_line_says_what_is_lost_and_what_to_do(tmp_path: Path) -> None:
    """A kernel that has nothing at all: no probe may raise, and each has a next step."""
    table = features.probe(Machine(KernelFS(tmp_path / "void"), RELEASE, 1000))
    assert len({feature.name for feature in table}) == len(table)
    for feature in table:
        assert feature.name and feature.found
        if feature.name != "kernel":
            assert feature.lost, feature
        if feature.ok is False:
            assert feature.fix, feature


def test_the_live_kernel_answers() -> None:
    table = {feature.name: feature for feature in features.probe()}
    assert platform.release() in table["kernel"].found
    assert table["privileges"].ok == (os.geteuid() == 0) or os.geteuid() == 0
    assert (table["kernel BTF"].ok is True) == Path("/sys/kernel/btf/vmlinux").exists()
    assert (table["loadable modules"].ok is not False) or not Path("/proc/modules").exists()


Change = Callable[[Kernel], object]


@pytest.mark.parametrize(
    ("name", "ok", "said", "change"),
    [
        ("kernel BTF", False, "is missing", lambda k: k.remove("sys/kernel/btf/vmlinux")),
        ("kernel BTF", False, "is missing", lambda k: k.put("sys/kernel/btf/vmlinux", "garbage")),
        ("bpffs", False, "no bpffs", lambda k: k.mounts()),
        (
            "bpffs",
            True,
            "`attach` mounts it",
            lambda k: (k.mounts(), k.put("sys/fs/bpf/.keep", "")),
        ),
        ("loadable modules", False, "no CONFIG_MODULES", lambda k: k.remove("proc/modules")),
        (
            "loadable modules",
            False,
            "modules_disabled=1",
            lambda k: k.put("proc/sys/kernel/modules_disabled", "1\n"),
        ),
        (
            "struct_ops in modules",
            False,
            "keeps struct_ops to itself",
            lambda k: k.put("sys/kernel/btf/vmlinux", btf("bpf_struct_ops")),
        ),
        (
            "struct_ops in modules",
            None,
            "no BTF",
            lambda k: k.remove("sys/kernel/btf/vmlinux"),
        ),
        ("kprobes", False, "no CONFIG_KPROBES", lambda k: k.symbols("printk")),
        ("kprobes", None, "cannot be read", lambda k: k.remove("proc/kallsyms")),
        ("ftrace with IPMODIFY", False, "no function tracer", lambda k: k.symbols("printk")),
        (
            "ftrace with IPMODIFY",
            False,
            "cannot reach page_cache_async_ra, page_cache_ra_order",
            lambda k: k.put(
                "sys/kernel/tracing/available_filter_functions", "page_cache_sync_ra [ext4]\n"
            ),
        ),
        (
            "ftrace with IPMODIFY",
            None,
            "list of traceable functions cannot be read",
            lambda k: k.remove("sys/kernel/tracing/available_filter_functions"),
        ),
        (
            "ftrace with IPMODIFY",
            None,
            "configuration is not published",
            lambda k: k.remove("sys/kernel/livepatch"),
        ),
        (
            "ftrace with IPMODIFY",
            False,
            "has neither",
            lambda k: (
                k.remove("sys/kernel/livepatch"),
                k.put(f"boot/config-{RELEASE}", "CONFIG_X86=y\n"),
            ),
        ),
        (
            "ftrace with IPMODIFY",
            True,
            "configuration has it",
            lambda k: (
                k.remove("sys/kernel/livepatch"),
                k.put("proc/config.gz", gzip.compress(b"CONFIG_DYNAMIC_FTRACE_WITH_ARGS=y\n")),
            ),
        ),
        (
            "access events",
            False,
            "missing: mm_filemap_get_pages, mm_filemap_map_pages, mm_filemap_fault",
            lambda k: k.put("sys/kernel/btf/vmlinux", btf("bpf_struct_ops_desc")),
        ),
        (
            "access events",
            True,
            "mm_filemap_fault; missing: mm_filemap_get_pages, mm_filemap_map_pages",
            lambda k: k.put("sys/kernel/btf/vmlinux", btf("btf_trace_mm_filemap_fault")),
        ),
        (
            "access events",
            None,
            "function filemap_get_pages; missing: mm_filemap_map_pages, mm_filemap_fault; not",
            lambda k: k.put("sys/kernel/btf/vmlinux", btf("filemap_get_pages")),
        ),
        (
            "tracepoints",
            False,
            "missing: mm_filemap_delete_from_page_cache",
            lambda k: k.put(
                "sys/kernel/btf/vmlinux", btf("btf_trace_mm_filemap_add_to_page_cache")
            ),
        ),
        (
            "hooks in reclaim",
            False,
            "cannot reach folio_referenced, try_to_free_mem_cgroup_pages, clear_inode",
            lambda k: k.put(
                "sys/kernel/tracing/available_filter_functions", "truncate_inode_pages_final\n"
            ),
        ),
        (
            "hooks in reclaim",
            False,
            "cannot reach tracepoint mm_vmscan_lru_shrink_inactive",
            lambda k: k.put("sys/kernel/btf/vmlinux", btf("bpf_struct_ops_desc")),
        ),
        (
            "hooks in reclaim",
            True,
            "reaches folio_referenced",
            lambda k: k.remove("sys/kernel/tracing/available_filter_functions"),
        ),
        (
            "hooks in reclaim",
            None,
            "not readable",
            lambda k: (
                k.remove("sys/kernel/tracing/available_filter_functions"),
                k.remove("proc/kallsyms"),
            ),
        ),
        (
            "unsigned modules",
            False,
            "locked down (integrity)",
            lambda k: k.put("sys/kernel/security/lockdown", "none [integrity] confidentiality"),
        ),
        (
            "unsigned modules",
            False,
            "module.sig_enforce",
            lambda k: k.put("sys/module/module/parameters/sig_enforce", "Y\n"),
        ),
        (
            "unsigned modules",
            True,
            "Secure Boot on",
            lambda k: k.put(
                "sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c",
                b"\x06\0\0\0\x01",
            ),
        ),
        (
            "unsigned modules",
            None,
            "lockdown unknown",
            lambda k: (
                k.remove("sys/kernel/security/lockdown"),
                k.put(f"boot/config-{RELEASE}", "CONFIG_SECURITY_LOCKDOWN_LSM=y\n"),
            ),
        ),
        (
            "kernel headers",
            False,
            "is missing",
            lambda k: k.remove(f"lib/modules/{RELEASE}/build"),
        ),
        (
            "module pagecache_bpf",
            True,
            "loaded",
            lambda k: k.put("sys/module/pagecache_bpf/refcnt", "0"),
        ),
        (
            "module pagecache_bpf",
            False,
            "none for this kernel",
            lambda k: k.put(f"lib/modules/{RELEASE}/modules.dep", "kernel/fs/ext4.ko:\n"),
        ),
        (
            "module pagecache_bpf",
            False,
            "is not signed; the kernel is locked down",
            lambda k: k.put("sys/kernel/security/lockdown", "none [integrity] confidentiality"),
        ),
        (
            "memory cgroup",
            True,
            "v1",
            lambda k: (
                k.put("sys/fs/cgroup/cgroup.controllers", "cpu\n"),
                k.put("proc/cgroups", "#subsys_name\thierarchy\ncpu\t3\nmemory\t4\n"),
            ),
        ),
        (
            "memory cgroup",
            False,
            "no memory controller",
            lambda k: k.remove("sys/fs/cgroup/cgroup.controllers"),
        ),
        (
            "privileges",
            False,
            "root without CAP_BPF",
            lambda k: k.put("proc/self/status", "CapEff:\t0000007fffffffff\n"),
        ),
        (
            "privileges",
            False,
            "user namespace",
            lambda k: k.put("proc/self/uid_map", "0 1000 1\n"),
        ),
    ],
)
def test_what_is_missing_is_seen(
    kernel: Kernel, name: str, ok: bool | None, said: str, change: Change
) -> None:
    assert kernel.probe(name).ok is True
    change(kernel)
    feature = kernel.probe(name)
    assert feature.ok is ok
    assert said in feature.found
    assert feature.ok or feature.fix


@pytest.mark.parametrize(
    ("change", "headers", "module"),
    [
        (lambda k: k.remove("proc/modules"), "See loadable modules", "See loadable modules"),
        (
            lambda k: k.put("sys/kernel/btf/vmlinux", btf("old")),
            *("See struct_ops in modules", "See struct_ops in modules"),
        ),
        (lambda k: None, "apt install linux-headers", "Run `make build`"),
    ],
)
def test_nobody_is_sent_to_build_a_module_that_cannot_serve(
    kernel: Kernel, change: Change, headers: str, module: str
) -> None:
    kernel.remove(f"lib/modules/{RELEASE}/build")
    kernel.put(f"lib/modules/{RELEASE}/modules.dep", "kernel/fs/ext4.ko:\n")
    change(kernel)
    assert headers in kernel.probe("kernel headers").fix
    assert module in kernel.probe("module pagecache_bpf").fix


def test_an_ordinary_user_is_told_to_use_sudo(kernel: Kernel) -> None:
    feature = kernel.probe("privileges", euid=1000)
    assert (feature.ok, feature.found) == (False, "user 1000")
    assert "sudo" in feature.fix


def test_a_signed_module_may_pass_a_lockdown(kernel: Kernel) -> None:
    kernel.put("sys/kernel/security/lockdown", "none [integrity] confidentiality")
    kernel.module(RELEASE, b"~Module signature appended~\n")
    assert kernel.probe("module pagecache_bpf").ok is True


@pytest.mark.parametrize(
    ("variable", "said"),
    [("libc.so.6", "version 0.0"), ("/nonexistent/libbpf.so.1", "cannot open shared object")],
)
def test_libbpf_too_old_or_absent(
    monkeypatch: pytest.MonkeyPatch, variable: str, said: str
) -> None:
    from pagecache_bpf.kernel import libbpf

    monkeypatch.setenv("PAGECACHE_BPF_LIBBPF", variable)
    libbpf.library.cache_clear()
    try:
        feature = features._libbpf(Machine())
    finally:
        libbpf.library.cache_clear()
    assert feature.ok is False
    assert said in feature.found
    assert "make deps" in feature.fix


def test_load_module_is_the_module_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    if kmod.is_loaded():
        pytest.skip("the module is loaded")
    if Path("/proc/modules").exists():
        pytest.skip("this kernel loads modules; the guest tests have that")
    with pytest.raises(UnsupportedError, match="this kernel cannot load modules"):
        features.load_module()


def test_tracefs_that_is_mounted_elsewhere_is_to_be_mounted(kernel: Kernel) -> None:
    """Root is not told to run doctor as root."""
    kernel.remove("sys/kernel/tracing/available_filter_functions")
    kernel.mounts("bpf /sys/fs/bpf", "tracefs /tmp/elsewhere")
    assert "mount -t tracefs" in kernel.probe("ftrace with IPMODIFY").fix
