# SPDX-License-Identifier: Apache-2.0
"""The cells of benchmarks.matrix: what is loaded from where, by what, and with which policy.

A cell is one policy on one engine, for one reader, in one setting (device, model, memory).  Every
combination that makes sense is a cell; one that cannot be measured here has a reason, and is shown.
"""

from __future__ import annotations

import itertools
import math
import shutil
import statistics
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from benchmarks import peers

MB = 1_000_000
#: At most so many times the default's seconds and bytes of the device.
TIME_LIMIT, BYTES_LIMIT = 1.02, 1.05
POLICIES = ("sequential", "maio")
AMPLE, TIGHT = "ample", "45%"
TIGHT_SHARE = 0.45


@dataclass(frozen=True)
class Device:
    """What is read from.

    read_ahead_kb: the kernel's window.  delay_ms, cap_bytes_per_s: of the guest's scaled device;
    None: this machine's own disk.
    """

    read_ahead_kb: int
    delay_ms: float | None = None
    cap_bytes_per_s: int = 0

    @property
    def native(self) -> bool:
        """Tell whether it is this machine's own disk."""
        return self.delay_ms is None

    @property
    def name(self) -> str:
        """As `--device` takes it."""
        if self.native:
            return f"native-{self.read_ahead_kb}"
        cap = f"{self.cap_bytes_per_s // MB}MB" if self.cap_bytes_per_s else "nocap"
        return f"guest-{self.delay_ms:g}ms-{cap}"

    @property
    def engines(self) -> tuple[str, ...]:
        """Engines that can run there: the module is built for the guest's kernel."""
        return ("agent",) if self.native else ("struct_ops", "agent")


@dataclass(frozen=True)
class Reader:
    """A program, and in which order it reads.

    kind: "whole" (front to back), "ranks" (slices of tensors) or "random".  needs: a program or a
    Python module without which it is not installed; where: "path", "peers" (the environment of
    `make peers`).  own_model: it does not load the checkpoint that the others load.
    """

    name: str
    kind: str
    needs: str = ""
    where: str = "path"
    own_model: bool = False

    @property
    def absent(self) -> str:
        """Why it cannot run here; empty: it can."""
        if not self.needs:
            return ""
        found = shutil.which(self.needs) if self.where == "path" else _has_module(self.needs)
        if not found:
            return "not installed"
        return "loads a checkpoint of its own" if self.own_model else ""


@cache
def _has_module(name: str) -> bool:
    if not peers.PYTHON.exists():
        return False
    done = subprocess.run([peers.PYTHON, "-c", f"import {name}"], capture_output=True)
    return done.returncode == 0


READERS = (
    Reader("safe_open", "whole"),
    Reader("read 1 MiB", "whole"),
    Reader("read 16 MiB", "whole"),
    Reader("pread by 8 threads", "whole"),
    Reader("mmap by pages", "whole"),
    Reader("cp", "whole", "cp"),
    Reader("io_uring, buffered (fio)", "whole", "fio"),
    Reader("llama.cpp", "whole", "llama_cpp", "peers", own_model=True),
    Reader("transformers", "whole", "transformers", "peers", own_model=True),
    Reader("vLLM", "whole", "vllm", "peers", own_model=True),
    Reader("rank 0 of 2", "ranks"),
    Reader("two ranks", "ranks"),
    Reader("random 4 KiB pread", "random"),
    Reader("random 128 KiB pread", "random"),
    Reader("random 4 KiB mmap", "random"),
    Reader("random 128 KiB mmap", "random"),
    Reader("random 4 KiB MADV_RANDOM", "random"),
    Reader("random 128 KiB MADV_RANDOM", "random"),
)
BY_NAME = {reader.name: reader for reader in READERS}


@dataclass(frozen=True)
class Setting:
    """What a round attaches once for: a device, a model on it and the memory of its readers.

    size: bytes of the model; shards: its files; memory: AMPLE or TIGHT, a memory cgroup that holds
    so much of the model beside what the reader itself allocates.
    """

    device: Device
    size: int
    shards: int
    memory: str = AMPLE

    @property
    def name(self) -> str:
        """In a few words."""
        files = f"{self.shards} shards" if self.shards > 1 else "1 file"
        return f"{self.device.name}, {size_text(self.size)} in {files}, {self.memory}"

    @property
    def labels(self) -> dict[str, object]:
        """What tells its rows from those of others."""
        return {
            "device": self.device.name,
            "size": self.size,
            "shards": self.shards,
            "memory": self.memory,
        }


