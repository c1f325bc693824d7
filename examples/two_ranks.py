# SPDX-License-Identifier: Apache-2.0
"""Two tensor-parallel ranks: each takes its half of every tensor, for its own device."""

import argparse
import hashlib
import multiprocessing

from safetensors import safe_open

import pagecache_bpf as pc

RANKS = 2


def rank(number: int, path: str, device: str, results: "multiprocessing.Queue[object]") -> None:
    """Load the rows of one rank; tell their digests and the report."""
    digests = {}
    with pc.load(path, devices=device) as load, safe_open(path, framework="np") as file:
        for name in list(file.keys()):
            rows = file.get_slice(name)
            count = rows.get_shape()[0]
            start, end = count * number // RANKS, count * (number + 1) // RANKS
            digests[name] = hashlib.sha256(rows[start:end].tobytes()).hexdigest()
    results.put((number, digests, load.report()))


def main() -> None:
    """Start the ranks and print what they say."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file")
    parser.add_argument("--devices", nargs=RANKS, default=["cuda:0", "cuda:1"])
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    ranks = [
        context.Process(target=rank, args=(number, args.file, device, results))
        for number, device in enumerate(args.devices)
    ]
    for process in ranks:
        process.start()
    for _ in ranks:
        number, digests, report = results.get()
        print(f"rank {number}: {len(digests)} tensors {hash_of(digests)}\n{report}")
    for process in ranks:
        process.join()


def hash_of(digests: dict[str, str]) -> str:
    """One digest for all tensors of a rank."""
    return hashlib.sha256("".join(digests[name] for name in sorted(digests)).encode()).hexdigest()


if __name__ == "__main__":
    main()
