# SPDX-License-Identifier: Apache-2.0
"""Puts templates into the maps of a running policy, beside those that others have put there.

The maps themselves say what is in use: a model's entry leads to its consumers, these to their
steps, these to extents and files.  So whoever gives a template, a command, the controller or
a load, takes free places only, and what is not its own stays as it is.  Nothing here knows where a
policy's maps are.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from pagecache_bpf._run_dir import RUN_DIR
from pagecache_bpf.errors import PagecacheError
from pagecache_bpf.kernel import abi
from pagecache_bpf.kernel.bpf_maps import BpfMap
from pagecache_bpf.templates.layout import ARRAYS, FILES, Identity, lay_out
from pagecache_bpf.templates.template import Template

Array = np.ndarray[Any, Any]
Region = tuple[int, int]  # elements [start, end) of an array
#: These two are laid out alike, so they get the same places.
_STEPS, _INDEX = "template_steps", "template_index"


def add(
    maps: Mapping[str, BpfMap],
    name: str,
    template: Template,
    identities: Mapping[int, Identity],
) -> list[bytes]:
    """Give a policy one more template; one of the same name is replaced.

    Args:
        maps: the template maps of the policy, by name; see layout.ARRAYS and layout.FILES.
        name: the model's name.
        template: what is read in which order.
        identities: of its files, by their number in it; a file without one cannot be found by
            the policy.

    Returns:
        The keys of the files, by which remove() finds them.

    Raises:
        PagecacheError: the maps have no room for it; nothing was changed, but that a template of
            the same name is gone.
        OSError: the maps cannot be used.
    """
    with _exclusive():
        arrays = read_all(maps)
        files = _files(maps[FILES])
        _remove_named(maps, arrays, name, files)
        used = regions(arrays, files)
        sizes = lay_out([(name, template)]).sizes()
        first = {}
        for array, size in sizes.items():
            own = [model[array] for model in used]
            first[array] = _free(array, size, own, maps[array].entries)
        # The index is found by the numbers of the steps, so it has the same places.
        first[_STEPS] = first[_INDEX] = max(first[_STEPS], first[_INDEX])
        taken = set(files)
        layout = lay_out([(name, template)], lambda _, file: identities.get(file), first=first)
        for array, content in layout.arrays.items():
            _write(maps[array], content, first[array])
        try:
            for key, value in layout.files:
                if key not in taken:  # a file keeps the template that was there first
                    maps[FILES].update(key, value)
        except OSError as error:
            _remove(maps, read_all(maps), first["template_models"], _files(maps[FILES]))
            raise PagecacheError(
                "the template was not given to the policy",
                f"its map {FILES} takes no more: {error.strerror or error}",
                "Detach the policy, and attach it with this template",
            ) from error
    return [key for key, _ in layout.files if key not in taken]


def remove(maps: Mapping[str, BpfMap], name: str) -> None:
    """Take a template away; its places are free then.

    Args:
        maps: the template maps of the policy, by name.
        name: the model's name.

    Raises:
        OSError: the maps cannot be used.
    """
    with _exclusive():
        arrays = read_all(maps)
        files = _files(maps[FILES])
        _remove_named(maps, arrays, name, files)


def read_all(maps: Mapping[str, BpfMap]) -> dict[str, Array]:
    """Read every array of templates.

    Args:
        maps: the template maps of the policy, by name.

    Returns:
        Elements of each array, by the name of its map; they are copies.

    Raises:
        OSError: the maps cannot be read.
    """
    return {name: read_array(maps[name], name) for name in ARRAYS}


def read_array(map_file: BpfMap, name: str) -> Array:
    """Read one array of templates.

    Args:
        map_file: the open map.
        name: its name, which says what its elements are.

    Returns:
        All elements, those that are not in use too; a copy.

    Raises:
        OSError: the map cannot be read.
    """
    with map_file.memory() as memory:
        kind = np.dtype(ARRAYS[name])
        data = memory[: map_file.entries * kind.itemsize]
    return np.frombuffer(data, kind)


def regions(arrays: Mapping[str, Array], files: Mapping[bytes, bytes]) -> list[dict[str, Region]]:
    """Find what the templates in the maps use.

    Args:
        arrays: the content of the maps.
        files: the content of template_files, by key.

    Returns:
        For each model the region of each array that can be reached from it.
    """
    found = []
    values = [abi.pagecache_template_file.from_buffer_copy(value) for value in files.values()]
    for number in _models(arrays):
        model = arrays["template_models"][number]
        first, count = int(model["first_consumer"]), int(model["nr_consumers"])
        consumers = arrays["template_consumers"][first : first + count]
        consumers = consumers[consumers["nr_steps"] > 0]
        steps = _union(
            (int(consumer["first_step"]), int(consumer["first_step"]) + int(consumer["nr_steps"]))
            for consumer in consumers
        )
        numbers = arrays[_STEPS]["extent"][slice(*steps)]
        extents = (int(numbers.min()), int(numbers.max()) + 1) if len(numbers) else (0, 0)
        targets = arrays["template_extents"]["file"][slice(*extents)]
        own = [value for value in values if value.model == number]
        reached = [value.file for value in own]
        if len(targets):
            reached += [int(targets.min()), int(targets.max())]
        found.append(
            {
                "template_models": (number, number + 1),
                "template_consumers": (first, first + count),
                "template_targets": (min(reached), max(reached) + 1) if reached else (0, 0),
                "template_spans": _union((value.spans, value.spans + count) for value in own),
                _INDEX: steps,
                _STEPS: steps,
                "template_extents": extents,
            }
        )
    return found


def _free(array: str, size: int, used: Iterable[Region], capacity: int) -> int:
    """Find the first place of an array with room for some elements.  Raises PagecacheError."""
    at = 0
    for start, end in sorted(region for region in used if region[1] > region[0]):
        if start - at >= size:
            return at
        at = max(at, end)
    if capacity - at < size:
        raise PagecacheError(
            "the template was not given to the policy",
            f"its map {array} has room for {max(0, capacity - at):,} elements more, "
            f"not for {size:,}",
            "Detach the policy, and attach it with this template",
        )
    return at


def _models(arrays: Mapping[str, Array]) -> Sequence[int]:
    """Return the numbers of the models that are in use."""
    numbers: Sequence[int] = np.flatnonzero(arrays["template_models"]["nr_consumers"]).tolist()
    return numbers


def _name(arrays: Mapping[str, Array], number: int) -> bytes:
    """Return the name of a model, as bytes."""
    return bytes(arrays["template_models"][number]["name"].tobytes().rstrip(b"\0"))


def _remove_named(
    maps: Mapping[str, BpfMap], arrays: dict[str, Array], name: str, files: dict[bytes, bytes]
) -> None:
    """Remove the templates of a name, cut to the bytes that a policy's maps have for one."""
    for number in _models(arrays):
        if _name(arrays, number) == name.encode()[:63]:
            _remove(maps, arrays, number, files)


