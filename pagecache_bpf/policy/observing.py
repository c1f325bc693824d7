# SPDX-License-Identifier: Apache-2.0
"""Whether the machine's owner wants files to be observed when they are tagged.

It reads one environment variable and knows no observer.
"""

from __future__ import annotations

import os

VARIABLE = "PAGECACHE_BPF_OBSERVE"


def wanted() -> bool:
    """Tell whether files are to be observed.

    Returns:
        False if the variable says "off": each `attach` and `tag` is then as with --no-observe.
    """
    return os.environ.get(VARIABLE, "on") != "off"
