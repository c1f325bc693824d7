# SPDX-License-Identifier: Apache-2.0
"""The host's side of a benchmark: boot the guest, run the benchmark in it, get the rows back.

A benchmark is one module that runs on both sides: without --inside it boots the guest and
starts itself there with --inside FILE; FILE lies below build/, which both sides share.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from benchmarks import schema
from benchmarks.guest import Disk, Guest, GuestError, end_on_sigterm, explain
from pagecache_bpf.errors import PagecacheError, UsageError
from pagecache_bpf.policy.observing import VARIABLE
from pagecache_bpf.units import parse_size

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build"
MODELS = BUILD / "models"
_MIB = 1 << 20

Say = Callable[[str], None]


def progress() -> Say:
    """Return a function that prints a line on stderr with the seconds since now in front."""
    begun = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - begun:6.1f}s] {text}", file=sys.stderr, flush=True)

    return say


def size_argument(text: str) -> int:
    """Parse a size option for argparse: "64M", "4G"."""
    try:
        return parse_size(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def add_common(parser: argparse.ArgumentParser, name: str) -> None:
    """Add the options that every benchmark has."""
    parser.add_argument(
        "--out",
        type=Path,
        default=BUILD / "bench" / f"{name}.json",
        metavar="FILE",
        help="where the results go (default: build/bench/NAME.json)",
    )
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.add_argument("--cpus", type=int, default=2, help="virtual CPUs (default: 2)")
    parser.add_argument(
        "--kernel",
        type=Path,
        metavar="IMAGE",
        help="the guest's kernel (default: the newest installed 6.12)",
    )
    parser.add_argument("--memory", help="the guest's memory (default: what the case needs)")
    parser.add_argument("--timeout", type=float, default=3600, metavar="SECONDS")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)


def memory_for(wanted_bytes: int) -> str:
    """Return the memory that a guest needs to load a checkpoint.

    That is the cached pages, the loader's copy, the reference and a direct read's buffers, beside
    the system.

    Args:
        wanted_bytes: what is loaded.

    Returns:
        The memory, as QEMU's option takes it.

    Raises:
        UsageError: this machine has less.
    """
    need = 4 * wanted_bytes + 1536 * _MIB
    have = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * 3 // 4
    if need > have:
        raise UsageError(
            f"a checkpoint of {wanted_bytes / 1e9:.1f} GB is too large for this machine",
            f"the guest would need {need >> 20} MiB, of which at most {have >> 20} are to spare",
            "Take a smaller checkpoint",
        )
    return f"{max(2048, need // _MIB)}M"


def disk_for(wanted_bytes: int, cap_bytes_per_s: int | None) -> Disk:
    """Return a disk with room for the files and the file system's own."""
    return Disk(f"{wanted_bytes * 5 // 4 // _MIB + 512}M", cap_bytes_per_s)


def run_inside(
    module: str,
    argv: Sequence[str],
    options: argparse.Namespace,
    wanted: int,
    cap: int | None,
    icount: bool = False,
) -> schema.Report:
    """Boot the guest, run `python -m MODULE ARGV --inside FILE` in it and read FILE.

    Progress comes out on stderr as it happens. Raises PagecacheError when the guest is lost,
    the benchmark fails in it, or its kernel complained: the message names the console log.
    """
    name = module.rpartition(".")[2]
    answer = BUILD / "bench" / f".{name}.{os.getpid()}.json"
    answer.parent.mkdir(parents=True, exist_ok=True)
    guest = Guest(
        cpus=options.cpus,
        memory=options.memory or memory_for(wanted),
        kernel=options.kernel,
        disks=[disk_for(wanted, cap)],
        timeout_s=options.timeout,
        icount=icount,
        name=name,
        # Policies are measured; what the observer costs is a benchmark of its own.
        env={VARIABLE: "off"},
    )
    command = ["python", "-m", module, *argv, "--inside", str(answer)]
    try:
        result = guest.run(command, echo=sys.stderr)
        if result.lost or result.returncode != 0 or result.problems:
            explain(result)
            console = result.console.read_text(errors="replace").splitlines()
            raise PagecacheError(
                f"the benchmark failed in the guest (exit code {result.returncode})",
                result.why_lost or "; ".join(result.problems[:3]) or "see its output above",
                f"The guest's console log is {result.console}; it ends with:\n"
                + "\n".join(console[-15:]),
            )
        return schema.read(answer)
    except GuestError as error:
        raise PagecacheError("cannot boot the guest", str(error)) from error
    finally:
        answer.unlink(missing_ok=True)


def finish(
    report: schema.Report, options: argparse.Namespace, show: Callable[[Console], None]
) -> int:
    """Write the results and print them; 1 when some bytes were wrong."""
    schema.write(options.out, report)
    if options.json:
        print(options.out.read_text(), end="")
    else:
        show(Console())
        print(f"results: {options.out}", file=sys.stderr)
    wrong = [row for row in report.rows if not row.correct]
    for row in wrong:
        print(f"WRONG BYTES: {row.case} {row.loader} on {row.fs}", file=sys.stderr)
    return 1 if wrong else 0


def guarded(main: Callable[[], int]) -> int:
    """Run a benchmark's main; errors become messages and exit codes."""
    end_on_sigterm()
    try:
        code = main()
        sys.stdout.flush()
        return code
    except PagecacheError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader has had enough, as `head` does
        # What is left in the buffer must not be written when Python ends, either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
