# SPDX-License-Identifier: Apache-2.0
"""Boot a guest under QEMU with this machine's own root file system and run one command in it.

The guest is a stock distribution kernel started by virtme-ng. Its root is the host's, read-only
with throw-away overlays; only the project's ``build/`` is shared for writing, so results come back
as files. QEMU's interpreter (TCG) is used: it works where KVM does not, at a tenth of the speed.
"""

from __future__ import annotations

import contextlib
import os
import re
import selectors
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from benchmarks.guest import image
from benchmarks.guest.console import problems_of

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build"
GUEST_ENV = "PAGECACHE_BPF_GUEST"
#: The status of a guest that did not live to report one; no command can be told apart by it,
#: so look at Result.lost.
LOST_RETURNCODE = 125


class GuestError(Exception):
    """The guest cannot be started: something is missing or an option makes no sense."""


@dataclass(frozen=True)
class Disk:
    """A virtio disk of the guest, an empty sparse file on the host.

    Args:
        size: as QEMU takes it, e.g. "1G".
        read_bps: cap on reads, in bytes per second; None for none. Writes are never capped, so
            that filling the disk is quick.
    """

    size: str = "1G"
    read_bps: int | None = None

    @classmethod
    def parse(cls, text: str) -> Disk:
        """Read ``SIZE[:bps=RATE]``; K, M and G of RATE are powers of 10.

        Raises:
            GuestError: the text is neither.
        """
        match = re.fullmatch(r"(\d+[KMGT]?)(?::bps=(\d+)([KMG]?))?", text)
        if match is None:
            raise GuestError(f"disk {text!r} is not SIZE[:bps=RATE], e.g. 2G or 2G:bps=64M")
        size, rate, unit = match.groups()
        scale = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}
        return cls(size, int(rate) * scale[unit] if rate else None)

    def bytes(self) -> int:
        """Return the size in bytes."""
        match = re.fullmatch(r"(\d+)([KMGT]?)", self.size)
        if match is None:
            raise GuestError(f"disk size {self.size!r} is not a number with K, M, G or T")
        return int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}[match[2]]


@dataclass
class Result:
    """What came back from a guest.

    Attributes:
        returncode: the command's own exit status; 125 when the guest was lost.
        stdout: the command's output and errors together.
        console: the serial console's log (kernel messages).
        problems: lines of that log that report a kernel defect.
        lost: the guest died, hung or never came up; the command's result is unknown.
        why_lost: one sentence for a person, empty unless lost.
        run_dir: where all of it lies.
        boot_s: seconds from start to the command's start; None when it never started.
    """

    returncode: int
    stdout: str
    console: Path
    problems: list[str]
    lost: bool
    why_lost: str
    run_dir: Path
    boot_s: float | None


def default_kernel() -> Path:
    """Return the image of the newest installed 6.12 kernel whose headers are there too.

    Raises:
        GuestError: there is none.
    """
    found = [
        image
        for image in Path("/boot").glob("vmlinuz-6.12*")
        if Path("/lib/modules", image.name.removeprefix("vmlinuz-"), "build").exists()
    ]
    if not found:
        raise GuestError("no 6.12 kernel with headers in /boot; run `make deps` to install one")
    return max(found, key=lambda p: [int(n) for n in re.findall(r"\d+", p.name)])


