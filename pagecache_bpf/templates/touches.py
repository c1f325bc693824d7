# SPDX-License-Identifier: Apache-2.0
"""The first byte of tensors, which a rank reads of those as well that it has no use for.

safetensors' `safe_open(...).get_tensor(name)` makes a tensor over the mapped file and looks at its
first element, so that a page of every tensor is read, also where the rank then takes another part
of it, or drops it since another rank has that layer or expert.  Large models have 100,000 tensors:
runs of them that a rank drops are strided extents, of which few are needed, since layers and
experts are alike.

Source: vLLM 0.32 with safetensors 0.8.0, seen by tests/loaders.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from pagecache_bpf.templates.template import STRIDED, Extents

Numbers = npt.NDArray[np.int64]


def with_touches(
    rows: Extents,
    places: Numbers,
    files: Numbers,
    offsets: Numbers,
    lengths: Numbers,
    consumer: int,
) -> Extents:
    """Add the first byte of every tensor to what a rank reads.

    Args:
        rows: what the rank reads, in its order: an array of STRIDED.
        places: of each row the number of its tensor in the order of reading; -1 - number for the
            header of a file that is read before that tensor.
        files: the number of each tensor's file, in the order of reading; -1: the tensor has no
            bytes, or its loader does not touch it.
        offsets: where each tensor begins in its file.
        lengths: bytes of each tensor.
        consumer: the rank's number among the template's consumers.

    Returns:
        An array of STRIDED, in the order of reading; tensors of which only the first byte is read,
        with none in between of which more is read, come by their lengths and offsets.
    """
    own = places >= 0
    begins = own & (rows["offset"] == offsets[np.maximum(places, 0)].astype(np.uint64))
    wanted = files >= 0
    wanted[places[begins]] = False
    touched = np.flatnonzero(wanted)
    if not len(touched):
        return rows
    # A run ends where more of a tensor, or the header of a file, is read.
    more = np.zeros(len(files) + 1, np.int64)
    more[places[own] + 1] = 1
    more[-1 - places[~own]] = 1
    runs = np.cumsum(more)[touched] * (int(files.max()) + 1) + files[touched]
    # Tensors of one length are one kind of layer: they lie at even distances.
    order = np.lexsort((offsets[touched], lengths[touched], runs))
    touched, runs = touched[order], runs[order]
    added, first = _strided(runs, files[touched], offsets[touched], touched, consumer)
    # The header comes first, then the first byte, then the rest.
    keys = np.concatenate((np.where(own, places * 3 + 2, (-1 - places) * 3), first * 3 + 1))
    joined: Extents = np.concatenate((rows, added))[np.argsort(keys, kind="stable")]
    return joined


def _strided(
    runs: Numbers, files: Numbers, offsets: Numbers, places: Numbers, consumer: int
) -> tuple[Extents, Numbers]:
    """Return bytes at these offsets as strided extents, and the first place of each one's run."""
    starts = np.flatnonzero(np.concatenate(([True], runs[1:] != runs[:-1])))
    first_of_run = np.minimum.reduceat(places, starts)
    run = np.cumsum(np.concatenate(([0], (runs[1:] != runs[:-1]).astype(np.int64))))
    steps = np.where(np.diff(run) == 0, np.diff(offsets), -1)
    found: list[tuple[int, int, int]] = []  # number of its first, how many, bytes apart
    at = 0
    # Where the distance to the next one changes; the last one has no next.
    edges = np.append(np.flatnonzero(np.diff(steps)) + 1, len(steps)).tolist()
    for edge in edges:
        if edge <= at:
            continue  # the one before it belongs to the extent that has just ended
        step = int(steps[at])
        if step > 0 and edge - at > 1:
            found.append((at, edge - at + 1, step))
            at = edge + 1
        else:
            found += [(number, 1, 0) for number in range(at, edge)]
            at = edge
    found += [(number, 1, 0) for number in range(at, len(offsets))]
    numbers, many, apart = (np.array(column, np.int64) for column in zip(*found, strict=True))
    made: np.ndarray[Any, Any] = np.zeros(len(numbers), STRIDED)
    made["consumer"], made["file"] = consumer, files[numbers]
    made["offset"], made["length"], made["wanted"] = offsets[numbers], 1, many
    made["count"], made["stride"] = many, apart
    return made, first_of_run[run[numbers]]
