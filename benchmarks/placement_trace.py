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
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
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


def from_csv(path: Path, seed: int, *, models: int = 0, skew: float = 1.0) -> Requests:
    """Read a published trace.

    Its columns tell which one it is.  BurstGPT: Timestamp (seconds) and Model.  Azure functions,
    2019: HashFunction and a count for each minute, within which the requests are spread evenly at
    random; each function stands for a model, as in ServerlessLLM.  Azure functions, 2021: func,
    end_timestamp and duration (seconds).  Azure LLM inference, 2023: TIMESTAMP (a date), without
    models, which are drawn by Zipf's law.

    Args:
        path: the file.
        seed: of what the trace does not tell: the sizes of its models, and the above.
        models: how many there are, where the trace names none.
        skew: exponent of Zipf's law, likewise.

    Returns:
        Its requests, from second 0 on.

    Raises:
        UsageError: it cannot be read, or lacks the columns.
    """
    random = np.random.default_rng(seed)
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = csv.DictReader(file)
            columns = [name for name in rows.fieldnames or () if name]
            minutes = {name: int(_MINUTE.sub("", name)) for name in columns if _is_minute(name)}
            if minutes:
                times, names = _counted(rows, minutes, random)
            else:
                times, names = _listed(rows)
    except (OSError, KeyError, ValueError, TypeError, csv.Error) as error:
        raise UsageError(
            f"the trace {path} cannot be read",
            str(error),
            "Give a CSV with the columns Timestamp (or time), in seconds, and Model",
        ) from error
    if not len(times):
        raise UsageError(f"the trace {path} is empty", "it has no request")
    if not names:
        if models < 1:
            raise UsageError(f"the trace {path} names no models", "it is not said how many to draw")
        weights = 1 / np.arange(1, models + 1) ** skew
        numbers = random.choice(random.permutation(models), len(times), p=weights / weights.sum())
    else:
        known, numbers = np.unique(np.array(names), return_inverse=True)
        models = len(known)
    order = np.argsort(times, kind="stable")
    sizes, gpus = _checkpoints(models, seed)
    return Requests(times[order] - times.min(), numbers[order].astype(np.int64), sizes, gpus)


_MINUTE = re.compile(r"^minute_", re.I)


def _is_minute(column: str) -> bool:
    """Tell whether a column counts the requests of a minute: "17" or "minute_17"."""
    return _MINUTE.sub("", column).isdecimal()


def _counted(
    rows: Iterable[dict[str, str]], minutes: Mapping[str, int], random: np.random.Generator
) -> tuple[npt.NDArray[np.float64], list[str]]:
    """Return times and names of requests that are counted by function and minute."""
    times: list[npt.NDArray[np.float64]] = [np.zeros(0)]
    names: list[str] = []
    for row in rows:
        for column, minute in minutes.items():
            count = int(float(row[column] or 0))  # a line may be cut short
            if count:
                times.append(60 * (minute + random.uniform(size=count)))
                names += [row["HashFunction"]] * count
    return np.concatenate(times), names


def _listed(rows: Iterable[dict[str, str]]) -> tuple[npt.NDArray[np.float64], list[str]]:
    """Return times and names of requests that have a line each; no names where none is told."""
    times: list[float] = []
    names: list[str] = []
    for row in rows:
        found = {name.lower(): value for name, value in row.items() if name}
        if "end_timestamp" in found:
            times.append(float(found["end_timestamp"]) - float(found["duration"]))
            names.append(found["func"])
            continue
        times.append(_seconds(found["timestamp" if "timestamp" in found else "time"]))
        if "contexttokens" not in found:
            names.append(found["model"])
    return np.array(times), names


def _seconds(text: str) -> float:
    """Read a time in seconds, or a date with at most seven digits of a second's fraction."""
    try:
        return float(text)
    except ValueError:
        # Python 3.10 takes six digits.
        return datetime.fromisoformat(text[:26]).replace(tzinfo=timezone.utc).timestamp()
