# SPDX-License-Identifier: Apache-2.0
"""Requests for models over time: generated as published traces were, or read from one.

Generated: the share of each model follows Zipf's law, and the gaps between the requests of one
model a Gamma distribution with a coefficient of variation of 8, as ServerlessLLM (OSDI'24, section
7.1) and AlpaServe (OSDI'23, section 6.1) generate theirs from the Azure functions trace; BurstGPT
(KDD'25) finds Gamma-distributed bursts in requests to language models, too.  Sizes are those of
published checkpoints.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pagecache_bpf.errors import UsageError

GB = 10**9
#: Bytes of a checkpoint, GPUs that it takes, and the share of models that are so large.
SIZES = ((15.2 * GB, 1, 0.6), (29.5 * GB, 1, 0.2), (65.5 * GB, 2, 0.12), (141 * GB, 4, 0.08))


@dataclass(frozen=True)
class Requests:
    """Who is asked when: times in seconds, in order; models by number; sizes in bytes by model."""

    times: npt.NDArray[np.float64]
    models: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.float64]
    gpus: npt.NDArray[np.int64]


def _checkpoints(count: int, seed: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Return bytes and GPUs of so many models, in the published shares."""
    random = np.random.default_rng(seed)
    kinds = random.choice(len(SIZES), size=count, p=[share for _, _, share in SIZES])
    sizes = np.array([size for size, _, _ in SIZES])[kinds]
    return sizes, np.array([gpus for _, gpus, _ in SIZES])[kinds]


def generated(
    models: int, rate: float, seconds: float, *, skew: float, variation: float, seed: int
) -> Requests:
    """Generate requests.

    Args:
        models: how many there are.
        rate: requests a second for all of them.
        seconds: how long.
        skew: exponent of Zipf's law.
        variation: standard deviation of the gaps between requests of a model, over their mean.
        seed: of the random numbers.
    """
    random = np.random.default_rng(seed)
    weights = 1 / np.arange(1, models + 1) ** skew
    rates = random.permutation(rate * weights / weights.sum())
    shape = 1 / variation**2
    times, numbers = [], []
    for number, model_rate in enumerate(rates):
        expected = model_rate * seconds
        gaps = random.gamma(
            shape, 1 / (model_rate * shape), size=int(expected * 2 + 40 * variation)
        )
        # A burst is as likely at the start as later: begin somewhere in a gap.
        arrivals = np.cumsum(gaps) - random.uniform() * gaps[0]
        arrivals = arrivals[arrivals < seconds]
        times.append(arrivals)
        numbers.append(np.full(len(arrivals), number))
    joined = np.concatenate(times)
    order = np.argsort(joined, kind="stable")
    sizes, gpus = _checkpoints(models, seed + 1)
    return Requests(joined[order], np.concatenate(numbers)[order], sizes, gpus)


def from_csv(path: Path, seed: int) -> Requests:
    """Read a trace: columns Timestamp (seconds) and Model, as BurstGPT has them, or time and model.

    Args:
        path: the file.
        seed: of the sizes that its models get, as traces tell no sizes.

    Raises:
        UsageError: it cannot be read, or lacks the columns.
    """
    times, names = [], []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                found = {name.lower(): value for name, value in row.items() if name}
                times.append(float(found["timestamp" if "timestamp" in found else "time"]))
                names.append(found["model"])
    except (OSError, KeyError, ValueError, TypeError, csv.Error) as error:
        raise UsageError(
            f"the trace {path} cannot be read",
            str(error),
            "Give a CSV with the columns Timestamp (or time), in seconds, and Model",
        ) from error
    if not times:
        raise UsageError(f"the trace {path} is empty", "it has no request")
    known, numbers = np.unique(np.array(names), return_inverse=True)
    order = np.argsort(np.array(times), kind="stable")
    sizes, gpus = _checkpoints(len(known), seed)
    return Requests(np.array(times)[order] - min(times), numbers[order], sizes, gpus)
