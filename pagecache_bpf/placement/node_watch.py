# SPDX-License-Identifier: Apache-2.0
"""Looks at the models of this node and scores them.

No right is needed but to read the files: of files of others the kernel tells nothing, and then
`ask` may be a way to the controller.  Nothing of a model is read into the page cache but headers.
"""

from __future__ import annotations

import os
import platform
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from pagecache_bpf.errors import PagecacheError
from pagecache_bpf.explain import device_speed
from pagecache_bpf.explain.model_residency import look
from pagecache_bpf.ipc.public_client import PublicClient
from pagecache_bpf.kernel import cgroups
from pagecache_bpf.placement.content_identity import content_of
from pagecache_bpf.placement.copy_speed import CopySpeed
from pagecache_bpf.placement.load_score import ModelScore, NodeScores
from pagecache_bpf.placement.unanswered import Questions, Unanswered
from pagecache_bpf.weights.models import Model, resolve
from pagecache_bpf.weights.weight_format import suffixes

#: A look serves whoever asks in the next seconds: many may ask at once.
KEEP_SECONDS = 2.0
#: A look waits so long for each path; files whose server is gone are not looked at again until it
#: has answered, and nobody waits for them.
ANSWER_SECONDS = 30.0


@dataclass(frozen=True)
class Speeds:
    """What is known beforehand, in bytes a second.

    device: of all devices; None: the last measured one, or, with may_probe, a measurement.
    host_to_device: None: what CopySpeed measures.
    """

    device: float | None = None
    host_to_device: float | None = None
    may_probe: bool = True


def node_name() -> str:
    """Tell this node's name, by which the scheduler knows it.

    Returns:
        NODE_NAME of the environment, which the chart sets, or the host's name.
    """
    return os.environ.get("NODE_NAME") or platform.node() or "localhost"


def models_at(path: str | os.PathLike[str]) -> list[Model]:
    """Find the model that a path or a repository's name stands for, or those right below it.

    Args:
        path: as for load(), or a directory of models.

    Returns:
        The models; of a directory of models those that have weights.

    Raises:
        UsageError: there is none.
        PrivilegeError: a file may not be opened.
    """
    found = []
    for child in _children(Path(path)):
        try:
            found.append(resolve(child))
        except PagecacheError:
            continue
    return found or [resolve(path)]


def _children(directory: Path) -> list[Path]:
    """List what may be models in a directory of models; nothing where it is none, or not told."""
    try:
        if directory.is_dir() and not _is_model(directory):
            return sorted(directory.iterdir())
    except OSError:  # resolve() says what is wrong
        pass
    return []


def _is_model(directory: Path) -> bool:
    """Tell whether a directory is one model: weights, an index or a configuration lie in it.

    A cache directory of huggingface_hub is one, too; its weights lie below `snapshots`.
    """
    marks = {".json", *(f".{suffix}" for suffix in suffixes())}
    return any(
        child.suffix.lower() in marks or child.name in ("snapshots", "blobs")
        for child in directory.iterdir()
        if child.is_file() or child.name in ("snapshots", "blobs")
    )


