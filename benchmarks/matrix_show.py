# SPDX-License-Identifier: Apache-2.0
"""The matrix for people: a line for each cell, what is above its limit, a heat map."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import matrix_cells
from benchmarks.matrix_cells import BYTES_LIMIT, TIME_LIMIT, Ratio, Setting, paired
from benchmarks.schema import Report, Row
from pagecache_bpf.cli.output import table

_PLACE = ("device", "size", "shards", "memory", "model")


@dataclass(frozen=True)
class Result:
    """A cell that was measured.

    time, read: paired ratios to the default, of seconds and of device bytes.  of_limit: the share
    of direct I/O that the default and ours reach, None for what does not read everything.
    reader_cpu, our_cpu: median CPU seconds per GB wanted.
    """

    row: Row
    default: Row
    time: Ratio
    read: Ratio | None
    of_limit: tuple[float, float] | None
    reader_cpu: float | None
    our_cpu: float

    @property
    def over(self) -> list[str]:
        """Which of its limits the median is above, with what the quartiles say of it."""
        found = []
        for name, ratio, limit in (
            ("time", self.time, TIME_LIMIT),
            ("bytes", self.read, BYTES_LIMIT),
        ):
            if ratio and ratio.median > limit:
                sure = "" if ratio.low > limit else " (within the spread)"
                found.append(name + sure)
        return found


def results(report: Report) -> list[Result]:
    """Every cell that has a round, beside its default."""
    found = {(_place(row), row.loader, row.extra["state"]): row for row in report.rows}
    made = []
    for row in report.rows:
        default = found.get((_place(row), row.loader, "default"))
        limit = found.get((_place(row), "direct", "limit"))
        if row.policy is None or default is None:
            continue
        time = paired(default.seconds, row.seconds)
        if time is None:
            continue
        read = paired(
            [float(count) for count in default.device_bytes_rounds],
            [float(count) for count in row.device_bytes_rounds],
        )
        of_limit = None
        reads_all = matrix_cells.BY_NAME[row.loader].kind in ("whole", "engine")
        if reads_all and limit and limit.median_s and default.median_s and row.median_s:
            of_limit = limit.median_s / default.median_s, limit.median_s / row.median_s
        per_gb = row.wanted_bytes / 1e9
        cpu = [second for second in row.extra["reader_cpu_s"] if second is not None]
        made.append(
            Result(
                row,
                default,
                time,
                read,
                of_limit,
                statistics.median(cpu) / per_gb if cpu else None,
                statistics.median(row.extra["our_cpu_s"]) / per_gb,
            )
        )
    return made


def _place(row: Row) -> tuple[Any, ...]:
    return tuple(row.extra.get(key) for key in _PLACE)


def _ratio(ratio: Ratio | None) -> str:
    return f"{ratio.median:.2f} ({ratio.low:.2f}-{ratio.high:.2f})" if ratio else ""


def lines(report: Report) -> list[list[str]]:
    """Return the cells of the table, a line for each cell of the matrix."""
    made = []
    for result in results(report):
        row, default = result.row, result.default
        read = row.device_bytes
        made.append(
            [
                row.case,
                row.loader,
                f"{row.policy}" + ("" if row.engine == "agent" else f", {row.engine}"),
                f"{len(row.seconds)}",
                f"{default.median_s:.3f}" if default.median_s else "",
                _ratio(result.time),
                "{:.0%} {:.0%}".format(*result.of_limit) if result.of_limit else "",
                _ratio(result.read),
                f"{read / row.wanted_bytes:.2f}" if read is not None else "",
                f"{result.reader_cpu:.2f}" if result.reader_cpu is not None else "",
                f"{result.our_cpu:.2f}",
                ", ".join(result.over),
            ]
        )
    return made


_COLUMNS = [
    ("setting", "text"),
    ("reader", "text"),
    ("policy", "text"),
    ("rounds", "number"),
    ("default s", "number"),
    ("time, times default", "number"),
    ("of limit: default, ours", "number"),
    ("bytes, times default", "number"),
    ("read/wanted", "number"),
    ("CPU s/GB reader", "number"),
    ("ours", "number"),
    ("above", "text"),
]


def markdown(report: Report) -> str:
    """Return the same table for a document."""
    head = [name for name, _ in _COLUMNS]
    rule = ["---:" if kind == "number" else "---" for _, kind in _COLUMNS]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, rule, *lines(report)])


def print_matrix(report: Report, wanted: Sequence[Setting], console: Console) -> None:
    """Print what it was measured on, the table, and what is missing."""
    machine = report.machine
    gib = machine["memory_bytes"] / 2**30
    console.print(
        f"Linux {machine['kernel']}, {machine['cpus']} CPUs, {gib:.0f} GiB", highlight=False
    )
    console.width = max(210, console.width)
    console.print(table(_COLUMNS, lines(report)))
    found = results(report)
    over = [result for result in found if result.over]
    console.print(
        f"{len(found)} cells, {len(over)} above {TIME_LIMIT} times the default's time or "
        f"{BYTES_LIMIT} times its bytes"
    )
    missing = {
        (cell.reader.name, cell.absent)
        for cell in matrix_cells.cells(wanted, bool(machine.get("short")))
        if cell.absent
    }
    for name, why in sorted(missing):
        console.print(f"{name}: {why}")


def draw(report: Report, output: Path) -> None:
    """Draw the heat map: readers down, settings across, colored by the time's ratio.

    Each square says how many times the default's time the load took and, for whole loads, which
    share of the device's limit it had.  Blue is faster, red slower, white the same.

    Args:
        report: what was measured.
        output: the file; its suffix chooses the format.
    """
    # Slow to import, and absent where only the numbers are wanted.
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import colors, patches, pyplot

    matplotlib.rcParams["svg.hashsalt"] = "pagecache-bpf"
    found = results(report)
    columns = list(dict.fromkeys((result.row.case, _policy(result.row)) for result in found))
    order = [reader.name for reader in matrix_cells.READERS]
    names = sorted({result.row.loader for result in found}, key=order.index)
    figure, axes = pyplot.subplots(
        figsize=(2.6 + 0.62 * len(columns), 2.6 + 0.55 * len(names)), layout="constrained"
    )
    norm = colors.TwoSlopeNorm(1.0, 0.5, 1.5)
    shades = matplotlib.colormaps["RdBu_r"]
    for result in found:
        x, y = columns.index((result.row.case, _policy(result.row))), names.index(result.row.loader)
        ratio = result.time.median
        axes.add_patch(
            patches.Rectangle((x, y), 1, 1, facecolor=shades(norm(min(max(ratio, 0.5), 1.5))))
        )
        text = f"{ratio:.2f}"
        text += f"\n{result.of_limit[1]:.0%}" if result.of_limit else ""
        dark = abs(min(max(ratio, 0.5), 1.5) - 1) > 0.35
        axes.text(
            x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=7,
            color="white" if dark else "black",
        )  # fmt: skip
    axes.set_xlim(0, len(columns))
    axes.set_ylim(len(names), 0)
    axes.set_facecolor("#ececec")
    axes.set_xticks([x + 0.5 for x in range(len(columns))])
    axes.set_xticklabels([f"{case}: {policy}" for case, policy in columns], rotation=60, ha="right")
    axes.set_yticks([y + 0.5 for y in range(len(names))])
    axes.set_yticklabels(names)
    axes.tick_params(length=0, labelsize=7)
    axes.set_title(
        "Time with a policy, times the kernel's default (blue: faster, red: slower); below it the "
        "share\nof the device's limit (direct I/O). Gray: not part of this form.",
        loc="left",
        fontsize=9,
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {"metadata": {"Date": None}} if output.suffix == ".svg" else {}
    figure.savefig(output, dpi=110, **options)
    pyplot.close(figure)


def _policy(row: Row) -> str:
    return f"{row.policy}" if row.engine == "agent" else f"{row.policy} ({row.engine})"
