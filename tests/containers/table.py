# SPDX-License-Identifier: Apache-2.0
"""Print the table of docs/filesystems.md, from what `make test-containers` saw."""

from __future__ import annotations

import json

from tests.unit.command import ROOT

#: What the names of loads end in, beside those of readers under a policy that root has attached.
CLIENT = ", client"
TOLD = ROOT / "build" / "test" / "environments.json"


def note(
    environment: str,
    prefetched: float,
    hit: float | None,
    charged: float | None,
    usual: float,
    seconds: float,
) -> None:
    """Write down what was seen of an environment.

    Args:
        environment: its name.
        prefetched: share of the model that was read ahead.
        hit: share of what its reader wanted that was in the page cache; None: not told.
        charged: share of the model that its reader's control group was charged; None: it has none
            of its own.
        usual: seconds of the same reader without a policy.
        seconds: and with one.
    """
    TOLD.parent.mkdir(parents=True, exist_ok=True)
    rows = json.loads(TOLD.read_text()) if TOLD.exists() else {}
    rows[environment] = {
        "prefetched": prefetched,
        "hit": hit,
        "charged": charged,
        "usual": usual,
        "seconds": seconds,
    }
    TOLD.write_text(json.dumps(rows, indent=1))


def main() -> None:
    """Print a line for each environment: governed by root's policy, and as the client's load."""
    rows = json.loads(TOLD.read_text())
    print("| environment | root attaches: read ahead, hit | a client loads | charged | seconds |")
    print("| --- | --- | --- | --- | --- |")
    for name in dict.fromkeys(name.removesuffix(CLIENT) for name in rows):
        both = [rows.get(name), rows.get(name + CLIENT)]
        charged = [row["charged"] for row in both if row and row["charged"] is not None]
        cells = [
            *(
                "" if row is None else f"{_share(row['prefetched'])}, {_share(row['hit'])}"
                for row in both
            ),
            f"the reader, {_share(min(charged))}" if charged else "",
            "; ".join(f"{row['usual']:.2f}, {row['seconds']:.2f}" for row in both if row),
        ]
        print(f"| {name} | {' | '.join(cells)} |")


def _share(share: float | None) -> str:
    """Say a share in percent; what is not known is no number."""
    return "unknown" if share is None else f"{share:.0%}"


if __name__ == "__main__":
    main()
