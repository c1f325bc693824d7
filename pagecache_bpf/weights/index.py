# SPDX-License-Identifier: Apache-2.0
"""The index of a sharded checkpoint: which tensor lies in which file.

It knows the one JSON file only, and does not look whether the shards are there.
"""

from __future__ import annotations

import errno
import json
import posixpath
from pathlib import Path

from pagecache_bpf.errors import UsageError
from pagecache_bpf.kernel.file_key import read_small_file
from pagecache_bpf.weights.files import path_error, refuse_pointer
from pagecache_bpf.weights.names import in_natural_order

#: Far above the index of any model: 100,000 tensors make about 10 MB.
MAX_BYTES = 64 << 20
_DOCS = "docs/troubleshooting.md#is-not-a-weight-index"


def shards_of(index: Path) -> list[str]:
    """Return the files that an index names, below its directory, in natural order.

    Args:
        index: the path of a *.index.json.

    Returns:
        Their names, at least one.

    Raises:
        UsageError: it is not an index, or it leads out of its directory.
        PrivilegeError: it may not be read.

    Source: transformers, `modeling_utils.py`, SAFE_WEIGHTS_INDEX_NAME and WEIGHTS_INDEX_NAME.
    """
    fix = "Download it again, or name the shards one by one"
    try:
        text = read_small_file(index, MAX_BYTES)
        refuse_pointer(index, text)
        content = json.loads(text)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EFBIG):
            why = error.strerror or str(error)
            raise UsageError(f"{index} is not a weight index", why, fix, _DOCS) from None
        raise path_error(index, error) from None
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"{index} is not a weight index", f"bad JSON: {error}", fix, _DOCS
        ) from None
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UsageError(f"{index} is not a weight index", "it has no weight_map", fix, _DOCS)
    named = set(map(str, weight_map.values()))
    for name in named:
        if "\0" in name or name.startswith("/") or ".." in name.split("/") or not name:
            raise UsageError(
                f"{index} is not a weight index",
                f"it names {name!r}, outside its directory",
                fix,
                _DOCS,
            )
    return in_natural_order({posixpath.normpath(name) if "/" in name else name for name in named})
