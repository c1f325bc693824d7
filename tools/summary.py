# SPDX-License-Identifier: Apache-2.0
"""Adds up the reports of all test runs: what ran, what was skipped and why, and one last line."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

REPORTS = Path(__file__).resolve().parents[1] / "build" / "test"


def main() -> int:
    """Print what passed, failed and was skipped in all reports of build/test, with each reason.

    Returns:
        The exit status: 1 when something failed or no test ran.
    """
    total: Counter[str] = Counter()
    reasons: Counter[tuple[str, str]] = Counter()
    for report in sorted(REPORTS.glob("*.xml")):
        counts: Counter[str] = Counter()
        for case in ElementTree.parse(report).iter("testcase"):
            skipped = case.find("skipped")
            if case.find("failure") is not None or case.find("error") is not None:
                counts["failed"] += 1
            elif skipped is not None:
                counts["skipped"] += 1
                reasons[report.stem, skipped.get("message", "")] += 1
            else:
                counts["passed"] += 1
        total += counts
        print(f"{report.stem:8}", ", ".join(f"{n} {what}" for what, n in sorted(counts.items())))
    for (name, reason), count in sorted(reasons.items()):
        print(f"skipped in {name}, {count} times: {reason}")
    print(f"{total['passed']} passed, {total['failed']} failed, {total['skipped']} skipped")
    return 1 if total["failed"] or not total["passed"] else 0


if __name__ == "__main__":
    sys.exit(main())
