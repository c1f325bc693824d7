# SPDX-License-Identifier: Apache-2.0
"""The score of a model on a node: the seconds that a load of it would take there.

    seconds = (1 - r) * bytes / min(device, host_to_device) + r * bytes / host_to_device

r is the share of the model in the node's page cache, `device` the speed of the device that holds
its files and `host_to_device` the speed at which cached pages reach where the weights are used.
What comes from the device goes that way, too, hence the minimum: a cold load is never faster than
a warm one on the same node, however fast its device.

This is the only place that has the formula.  What it gets wrong, and in which direction:

- The copy of what comes from the device is taken to be hidden behind the device.  Where the device
  is nearly as fast as the copy and the loader does one after the other, a load takes longer; up to
  bytes / host_to_device.
- `device` is what direct I/O gets at best.  A loader that waits for each read gets less, so a cold
  load takes longer than told.  That factor is the same on nodes with the same devices and does not
  change which one is best; it does change how much better a warm one is (it is better still).
- A look is as old as `age_ns` says.  Pages may have come or gone since.
- Where the absent bytes do not fit into `free_budget_bytes`, the kernel has to drop something while
  it loads: other files first, in the end this one.
- Work after the weights are in place (compilation, graph capture) is the engine's and is not in it.

Source: the shape is that of ServerlessLLM's storage-aware scheduler (OSDI'24, section 6), which
knows cached and not cached only; r makes it a fraction.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pagecache_bpf.errors import PagecacheError

#: Answers of other nodes are bounded: nobody has more models than this on one.
MAX_MODELS = 4096
_TEXT = 1024


def seconds_to_load(
    size: int,
    resident: int | None,
    device: float | None,
    host_to_device: float,
) -> float | None:
    """Return how long a load takes, at best.

    Args:
        size: bytes of the model.
        resident: bytes of it in the page cache; None where that is not known: counted as none.
        device: bytes a second that the device gives; None if it is not known.
        host_to_device: bytes a second from the page cache to where the weights are used.

    Returns:
        Seconds; None where something has to be read and the device's speed is not known.
    """
    cached = min(resident or 0, size)
    absent = size - cached
    if absent and not device:
        return None
    read = absent / min(device, host_to_device) if device else 0.0
    return read + cached / host_to_device


def relative(seconds: Mapping[str, float | None], unknown: float | None = None) -> dict[str, float]:
    """Rank candidates by how near each comes to the fastest one.

    It is a ratio and no share of the slowest one's time, as one very slow device among the
    candidates would then make all others look alike.

    Args:
        seconds: by candidate; None for one of which nothing is known.
        unknown: the seconds that one of which nothing is known is taken to need.

    Returns:
        By candidate: 1 for the fastest, 0.5 for one that takes twice as long, and so on.  0 for
        those that stay unknown.
    """
    known = {
        name: unknown if value is None else value
        for name, value in seconds.items()
        if value is not None or unknown is not None
    }
    fastest = min((value for value in known.values() if value is not None), default=0.0)
    shares = dict.fromkeys(seconds, 0.0)
    for name, value in known.items():
        if value is not None:
            shares[name] = fastest / value if value > 0 else 1.0
    return shares


@dataclass(frozen=True)
class ModelScore:
    """A model on a node; sizes in bytes, speeds in bytes a second.

    model: its name on that node.  content: what it is, whatever it is called (content_identity).
    resident_bytes: None where the kernel does not tell.  device_rate: None if not known.
    """

    model: str
    content: str
    bytes: int
    resident_bytes: int | None
    device_rate: float | None
    host_to_device_rate: float

    @property
    def fraction(self) -> float:
        """Share in the page cache, 0 to 1; what is not known counts as absent."""
        return min(self.resident_bytes or 0, self.bytes) / self.bytes if self.bytes else 0.0

    @property
    def seconds(self) -> float | None:
        """How long a load takes now."""
        return seconds_to_load(
            self.bytes, self.resident_bytes, self.device_rate, self.host_to_device_rate
        )

    @property
    def cold_seconds(self) -> float | None:
        """How long it takes with nothing in the page cache."""
        return seconds_to_load(self.bytes, 0, self.device_rate, self.host_to_device_rate)

    @property
    def warm_seconds(self) -> float:
        """How long it takes with all of it in the page cache."""
        return self.bytes / self.host_to_device_rate


@dataclass(frozen=True)
class NodeScores:
    """What a node says of its models.

    time_ns: when it looked, in ns since 1970 by its own clock.  age_ns: how long ago that was when
    it answered: no two clocks have to agree.  free_budget_bytes: what the node may still cache;
    None: not known.  running: names of models that are being loaded there now.  missing: sentences
    about models that it was told of and did not find.
    """

    node: str
    time_ns: int
    age_ns: int
    free_budget_bytes: int | None
    running: tuple[str, ...]
    models: tuple[ModelScore, ...]
    missing: tuple[str, ...] = ()

    def find(self, wanted: str) -> ModelScore | None:
        """Find a model on the node.

        Args:
            wanted: a content identity, or else the name of a model.

        Returns:
            Its score; None: the node has none of either.
        """
        return next(
            (model for model in self.models if model.content == wanted),
            next((model for model in self.models if model.model == wanted), None),
        )

    def as_json(self) -> dict[str, Any]:
        """Return what /scores and `pagecache-bpf score --json` say.

        Returns:
            The node's numbers and one dictionary a model; sizes in bytes, speeds in bytes a second.
        """
        return {
            "node": self.node,
            "time_ns": self.time_ns,
            "age_seconds": self.age_ns / 1e9,
            "free_budget_bytes": self.free_budget_bytes,
            "running": list(self.running),
            "models": [
                {
                    "model": model.model,
                    "content": model.content,
                    "bytes": model.bytes,
                    "resident_bytes": model.resident_bytes,
                    "fraction": model.fraction,
                    "device_bytes_per_second": model.device_rate,
                    "host_to_device_bytes_per_second": model.host_to_device_rate,
                    "seconds": model.seconds,
                    "cold_seconds": model.cold_seconds,
                    "warm_seconds": model.warm_seconds,
                }
                for model in self.models
            ],
            "missing": list(self.missing),
        }


def from_json(data: Any) -> NodeScores:
    """Read what a node says; nothing in it is believed before it is looked at.

    Seconds and fractions are computed anew: a node cannot claim a time that its numbers do not
    give.

    Args:
        data: a decoded answer of /scores.

    Returns:
        The scores, as the node would have computed them.

    Raises:
        PagecacheError: it is not what a node says.
    """
    try:
        rows = data["models"]
        if not isinstance(rows, list) or len(rows) > MAX_MODELS:
            raise ValueError(f"models is no list of at most {MAX_MODELS}")
        budget = data.get("free_budget_bytes")
        return NodeScores(
            _text(data["node"]),
            _count(data["time_ns"]),
            round(_number(data["age_seconds"]) * 1e9),
            None if budget is None else _count(budget),
            tuple(_text(name) for name in list(data.get("running", ()))[:MAX_MODELS]),
            tuple(_model(row) for row in rows),
            tuple(_text(text) for text in list(data.get("missing", ()))[:MAX_MODELS]),
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise PagecacheError(
            "an answer of a node cannot be read",
            str(error) or type(error).__name__,
            "Check that /scores of `pagecache-bpf export` is what was asked, of the same version",
        ) from error


def _model(row: Any) -> ModelScore:
    resident, rate = row["resident_bytes"], row["device_bytes_per_second"]
    size = _count(row["bytes"])
    if not size:
        raise ValueError("a model of no bytes")
    return ModelScore(
        _text(row["model"]),
        _text(row["content"]),
        size,
        None if resident is None else min(_count(resident), size),
        None if rate is None else _rate(rate),
        _rate(row["host_to_device_bytes_per_second"]),
    )


def _text(value: Any) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= _TEXT:
        raise ValueError(f"{str(value)[:40]!r} is no text of 1 to {_TEXT} characters")
    return value


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 63:
        raise ValueError(f"{str(value)[:40]!r} is no count")
    return value


def _number(value: Any) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise ValueError(f"{str(value)[:40]!r} is no number")
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{value} is not a number from 0 on")
    return float(value)


def _rate(value: Any) -> float:
    found = _number(value)
    if found < 1:
        raise ValueError(f"{value} is no speed")
    return found