class NodeWatch:
    """Scores the models of this node whenever somebody asks.  Threads may share it."""

    def __init__(
        self,
        paths: Sequence[str | os.PathLike[str]],
        *,
        speeds: Speeds | None = None,
        tagged: Callable[[], Iterable[Model]] = tuple,
        ask: Callable[[Path], int | None] = lambda path: None,
        node: str | None = None,
        copy: CopySpeed | None = None,
    ) -> None:
        """Watch models.

        Args:
            paths: see models_at(); they are looked for again at each look.
            speeds: what is known of the node's speeds.
            tagged: gives models beside these, those that policies govern for example.
            ask: tells bytes in the page cache of a file of which the kernel does not tell.
            node: the node's name; by default node_name().
            copy: what measures host_to_device; watches of one process may share it.
        """
        self._paths = tuple(paths)
        self._speeds = speeds or Speeds()
        self._tagged, self._ask = tagged, ask
        self._node = node or node_name()
        self._lock = threading.Lock()
        self._last: tuple[float, NodeScores] | None = None
        self._copy = copy or CopySpeed()
        self._devices: dict[int, float | None] = {}
        self._models: dict[str, Model] = {}
        self._questions = Questions(ANSWER_SECONDS)

    def scores(self) -> NodeScores:
        """Look at the models of this node, at most every KEEP_SECONDS.

        Returns:
            The scores of now, or of the last look; `age_ns` tells how long ago that began.
        """
        with self._lock:
            now = time.monotonic()
            if self._last is None or now - self._last[0] > KEEP_SECONDS:
                self._last = (now, self._look())
            began, found = self._last
            return replace(found, age_ns=round((time.monotonic() - began) * 1e9))

    def model_of(self, content: str) -> Model | None:
        """Find the model with a content identity, as it was at the last look.

        Args:
            content: the identity.

        Returns:
            The model; None: there was none.
        """
        with self._lock:
            return self._models.get(content)

    def _look(self) -> NodeScores:
        copy = self._speeds.host_to_device or self._copy.now()
        missing: list[str] = []
        began = time.time_ns()
        found: dict[tuple[Path, ...], tuple[Model, ModelScore]] = {}
        places: dict[str, Callable[[], Iterable[Model]]] = {
            str(path): partial(models_at, path) for path in self._paths
        }
        places["what policies govern"] = self._tagged
        for name, models in places.items():
            try:
                asked = self._questions.ask(name, partial(self._scores_of, models, copy))
            except Unanswered:
                missing.append(f"{name}: its file system does not answer")
                continue
            except (PagecacheError, OSError) as error:
                missing.append(str(error))
                continue
            for model, score in asked:
                if isinstance(score, ModelScore):
                    found.setdefault(model.files, (model, score))
                else:
                    missing.append(score)
        scores: dict[str, ModelScore] = {}
        self._models = {}
        for model, score in found.values():
            best = scores.get(score.content)
            # Two copies of one model on a node: whoever loads it takes the warmer one.
            if best is None or score.fraction > best.fraction:
                scores[score.content] = score
                self._models[score.content] = model
        budget, running = _controller()
        return NodeScores(
            self._node, began, 0, budget, running, tuple(scores.values()), tuple(missing)
        )

    def _scores_of(
        self, models: Callable[[], Iterable[Model]], copy: float
    ) -> list[tuple[Model, ModelScore | str]]:
        """Score models; instead of a score there is what was wrong."""
        found: list[tuple[Model, ModelScore | str]] = []
        for model in models():
            try:
                found.append((model, self._score(model, copy)))
            except (PagecacheError, OSError) as error:
                found.append((model, f"{model.name}: {error}"))
        return found

    def _score(self, model: Model, copy: float) -> ModelScore:
        found = look(model, ask=self._ask)
        rate = self._device_rate(model)
        return ModelScore(
            model.name, content_of(model), found.bytes, found.resident_bytes, rate, copy
        )

    def _device_rate(self, model: Model) -> float | None:
        """Return the speed of the device with the first file; measured once at most."""
        if self._speeds.device is not None:
            return self._speeds.device
        device = model.files[0].stat().st_dev
        last = device_speed.last(device)
        if last is not None:
            return last.bytes_per_second
        if device not in self._devices and self._speeds.may_probe:
            self._devices[device] = None
            try:
                speed = device_speed.measure(model.files)
            except (PagecacheError, OSError):  # no direct I/O: it stays unknown
                return None
            self._devices[device] = speed.bytes_per_second
            if speed.bytes >= device_speed.ENOUGH_BYTES:
                device_speed.remember(device, speed)
        return self._devices.get(device)


def _controller() -> tuple[int | None, tuple[str, ...]]:
    """Return the bytes that the node may still cache, and the models that are being loaded.

    The controller tells root of everybody's loads and others of their own.
    """
    available = cgroups.host_memory().get("MemAvailable")
    try:
        with PublicClient(seconds=5.0) as client:
            status = client.status()
        total, claimed = status["budget"]["total_bytes"], status["budget"]["claimed_bytes"]
        running = tuple(sorted({str(load["model"]) for load in status["loads"]}))
    except (PagecacheError, OSError, KeyError, TypeError):
        return available, ()
    bounds = [available, None if total is None else max(0, total - claimed)]
    return min((bound for bound in bounds if bound is not None), default=None), running
