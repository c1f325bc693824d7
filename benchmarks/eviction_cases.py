# SPDX-License-Identifier: Apache-2.0
"""The cases of benchmarks.eviction: real files, real cgroups, a policy or the kernel's default.

A case is a function of a Lab and a state (policy or None) that returns what it measured; sizes are
parts of the cgroup's limit, so that the tests run the same with less.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from benchmarks.cachestat import drop, resident_bytes
from benchmarks.cgroups import Group, group
from benchmarks.control import pagecache_bpf
from benchmarks.disks import device_bytes_read
from benchmarks.guest.workers import told_of_workers
from pagecache_bpf.kernel.control_device import Device
from pagecache_bpf.policy import hints, loader
from pagecache_bpf.policy.catalog import discover, find
from pagecache_bpf.simulate.optimum import optimum

MIB = 1 << 20
PAGE = 4096
IDLE_MS = 600  # multiplex takes a model that nobody has read for so long for unused


@dataclass
class Measured:
    """One run of a case: bytes read from the device, bytes that were wanted, seconds.

    numbers: what else the case measures; capacity: page cache bytes that the cgroup held.
    """

    device_bytes: int
    wanted_bytes: int
    seconds: float
    capacity_bytes: int = 0
    numbers: dict[str, float] = field(default_factory=dict)

    @property
    def hit_bytes(self) -> int:
        """Wanted bytes that the device did not have to deliver."""
        return max(0, self.wanted_bytes - self.device_bytes)


@dataclass
class Lab:
    """Where files lie, and the limit of the cgroup that reads them, in bytes."""

    root: Path
    limit: int
    made: dict[str, Path] = field(default_factory=dict)

    def part(self, share: float) -> int:
        """Return so much of the limit, in whole MiB."""
        return max(1, round(self.limit * share / MIB)) * MIB

    def file(self, name: str, size: int) -> Path:
        """Return a file of that size, on the device and out of the cache; made once."""
        path = self.made.setdefault(name, self.root / name)
        if not path.exists() or path.stat().st_size != size:
            path.parent.mkdir(parents=True, exist_ok=True)
            block = random.Random(name).randbytes(MIB)
            with path.open("wb") as out:
                for start in range(0, size, MIB):
                    out.write(block[: min(MIB, size - start)])
        drop([path])
        return path

    def checkpoint(self, name: str, size: int) -> Path:
        """Return a safetensors file of tensors of 1 MiB in their order, out of the cache."""
        path = self.root / name / "model.safetensors"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            header = json.dumps(
                {
                    f"layer.{n:05}": {  # loaders sort names: so that is the file's order
                        "dtype": "U8",
                        "shape": [MIB],
                        "data_offsets": [n * MIB, (n + 1) * MIB],
                    }
                    for n in range(size // MIB)
                }
            ).encode()
            block = random.Random(name).randbytes(MIB)
            with path.open("wb") as out:
                out.write(len(header).to_bytes(8, "little") + header)
                for _ in range(size // MIB):
                    out.write(block)
        drop([path])
        return path

    def tree(self, name: str, size: int, file_bytes: int = 48 << 10) -> list[Path]:
        """Many small files below a directory, out of the cache."""
        root = self.root / name
        files = [root / f"dir{n % 16}" / f"file{n}.c" for n in range(max(1, size // file_bytes))]
        if not root.exists():
            block = b"int main(void) { return 0; }\n" * (file_bytes // 29)
            for path in files:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(block)
        drop(files)
        return files

    @contextmanager
    def cgroup(self, name: str = "pcbbench", limit: int | None = None) -> Iterator[Group]:
        """Yield a fresh cgroup with the limit."""
        with group(name, self.limit if limit is None else limit) as it:
            yield it

    def device_bytes(self) -> int:
        """Read so far from the device below the files."""
        return device_bytes_read(self.root) or 0


@contextmanager
def attached(
    policy: str | None, models: Mapping[str, Sequence[Path]], **knobs: int
) -> Iterator[None]:
    """Have the policy govern these files for the block; None: the kernel alone."""
    if policy is None:
        yield
        return
    info = find(policy)
    if policy == "maio":
        # Its template is derived from the headers by the command.
        (files,) = models.values()
        settings = (f"{k}={v}" for k, v in knobs.items() if k in {n.name for n in info.knobs})
        words = [word for setting in settings for word in ("--knob", setting)]
        pagecache_bpf("attach", "maio", *words, str(files[0].parent))
        try:
            yield
        finally:
            pagecache_bpf("detach", "maio")
        return
    known = {knob.name for knob in info.knobs}
    with ExitStack() as stack:
        loader.attach(info, {k: v for k, v in knobs.items() if k in known})
        stack.callback(loader.detach, info.name)
        device = stack.enter_context(Device())
        for model, files in models.items():
            for path in files:
                with path.open("rb") as file:
                    device.tag(file.fileno(), policy=info.name, model=model, path=str(path))
                stack.callback(_untag, device, path)
        yield


def _untag(device: Device, path: Path) -> None:
    with path.open("rb") as file:
        device.untag_fd(file.fileno())


@contextmanager
def _counted(lab: Lab) -> Iterator[Callable[[], tuple[int, float]]]:
    before, begun = lab.device_bytes(), time.monotonic()
    yield lambda: (lab.device_bytes() - before, time.monotonic() - begun)


def cyclic(lab: Lab, policy: str | None, rounds: int = 5) -> Measured:
    """Scan a file of 1.5 times the memory again and again."""
    size = lab.part(1.5)
    path = lab.file("cyclic.bin", size)
    budget = lab.part(0.965) // MIB - 1
    with (
        attached(policy, {"cyclic": [path]}, budget_mib=budget, window_kib=256),
        lab.cgroup() as it,
        _counted(lab) as count,
    ):
        for _ in range(rounds):
            it.scan([path])
        device, seconds = count()
        held = it.stat("file")
    return Measured(device, rounds * size, seconds, held)


def cyclic_optimum(size: int, capacity: int, rounds: int = 5) -> int:
    """Hit bytes of the optimum for that case."""
    pages = range(size // PAGE)
    return optimum([page for _ in range(rounds) for page in pages], capacity // PAGE).hits * PAGE


def burn(lab: Lab, policy: str | None, limited: bool = True) -> Measured:
    """Load a checkpoint twice the limit beside a neighbor's files of 40% of it."""
    neighbor, path = lab.file("near.bin", lab.part(0.4)), lab.checkpoint("load", lab.part(2.0))
    with (
        attached(policy, {"load": [path]}, drop_behind=1, window_mib=4, budget_mib=8),
        lab.cgroup(limit=None if limited else 8 * lab.limit) as it,
    ):
        it.scan([neighbor])
        before = resident_bytes([neighbor])
        with _counted(lab) as count:
            seconds = it.scan([path])
            device, _ = count()
        share = resident_bytes([neighbor]) / max(before, 1)
    return Measured(device, path.stat().st_size, seconds, numbers={"neighbor_share": share})


