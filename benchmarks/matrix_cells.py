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

from benchmarks import engines

MB = 1_000_000
#: At most so many times the default's seconds and bytes of the device.
TIME_LIMIT, BYTES_LIMIT = 1.02, 1.05
POLICIES = ("sequential", "maio")
#: What the readers of a setting load: tensors of no architecture, or what an engine can start on.
GENERATED = "generated"
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

    kind: "whole" (front to back), "ranks" (slices of tensors), "random" or "engine" (in its own
    order, and it answers).  needs: a program, or of an engine the Python module, without which it
    is not installed.  model: what it loads, see Setting.
    """

    name: str
    kind: str
    needs: str = ""
    model: str = GENERATED

    @property
    def absent(self) -> str:
        """Why it cannot run here; empty: it can."""
        if not self.needs:
            return ""
        if self.kind == "engine":
            made = _has_module(self.needs)
            return "" if made else "not installed: make build/venv-loaders/.engines"
        return "" if shutil.which(self.needs) else "not installed"


@cache
def _has_module(name: str) -> bool:
    """Tell whether the environment of the engines has a module; it is not imported."""
    if not engines.PYTHON.exists():
        return False
    code = f"import sys, importlib.util as util; sys.exit(util.find_spec({name!r}) is None)"
    return subprocess.run([engines.PYTHON, "-c", code], capture_output=True).returncode == 0


READERS = (
    Reader("safe_open", "whole"),
    Reader("read 1 MiB", "whole"),
    Reader("read 16 MiB", "whole"),
    Reader("pread by 8 threads", "whole"),
    Reader("mmap by pages", "whole"),
    Reader("cp", "whole", "cp"),
    Reader("io_uring, buffered (fio)", "whole", "fio"),
    Reader("transformers", "engine", "transformers", engines.LLAMA),
    Reader("vLLM", "engine", "vllm", engines.LLAMA),
    Reader("llama.cpp", "engine", "xllamacpp", engines.GGUF),
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
    so much of the model beside what the reader itself allocates.  model: GENERATED, engines.LLAMA
    or engines.GGUF, of which size and shards are about so many.
    """

    device: Device
    size: int
    shards: int
    memory: str = AMPLE
    model: str = GENERATED

    @property
    def name(self) -> str:
        """In a few words."""
        files = f"{self.shards} shards" if self.shards > 1 else "1 file"
        kind = "" if self.model == GENERATED else f" {self.model}"
        return f"{self.device.name}, {size_text(self.size)}{kind} in {files}, {self.memory}"

    @property
    def labels(self) -> dict[str, object]:
        """What tells its rows from those of others."""
        return {
            "device": self.device.name,
            "size": self.size,
            "shards": self.shards,
            "memory": self.memory,
            **({} if self.model == GENERATED else {"model": self.model}),
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
#: Of the engines' models: bytes, about, and files.
_ENGINE_MODELS = ((1200 * MB, 9, engines.LLAMA), (1200 * MB, 1, engines.GGUF))
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
        devices = (NATIVE[0], NATIVE[-1])
        choices = (
            (1000 * MB, 1, AMPLE),
            (90 * MB, 1, AMPLE),
            (1000 * MB, 48, AMPLE),
            (1000 * MB, 1, TIGHT),
            (90 * MB, 48, AMPLE),
        )
        made = [Setting(device, *choice) for device in devices for choice in choices]
        return [*made, *_engine_settings(devices, (AMPLE,))]
    native = [
        Setting(*choice) for choice in itertools.product(NATIVE, _SIZES, (1, 48), (AMPLE, TIGHT))
    ]
    guests = [
        Setting(*choice)
        for choice in itertools.product(GUESTS, (_GUEST_SIZE,), (1, 4), (AMPLE, TIGHT))
    ]
    return [*native, *_engine_settings(NATIVE, (AMPLE, TIGHT)), *guests]


def _engine_settings(devices: Sequence[Device], memories: Sequence[str]) -> list[Setting]:
    """Return the settings of the engines: their environment is not in the guest."""
    return [
        Setting(device, size, shards, memory, model)
        for device in devices
        for memory in memories
        for size, shards, model in _ENGINE_MODELS
    ]


def readers(setting: Setting, short: bool, only: Sequence[str] = ()) -> list[Reader]:
    """Return the readers of a setting, those that cannot run here too.

    Args:
        setting: what is loaded from where.
        short: leave out what the short form has not.
        only: the names of some readers, whichever form they are of; empty: all.

    Returns:
        Those that load the setting's model.
    """
    if only:
        wanted = [BY_NAME[name] for name in only]
        return [reader for reader in wanted if reader.model == setting.model]
    if not short or setting.model != GENERATED:
        return [reader for reader in READERS if reader.model == setting.model]
    names: tuple[str, ...] = _SHORT
    if setting.shards == 1 and setting.size > 500 * MB and setting.memory == AMPLE:
        names += _SHORT_RANDOM
    return [BY_NAME[name] for name in names]


def cells(chosen: Sequence[Setting], short: bool, only: Sequence[str] = ()) -> Iterator[Cell]:
    """Yield all cells of some settings; see readers()."""
    for setting in chosen:
        for reader in readers(setting, short, only):
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
