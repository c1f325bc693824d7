# SPDX-License-Identifier: Apache-2.0
"""pagecache-bpf run: run a command with its weights read ahead of it."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from types import FrameType
from typing import TYPE_CHECKING

from pagecache_bpf.cli.output import TROUBLESHOOTING, Output
from pagecache_bpf.cli.parser import Group
from pagecache_bpf.errors import PagecacheError, UsageError

if TYPE_CHECKING:
    from pagecache_bpf.api import Load

GROUP = Group.USE
HELP = "run a command with its weights read ahead of it"
DESCRIPTION = """\
Runs COMMAND, whose weights are read ahead of it in the best way this user has: by the
controller, by a policy (root), or by threads of this process. Its weights are those of --weights,
or else of the words of COMMAND that are paths of weights or names in the Hugging Face cache
(`--model PATH` and `--model=PATH` alike). COMMAND gets its signals and its terminal as without
this, and its exit code is returned (128 + N when signal N ended it, 126 and 127 when it cannot be
run). At the end a report goes to stderr, and what was not in the page cache before is dropped."""
EXAMPLES = (
    ("pagecache-bpf run -- vllm serve /models/llama-3-8b", "any server, unchanged"),
    (
        "pagecache-bpf run --device cuda:1 --budget 16GiB -- llama-server -m model.gguf",
        "for one device, with a bound",
    ),
    (
        "pagecache-bpf run --prefetch -- vllm serve /models/llama-3-8b",
        "reads the weights at once, while the server still imports its framework",
    ),
)
JSON = {
    "run": {
        "reports[]": "on stderr, one for each of the weights: the fields of pagecache_bpf.Report",
    }
}
NOT_EXECUTABLE, NOT_FOUND = 126, 127  # as the shell counts
FORWARDED = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
# The terminal sends these to the command as well; it decides.
LEFT_TO_IT = (signal.SIGINT, signal.SIGQUIT)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of run."""
    parser.add_argument(
        "--weights",
        metavar="PATH",
        action="append",
        default=[],
        help="what COMMAND loads: a file, a directory, a Hugging Face snapshot, or ORG/NAME in its "
        "cache; may be given several times",
    )
    parser.add_argument("--policy", metavar="NAME", help="policy (default: the best there is)")
    parser.add_argument(
        "--device",
        metavar="DEVICE",
        action="append",
        default=[],
        help="accelerator that it loads for (see `topology`); may be given several times",
    )
    parser.add_argument(
        "--budget",
        metavar="SIZE",
        help="of the weights, so much may be in the page cache at a time",
    )
    parser.add_argument("--template", metavar="FILE", help="I/O template: the order of the reads")
    parser.add_argument(
        "--prefetch",
        action="store_true",
        help="read the weights at once, while COMMAND still starts: as much as --budget allows, or"
        " half of the memory that is free",
    )
    parser.add_argument(
        "--keep", action="store_true", help="leave the weights in the page cache at the end"
    )
    parser.add_argument(
        "command",
        metavar="COMMAND",
        nargs=argparse.REMAINDER,
        help="the command with its arguments, after --",
    )


def run(args: argparse.Namespace, out: Output) -> int:
    """Open the loads, run, report."""
    from pagecache_bpf import api

    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        raise UsageError("there is no command to run", "", "Write it after --")
    wanted: list[str] = args.weights
    refused: list[PagecacheError] = []
    if not wanted:
        from pagecache_bpf.weights.command_line import models_in

        wanted, refused = models_in(command)
    if not wanted and refused:
        raise refused[0]
    for error in refused:
        out.warn(str(error))
    if not wanted:
        raise UsageError(
            "no weights were found in the command",
            "none of its words is a path of weights or a name in the Hugging Face cache",
            "Name them with --weights PATH",
            f"{TROUBLESHOOTING}#no-weights-were-found-in-the-command",
        )
    with ExitStack() as stack:
        loads: list[Load] = []
        for path in wanted:
            load = api.load(
                path,
                devices=args.device,
                policy=args.policy,
                budget=args.budget,
                template=args.template,
                keep=args.keep,
                prefetch=args.prefetch,
            )
            stack.callback(load.done)
            loads.append(load)
        code = _run(command)
        stack.close()
    reports = [load.report() for load in loads]
    if out.json:
        print(json.dumps({"reports": [report.as_json() for report in reports]}), file=sys.stderr)
    else:
        for report in reports:
            out.remark(str(report))
    return code


def _run(command: Sequence[str]) -> int:
    """Run it, pass signals on, and return what the shell would."""
    child: subprocess.Popen[bytes] | None = None
    early: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        if child is None:
            early.append(number)
        elif child.poll() is None:
            child.send_signal(number)

    before = {number: signal.signal(number, forward) for number in FORWARDED}
    # Handled here by doing nothing: a signal that is handled has its default back in the command,
    # one that is ignored stays ignored, as nohup(1) wants it.
    for left in LEFT_TO_IT:
        if signal.getsignal(left) != signal.SIG_IGN:
            before[left] = signal.signal(left, lambda number, frame: None)
    try:
        # Descriptors that were given to us are meant for it; ours close by themselves.
        child = subprocess.Popen(command, close_fds=False)
        for number in early:
            child.send_signal(number)
        code = child.wait()
    except FileNotFoundError as error:
        raise _cannot_run(command[0], error, NOT_FOUND) from None
    except OSError as error:
        raise _cannot_run(command[0], error, NOT_EXECUTABLE) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code


def _cannot_run(name: str, error: OSError, code: int) -> PagecacheError:
    failed = UsageError(
        f"{name} cannot be run",
        error.strerror or os.strerror(error.errno or 0),
        "Check the command",
    )
    failed.exit_code = code
    return failed
