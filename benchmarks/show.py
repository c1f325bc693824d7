# SPDX-License-Identifier: Apache-2.0
"""Results for people: tables on the terminal, a picture of residency over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.cachestat import Sample
from benchmarks.schema import Report, Row

_STATE_TEXT = {
    "default": "kernel default",
    "attached": "{policy}",
    "detached": "detached again",
    "limit": "direct I/O",
    "again": "{policy} again",
    "warm": "(cached)",
}


def megabytes(count: float) -> str:
    """Format bytes as MB (10**6), the unit of devices."""
    return f"{count / 1e6:.1f}"


def state_text(row: Row) -> str:
    """Return what was in force when the row was measured, in words."""
    if _is_other(row):
        return names_of(row)[1]
    text = _STATE_TEXT.get(str(row.extra.get("state")), str(row.extra.get("state")))
    return text.format(policy=row.policy)


def _is_other(row: Row) -> bool:
    """Tell whether it is another's: only those have no policy when they load again."""
    state = row.extra.get("state")
    return state == "peer" or (state == "again" and not row.policy)


def names_of(row: Row) -> tuple[str, str]:
    """Return a row's loader and who read ahead for it; loaders that replace it do so themselves."""
    if not _is_other(row):
        return row.loader, state_text(row)
    if row.extra["state"] == "again":
        return "again", row.loader
    for word in (" after ", " + "):
        loader, found, warmer = row.loader.partition(word)
        if found:
            return loader, warmer
    return "others", row.loader


def _cells(row: Row) -> list[str]:
    median = row.median_s
    speedup, share = row.extra.get("speedup"), row.extra.get("of_limit")
    spread = f"{min(row.seconds):.2f}-{max(row.seconds):.2f}" if len(row.seconds) > 1 else ""
    return [
        "" if row.loader == "direct" else names_of(row)[0],
        state_text(row),
        f"{median:.2f}" if median else "-",
        spread,
        megabytes(row.wanted_bytes / median) if median else "-",
        f"{speedup:.2f}x" if speedup else "",
        f"{share:.0%}" if share else "",
        megabytes(row.device_bytes) if row.device_bytes is not None else "-",
    ]


def _empty(title: str, words: Sequence[str], numbers: Sequence[str]) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=0,
    )
    for heading in words:
        table.add_column(heading, no_wrap=True)
    for heading in numbers:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _style(row: Row) -> str:
    return "red" if not row.correct else "bold green" if row.policy else ""


def cold_table(rows: Sequence[Row], title: str) -> Table:
    """Return one case's cold loads, grouped by loader; fits 80 columns."""
    numbers = ("median s", "range", "MB/s", "faster", "of limit", "MB read")
    table = _empty(title, ("loader", "readahead by"), numbers)
    # By loader in the order of the first, the limit last.
    names = list(dict.fromkeys(names_of(row)[0] for row in rows if row.loader != "direct"))
    for name in [*names, "direct"]:
        group = [row for row in rows if names_of(row)[0] == name]
        for number, row in enumerate(group):
            cells = _cells(row)
            if number:
                cells[0] = ""
            table.add_row(*cells, style=_style(row), end_section=number == len(group) - 1)
    return table


def one_table(rows: Sequence[Row], title: str) -> Table:
    """Cold loads of several cases and both kernels in one table; fits 80 columns."""
    numbers = ("median s", "MB/s", "faster", "of limit")
    table = _empty(title, ("model, where", "loader", "readahead by"), numbers)
    for (host, case), found in groupby((row for _, rows in by_case(rows) for row in rows), _place):
        group = list(found)
        for number, row in enumerate(group):
            loader, state, median, _, speed, faster, share, _ = _cells(row)
            table.add_row(
                {0: case, 1: f"  {host}"}.get(number, ""),
                loader,
                state,
                median,
                speed,
                faster,
                share,
                style=_style(row),
                end_section=number == len(group) - 1,
            )
    return table


def _place(row: Row) -> tuple[str, str]:
    return str(row.extra.get("host", "guest")), row.case


def verdict(rows: Sequence[Row]) -> str:
    """Return one line on whether every load got the right bytes."""
    wrong = [f"{row.loader} ({state_text(row)})" for row in rows if not row.correct]
    if wrong:
        return f"[bold red]WRONG BYTES: {', '.join(wrong)}[/]"
    return "Every tensor and file was byte for byte what the device holds, in every load."


def print_cold(report: Report, console: Console) -> None:
    """Print all cases of a cold-load report."""
    for title, rows in by_case(report.rows):
        console.print(cold_table(rows, title))
        console.print(verdict(rows))
        console.print()


def by_case(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """Rows grouped by checkpoint, file system and delay, with a title each."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        title = f"{row.case}, {megabytes(row.wanted_bytes)} MB, {row.fs}"
        if row.extra.get("host") == "native":
            title += ", this machine's own kernel"
        if row.extra.get("delay_ms") is not None:
            title += f", {row.extra['delay_ms']:g} ms per request"
        if row.extra.get("cap_bytes_per_s"):
            title += f", {megabytes(row.extra['cap_bytes_per_s'])} MB/s device"
        groups.setdefault(title, []).append(row)
    return list(groups.items())


def plot_residency(
    curves: Mapping[str, Sequence[Sample]],
    total_bytes: int,
    title: str,
    outputs: Sequence[Path],
    ends_s: Mapping[str, float],
) -> None:
    """Draw residency over time, one curve a policy, the end of each load marked.

    The output's suffix chooses the format (.svg, .png).
    """
    # Slow to import, and absent where only the numbers are wanted.
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "pagecache-bpf"  # the same input, the same file
    colors = ("#8a8f98", "#1a7f4b", "#c2571a", "#2f5fb3")
    figure, axes = pyplot.subplots(figsize=(8, 4.2), layout="constrained")
    longest = max(ends_s.values())
    for (name, samples), color in zip(curves.items(), colors, strict=False):
        end = ends_s[name]
        points = [(max(s.at_s, 0.0), s.resident / 1e6) for s in samples if s.at_s <= end]
        points.append((end, min(samples[-1].resident, total_bytes) / 1e6))
        axes.plot(*zip(*points, strict=True), color=color, linewidth=2)
        axes.plot([end], [points[-1][1]], "o", color=color)
        left = end < longest / 2
        axes.annotate(
            f"{name}: {end:.1f} s",
            (end, points[-1][1]),
            xytext=(-4 if left else 4, 8),
            textcoords="offset points",
            ha="left" if left else "right",
            color=color,
            fontweight="bold",
        )
    axes.axhline(total_bytes / 1e6, color="#c9ccd1", linewidth=1, linestyle="--", zorder=0)
    axes.set_xlim(0, longest * 1.04)
    axes.set_ylim(0, total_bytes / 1e6 * 1.14)
    axes.set_xlabel("seconds since the load began")
    axes.set_ylabel("checkpoint in the page cache (MB)")
    axes.set_title(title, loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    for output in outputs:
        output.parent.mkdir(parents=True, exist_ok=True)
        options: dict[str, Any] = {"metadata": {"Date": None}} if output.suffix == ".svg" else {}
        figure.savefig(output, dpi=150, **options)
    pyplot.close(figure)