#: Uses all of a file through a mapping, from front to back, as `safe_open` and llama.cpp do.
_MAPPED = """
import mmap, sys
with open(sys.argv[1], "rb") as file:
    mapping = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
for start in range(0, len(mapping), 4096):
    mapping[start]
"""
_INTERPRETER = 16 * MIB  # that the loader takes itself


def mapped(lab: Lab, policy: str | None, limited: bool = True, percent: int = 45) -> Measured:
    """A checkpoint is used through a mapping, in a cgroup that has room for a part of it."""
    path = lab.checkpoint("mapped", lab.part(2.0))
    size = path.stat().st_size
    limit = size * percent // 100 + _INTERPRETER if limited else 2 * size + _INTERPRETER
    with (
        attached(policy, {"mapped": [path]}, window_mib=8),
        lab.cgroup(limit=limit) as it,
        _counted(lab) as count,
    ):
        before = workers_s()
        seconds = it.run(sys.executable, "-I", "-S", "-c", _MAPPED, str(path))
        device, _ = count()
        numbers = {**reclaimed(it), "workers_s": workers_s() - before}
    return Measured(device, size, seconds, numbers=numbers | {"read_share": device / size})


def workers_s() -> float:
    """Return the CPU seconds of the module's workers, who read ahead and make room for that."""
    return sum(int(told.split()[0]) for told in told_of_workers("schedstat")) / 1e9


def reclaimed(it: Group) -> dict[str, float]:
    """Return what reclaim had to do in a group of version 2, and its processes' CPU seconds."""
    pages = {
        "scanned_pages": "pgscan",
        "evicted_pages": "pgsteal",
        "activated_pages": "pgactivate",
        "reread_pages": "workingset_refault_file",
    }
    return {
        **{name: float(it.stat(line)) for name, line in pages.items()},
        "faults": float(it.stat("pgfault")),
        "system_s": it.cpu_s("system"),
        "user_s": it.cpu_s("user"),
    }


