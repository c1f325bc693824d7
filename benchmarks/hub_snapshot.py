# SPDX-License-Identifier: Apache-2.0
"""Bytes read twice: shards of a Hugging Face snapshot against a plain directory, in little memory.

    python -m benchmarks.hub_snapshot --rounds 5

Four shards of 54 MiB are read from front to back, in the order of their names, in a memory cgroup
of 96 MiB: from a plain directory, and through the links of a snapshot, whose blobs are named by
their hashes.  A prefetcher that takes the files in another order fills the limit with what comes
later, and the device reads it twice.  Each round runs every layout with and without the policy,
cold, as root; the device is a loop of its own, so that nobody else's reads are counted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks import cgroups
from benchmarks.cachestat import drop
from benchmarks.checkpoints import generate, hub_snapshot
from benchmarks.control import CommandLine
from benchmarks.disks import device_bytes_read
from benchmarks.rounds import attached
from pagecache_bpf.weights.models import Model, resolve

_SIZE, _LIMIT, _SHARDS = 216 << 20, 96 << 20, 4
_READ = 'for f in "$@"; do dd if="$f" of=/dev/null bs=1M status=none || exit 1; done'


@contextmanager
def _disk(scratch: Path) -> Iterator[Path]:
    """Mount a file system of its own, on an image in `scratch`."""
    image, mount = scratch / "image", scratch / "mount"
    with image.open("wb") as file:
        file.truncate(3 * _SIZE)
    mount.mkdir()
    subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(mount)], check=True)
    try:
        yield mount
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def _read(model: Model, group: cgroups.Group) -> int:
    """Read the files cold, in the group; return the bytes that the device has read."""
    drop(model.files)
    before = device_bytes_read(model.files[0])
    names = [str(model.directory / name) for name in model.names]
    group.run("sh", "-c", _READ, "read", *names)
    after = device_bytes_read(model.files[0])
    assert before is not None and after is not None
    return after - before


def main() -> None:
    """Measure, and print a line for each layout and state."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--policy", default="sequential")
    parser.add_argument("--engine", default="agent")
    parser.add_argument("--json", type=Path, help="write the bytes of every round here, too")
    args = parser.parse_args()
    counts: dict[str, list[int]] = {}
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm")))
        disk = stack.enter_context(_disk(scratch))
        group = stack.enter_context(cgroups.group(f"snapshot-{os.getpid()}", _LIMIT))
        made = generate(disk / "plain", _SIZE, _SHARDS)
        layouts = {"plain": made.root, "snapshot": hub_snapshot(made.root, disk / "hub")}
        models = {name: resolve(path) for name, path in layouts.items()}
        assert models["plain"].names == models["snapshot"].names, "not in the same order"
        os.sync()
        control = CommandLine(args.engine)
        for number in range(args.rounds):
            turn = [*models] if number % 2 == 0 else [*reversed(models)]
            for name in turn:
                counts.setdefault(f"{name}, default", []).append(_read(models[name], group))
                with attached(control, args.policy, layouts[name]):
                    key = f"{name}, {args.policy}"
                    counts.setdefault(key, []).append(_read(models[name], group))
        size = models["plain"].size
    if args.json:
        args.json.write_text(json.dumps(counts, indent=1))
    print("| layout | device bytes of the model's, by round | median |\n|---|---|---|")
    for key, values in sorted(counts.items()):
        shares = ", ".join(f"{value / size:.3f}" for value in values)
        print(f"| {key} | {shares} | {statistics.median(values) / size:.3f} |")


if __name__ == "__main__":
    main()