def _remove(
    maps: Mapping[str, BpfMap],
    arrays: dict[str, Array],
    number: int,
    files: dict[bytes, bytes],
) -> None:
    """Remove a model: its files first, so that no program finds it any more."""
    for key, value in list(files.items()):
        if abi.pagecache_template_file.from_buffer_copy(value).model == number:
            maps[FILES].delete(key)
            del files[key]
    empty = np.zeros(1, ARRAYS["template_models"])
    _write(maps["template_models"], empty, number)
    # What read_all() gave is read-only.
    models = arrays["template_models"].copy()
    models[number] = empty[0]
    arrays["template_models"] = models


def _union(parts: Iterable[Region]) -> Region:
    """Return the smallest region that holds several; an empty one of none."""
    listed = list(parts)
    if not listed:
        return 0, 0
    return min(start for start, _ in listed), max(end for _, end in listed)


def _files(map_file: BpfMap) -> dict[bytes, bytes]:
    """Read the entries of template_files."""
    return map_file.items()


def _write(map_file: BpfMap, content: Array, first: int) -> None:
    """Write elements from a place on; the others stay as they are."""
    if content.nbytes:
        start = first * content.dtype.itemsize
        with map_file.memory(write=True) as memory:
            memory[start : start + content.nbytes] = content.tobytes()


@contextmanager
def _exclusive() -> Iterator[None]:
    """Hold a lock, so that no other process writes templates meanwhile."""
    RUN_DIR.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = os.open(RUN_DIR / "templates.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)