def pin(lab: Lab, policy: str | None) -> Measured:
    """Weights of 30% of the limit, read, then a scan of twice the limit; the weights again."""
    weights, noise = lab.file("pin.bin", lab.part(0.3)), lab.file("noise.bin", lab.part(2.0))
    with (
        attached(policy, {"pin": [weights]}, budget_mib=lab.part(0.35) // MIB),
        lab.cgroup() as it,
    ):
        it.scan([weights])
        it.scan([noise])
        share = resident_bytes([weights]) / weights.stat().st_size
        numbers = {"resident_share": share}
        if policy:
            values, alarms = hints.gauges(policy)
            numbers |= {name: float(value) for name, value in values.items()}
            numbers["alarms"] = len(alarms)
        with _counted(lab) as count:
            it.scan([weights])
            device, seconds = count()
    return Measured(device, weights.stat().st_size, seconds, numbers=numbers)


def switches(count: int, seed: int = 6) -> str:
    """Zipf-distributed requests for three models."""
    return "".join(random.Random(seed).choices("abc", weights=[6, 3, 2], k=count))


def multiplex(lab: Lab, policy: str | None, requests: str = switches(12)) -> Measured:
    """Three models, together twice the memory, wanted in turn; the queue is the plan."""
    size = lab.part(2 / 3)
    paths = {model: lab.file(f"{model}/{model}.bin", size) for model in "abc"}
    budget = lab.part(0.95) // MIB
    with (
        attached(policy, {m: [p] for m, p in paths.items()}, budget_mib=budget, idle_ms=IDLE_MS),
        lab.cgroup() as it,
        _counted(lab) as count,
    ):
        for at, model in enumerate(requests):
            for other in "abc" if policy is not None else "":
                ahead = (n for n in range(at + 1, len(requests)) if requests[n] == other)
                due = f"+{10 * (next(ahead, 1000) - at)}s"
                hints.hint(str(policy), "plans", model=other, due_ns=due)
            it.scan([paths[model]])
            time.sleep(
                (IDLE_MS + 100) / 1000
            )  # the model is served from memory of its own: not in use here
        device, seconds = count()
        held = it.stat("file")
        numbers: dict[str, float] = {}
        if policy:
            rows = hints.read_map(policy, "scores")
            numbers["score_resident_bytes"] = PAGE * sum(
                row["value"]["resident_pages"] for row in rows
            )
            numbers["really_resident_bytes"] = resident_bytes(paths.values())
    measured = Measured(device, len(requests) * size, seconds, held, numbers)
    numbers["reread_bytes"] = device - size * len(set(requests))
    return measured


def multiplex_optimum(size: int, capacity: int, requests: str = switches(12)) -> int:
    """Reread bytes of the optimum for that case."""
    pages = size // PAGE
    order = ["abc".index(model) * pages + page for model in requests for page in range(pages)]
    misses = len(order) - optimum(order, capacity // PAGE).hits
    return (misses - pages * len(set(requests))) * PAGE


def kvcache(lab: Lab, policy: str | None) -> Measured:
    """Weights of half the limit that no policy governs, beside KV files of twice the limit."""
    weights, kv = lab.file("kvw.bin", lab.part(0.5)), lab.file("kv.bin", lab.part(2.0))
    with (
        attached(policy, {"kv": [kv]}, budget_mib=max(1, lab.part(0.1) // MIB)),
        lab.cgroup() as it,
    ):
        it.scan([weights])
        it.scan([kv])
        share = resident_bytes([weights]) / weights.stat().st_size
        with _counted(lab) as count:
            it.scan([weights])
            device, seconds = count()
    return Measured(device, weights.stat().st_size, seconds, numbers={"resident_share": share})


def colocate(lab: Lab, policy: str | None) -> Measured:
    """Online weights of 40%, an offline scan of twice the limit in a cgroup beside, one parent."""
    weights, data = lab.file("online.bin", lab.part(0.4)), lab.file("offline.bin", lab.part(2.0))
    with (
        attached(policy, {"on": [weights], "off": [data]}, budget_mib=lab.part(0.5) // MIB),
        lab.cgroup() as parent,
        group("online", parent=parent.path) as online,
        group("offline", parent=parent.path) as offline,
    ):
        if policy:
            hints.hint(policy, "roles", cgroup_id=str(online.path), value=1)
            hints.hint(policy, "roles", cgroup_id=str(offline.path), value=2)
        online.scan([weights])
        offline.scan([data])
        share = resident_bytes([weights]) / weights.stat().st_size
        with _counted(lab) as count:
            online.scan([weights])
            device, seconds = count()
    return Measured(device, weights.stat().st_size, seconds, numbers={"resident_share": share})


def search(lab: Lab, policy: str | None, rounds: int = 10) -> Measured:
    """Search a source tree of 1.4 times the limit again and again."""
    files = lab.tree("src", lab.part(1.4))
    size = sum(path.stat().st_size for path in files)
    with (
        attached(policy, {"src": files}, skip_kib=256, recent_mib=4),
        lab.cgroup() as it,
        _counted(lab) as count,
    ):
        for _ in range(rounds):
            it.search(lab.root / "src")
        device, seconds = count()
        held = it.stat("file")
    return Measured(device, rounds * size, seconds, held)


def burner() -> str:
    """Return the policy for burn after reading: maio, or another one that drops behind."""
    return "maio" if any(info.name == "maio" for info in discover()) else "kvcache"


#: Case and the policy that it is for.
CASES: dict[str, tuple[Callable[..., Measured], str]] = {
    "burn": (burn, burner()),
    "cyclic": (cyclic, "cyclic"),
    "pin": (pin, "pin"),
    "multiplex": (multiplex, "multiplex"),
    "kvcache": (kvcache, "kvcache"),
    "colocate": (colocate, "colocate"),
    "search": (search, "mru"),
    "mapped45": (partial(mapped, percent=45), "maio"),
    "mapped30": (partial(mapped, percent=30), "maio"),
}
#: Of these the seconds without a limit stand beside, too.
BESIDE_UNLIMITED = ("burn", "mapped45", "mapped30")
