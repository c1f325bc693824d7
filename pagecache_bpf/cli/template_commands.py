# SPDX-License-Identifier: Apache-2.0
"""What the commands below `pagecache-bpf template` do."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pagecache_bpf import templates
from pagecache_bpf.cli.output import Output, pairs, table
from pagecache_bpf.errors import UsageError
from pagecache_bpf.templates import Template
from pagecache_bpf.templates.template import counts
from pagecache_bpf.units import format_size, parse_size, plural
from pagecache_bpf.weights.models import Model, resolve

if TYPE_CHECKING:
    from rich.console import Console

_NAMES_BYTES = 256 << 20


def derive_template(args: argparse.Namespace, out: Output) -> int:
    """Run `template derive`: derive a template from the headers of a model and write it.

    Args:
        args: `path`, the order in `order` or a file of names in `list`, the deployment in `tp`,
            `ep`, `pp`, `pp_layers`, `redundant_experts` and `rank`, `gap` and `output`.
        out: where the result goes; it is warned of kinds of tensors that are not known.

    Returns:
        The exit code, 0.
    """
    from pagecache_bpf.templates.parallel import Parallel

    names = None if args.list is None else _names(args.list)
    model = resolve(args.path)
    parallel = Parallel(args.tp, args.ep, args.pp, args.pp_layers, args.redundant_experts)
    gap, source = _gap(model, args.gap, parallel.world)
    unknown: list[str] = []
    made = templates.derive(
        model,
        args.order,
        names=names,
        rank=args.rank,
        gap=gap,
        parallel=parallel,
        unknown=unknown,
    )
    if unknown:
        out.warn(
            f"every rank reads {plural(len(unknown), 'kind')} of tensors whole: it is not known "
            f"how they are cut ({', '.join(unknown[:3])}{', ...' if len(unknown) > 3 else ''})"
        )
    extra = {"gap_bytes": gap, "gap_source": source, "read_whole": unknown}
    _deliver(made, args.output, out, extra)
    return 0


def _gap(model: Model, text: str | None, ranks: int) -> tuple[int, str]:
    """Return the bytes that are cheaper to read along than to leave out, and how they are known."""
    from pagecache_bpf.explain.device_speed import read_along_bytes
    from pagecache_bpf.templates.derive import GAP

    if text is not None:
        return parse_size(text), "option"
    measured = read_along_bytes(model.files) if ranks > 1 else None
    return (GAP, "default") if measured is None else (measured, "measured")


def _names(path: Path) -> list[str]:
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(_NAMES_BYTES)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read", str(error)) from error
    return [line for line in text.splitlines() if line]


def record_template(args: argparse.Namespace, out: Output) -> int:
    """Run `template record`: run a command and write down what it reads of a model.

    Args:
        args: `path` of the model, `words` of the command, `gap` as typed, `output`.
        out: where the result goes; it is warned of accesses that were lost and of a command that
            failed.

    Returns:
        The exit code, 0: that of the command is in the result.

    Raises:
        UsageError: there is no command.
    """
    from pagecache_bpf.templates.record import record

    words = args.words[1:] if args.words[:1] == ["--"] else args.words
    if not words:
        raise UsageError("no command was given", "", "Put it at the end, after --")
    gap = parse_size(args.gap)
    recording = record(resolve(args.path), words, gap)
    templates.write(recording.template, args.output)
    if recording.lost:
        out.warn(f"{recording.lost:,} accesses were not recorded: the buffer was full")
    if recording.exit_code:
        out.warn(f"the command ended with exit code {recording.exit_code}")
    extra = {"exit_code": recording.exit_code, "lost": recording.lost}
    _show(recording.template, args.output, out, extra)
    return 0


def show_template(args: argparse.Namespace, out: Output) -> int:
    """Run `template show`: tell what a template is and, if asked, each of its ranges in order.

    Args:
        args: `template`, its file, and whether `order` is asked for.
        out: where the result goes.

    Returns:
        The exit code, 0.
    """
    template = templates.read(args.template)
    extra: dict[str, Any] = {}
    if args.order:
        extra["order"] = [
            {
                "consumer": int(extent["consumer"]),
                "path": template.files[int(extent["file"])].path,
                "offset": int(extent["offset"]),
                "length": int(extent["length"]),
            }
            for extent in template.plain()
        ]
    _show(template, args.template, out, extra)
    return 0


def check_template(args: argparse.Namespace, out: Output) -> int:
    """Run `template check`: compare the files a template was made of with those of a model.

    Args:
        args: `template`, its file, and `path` of the model.
        out: where the result goes: which files differ, and how.

    Returns:
        The exit code, 1 if the template does not fit as a whole.
    """
    template = templates.read(args.template)
    model = resolve(args.path)
    fit = templates.check(template, model)
    data = {
        "fits": fit.whole,
        "fitting_bytes": fit.fitting_bytes,
        "total_bytes": fit.total_bytes,
        "mismatches": [{"path": mismatch.path, "why": mismatch.why} for mismatch in fit.mismatches],
    }

    def human(console: Console) -> None:
        if fit.whole:
            console.print(
                f"{args.template} fits: {plural(len(template.files), 'file')}, "
                f"{format_size(fit.total_bytes)} in its ranges"
            )
            return
        console.print(
            f"{args.template} does not fit: {format_size(fit.fitting_bytes)} of "
            f"{format_size(fit.total_bytes)} do\n"
        )
        rows = [[mismatch.path, mismatch.why] for mismatch in fit.mismatches]
        console.print(table([("file", "path"), ("difference", "text")], rows))

    out.emit(data, human)
    return 0 if fit.whole else 1


def import_template(args: argparse.Namespace, out: Output) -> int:
    """Run `template import`: make a template of a trace that MAIO's tools have recorded.

    Args:
        args: `trace`, `path` of the model whose files the trace names, `output`.
        out: where the result goes.

    Returns:
        The exit code, 0.

    Source:
        MAIO (FAST '26), whose trace format this is.
    """
    from pagecache_bpf.templates.traces import read_trace

    _deliver(read_trace(args.trace, args.path), args.output, out)
    return 0


def export_template(args: argparse.Namespace, out: Output) -> int:
    """Run `template export`: write a template as a MAIO trace, to a file or to stdout.

    Args:
        args: `template`, its file; `path`, where the model's files lie; `output`, None for stdout.
        out: where the result goes, if it is not the trace itself.

    Returns:
        The exit code, 0.

    Raises:
        UsageError: the output cannot be written, or a file has a name that a trace cannot have.
    """
    from pagecache_bpf.templates.fit import locate
    from pagecache_bpf.templates.traces import check_names, render_trace

    template = templates.read(args.template)
    paths = dict(enumerate(locate(template, Path(args.path).absolute())))
    gone = [path for path in paths.values() if not path.exists()]
    if gone:  # which is right where the trace is for another machine
        out.warn(f"{gone[0]} does not exist; PATH says where the files are")
    check_names(paths.values())
    lines = render_trace(template, paths)
    if args.output is None and out.json:
        text = "".join(lines)
        data = {"file": None, "lines": text.count("\n"), "trace": text}
        out.emit(data, lambda console: None)
        return 0
    if args.output is None:
        sys.stdout.flush()
        for some in lines:  # a name need not be text
            sys.stdout.buffer.write(some.encode("utf-8", "surrogateescape"))
        return 0
    count = 0
    try:
        with args.output.open("w", encoding="utf-8", errors="surrogateescape") as file:
            for some in lines:
                file.write(some)
                count += some.count("\n")
    except OSError as error:
        raise UsageError(f"{args.output} cannot be written", error.strerror or "") from error
    out.emit(
        {"file": str(args.output), "lines": count, "trace": None},
        lambda console: console.print(f"{args.output}: {plural(count, 'line')}"),
    )
    return 0


def diff_template(args: argparse.Namespace, out: Output) -> int:
    """Run `template diff`: compare the bytes that two templates read, and their order.

    Args:
        args: the files `left` and `right`.
        out: where the result goes.

    Returns:
        The exit code, 1 if they differ.
    """
    from pagecache_bpf.templates.compare import compare

    found = compare(templates.read(args.left), templates.read(args.right))
    data = {
        "same": found.same,
        "only_left_files": list(found.only_left_files),
        "only_right_files": list(found.only_right_files),
        "changed_files": list(found.changed),
        "common_bytes": found.common,
        "only_left_bytes": found.only_left,
        "only_right_bytes": found.only_right,
        "in_order_bytes": found.in_order,
        "left_consumers": found.consumers[0],
        "right_consumers": found.consumers[1],
    }

    def human(console: Console) -> None:
        if found.same:
            console.print("the same bytes of the same files, in the same order")
            return
        order = "nothing in common" if found.in_order is None else format_size(found.in_order)
        rows = [
            (f"only in {args.left}", _files(found.only_left_files)),
            (f"only in {args.right}", _files(found.only_right_files)),
            ("other contents", _files(found.changed)),
            ("in both", format_size(found.common)),
            ("in the same order", order),
            (f"only {args.left}", format_size(found.only_left)),
            (f"only {args.right}", format_size(found.only_right)),
            ("consumers", f"{found.consumers[0]} and {found.consumers[1]}"),
        ]
        console.print(pairs([row for row in rows if row[1]]))

    out.emit(data, human)
    return 0 if found.same else 1


def _files(paths: tuple[str, ...]) -> str:
    return f"{plural(len(paths), 'file')}: {', '.join(paths[:3])}" if paths else ""


def _deliver(
    template: Template, output: Path | None, out: Output, extra: dict[str, Any] | None = None
) -> None:
    """Write a template and say what it is, or print it."""
    if output is not None:
        templates.write(template, output)
    if output is not None or out.json:
        _show(template, output, out, extra or {})
        return
    from pagecache_bpf.templates.text import render

    sys.stdout.flush()
    for piece in render(template):
        sys.stdout.buffer.write(piece)
    sys.stdout.buffer.flush()


def _show(template: Template, file: Path | None, out: Output, extra: dict[str, Any]) -> None:
    consumers: list[dict[str, Any]] = []
    for number, name in enumerate(template.consumers):
        own = template.extents[template.extents["consumer"] == number]
        consumers.append(
            {
                "name": name,
                "extents": len(own),
                "bytes": int((own["length"] * counts(own)).sum()),
                "wanted_bytes": int(own["wanted"].sum()),
            }
        )
    data = {
        "file": None if file is None else str(file),
        "source": template.source,
        "loader": template.loader,
        "tp": template.tp,
        "bytes": template.distinct,
        "wanted_bytes": template.wanted,
        "size_bytes": template.size,
        "extents": len(template.extents),
        "files": [
            {
                "path": member.path,
                "bytes": member.size,
                "sha256": member.digest,
                "hashed_from": member.hashed_from,
                "hashed_bytes": member.hashed_bytes,
            }
            for member in template.files
        ],
        "consumers": consumers,
        **extra,
    }

    def human(console: Console) -> None:
        rows = [
            ("template", str(file)),
            ("source", f"{template.source} ({template.loader})"),
            ("files", f"{len(template.files):,}, {format_size(template.size)}"),
            ("reads", f"{format_size(data['bytes'])} in {plural(len(template.extents), 'extent')}"),
        ]
        if template.tp > 1:
            rows.insert(2, ("ranks", f"{template.tp}"))
        console.print(pairs(rows))
        console.print()
        lines = [
            [
                consumer["name"],
                f"{consumer['extents']:,}",
                format_size(consumer["bytes"]),
                format_size(consumer["wanted_bytes"]),
            ]
            for consumer in consumers
        ]
        columns = [
            ("consumer", "text"),
            ("extents", "number"),
            ("reads", "number"),
            ("uses", "number"),
        ]
        console.print(table(columns, lines))
        for extent in extra.get("order", ()):
            name = template.consumers[extent["consumer"]]
            console.print(f"{name}: {extent['path']} {extent['offset']} +{extent['length']}")

    out.emit(data, human)
