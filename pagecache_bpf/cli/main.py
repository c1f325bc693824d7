# SPDX-License-Identifier: Apache-2.0
"""Runs a command: errors become messages on stderr and exit codes, never tracebacks."""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

from pagecache_bpf.cli.output import Output
from pagecache_bpf.cli.parser import build_parser
from pagecache_bpf.errors import PagecacheError, missing_package

INTERRUPTED, BROKEN_PIPE, TERMINATED = 130, 141, 143  # as the shell counts: 128 + signal


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ARGV (default: sys.argv) and return the exit code.

    0 done, 1 failed, 2 wrong use, 3 this machine lacks something, 4 not enough privilege.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    # Known before parsing, so that a parse error too is printed as asked.
    ours = words[: words.index("--")] if "--" in words else words
    out = Output(json="--json" in ours, color="--no-color" not in ours)
    verbose = False
    try:
        args = build_parser().parse_args(words)
        verbose = args.verbose
        logging.basicConfig(
            stream=sys.stderr,
            format="%(name)s: %(message)s",
            level=logging.DEBUG if verbose else logging.WARNING,
        )
        # So that what is half done is undone, as on Ctrl-C.
        signal.signal(signal.SIGTERM, _terminated)
        code: int = args.run(args, out)
        sys.stdout.flush()
        return code
    except PagecacheError as error:
        out.error(error)
        if verbose:
            traceback.print_exc()
        return error.exit_code
    except KeyboardInterrupt as error:
        out.failure("interrupted", error)
        return INTERRUPTED
    except _Terminated as error:
        out.failure("terminated", error)
        return TERMINATED
    except BrokenPipeError:
        # The reader has had enough, as `head` does; the exit must not try to flush again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except Exception as error:
        missing = missing_package(error) if isinstance(error, ModuleNotFoundError) else None
        if missing is not None:
            out.error(missing)
            return missing.exit_code
        out.failure(f"unexpected {type(error).__name__}: {error}", error, report=not verbose)
        if verbose:
            traceback.print_exc()
        return 1


class _Terminated(BaseException):
    """SIGTERM has arrived."""


def _terminated(number: int, frame: FrameType | None) -> NoReturn:
    raise _Terminated
