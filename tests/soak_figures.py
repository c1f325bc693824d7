# SPDX-License-Identifier: Apache-2.0
"""What the soak samples, and the rules by which a figure has grown."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pagecache_bpf.kernel import libbpf
from tests.native.controller import children_of

#: Fewer samples than these tell nothing about growth.
FEWEST_SAMPLES = 4


@dataclass(frozen=True)
class Rule:
    """By how much the lowest sample of the last quarter may be above the highest of the first.

    A figure that goes up and down with what was done last does not grow by that; one of which a
    little is lost each time does.

    Attributes:
        slack: so much, in the unit of the figure.
        share: and so much of the first quarter's highest sample.
        why: what makes it differ where nothing is lost.
        ends: that the last sample is to be at most the slack, too.
    """

    slack: float = 0.0
    share: float = 0.0
    why: str = "what was made has to be gone"
    ends: bool = False


_NOTHING = Rule()
_GONE = Rule(ends=True)
_MEMORY = Rule(
    2 << 20, 0.04, "the allocators of Python and libc keep what they once needed, within bounds"
)
#: By the end of a figure's name; the first that fits holds.  A figure without a rule is shown only.
RULES: dict[str, Rule] = {
    "anonymous bytes": _MEMORY,
    "proportional bytes": _MEMORY,
    "descriptors": _NOTHING,
    "threads": Rule(2, why="threads of the pools are started when there is work, up to a bound"),
    "processes": _NOTHING,
    "maps": _NOTHING,
    "programs": _NOTHING,
    "links": _NOTHING,
    "maps of nobody": Rule(2, why="other users of the machine come and go between two looks"),
    "programs of nobody": Rule(2, why="other users of the machine come and go between two looks"),
    "files": Rule(3, why="files of each kind come at its first use, and are few"),
    "log bytes": Rule(
        64 << 10, why="a log grows by what happens, which is bounded by its rotation"
    ),
    "leftover processes": _GONE,
    "leftover cgroups": _GONE,
    "slab mem_cgroup": Rule(64, 0.5, "the slab counts whole pages of objects, of all users"),
}


def rule_of(name: str) -> Rule | None:
    """Return the rule of a figure, by the end of its name; None: it is shown only."""
    fitting = [end for end in RULES if name == end or name.endswith(f" {end}")]
    return RULES[max(fitting, key=len)] if fitting else None


@dataclass(frozen=True)
class Verdict:
    """A figure over the whole run.

    Attributes:
        name: the figure's.
        first: median of the first quarter's samples.
        last: median of the last quarter's.
        most: the highest sample.
        grew: the rule that it breaks; empty if it breaks none.
    """

    name: str
    first: float
    last: float
    most: float
    grew: str = ""


def judge(samples: Sequence[Mapping[str, float]]) -> list[Verdict]:
    """Compare the first quarter of a run with the last, figure by figure.

    Args:
        samples: figures by their names, in the order of time; all have the same names.

    Returns:
        A verdict a figure, in the order of the first sample.
    """
    quarter = max(1, len(samples) // 4)
    verdicts = []
    for name in samples[0] if samples else ():
        values = [sample[name] for sample in samples]
        begin, end = values[:quarter], values[-quarter:]
        rule = rule_of(name)
        grew = ""
        if rule is not None and len(samples) >= FEWEST_SAMPLES:
            bound = max(begin) * (1 + rule.share) + rule.slack
            if min(end) > bound or (rule.ends and values[-1] > rule.slack):
                grew = f"above {_number(bound)}: {rule.why}"
        first, last = statistics.median(begin), statistics.median(end)
        verdicts.append(Verdict(name, first, last, max(values), grew))
    return verdicts


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:,.1f}"


def table(verdicts: Sequence[Verdict]) -> str:
    """Return the verdicts as a table of text."""
    width = max((len(verdict.name) for verdict in verdicts), default=0)
    lines = [f"{'':{width}} {'first quarter':>15} {'last quarter':>15} {'most':>15}"]
    for verdict in verdicts:
        values = "".join(f" {_number(v):>15}" for v in (verdict.first, verdict.last, verdict.most))
        grew = f"  GREW {verdict.grew}" if verdict.grew else ""
        lines.append(f"{verdict.name:{width}}{values}{grew}")
    return "\n".join(lines)


# --- what is sampled ---


def tree(pid: int) -> list[int]:
    """Return a process and those below it."""
    found = [pid]
    for child in children_of(pid):
        found += tree(child)
    return found


def of_processes(name: str, pid: int) -> dict[str, float]:
    """Sample a process that lasts, and the processes below it.

    Args:
        name: how it is called, in front of the figures.
        pid: the process.

    Returns:
        Memory in bytes and counts, by name.
    """
    below = tree(pid)
    status = Path(f"/proc/{pid}/status").read_text()
    held = {number: held_by(number) for number in below}
    return {
        f"{name} anonymous bytes": _kilobytes(status, "RssAnon:"),
        f"{name} proportional bytes": sum(map(_proportional, below)),
        f"{name} descriptors": len(os.listdir(f"/proc/{pid}/fd")),
        f"{name} threads": len(os.listdir(f"/proc/{pid}/task")),
        f"{name} processes": len(below),
        f"{name} maps": sum(len(kinds["map_id"]) for kinds in held.values()),
        f"{name} programs": sum(len(kinds["prog_id"]) for kinds in held.values()),
        f"{name} links": sum(len(kinds["link_id"]) for kinds in held.values()),
    }


def _kilobytes(text: str, word: str) -> float:
    for line in text.splitlines():
        if line.startswith(word):
            return int(line.split()[1]) << 10
    return 0.0


def _proportional(pid: int) -> float:
    with suppress(OSError):  # it has ended since
        return _kilobytes(Path(f"/proc/{pid}/smaps_rollup").read_text(), "Pss:")
    return 0.0


def held_by(pid: int) -> dict[str, set[int]]:
    """Return the numbers of the BPF objects that a process holds, by what fdinfo calls them."""
    found: dict[str, set[int]] = {"map_id": set(), "prog_id": set(), "link_id": set()}
    with suppress(OSError):
        for entry in os.scandir(f"/proc/{pid}/fd"):
            with suppress(OSError):
                target = os.readlink(entry.path)
                if "bpf" not in target:
                    continue
                for line in Path(f"/proc/{pid}/fdinfo/{entry.name}").read_text().splitlines():
                    name, _, value = line.partition(":\t")
                    # A link's fdinfo names its program, which is not a descriptor of its own.
                    if name in found and ("link" in target) == (name == "link_id"):
                        found[name].add(int(value))
    return found


def of_nobody() -> dict[str, float]:
    """Count the maps and programs of this kernel that no process has a descriptor of."""
    kernel = {"map_id": set(numbers("map")), "prog_id": set(numbers("prog"))}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            held = held_by(int(entry.name))
            for kind, known in kernel.items():
                known -= held[kind]
    return {
        "maps of nobody": len(kernel["map_id"]),
        "programs of nobody": len(kernel["prog_id"]),
    }


def numbers(kind: str) -> Iterator[int]:
    """Yield the number of every BPF object of a kind (map, prog) in this kernel."""
    import ctypes

    following = getattr(libbpf.library(), f"bpf_{kind}_get_next_id")
    number = ctypes.c_uint32(0)
    while following(number, ctypes.byref(number)) == 0:
        yield number.value


def of_directory(name: str, directory: Path) -> dict[str, float]:
    """Count the files of a run directory, and the bytes of its logs."""
    files = [path for path in directory.rglob("*") if not path.is_dir()]
    logs = sum(path.stat().st_size for path in files if path.suffix == ".log")
    return {f"{name} files": len(files), f"{name} log bytes": logs}


def of_kernel() -> dict[str, float]:
    """Count what the kernel keeps of memory cgroups, dying ones included."""
    found: dict[str, float] = {}
    with suppress(OSError):
        for line in Path("/proc/slabinfo").read_text().splitlines():
            if line.startswith("mem_cgroup "):
                found["slab mem_cgroup"] = int(line.split()[1])
    return found
