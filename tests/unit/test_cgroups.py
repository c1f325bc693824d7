# SPDX-License-Identifier: Apache-2.0
"""Headroom of memory cgroups, read from files as v1 and v2 kernels write them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pagecache_bpf.errors import UsageError
from pagecache_bpf.kernel import cgroups
from pagecache_bpf.kernel.kernelfs import LIVE, KernelFS

MIB = 1 << 20
V2 = "30 23 0:26 {root} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
HYBRID = (
    "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755\n"
    "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
    "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
)


def write(root: Path, files: dict[str, str]) -> KernelFS:
    """A kernel of files."""
    for name, text in files.items():
        path = root / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return KernelFS(root)


def v2_level(path: str, maximum: str, high: str, used: int, **stat: int) -> dict[str, str]:
    return {
        f"{path}/cgroup.procs": "",
        f"{path}/memory.max": f"{maximum}\n",
        f"{path}/memory.high": f"{high}\n",
        f"{path}/memory.current": f"{used}\n",
        f"{path}/memory.stat": "".join(f"{name} {value}\n" for name, value in stat.items()),
    }


@pytest.fixture
def pod(tmp_path: Path) -> KernelFS:
    """A container with 800 MiB in a pod with a high of 500 MiB."""
    return write(
        tmp_path,
        {
            "/proc/self/mountinfo": V2.format(root="/"),
            "/proc/self/cgroup": "0::/pod/container\n",
            "/proc/77/cgroup": "0::/pod\n",
            "/sys/fs/cgroup/cgroup.controllers": "cpu io memory\n",
            "/sys/fs/cgroup/cgroup.procs": "",
            "/proc/meminfo": "MemTotal:  2048 kB\nHugePages_Total:  3\n",
            **v2_level(
                "/sys/fs/cgroup/pod/container",
                *(str(800 * MIB), "max", 300 * MIB),
                anon=100 * MIB,
                file=200 * MIB,
                inactive_file=120 * MIB,
                active_file=70 * MIB,
                file_dirty=11 * MIB,
                file_writeback=2 * MIB,
            ),
            **v2_level(
                "/sys/fs/cgroup/pod",
                *("max", str(500 * MIB), 400 * MIB),
                inactive_file=130 * MIB,
                active_file=70 * MIB,
            ),
        },
    )


def test_the_tightest_level_decides(pod: KernelFS) -> None:
    memory = cgroups.of_process(kernel=pod)
    assert (memory.version, memory.path) == (2, "/pod/container")
    container, above = memory.levels  # the root has no numbers
    assert (container.limit, container.high, container.used) == (800 * MIB, None, 300 * MIB)
    assert container.reclaimable == (120 + 70 - 11 - 2) * MIB
    assert container.headroom == (800 - 300 + 177) * MIB
    assert container.free == 500 * MIB
    assert (above.limit, above.bound, above.free) == (None, 500 * MIB, 100 * MIB)
    assert memory.tightest is above
    assert memory.headroom == (500 - 400 + 200) * MIB


def test_of_another_process_and_of_a_path(pod: KernelFS) -> None:
    assert [level.path for level in cgroups.of_process(77, pod).levels] == ["/pod"]
    for path in ("/pod", "pod", "/sys/fs/cgroup/pod"):
        assert cgroups.of_path(path, pod).headroom == 300 * MIB
    assert cgroups.of_path("/", pod).levels == ()
    with pytest.raises(UsageError, match="is not a memory cgroup"):
        cgroups.of_path("/nowhere", pod)
    with pytest.raises(UsageError, match="no process 78"):
        cgroups.of_process(78, pod)


def test_an_overcommitted_level_has_no_room(tmp_path: Path) -> None:
    level = cgroups.Level("/", 100, 50, 200, 10)
    assert (level.bound, level.headroom, level.free) == (50, 0, 0)


def test_what_is_mounted_may_be_a_part(tmp_path: Path) -> None:
    """A container without a cgroup namespace: its own part is mounted as the whole."""
    files = {
        "/proc/self/mountinfo": V2.format(root="/docker/abc"),
        "/proc/self/cgroup": "0::/docker/abc/job\n",
        "/sys/fs/cgroup/cgroup.controllers": "memory\n",
        "/sys/fs/cgroup/job/cgroup.procs": "",
        **v2_level("/sys/fs/cgroup/job", "4096", "max", 4096, inactive_file=1024),
    }
    kernel = write(tmp_path, files)
    memory = cgroups.of_process(kernel=kernel)
    assert [(level.path, level.headroom) for level in memory.levels] == [("/docker/abc/job", 1024)]
    assert cgroups.of_path("/job", kernel) == memory
    write(tmp_path, {"/proc/self/cgroup": "0::/../other\n"})
    assert cgroups.of_process(kernel=kernel).levels == ()


def test_v1_where_v2_has_no_memory_controller(tmp_path: Path) -> None:
    unlimited = str((1 << 63) - 4096)
    kernel = write(
        tmp_path,
        {
            "/proc/self/mountinfo": HYBRID,
            "/proc/self/cgroup": "4:memory:/job\n3:cpu,cpuacct:/x\n0::/elsewhere\n",
            "/sys/fs/cgroup/unified/cgroup.controllers": "hugetlb\n",
            "/sys/fs/cgroup/memory/job/memory.usage_in_bytes": "900\n",
            "/sys/fs/cgroup/memory/job/memory.limit_in_bytes": "1000\n",
            "/sys/fs/cgroup/memory/job/memory.stat": (
                "inactive_file 1\ntotal_inactive_file 300\ntotal_active_file 100\ntotal_dirty 50\n"
            ),
            "/sys/fs/cgroup/memory/memory.usage_in_bytes": "5000\n",
            "/sys/fs/cgroup/memory/memory.limit_in_bytes": f"{unlimited}\n",
        },
    )
    memory = cgroups.of_process(kernel=kernel)
    assert (memory.version, memory.path) == (1, "/job")
    assert [level.headroom for level in memory.levels] == [1000 - 900 + 350, None]
    assert memory.headroom == 450


def test_without_a_memory_controller_nothing_is_bounded(tmp_path: Path) -> None:
    kernel = write(
        tmp_path, {"/proc/self/mountinfo": V2.format(root="/"), "/proc/self/cgroup": "0::/a\n"}
    )
    memory = cgroups.of_process(kernel=kernel)
    assert (memory.version, memory.levels, memory.headroom) == (None, (), None)
    with pytest.raises(UsageError, match="no memory controller"):
        cgroups.of_path("/a", kernel)


def test_host_memory(pod: KernelFS) -> None:
    assert cgroups.host_memory(pod) == {"MemTotal": 2 * MIB, "HugePages_Total": 3}


def test_this_kernel() -> None:
    memory = cgroups.of_process(os.getpid())
    assert f":{memory.path}\n" in Path("/proc/self/cgroup").read_text()
    assert all(level.used >= 0 and level.reclaimable >= 0 for level in memory.levels)
    live = cgroups.host_memory(LIVE)
    assert 0 < live["MemAvailable"] <= live["MemTotal"]


def test_s16_where_cgroups_are_mounted_is_looked_for(tmp_path: Path) -> None:
    elsewhere = "30 23 0:26 / /mnt/groups rw - cgroup2 cgroup2 rw\n"
    files = {"/proc/self/mountinfo": elsewhere, "/mnt/groups/cgroup.controllers": "cpu memory\n"}
    assert cgroups.unified_mount(write(tmp_path / "a", files)) == Path("/mnt/groups")
    kernel = write(tmp_path / "b", {"/proc/self/mountinfo": HYBRID})
    assert cgroups.unified_mount(kernel) == Path("/sys/fs/cgroup")
