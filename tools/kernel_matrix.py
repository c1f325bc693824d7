#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Keeps the table of docs/kernels.md: which tests of the module pass on which kernel.

Reports of pytest that are named (build/test/kernels/RELEASE.xml, see `make test-kernels`) are taken
into docs/kernels.json, and the table is written.  `--check` says whether the table is what was
recorded and, where reports lie in build/test/kernels, whether these are what was recorded.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "docs" / "kernels.json"
PAGE = ROOT / "docs" / "kernels.md"
REPORTS = ROOT / "build" / "test" / "kernels"
BEGIN, END = "<!-- table -->\n", "<!-- end of table -->\n"
PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"

#: Kernel release, test file (without test_ and .py), outcome: number of tests.
Results = dict[str, dict[str, dict[str, int]]]


def read_report(path: Path) -> dict[str, dict[str, int]]:
    """Count the outcomes of one report by test file.

    Args:
        path: a report of pytest's, in JUnit's format.

    Returns:
        Counts by outcome, by the file's name without test_; both sorted.
    """
    counts: dict[str, Counter[str]] = {}
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        file = case.attrib["classname"].rpartition(".")[2].removeprefix("test_")
        kinds = {child.tag for child in case}
        outcome = FAILED if kinds & {"failure", "error"} else PASSED
        if "skipped" in kinds:
            outcome = SKIPPED
        counts.setdefault(file, Counter())[outcome] += 1
    return {file: dict(sorted(counts[file].items())) for file in sorted(counts)}


def render(results: Results) -> str:
    """Write the table: a row for each test file, a column for each kernel.

    Args:
        results: what read_report() said, by kernel release.

    Returns:
        The table in Markdown.
    """
    releases = sorted(results)
    files = sorted({file for counts in results.values() for file in counts})
    lines = [
        f"| tests | {' | '.join(releases)} |",
        f"| --- |{' --- |' * len(releases)}",
    ]
    for file in files:
        cells = []
        for release in releases:
            counts = results[release].get(file)
            cells.append(
                ", ".join(f"{number} {outcome}" for outcome, number in counts.items())
                if counts
                else "not run"
            )
        lines.append(f"| `{file}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def page_with(table: str, page: str) -> str:
    """Put the table into the page, between its two marks.

    Args:
        table: what render() returned.
        page: the page's text.

    Returns:
        The text with that table.
    """
    head, _, rest = page.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return head + BEGIN + "\n" + table + "\n" + END + tail


def problems(reports: list[Path]) -> list[str]:
    """Find what of the page and the record is not what was run.

    Args:
        reports: those that are at hand.

    Returns:
        A sentence for each; empty: all is well.
    """
    results: Results = json.loads(RECORD.read_text())
    page = PAGE.read_text()
    found = []
    if page_with(render(results), page) != page:
        found.append(f"{PAGE.name} does not show what {RECORD.name} says")
    found += [
        f"{report} is not what {RECORD.name} says of {report.stem}"
        for report in reports
        if read_report(report) != results.get(report.stem)
    ]
    return found


def main() -> int:
    """Record reports and write the table, or check both.

    Returns:
        The exit status: 1 if --check finds something.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("reports", nargs="*", type=Path, metavar="REPORT")
    options = parser.parse_args()
    if options.check:
        found = problems(sorted(REPORTS.glob("*.xml")))
        print(*found, sep="\n", file=sys.stderr)
        return 1 if found else 0
    results: Results = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    for report in options.reports:
        results[report.stem] = read_report(report)
    RECORD.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    PAGE.write_text(page_with(render(results), PAGE.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