@dataclass(frozen=True)
class Cell:
    """One policy for one reader in one setting, beside the default in the same rounds."""

    setting: Setting
    reader: Reader
    policy: str
    engine: str

    @property
    def absent(self) -> str:
        """Why it is not measured; empty: it is."""
        return absent(self.reader, self.setting)


def absent(reader: Reader, setting: Setting) -> str:
    """Say why a reader cannot be measured in a setting; empty: it can."""
    if reader.kind == "ranks" and setting.memory == TIGHT:
        return "its processes start outside of the cgroup"
    return reader.absent


def size_text(size: int) -> str:
    """Format bytes in the units of a disk: "90 MB", "4 GB"."""
    return f"{size / 1e9:.3g} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


NATIVE = tuple(Device(kib) for kib in (128, 512, 4096, 8192))
#: An emulated guest reads as its delay says at a hundredth of a machine's speed.
GUESTS = tuple(
    Device(128, delay, cap * MB)
    for delay, cap in itertools.product((0.2, 1.0, 2.0, 10.0, 20.0, 40.0), (16, 64, 200, 0))
)
_SIZES = (90 * MB, 1000 * MB, 4000 * MB)
_GUEST_SIZE = 64 * MB
#: Readers of the short form, whole and random ones.
_SHORT = ("safe_open", "read 1 MiB", "pread by 8 threads", "mmap by pages")
_SHORT_RANDOM = (
    "random 4 KiB pread",
    "random 128 KiB pread",
    "random 4 KiB mmap",
    "random 4 KiB MADV_RANDOM",
)


def settings(short: bool) -> list[Setting]:
    """Return the settings of the whole matrix, or of the short form."""
    if short:
        return [
            Setting(device, size, shards, memory)
            for device in (NATIVE[0], NATIVE[-1])
            for size, shards, memory in (
                (1000 * MB, 1, AMPLE),
                (90 * MB, 1, AMPLE),
                (1000 * MB, 48, AMPLE),
                (1000 * MB, 1, TIGHT),
                (90 * MB, 48, AMPLE),
            )
        ]
    native = [
        Setting(*choice) for choice in itertools.product(NATIVE, _SIZES, (1, 48), (AMPLE, TIGHT))
    ]
    guests = [
        Setting(*choice)
        for choice in itertools.product(GUESTS, (_GUEST_SIZE,), (1, 4), (AMPLE, TIGHT))
    ]
    return [*native, *guests]


def readers(setting: Setting, short: bool) -> list[Reader]:
    """Return the readers of a setting, those that cannot run here too."""
    if not short:
        return list(READERS)
    names: tuple[str, ...] = _SHORT
    if setting.shards == 1 and setting.size > 500 * MB and setting.memory == AMPLE:
        names += _SHORT_RANDOM
    return [BY_NAME[name] for name in names]


def cells(chosen: Sequence[Setting], short: bool) -> Iterator[Cell]:
    """Yield all cells of some settings."""
    for setting in chosen:
        for reader in readers(setting, short):
            for engine in setting.device.engines:
                for policy in POLICIES:
                    yield Cell(setting, reader, policy, engine)


@dataclass(frozen=True)
class Ratio:
    """A paired ratio: its quartiles over the rounds."""

    low: float
    median: float
    high: float


def paired(base: Sequence[float], ours: Sequence[float]) -> Ratio | None:
    """Compare round by round.

    Args:
        base: of the default, a number a round.
        ours: with the policy, of the same rounds.

    Returns:
        How many times the default's it was; None without a round.  A default of nothing (no byte
        read) is as good as ours of nothing and no ratio otherwise.
    """
    pairs = [
        now / was if was else 1.0 if not now else math.inf
        for was, now in zip(base, ours, strict=False)
    ]
    if not pairs:
        return None
    if len(pairs) == 1:
        return Ratio(pairs[0], pairs[0], pairs[0])
    low, median, high = statistics.quantiles(pairs, n=4, method="inclusive")
    return Ratio(low, median, high)