@dataclass
class Guest:
    """The machine to boot.

    Args:
        cpus: virtual CPUs; the host's threads limit what more of them bring.
        memory: as QEMU takes it; split evenly over the nodes.
        numa: NUMA nodes.
        kernel: kernel image, or a built kernel tree; the default is `default_kernel()`.
        disks: become /dev/vda, /dev/vdb, ... in this order.
        timeout_s: after so many seconds the guest is killed and counts as lost.
        append: more kernel command line.
        serial: emulate the CPUs one after the other in one thread. QEMU's threads lose a race of
            self-modifying code: a stock kernel without any module dies of "Oops: int3" when a
            tracepoint on a busy path is turned on and off. Runs
            that patch the kernel's text under load need this; it halves the speed.
        icount: let the guest's clock count executed instructions, one a nanosecond, and run as
            fast as the host's clock only while all CPUs wait. Implies serial. Costs of a few
            instructions can be told from noise then.
        name: prefix of the run's directory under build/guest/.
    """

    cpus: int = 2
    memory: str = "3G"
    numa: int = 1
    kernel: Path | None = None
    disks: Sequence[Disk] = ()
    timeout_s: float = 1800.0
    append: Sequence[str] = ()
    serial: bool = False
    icount: bool = False
    name: str = "run"
    env: dict[str, str] = field(default_factory=dict)

    def run(self, command: Sequence[str], *, echo: IO[str] | None = None) -> Result:
        """Boot, run the command in the repository's root, shut down.

        Args:
            command: program and arguments; the venv's bin/ is first in its PATH.
            echo: gets the command's output while it runs.

        Raises:
            GuestError: QEMU, virtme-ng, a kernel or a sensible option is missing.
        """
        run_dir = self._new_run_dir()
        self._write_script(run_dir, command)
        images = _make_images(run_dir, command)
        argv = [*self._vng(run_dir, images), "--", f"sh {run_dir.relative_to(ROOT)}/run.sh"]
        started = time.time()
        stopped_by, stdout = _supervise(argv, run_dir, self.timeout_s, echo)
        return self._collect(run_dir, stdout, started, stopped_by)

    def shell(self) -> int:
        """Boot to an interactive shell on this terminal; returns when it is left."""
        run_dir = self._new_run_dir()
        command = ["bash", "-i"]
        self._write_script(run_dir, command)
        images = _make_images(run_dir, command)
        return subprocess.run(
            self._vng(run_dir, images, interactive=True), env=_vng_env(), cwd=ROOT
        ).returncode

    # --- the parts of run() ---

    def _new_run_dir(self) -> Path:
        base = BUILD / "guest"
        stamp = time.strftime("%Y%m%d-%H%M%S")
        for n in range(100):
            path = base / (f"{self.name}-{stamp}" + (f"-{n}" if n else ""))
            with contextlib.suppress(FileExistsError):
                path.mkdir(parents=True)
                latest = base / f"{self.name}-latest"
                latest.unlink(missing_ok=True)
                latest.symlink_to(path.name)
                return path
        raise GuestError(f"cannot make a fresh directory in {base}")

    def _write_script(self, run_dir: Path, command: Sequence[str]) -> None:
        """Write what the guest runs; the status goes to a file, so that a lost guest shows."""
        env = {
            GUEST_ENV: "1",
            "PYTHONDONTWRITEBYTECODE": "1",  # the guest's source tree is read-only
            "PYTHONUNBUFFERED": "1",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # no test here needs one
            "COLUMNS": os.environ.get("COLUMNS", "100"),
            "HOME": "/run",
            "PATH": f"{BUILD}/venv/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            **{k: v for k, v in os.environ.items() if k.startswith("PAGECACHE_BPF_") and v},
            # Its own: sockets cannot be made on the file system that both sides share.
            "PAGECACHE_BPF_RUN_DIR": "/run/pagecache-bpf",
            **self.env,
        }
        exports = "\n".join(f"export {k}={shlex.quote(v)}" for k, v in env.items())
        (run_dir / "run.sh").write_text(
            f"""\
{exports}
cd {shlex.quote(str(ROOT))} || exit 1
echo started >{run_dir}/started
mountpoint -q /sys/fs/bpf || mount -t bpf bpf /sys/fs/bpf
mountpoint -q /sys/kernel/debug || mount -t debugfs debugfs /sys/kernel/debug
mountpoint -q /sys/kernel/tracing || mount -t tracefs tracefs /sys/kernel/tracing
modprobe -q -a virtio_blk loop dm_mod dm_delay ext4 xfs
{image.mount_script()}
{shlex.join(command)} 2>&1
status=$?
dmesg >{run_dir}/dmesg.log
cp /run/pagecache-bpf/*.log {run_dir} 2>/dev/null
echo $status >{run_dir}/exit-status
exit $status
"""
        )

    def _vng(
        self, run_dir: Path, images: dict[str, Path], *, interactive: bool = False
    ) -> list[str]:
        vng = BUILD / "venv/bin/vng"
        if not vng.exists():
            raise GuestError("virtme-ng is not installed; run `make deps`")
        if shutil.which("qemu-system-x86_64") is None:
            raise GuestError("qemu-system-x86_64 is not installed; run `make deps`")
        if self.cpus < 1 or self.numa < 1 or self.cpus % self.numa:
            raise GuestError(f"{self.cpus} CPUs cannot be split over {self.numa} NUMA nodes evenly")
        argv = [str(vng), "--disable-kvm", "--force-9p", "-r", str(self.kernel or default_kernel())]
        argv += ["--user", "root", "--cpus", str(self.cpus), "--memory", self.memory]
        argv += ["--rwdir", str(BUILD), *self._numa_options()]
        options = [*self._disk_options(run_dir), *_image_options(images)]
        if self.icount:
            options.append("-icount shift=0")
        elif self.serial:
            options.append("-accel tcg,thread=single")
        argv += [f"--qemu-opts={' '.join(options)}"] if options else []
        append = ["printk.devkmsg=on", *self.append]
        if self.kernel and self.kernel.is_dir():
            # One with checks of its own: KASAN takes an interrupt during the switch to five
            # levels of page tables for a bad access, and neither it nor lockdep says more then.
            append += ["no5lvl", "kasan_multi_shot"]
        for option in append:
            argv += ["--append", option]
        return argv if interactive else [*argv, "--verbose"]

    def _numa_options(self) -> list[str]:
        if self.numa == 1:
            return []
        size = Disk(self.memory).bytes() // self.numa >> 20
        cpus_per_node = self.cpus // self.numa
        options = []
        for node in range(self.numa):
            first, last = node * cpus_per_node, (node + 1) * cpus_per_node - 1
            cpus = f"{first}-{last}" if last > first else f"{first}"
            options += ["--numa", f"{size}M,cpus={cpus}"]
        return options

    def _disk_options(self, run_dir: Path) -> list[str]:
        """Return QEMU's options for the disks, each of which is one raw sparse file.

        The host's page cache must not serve a capped read twice as fast, but throttling sits
        above it in QEMU, so cache=unsafe keeps the cap and spares the host's disk (writes are
        never flushed: the file lives as long as the guest).
        """
        options = []
        for n, disk in enumerate(self.disks):
            path = run_dir / f"disk{n}.img"
            with path.open("wb") as file:
                file.truncate(disk.bytes())
            cap = f",throttling.bps-read={disk.read_bps}" if disk.read_bps else ""
            options.append(
                f"-drive if=none,id=disk{n},file={path},format=raw,cache=unsafe,discard=unmap{cap}"
            )
            options.append(f"-device virtio-blk-pci,drive=disk{n},serial=disk{n}")
        return options

    def _collect(self, run_dir: Path, stdout: str, started: float, stopped_by: str) -> Result:
        console = run_dir / "console.log"
        log = console.read_text(errors="replace")
        problems = problems_of(log, "virtme-ng-init: starting script")
        begun, status = run_dir / "started", run_dir / "exit-status"
        for disk in run_dir.glob("*.img"):
            disk.unlink()
        boot_s = begun.stat().st_mtime - started if begun.exists() else None
        why_lost = ""
        if not status.exists() or not status.read_text().strip().isdigit():
            if boot_s is None:
                why_lost = f"the guest never came up{stopped_by}"
            else:
                why_lost = f"the guest died while it ran the command{stopped_by}"
            why_lost += f"; its console log is {console}"
        return Result(
            returncode=LOST_RETURNCODE if why_lost else int(status.read_text()),
            stdout=stdout,
            console=console,
            problems=problems,
            lost=bool(why_lost),
            why_lost=why_lost,
            run_dir=run_dir,
            boot_s=boot_s,
        )


