# SPDX-License-Identifier: Apache-2.0
"""pagecache-bpf template: I/O templates, the order in which a loader wants the bytes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from pagecache_bpf.cli.output import Output
from pagecache_bpf.cli.parser import Group

if TYPE_CHECKING:
    from collections.abc import Callable

GROUP = Group.POLICIES
HELP = "derive, record, look at, check and convert I/O templates"
DESCRIPTION = """\
An I/O template lists, in the order of a loader, the parts of a model's files that it will read,
and for which of its processes. Policies such as maio read ahead by it. It knows the files by
their sizes and headers, and is refused where it does not fit. Only `record` needs root. Use one
with `attach maio --template TEMPLATE PATH`."""
EXAMPLES = (
    ("pagecache-bpf template derive /models/llama-3-8b -o llama.template", "from the headers"),
    (
        "pagecache-bpf template derive /models/llama-3-8b --tp 2 -o llama.tp2",
        "for two tensor-parallel ranks",
    ),
    (
        "pagecache-bpf template derive /models/deepseek-v3 --tp 8 --ep 8 --rank 3 -o ds.rank3",
        "one rank of eight that share the experts",
    ),
    (
        "pagecache-bpf template record -o mine.template --path /models/llama-3-8b -- "
        "python3 load.py",
        "from a real load",
    ),
    ("pagecache-bpf template check llama.template /models/llama-3-8b", "does it fit?"),
    ("pagecache-bpf template diff llama.template mine.template", "in what they differ"),
)
_SUMMARY = {
    "file": "where the template lies; null if it was only printed",
    "source": "derived, recorded or imported",
    "loader": "whose order it is",
    "tp": "tensor-parallel ranks of the load",
    "bytes": "bytes that it reads, each once",
    "wanted_bytes": "bytes that the consumers use, each for itself",
    "size_bytes": "size of its files",
    "extents": "number of ranges",
    "files[].path": "a file, below the model's directory",
    "files[].bytes": "its size",
    "files[].sha256": "digest of what identifies it: its header",
    "files[].hashed_from": "where in the file that begins",
    "files[].hashed_bytes": "and how long it is; 0: the first and the last 64 KiB",
    "consumers[].name": "a process that reads",
    "consumers[].extents": "number of its ranges",
    "consumers[].bytes": "bytes in them",
    "consumers[].wanted_bytes": "of these, bytes that it uses",
}
JSON = {
    "template derive": {
        **_SUMMARY,
        "gap_bytes": "slices closer than this are read as one",
        "gap_source": "option, measured (what a request costs the device), or default",
        "read_whole[]": "a tensor of a kind that is not known, which every rank reads whole",
    },
    "template record": {
        **_SUMMARY,
        "exit_code": "of the command; negative: the signal that ended it",
        "lost": "accesses that were not recorded, since the buffer was full",
    },
    "template show": {
        **_SUMMARY,
        "order[].consumer": "with --order: number of the consumer,",
        "order[].path": "and what it reads next: the file,",
        "order[].offset": "from here,",
        "order[].length": "so many bytes",
    },
    "template check": {
        "fits": "whether every file is the one it was made for",
        "fitting_bytes": "bytes of its ranges in files that fit",
        "total_bytes": "bytes of its ranges",
        "mismatches[].path": "a file that does not fit",
        "mismatches[].why": "in what it differs",
    },
    "template import": _SUMMARY,
    "template export": {
        "file": "where the trace lies; null if it was printed",
        "lines": "number of its lines",
        "trace": "the trace itself; null if it was written to a file",
    },
    "template diff": {
        "same": "whether both read the same bytes of the same files in the same order",
        "only_left_files[]": "files that only the first one has",
        "only_right_files[]": "files that only the second one has",
        "changed_files[]": "files that both have, with different identities",
        "common_bytes": "bytes that both read",
        "only_left_bytes": "bytes that only the first one reads",
        "only_right_bytes": "bytes that only the second one reads",
        "in_order_bytes": "of those that both read, bytes that come in the same order; null: none",
        "left_consumers": "consumers of the first one",
        "right_consumers": "consumers of the second one",
    },
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add derive, record, show, check, import, export and diff."""
    from pagecache_bpf.cli.parser import add_command

    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, summary: str, description: str = "") -> argparse.ArgumentParser:
        command = add_command(commands, name, summary, description)
        command.set_defaults(template_command=name)
        return command

    derive = add(
        "derive",
        "make a template from the headers of the files",
        "Reads the headers of safetensors, GGUF or PyTorch (zip) files and lists all tensors in\n"
        "the order in which loaders read them. Nothing is run and no data is read.",
    )
    derive.add_argument(
        "path", metavar="PATH", help="weight file, directory of shards, or snapshot"
    )
    derive.add_argument(
        "--order",
        metavar="ORDER",
        choices=("keys", "offset", "natural"),
        default="keys",
        help="keys: file by file, as safe_open(...).keys() lists the tensors (transformers 4, "
        "vLLM, SGLang; the default); offset: file by file, as they lie; natural: all files "
        "together, by name with numbers as numbers (transformers 5)",
    )
    derive.add_argument(
        "--list",
        metavar="NAMES",
        type=Path,
        help="file with the names of the tensors in the order in which they are read, one a line; "
        "others are left out",
    )
    derive.add_argument(
        "--tp",
        metavar="N",
        type=_positive,
        default=1,
        help="tensor-parallel ranks, which each read their slice of tensors that are usually split "
        "(default: 1)",
    )
    derive.add_argument(
        "--ep",
        metavar="N",
        type=_positive,
        default=1,
        help="expert-parallel ranks, which each read their share of the experts whole "
        "(default: 1: experts are sliced like other layers)",
    )
    derive.add_argument(
        "--pp",
        metavar="N",
        type=_positive,
        default=1,
        help="stages of the pipeline, which each read their layers (default: 1)",
    )
    derive.add_argument(
        "--pp-layers",
        metavar="LIST",
        type=_numbers,
        default=(),
        help="layers of each stage, as in VLLM_PP_LAYER_PARTITION: 30,31 (default: even shares)",
    )
    derive.add_argument(
        "--redundant-experts",
        metavar="LIST",
        type=_numbers,
        default=(),
        help="experts that exist twice, numbered as in the model: 0,1,17; they are placed behind "
        "the others",
    )
    derive.add_argument("--rank", metavar="R", type=_count, help="only this rank, from 0")
    derive.add_argument(
        "--gap",
        metavar="SIZE",
        help="slices closer than this are read as one (default: what a request costs the device in "
        "bytes, measured once, for 0.5 s, where there is more than one rank; 0 where it cannot be "
        "measured)",
    )
    _add_output(derive)

    record = add(
        "record",
        "make a template from what a command reads",
        "Runs COMMAND and records what it and its children read of the files below PATH, in their\n"
        "order, one consumer for each process. Options come before COMMAND.",
    )
    record.add_argument(
        "--path", metavar="PATH", required=True, help="the model whose files are recorded"
    )
    _add_output(record, required=True)
    record.add_argument(
        "--gap",
        metavar="SIZE",
        default="128KiB",
        help="accesses closer than this are joined (default: 128KiB)",
    )
    record.add_argument(
        "words", metavar="COMMAND", nargs=argparse.REMAINDER, help="what is run, with its arguments"
    )

    show = add("show", "show a template")
    show.add_argument("template", metavar="TEMPLATE", type=Path, help="the template")
    show.add_argument("--order", action="store_true", help="list every range, in order")

    check = add(
        "check",
        "check whether a template fits files",
        "Compares sizes and headers with those that the template was made for; exits with 1 when\n"
        "something differs.",
    )
    check.add_argument("template", metavar="TEMPLATE", type=Path, help="the template")
    check.add_argument("path", metavar="PATH", help="the model: file, directory or snapshot")

    importing = add(
        "import",
        "make a template from a MAIO text trace",
        "Reads lines `PATH OFFSET LENGTH NUMA`. A trace for one NUMA node becomes one consumer,\n"
        "one for several nodes a consumer for each; -1 leaves the node open and belongs to the\n"
        "line before. The files have to be there: the trace does not say what they contained.",
    )
    importing.add_argument("trace", metavar="TRACE", type=Path, help="the trace")
    importing.add_argument(
        "--path",
        metavar="PATH",
        type=Path,
        help="directory of the files, which are found by their names (default: as the trace says)",
    )
    _add_output(importing)

    export = add("export", "write a template as a MAIO text trace")
    export.add_argument("template", metavar="TEMPLATE", type=Path, help="the template")
    export.add_argument(
        "path", metavar="PATH", nargs="?", default=".", help="where the files are (default: here)"
    )
    _add_output(export, "TRACE")

    diff = add(
        "diff",
        "show in what two templates differ",
        "Exits with 1 when they do.",
    )
    diff.add_argument("left", metavar="ONE", type=Path, help="a template")
    diff.add_argument("right", metavar="OTHER", type=Path, help="another one")


def _add_output(
    parser: argparse.ArgumentParser, what: str = "TEMPLATE", required: bool = False
) -> None:
    parser.add_argument(
        "-o",
        "--output",
        metavar=what,
        type=Path,
        required=required,
        help=f"where the {what.lower()} goes" + ("" if required else " (default: stdout)"),
    )


def _positive(text: str) -> int:
    number = _count(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 1 on")
    return number


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(_count(word.strip()) for word in text.split(","))


def _count(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 6):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def run(args: argparse.Namespace, out: Output) -> int:
    """Run the subcommand: derive, record, show and so on."""
    from pagecache_bpf.cli import template_commands

    command: Callable[[argparse.Namespace, Output], int] = getattr(
        template_commands, f"{args.template_command}_template"
    )
    return command(args, out)
