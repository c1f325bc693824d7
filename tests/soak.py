# SPDX-License-Identifier: Apache-2.0
"""Hours of ordinary and of bad days, and what grows meanwhile: `python -m tests.soak`, as root.

Three places run side by side, each with a run directory of its own: an agent that is never ended,
a controller (`serve`) that is never ended, and a place where agents, controllers, commands and
workers are killed.  Rounds in random order attach, tag, untag and detach, load through load() as
root and as nobody, replace, cut and delete weight files, and read in memory cgroups that come and
go; readers are killed half-way.  Every byte that a reader gets is compared with what was written.

Each minute everything that lasts only for a round is taken back, and memory, descriptors, threads,
BPF objects, files and processes are counted.  At the end the medians of the first and of the last
quarter are compared: the exit code is 1 where one has grown (tests/soak_figures.py has the rules),
where a byte was wrong, or where a command said what it should not.

The run has a mount namespace, with a file system of its own in an image below build/ (128 KiB of
readahead, as most machines have) and an empty /run: it meets neither the machine's own policies nor
tests that run at the same time.  Engine agent only.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests import soak_figures
from tests.soak_kinds import Steady, Wild
from tests.soak_places import Place, Surprise
from tests.unit.command import ROOT

SAMPLE_SECONDS = 60.0
IMAGE_MEBIBYTES = 2048
_INSIDE = "PAGECACHE_BPF_SOAK_INSIDE"


@contextmanager
def file_system(image: Path, at: Path) -> Iterator[None]:
    """Mount a new file system in an image; its end fails where somebody still holds a file."""
    with image.open("wb") as file:
        file.truncate(IMAGE_MEBIBYTES << 20)
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
    loop = subprocess.run(
        ["losetup", "--find", "--show", "--direct-io=on", str(image)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    try:
        (Path("/sys/block") / Path(loop).name / "queue" / "read_ahead_kb").write_text("128")
        at.mkdir()
        subprocess.run(["mount", loop, str(at)], check=True)
        try:
            yield
        finally:
            done = subprocess.run(["umount", str(at)], capture_output=True, text=True)
            if done.returncode:
                subprocess.run(["umount", "--lazy", str(at)], check=True)
                raise Surprise(f"the file system is held: {done.stderr.strip()}")
    finally:
        subprocess.run(["losetup", "--detach", loop], check=True)


class Soak:
    """The places, the samples that were taken, and what went wrong.

    Args:
        directory: where weights are.
        chance: what comes next.
    """

    def __init__(self, directory: Path, chance: random.Random) -> None:
        self.places: list[Place] = [
            Steady("agent", directory, chance, serve=False),
            Steady("controller", directory, chance, serve=True),
            Wild("wild", directory, chance),
        ]
        self.chance = chance
        self.samples: list[dict[str, float]] = []
        self.surprises: list[str] = []
        self.rounds = 0

    @property
    def is_warm(self) -> bool:
        """Whether every kind of round has been done once."""
        return all(place.bags > 1 for place in self.places)

    def surprise(self, place: str, text: str) -> None:
        """Write down what should not have been."""
        self.surprises.append(f"{place}: {text}")
        say(f"SURPRISE {place}: {text}")

    def one_round(self) -> None:
        """Do one thing at one place."""
        place = self.places[self.rounds % len(self.places)]
        self.rounds += 1
        try:
            place.one_round()
        except Surprise as error:
            self.surprise(place.name, str(error))
            place.start_over()

    def sample(self) -> dict[str, float]:
        """Take back what lasts for a round only, and count what is there."""
        found: dict[str, float] = {}
        for place in self.places:
            try:
                place.settle()
            except Surprise as error:
                self.surprise(place.name, str(error))
                place.start_over()
        for place in self.places:
            found.update(place.figures())
        found.update(soak_figures.of_nobody())
        found.update(soak_figures.of_kernel())
        self.samples.append(found)
        return found


def say(text: str) -> None:
    """Print a line with the time."""
    print(time.strftime("%H:%M:%S"), text, flush=True)


def report(soak: Soak) -> int:
    """Print the figures and what went wrong; return the exit code."""
    verdicts = soak_figures.judge(soak.samples)
    print(soak_figures.table(verdicts))
    grown = [verdict.name for verdict in verdicts if verdict.grew]
    right = sum(place.right_bytes for place in soak.places)
    done: dict[str, int] = {}
    for place in soak.places:
        for what, times in place.done.items():
            done[what] = done.get(what, 0) + times
    wrong = sum("wrong bytes" in text for text in soak.surprises)
    print(
        f"{soak.rounds} rounds, {len(soak.samples)} samples, {right:,} bytes compared and right, "
        f"{wrong} readers with wrong ones"
    )
    print(", ".join(f"{what} {times}" for what, times in sorted(done.items())))
    slowest = max(place.slowest_rmdir for place in soak.places)
    print(f"a cgroup could be removed at most {slowest:.2f} s after its last reader had ended")
    for text in soak.surprises:
        print(f"SURPRISE {text}")
    if grown:
        print(f"grew: {', '.join(grown)}")
    return 1 if grown or soak.surprises else 0


def run(args: argparse.Namespace) -> int:
    """Run inside the namespace; return the exit code."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=755", "soak", "/run"], check=True)
    os.nice(args.nice)
    say(f"seed {args.seed}, {args.minutes:g} minutes")
    with ExitStack() as stack:
        # Not in /tmp: that may be a tmpfs, which has no pages to read ahead.
        directory = Path(
            stack.enter_context(tempfile.TemporaryDirectory(dir=ROOT / "build", prefix="soak-"))
        )
        directory.chmod(0o755)
        stack.enter_context(file_system(directory / "image", directory / "models"))
        soak = Soak(directory / "models", random.Random(args.seed))
        for place in soak.places:
            stack.enter_context(place)
        until = time.monotonic() + args.minutes * 60
        due = 0.0
        while time.monotonic() < until:
            soak.one_round()
            time.sleep(args.pause)
            # What is made at the first use of something is there when all has been done once.
            if soak.is_warm and time.monotonic() >= due:
                due = time.monotonic() + min(SAMPLE_SECONDS, args.minutes * 6)
                found = soak.sample()
                say(json.dumps({"round": soak.rounds, **found}))
        soak.sample()
        code = report(soak)
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Run for some minutes; 1 when something has grown or went wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=120.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 31))
    parser.add_argument("--pause", type=float, default=0.5, help="seconds between two rounds")
    parser.add_argument("--nice", type=int, default=5)
    args = parser.parse_args(argv)
    if os.geteuid():
        print("the soak needs root", file=sys.stderr)
        return 4
    if _INSIDE not in os.environ:
        words = ["unshare", "--mount", sys.executable, "-m", "tests.soak"]
        seed = ["--seed", str(args.seed)]
        given = list(argv if argv is not None else sys.argv[1:])
        return subprocess.run(
            [*words, *given, *seed], env={**os.environ, _INSIDE: "1"}, cwd=ROOT
        ).returncode
    return run(args)


if __name__ == "__main__":
    sys.exit(main())
