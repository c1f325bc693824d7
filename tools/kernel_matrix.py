#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Keeps the tables of docs/kernels.md: what of the module's tests passes on which kernel.

One has the tests by file; the other, of tests/vm/test_kmod_filesystems.py, each family of hooks on
each file system.  Reports of pytest that are named (build/test/kernels/RELEASE.xml, see `make
test-kernels`) are taken into docs/kernels.json, and the tables are written; a report of some files
replaces what is known of these.  `--check` says whether the tables are what was recorded and, where
reports lie in build/test/kernels, whether these are what was recorded.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "docs" / "kernels.json"
PAGE = ROOT / "docs" / "kernels.md"
REPORTS = ROOT / "build" / "test" / "kernels"
TABLES = ("table", "file systems")
PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"

#: Kernel release, test file (without test_ and .py), outcome: number of tests.
Results = dict[str, dict[str, dict[str, int]]]
#: Kernel release, file system, family of hooks: outcome.
Cells = dict[str, dict[str, dict[str, str]]]


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
        counts.setdefault(file, Counter())[outcome_of(case)] += 1
    return {file: dict(sorted(counts[file].items())) for file in sorted(counts)}


def outcome_of(case: ElementTree.Element) -> str:
    """Tell what became of one test.

    Args:
        case: its element of the report.

    Returns:
        One of passed, failed and skipped.
    """
    kinds = {child.tag for child in case}
    if "skipped" in kinds:
        return SKIPPED
    return FAILED if kinds & {"failure", "error"} else PASSED


def read_cells(path: Path) -> dict[str, dict[str, str]]:
    """Find the outcomes of the tests of file systems in one report.

    Args:
        path: a report of pytest's, in JUnit's format.

    Returns:
        By file system and family of hooks; of a test that was skipped the reason.
    """
    cells: dict[str, dict[str, str]] = {}
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        if found := re.fullmatch(r"test_hooks\[(\w+)-(\w+)\]", case.attrib["name"]):
            outcome = outcome_of(case)
            if outcome == SKIPPED:
                outcome = case.find("skipped").attrib["message"]  # type: ignore[union-attr]
            cells.setdefault(found[1], {})[found[2]] = outcome
    return cells


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


def render_cells(cells: Cells) -> str:
    """Write the table of file systems: a row for each kernel and each of them.

    Args:
        cells: what read_cells() said, by kernel release.

    Returns:
        The table in Markdown.
    """
    families = list(
        dict.fromkeys(
            family for found in cells.values() for row in found.values() for family in row
        )
    )
    lines = [
        f"| kernel | file system | {' | '.join(families)} |",
        f"| --- | --- |{' --- |' * len(families)}",
    ]
    for release in sorted(cells):
        for name, row in cells[release].items():
            outcomes = " | ".join(row.get(family, "not run") for family in families)
            lines.append(f"| {release} | {name} | {outcomes} |")
    return "\n".join(lines) + "\n"


def page_with(tables: Sequence[str], page: str) -> str:
    """Put the tables into the page, each between its two marks.

    Args:
        tables: what render() and render_cells() returned.
        page: the page's text.

    Returns:
        The text with these tables.
    """
    for name, table in zip(TABLES, tables, strict=True):
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
        head, _, rest = page.partition(begin)
        _, _, tail = rest.partition(end)
        page = head + begin + "\n" + table + "\n" + end + tail
    return page


def recorded() -> tuple[Results, Cells]:
    """Read the record.

    Returns:
        What was run last on each kernel: tests by file, and file systems.
    """
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    return record.get("files", {}), record.get("file systems", {})


def problems(reports: list[Path]) -> list[str]:
    """Find what of the page and the record is not what was run.

    Args:
        reports: those that are at hand.

    Returns:
        A sentence for each; empty: all is well.
    """
    results, cells = recorded()
    page = PAGE.read_text()
    found = []
    if page_with([render(results), render_cells(cells)], page) != page:
        found.append(f"{PAGE.name} does not show what {RECORD.name} says")
    found += [
        f"{report} is not what {RECORD.name} says of {report.stem}"
        for report in reports
        if not read_report(report).items() <= results.get(report.stem, {}).items()
        or not read_cells(report).items() <= cells.get(report.stem, {}).items()
    ]
    return found


def take(report: Path, results: Results, cells: Cells) -> None:
    """Record a report: what it says of a file, or of a file system, is what was run last.

    Args:
        report: a report of pytest's, named after the kernel's release.
        results: the record of files, changed in place.
        cells: the record of file systems, changed in place.
    """
    files = {**results.get(report.stem, {}), **read_report(report)}
    results[report.stem] = dict(sorted(files.items()))
    if found := read_cells(report):
        cells[report.stem] = {**cells.get(report.stem, {}), **found}


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
    results, cells = recorded()
    for report in options.reports:
        take(report, results, cells)
    record = {"files": dict(sorted(results.items())), "file systems": dict(sorted(cells.items()))}
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    PAGE.write_text(page_with([render(results), render_cells(cells)], PAGE.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
