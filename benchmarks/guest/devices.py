# SPDX-License-Identifier: Apache-2.0
"""The guest's side: file systems on devices with a known latency.

dm-delay holds back each read for a number of milliseconds and lets writes pass, so that data
gets there quickly and is read slowly; the bandwidth is capped by QEMU (Disk.read_bps).
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pagecache_bpf.errors import PagecacheError

SECTOR = 512
MOUNTS = Path("/tmp/pagecache-bpf")


def run(*command: str, text: str | None = None) -> None:
    """Run a tool; raises PagecacheError with what it said."""
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        raise PagecacheError(f"{' '.join(command)} failed", (done.stderr or done.stdout).strip())


@dataclass
class ScaledDevice:
    """A mounted file system on a delayed device.  node: such as /dev/dm-0."""

    name: str
    disk: str
    fs: str
    start: int
    sectors: int
    delay_ms: float = 0.0

    @property
    def mount(self) -> Path:
        """Where it is mounted."""
        return MOUNTS / self.name

    @property
    def mapped(self) -> str:
        """The device's stable name."""
        return f"/dev/mapper/{self.name}"

    @property
    def node(self) -> str:
        """The device's kernel name, /dev/dm-N."""
        return str(Path(self.mapped).resolve())

    @property
    def sysfs(self) -> Path:
        """/sys/block/dm-N."""
        return Path("/sys/block") / Path(self.node).name

    def _table(self, delay_ms: float) -> str:
        where = f"{self.disk} {self.start}"
        return f"0 {self.sectors} delay {where} {delay_ms:.0f} {where} 0"

    def set_delay(self, delay_ms: float) -> None:
        """Hold back each read for so many milliseconds from now on."""
        run("dmsetup", "load", self.name, text=self._table(delay_ms))
        run("dmsetup", "suspend", self.name)
        run("dmsetup", "resume", self.name)
        self.delay_ms = delay_ms

    def set_read_ahead_kb(self, kib: int) -> None:
        """Set the device's readahead window, for files opened from now on."""
        (self.sysfs / "queue" / "read_ahead_kb").write_text(str(kib))

    def remount(self) -> None:
        """Unmount and mount again: nothing of it is cached then.  Raises if it is busy."""
        run("umount", str(self.mount))
        run("mount", self.mapped, str(self.mount))

    def bytes_read(self) -> int:
        """Return the bytes read from the device since it exists."""
        return int((self.sysfs / "stat").read_text().split()[2]) * SECTOR


def open_device(
    disk: int, fs: str, *, part: tuple[int, int] = (0, 1), read_ahead_kb: int = 128
) -> ScaledDevice:
    """Make a file system on a virtio disk (0 is the first) and mount it, without a delay yet.

    part: (i, n) takes the i-th of n equal parts of the disk.
    """
    letter = chr(ord("a") + disk)
    block = Path(f"/sys/block/vd{letter}")
    if not block.exists():
        raise PagecacheError(f"the guest has no disk {disk}", fix="Boot it with one more --disk")
    index, count = part
    sectors = int((block / "size").read_text()) // count
    device = ScaledDevice(
        f"vd{letter}{index}-{fs}", f"/dev/vd{letter}", fs, index * sectors, sectors
    )
    run("modprobe", "-a", fs, "dm_delay")
    run("dmsetup", "create", device.name, text=device._table(0))
    # The disk may have carried the other file system until now.
    run(f"mkfs.{fs}", "-q", {"ext4": "-F", "xfs": "-f"}[fs], device.mapped)
    device.mount.mkdir(parents=True, exist_ok=True)
    run("mount", device.mapped, str(device.mount))
    device.set_read_ahead_kb(read_ahead_kb)
    return device


def close_device(device: ScaledDevice) -> None:
    """Unmount and remove it."""
    run("umount", str(device.mount))
    run("dmsetup", "remove", device.name)


@contextmanager
def scaled_device(
    disk: int = 0, fs: str = "ext4", delay_ms: float = 20.0, read_ahead_kb: int = 128
) -> Iterator[ScaledDevice]:
    """Yield the standard scaled device, removed again at the end."""
    device = open_device(disk, fs, read_ahead_kb=read_ahead_kb)
    try:
        device.set_delay(delay_ms)
        yield device
    finally:
        close_device(device)
