# SPDX-License-Identifier: Apache-2.0
"""A thousand hostile clients beside one honest load of another user: what do they cost it?

    python -m benchmarks.hostile_clients --clients 1000 --seconds 60

Needs root; starts a controller of its own (engine agent) and takes quiet and hostile rounds in
turns.  In each the same model is loaded cold, again and again, by an honest user: through the
controller, as `pc.load()` does.  In the hostile ones, users of other numbers connect, and each of
their clients does one of ACTS after the other.  What is told: the time of the load against the
quiet one beside it, the time to its first prefetched page, how long root's requests took, what the
controller's process needed before, at most and afterwards, and what is left behind.  The first
load of a fresh controller is told, too.

The crowd takes time of the CPUs by itself, whatever the controller does: with --confine it only
gets what nobody else wants, so that what is left is the controller's part.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import struct
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks import memory
from benchmarks.cachestat import drop
from benchmarks.hostile_acts import attacked, confined, idle_loops
from pagecache_bpf.errors import PagecacheError
from pagecache_bpf.ipc.public_client import PublicClient
from pagecache_bpf.kernel.cachestat import cachestat
from tests.native.controller import Controller, as_user, children_of, serving
from tests.native.readahead import usual_readahead

HONEST = 65533
SHARDS = 4
#: Behind what the kernel reads ahead by itself when the first page is read.
FAR_BYTES = 8 << 20
LEFT_SECONDS = 60.0
CROWD_SECONDS = 60.0
CONFIG = '[loads]\nengine = "agent"\npolicies = ["maio"]\n'
_READ_BYTES = 4 << 20


def make_model(root: Path, size: int) -> list[Path]:
    """Write shards of random bytes with real headers.

    Args:
        root: the directory.
        size: bytes of all shards together.

    Returns:
        The shards, in the order in which they are read.
    """
    paths = []
    tensor = 4 << 20
    block = os.urandom(tensor)
    for shard in range(SHARDS):
        count = max(4, size // SHARDS // tensor)
        header = json.dumps(
            {
                f"model.layers.{shard * count + number}.weight": {
                    "dtype": "U8",
                    "shape": [tensor],
                    "data_offsets": [number * tensor, (number + 1) * tensor],
                }
                for number in range(count)
            }
        ).encode()
        path = root / f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
        with path.open("wb") as out:
            out.write(struct.pack("<Q", len(header)) + header)
            for _ in range(count):
                out.write(block)
            out.flush()
            os.fsync(out.fileno())
        os.chown(path, HONEST, HONEST)  # who may ask what of it is cached
        paths.append(path)
    return paths


# --- the honest user ---


def honest_load(path: Path, files: list[Path]) -> dict[str, float]:
    """Load a model through the controller.

    Args:
        path: the controller's socket.
        files: the cold shards.

    Returns:
        Seconds: until the load was open, until the first prefetched page after the request, and
        until the last byte was read.
    """
    begun = time.perf_counter()
    fds = [os.open(file, os.O_RDONLY) for file in files]
    buffer = bytearray(_READ_BYTES)
    with PublicClient(path) as client:
        report = client.open_load(fds, model="honest")
        times = {"open": time.perf_counter() - begun}
        if report["policy"] is None:
            raise PagecacheError("the honest load is not served", str(report["why"]))
        os.pread(fds[0], 4096, 0)
        while not cachestat(fds[0], FAR_BYTES, 4 << 20).cached:
            if time.perf_counter() > begun + 10:
                raise PagecacheError("nothing was prefetched", "for 10 s after the request")
        times["first prefetched page"] = time.perf_counter() - begun
        for fd in fds:
            while os.readv(fd, [buffer]):
                pass
        times["loaded"] = time.perf_counter() - begun
        client.done(report["load"])
    for fd in fds:
        os.close(fd)
    return times


# --- what is looked at ---


def needs(pid: int) -> dict[str, int]:
    """Return what a process needs now: memory, threads, descriptors, and its children."""
    status = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    children = children_of(pid)
    memory = 0
    for child in children:
        with suppress(OSError, StopIteration):
            lines = Path(f"/proc/{child}/smaps_rollup").read_text().splitlines()
            memory += int(next(line for line in lines if line.startswith("Pss:")).split()[1])
    return {
        "rss_kib": int(status["VmRSS"].split()[0]),
        "threads": int(status["Threads"]),
        "descriptors": len(os.listdir(f"/proc/{pid}/fd")),
        "children": len(children),
        "children_pss_kib": memory,
    }


def cpu_seconds(pid: int) -> dict[str, float]:
    """Return the CPU time of a process and of its children, by what they are.

    Args:
        pid: the process.

    Returns:
        Seconds: its own; of its children by their names; of those that have ended. 0 where it has.
    """

    def times(number: int) -> list[float]:
        with suppress(OSError):
            words = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
            return [int(word) / os.sysconf("SC_CLK_TCK") for word in words[11:15]]
        return [0.0] * 4

    own = times(pid)
    found = {"": sum(own[:2]), "ended": sum(own[2:])}
    children: list[int] = []
    with suppress(OSError):
        children = children_of(pid)
    for child in children:
        with suppress(OSError):
            name = Path(f"/proc/{child}/comm").read_text().strip()
            found[name] = found.get(name, 0.0) + sum(times(child))
    return found


class Observer:
    """Asks as root, and looks at the controller's process, every now and then in a thread."""

    def __init__(self, controller: Controller, crowd: list[int]) -> None:
        self.cpu: dict[str, float] = {}
        self.latencies: list[float] = []
        self.failures: list[str] = []
        self.peak: dict[str, int] = {}
        self._controller = controller
        self._crowd = crowd
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._ask, daemon=True),
            threading.Thread(target=self._look, daemon=True),
        ]

    def __enter__(self) -> Observer:
        self._begun = time.monotonic()
        self._before = self._times()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        seconds = time.monotonic() - self._begun
        for name, value in self._times().items():
            self.cpu[name] = (value - self._before[name]) / seconds

    def _times(self) -> dict[str, float]:
        """Return CPU seconds so far of those who take part."""
        controller = cpu_seconds(self._controller.process.pid)
        found = {
            "controller": controller.pop(""),
            "workers": controller.pop("pagecache-read", 0.0),
            "inspectors and what has ended": sum(controller.values()),
            "crowd": sum(sum(cpu_seconds(pid).values()) for pid in self._crowd),
        }
        user, nice, system, _idle, _waiting, *rest = map(
            int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        )
        busy = (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")
        return {**found, "the load and all else": busy - sum(found.values())}

    def _ask(self) -> None:
        while not self._stop.wait(0.1):
            begun = time.perf_counter()
            try:
                with self._controller.root() as root:
                    root.policies()
                    root.request("controller")
                    root.request("clients")
            except PagecacheError as error:
                self.failures.append(str(error))
            self.latencies.append(time.perf_counter() - begun)

    def _look(self) -> None:
        while not self._stop.wait(0.25):
            with suppress(OSError):
                for name, value in needs(self._controller.process.pid).items():
                    self.peak[name] = max(value, self.peak.get(name, 0))


def left_behind(controller: Controller, before: dict[str, int]) -> dict[str, int]:
    """Wait for what the attackers leave to go, and return what stays after a minute."""
    until = time.monotonic() + LEFT_SECONDS
    while True:
        with controller.root() as root, controller.client() as client:
            asked = root.request("clients")
            health = asked["health"]
            found = {
                "connections": sum(client["socket"] == "public" for client in asked["clients"]) - 1,
                "loads": len(client.status()["loads"]),
                "tags": len(list(root.tags())),
                "requests": health["requests_waiting"] + health["requests_running"] - 1,
                "prefetch bytes": health["prefetch_bytes"],
                "inspectors": health["inspectors"] - 1,
            }
        now = needs(controller.process.pid)
        for name in ("threads", "descriptors", "children"):
            found[name] = max(0, now[name] - before[name])
        if not any(found.values()) or time.monotonic() > until:
            return {name: value for name, value in found.items() if value}
        time.sleep(0.5)


def progress(text: str) -> None:
    """Tell how far it is."""
    print(text, file=sys.stderr, flush=True)


def loads(
    controller: Controller, files: list[Path], seconds: float, least: int
) -> list[dict[str, float]]:
    """Load the model cold, again and again for so long, and at least so often."""
    found: list[dict[str, float]] = []
    until = time.monotonic() + seconds
    while time.monotonic() < until or len(found) < least:
        drop(files)
        memory.touch()
        found.append(as_user(HONEST, lambda: honest_load(controller.socket, files)))
    return found


def health(controller: Controller) -> dict[str, Any]:
    """Return what the controller has to do, as it tells root."""
    with controller.root() as root:
        return dict(root.request("clients")["health"])


def arrivals(health: dict[str, Any]) -> int:
    """Return how many connections were taken or refused so far."""
    return int(health["accepted"]) + int(sum(health["refused"].values()))


def wait_for_crowd(controller: Controller, before: dict[str, Any], clients: int) -> None:
    """Wait until so many connections have been taken or refused since then."""
    until = time.monotonic() + CROWD_SECONDS
    while True:
        now = health(controller)
        come = arrivals(now) - arrivals(before)
        if come >= clients:
            progress(f"{come} connections have come, {now['connections']} are open")
            return
        if time.monotonic() > until:
            raise PagecacheError("the crowd has not come", f"{come} of {clients} have connected")
        time.sleep(0.1)


def first_loads(scratch: Path, files: list[Path], starts: int) -> list[dict[str, float]]:
    """Load the model cold as the first of a fresh controller, so many times."""
    found = []
    for start in range(starts):
        with serving(scratch / f"first-{start}", CONFIG) as controller:
            controller.await_warm()
            found += loads(controller, files, 0, 1)
    return found


def mean(found: list[dict[str, float]]) -> dict[str, float]:
    """Return the means of figures that were taken several times."""
    return {name: statistics.mean(times[name] for times in found) for name in found[0]}


def measure(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Take all rounds."""
    files = make_model(scratch, options.size << 20)
    quiet: list[dict[str, float]] = []
    hostile: list[dict[str, float]] = []
    latencies: list[float] = []
    failures: list[str] = []
    peak: dict[str, int] = {}
    cpu: list[dict[str, float]] = []
    quiet_cpu: list[dict[str, float]] = []
    loops: list[dict[str, float]] = []
    first = first_loads(scratch, files, options.starts)
    with confined(options.confine) as group, serving(scratch / "run", CONFIG) as controller:
        loads(controller, files, 0, 2)  # the policy is attached, and all is imported
        before = needs(controller.process.pid)
        for _ in range(options.rounds):
            with Observer(controller, []) as observer:
                quiet += loads(controller, files, 0, 5)
            quiet_cpu.append(observer.cpu)
            progress(f"{len(quiet)} quiet loads, the last in {quiet[-1]['loaded']:.2f} s")
            with idle_loops(os.cpu_count() or 1):
                loops += loads(controller, files, 0, 5)
            earlier = health(controller)
            crowd = (options.clients, options.users, options.pause, group)
            with (
                attacked(controller.socket, scratch, *crowd) as pids,
                Observer(controller, pids) as observer,
            ):
                wait_for_crowd(controller, earlier, options.clients)
                hostile += loads(controller, files, options.seconds / options.rounds, 5)
            progress(f"{len(hostile)} beside them, the last in {hostile[-1]['loaded']:.2f} s")
            worst = max(observer.latencies, default=0)
            progress(f"root: {len(observer.latencies)} requests, worst {worst:.2f} s")
            progress(f"peak: {observer.peak}")
            cpu.append(observer.cpu)
            latencies += observer.latencies
            failures += observer.failures
            for name, value in observer.peak.items():
                peak[name] = max(value, peak.get(name, 0))
            left = left_behind(controller, before)
        told = health(controller)
        after = needs(controller.process.pid)
    return {
        "quiet": quiet,
        "loops": loops,
        "hostile": hostile,
        "cpu": mean(cpu),
        "quiet_cpu": mean(quiet_cpu),
        "root_seconds": latencies,
        "root_failures": failures,
        "before": before,
        "peak": peak,
        "after": after,
        "left": left,
        "health": told,
        "first": first,
    }


def show(found: dict[str, Any]) -> None:
    """Print the figures."""
    print(
        f"{'honest load, ms':<24}{'quiet':>10}{'loops':>10}{'hostile':>10}{'worst':>10}"
        f"{'ratio':>8}{'to loops':>10}"
    )
    for name in found["quiet"][0]:
        quiet, loops, hostile = (
            [1000 * times[name] for times in found[which]]
            for which in ("quiet", "loops", "hostile")
        )
        medians = [statistics.median(values) for values in (quiet, loops, hostile)]
        print(
            f"{name:<24}{medians[0]:>10.1f}{medians[1]:>10.1f}{medians[2]:>10.1f}"
            f"{max(hostile):>10.1f}{medians[2] / medians[0]:>8.2f}{medians[2] / medians[1]:>10.2f}"
        )
    for name in ("open", "first prefetched page") if found["first"] else ():
        values = sorted(1000 * times[name] for times in found["first"])
        middle = statistics.median(values)
        print(f"{f'{name}, first load of a controller':<44}{middle:>10.1f}{values[-1]:>10.1f}")
    print(f"loads: {len(found['quiet'])} quiet, {len(found['hostile'])} beside hostile clients")
    for which, name in (("quiet", "quiet_cpu"), ("hostile", "cpu")):
        taken = ", ".join(f"{who} {share:.2f}" for who, share in found[name].items())
        print(f"CPUs taken, {which}: {taken}")
    latencies = found["root_seconds"]
    print(
        f"root's requests: {len(latencies)}, median {1000 * statistics.median(latencies):.0f} ms, "
        f"worst {1000 * max(latencies):.0f} ms, failed {len(found['root_failures'])}"
    )
    print(f"{'the controller':<24}{'before':>10}{'peak':>10}{'after':>10}")
    for name, value in found["before"].items():
        print(f"{name:<24}{value:>10}{found['peak'][name]:>10}{found['after'][name]:>10}")
    health = found["health"]
    print(f"connections taken: {health['accepted']}, refused: {health['refused']}")
    print(f"inspectors started: {health['inspectors_started']}, lost: {health['inspectors_lost']}")
    print(f"left behind: {found['left'] or 'nothing'}")


def main() -> int:
    """Measure and show."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.hostile_clients",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--clients", type=int, default=1000, help="hostile ones (default: 1000)")
    parser.add_argument("--users", type=int, default=8, help="that they belong to (default: 8)")
    parser.add_argument("--pause", type=float, default=1.0, help="seconds between acts of a client")
    parser.add_argument("--seconds", type=float, default=60.0, help="of attack (default: 60)")
    parser.add_argument("--rounds", type=int, default=3, help="quiet and hostile (default: 3)")
    parser.add_argument("--starts", type=int, default=3, help="of fresh controllers (default: 3)")
    parser.add_argument("--confine", action="store_true", help="the crowd gets idle CPUs only")
    parser.add_argument("--size", type=int, default=1024, help="of the model, MiB (default: 1024)")
    parser.add_argument("--json", action="store_true", help="every figure")
    options = parser.parse_args()
    if os.geteuid():
        parser.error("it takes root")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the controller is ended, too
    with tempfile.TemporaryDirectory(prefix="hostile-clients-", dir="/var/tmp") as name:
        os.chmod(name, 0o755)
        # Where the kernel's own window is large, a policy leaves the readers to it.
        with usual_readahead(Path(name)), memory.backed((options.size << 20) * 5 // 4):
            found = measure(options, Path(name))
    if options.json:
        print(json.dumps(found))
    else:
        show(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