def _make_images(run_dir: Path, command: Sequence[str]) -> dict[str, Path]:
    """Make what Python reads in the guest; by the serial number of its disk.

    Raises:
        GuestError: there is no room for them, or mkfs.ext4 is missing.
    """
    try:
        return {
            image.PACKAGES: image.packages_image(BUILD / "guest"),
            image.TREE: image.tree_image(run_dir, command),
        }
    except (OSError, shutil.Error, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or b""
        raise GuestError(
            f"the guest's image of Python cannot be made: {error} {said.decode().strip()}"
        ) from error


def _image_options(images: dict[str, Path]) -> list[str]:
    """Return QEMU's options for disks that the guest only reads, behind those of the tests."""
    options = []
    for serial, path in images.items():
        options += [
            f"-drive if=none,id={serial},file={path},format=raw,readonly=on",
            f"-device virtio-blk-pci,drive={serial},serial={serial}",
        ]
    return options


def _vng_env() -> dict[str, str]:
    """virtme-ng calls its own helpers by name, so its directory has to be in PATH."""
    return {**os.environ, "PATH": f"{BUILD}/venv/bin:{os.environ.get('PATH', '')}"}


def _supervise(
    argv: Sequence[str], run_dir: Path, timeout_s: float, echo: IO[str] | None
) -> tuple[str, str]:
    """Run virtme-ng; the command's output comes on its stdout, the console on its stderr.

    Returns why it was stopped ("" if it ended by itself) and the output.
    """
    deadline = time.monotonic() + timeout_s
    captured: list[bytes] = []
    with (
        (run_dir / "console.log").open("wb") as console,
        (run_dir / "stdout.log").open("wb") as out,
        subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=ROOT,
            env=_vng_env(),
            start_new_session=True,  # QEMU is a grandchild: kill the whole group
        ) as process,
        selectors.DefaultSelector() as selector,
    ):
        assert process.stdout is not None and process.stderr is not None
        selector.register(process.stdout, selectors.EVENT_READ, out)
        selector.register(process.stderr, selectors.EVENT_READ, console)
        try:
            while selector.get_map():
                if time.monotonic() > deadline:
                    return f" (killed after {timeout_s:.0f} s)", _text(captured)
                for key, _ in selector.select(timeout=1.0):
                    data = os.read(key.fd, 65536)
                    if not data:
                        selector.unregister(key.fileobj)
                        continue
                    key.data.write(data)
                    key.data.flush()
                    if key.data is out:
                        captured.append(data)
                        if echo is not None:
                            echo.write(data.decode(errors="replace").replace("\r\n", "\n"))
                            echo.flush()
        finally:
            _kill_group(process)
    return "", _text(captured)


def end_on_sigterm() -> None:
    """Let SIGTERM end this process like Ctrl-C, so that no guest is left behind."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=10)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _text(chunks: Sequence[bytes]) -> str:
    return b"".join(chunks).decode(errors="replace").replace("\r\n", "\n")


def explain(result: Result, out: IO[str] = sys.stderr) -> None:
    """Tell a person what was wrong with a run: a lost guest, kernel problems."""
    if result.lost:
        print(f"guest lost: {result.why_lost}", file=out)
    for line in result.problems[:20]:
        print(f"kernel problem: {line}", file=out)
    if result.problems:
        print(f"{len(result.problems)} kernel problem line(s) in {result.console}", file=out)
