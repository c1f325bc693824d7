# SPDX-License-Identifier: Apache-2.0
"""Writes the pages that are made from the code: `python -m tools.generate_docs`.

The manual pages come from the parser (tools.man_pages), docs/metrics.md from the declaration of
the metrics.  --write puts them where they are kept in the source tree, --check fails when one that
is kept there is stale, and --man prints the manual page of a command.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pagecache_bpf.cli.parser import PROG
from pagecache_bpf.metrics import declarations
from tools.man_pages import manual_pages

DOCS = Path(__file__).resolve().parents[1] / "docs"
MAN = DOCS / "man"
METRICS = DOCS / "metrics.md"


def metrics_page() -> str:
    """Write the page about all metrics, docs/metrics.md.

    Returns:
        The page, in Markdown.
    """
    lines = [
        "<!-- Made by `python -m tools.generate_docs --write`: do not edit. -->",
        "",
        "# Metrics",
        "",
        "What `pagecache-bpf export` serves. [Monitoring](monitoring.md) says how to collect it.",
        "`pagecache-bpf stats --json` has the same numbers under the kernel's names.",
        "",
        "Counters of a policy begin at 0 when it is attached. Counters of a model only grow while",
        "the agent's process runs, over any number of attachments, and are told while the model is",
        "tagged; what `stats`, `watch` and `top` show, and `hit_ratio`, begins at 0 when the model",
        "is tagged. Sizes are bytes of whole pages. There is no histogram of the time that hooks",
        "take: neither engine measures it (`python -m benchmarks.overhead` does).",
        "",
    ]
    for kind in ("counter", "gauge"):
        lines += [f"## {kind.title()}s", "", "| name | labels | meaning |", "| --- | --- | --- |"]
        for metric in declarations.METRICS:
            if metric.kind == kind:
                labels = ", ".join(metric.labels)
                lines.append(f"| `{metric.name}` | {labels} | {metric.help} |")
        lines.append("")
    lines += ["## Labels", "", "| label | values |", "| --- | --- |"]
    used = {label for metric in declarations.METRICS for label in metric.labels}
    lines += [
        f"| `{label}` | {text} |" for label, text in declarations.LABELS.items() if label in used
    ]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Print, write or check the pages.

    Args:
        argv: the command line without the program's name; sys.argv's by default.

    Returns:
        1 when a page that is kept is stale, or belongs to a command that is gone.
    """
    parser = argparse.ArgumentParser(prog="python -m tools.generate_docs", description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--man", metavar="COMMAND", nargs="?", const="", help="print the page of a command"
    )
    what.add_argument("--write", action="store_true", help="write the pages in docs/")
    what.add_argument("--check", action="store_true", help="fail if one of them is stale")
    args = parser.parse_args(argv)
    if args.man is not None:
        print(manual_pages()[f"{PROG}-{args.man}.1" if args.man else f"{PROG}.1"], end="")
        return 0
    pages = {MAN / name: text for name, text in manual_pages().items()}
    pages[METRICS] = metrics_page()
    stale = [
        path
        for path, text in pages.items()
        if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]
    gone = sorted({*MAN.glob("*.1")} - pages.keys())
    if args.write:
        MAN.mkdir(parents=True, exist_ok=True)
        for path in stale:
            path.write_text(pages[path], encoding="utf-8")
        for path in gone:
            path.unlink()
        return 0
    for path in [*stale, *gone]:
        print(
            f"{path.name} is stale: run `python -m tools.generate_docs --write` and commit the "
            "result",
            file=sys.stderr,
        )
    return 1 if stale or gone else 0


if __name__ == "__main__":
    sys.exit(main())
