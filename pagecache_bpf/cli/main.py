# SPDX-License-Identifier: Apache-2.0
"""Runs a command: errors become messages on stderr and exit codes, never tracebacks."""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import traceback
from collections.abc import Sequence

from pagecache_bpf.cli import interrupts, undo_log
from pagecache_bpf.cli.output import TROUBLESHOOTING, Output
from pagecache_bpf.cli.parser import build_parser
from pagecache_bpf.errors import PagecacheError, PrivilegeError, missing_package

INTERRUPTED, BROKEN_PIPE = 130, 141  # as the shell counts: 128 + signal


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line: every error becomes a message on stderr and an exit code.

    Args:
        argv: the words after the program's name; None: those of sys.argv.

    Returns:
        The exit code: 0 done, 1 failed, 2 wrong use, 3 this machine lacks something, 4 not enough
        privilege, 128 and more ended by a signal, as shells count.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    # Known before parsing, so that a parse error too is printed as asked.
    ours = words[: words.index("--")] if "--" in words else words
    out = Output(json="--json" in ours, color="--no-color" not in ours)
    verbose = False
    try:
        interrupts.install()
        with interrupts.deferred():  # argparse cannot be left in the middle
            args = build_parser(words).parse_args(words)
        verbose = args.verbose
        logging.basicConfig(
            stream=sys.stderr,
            format="%(name)s: %(message)s",
            level=logging.DEBUG if verbose else logging.WARNING,
        )
        if os.geteuid() == 0:
            args.recovered = undo_log.recover(out)
        code: int = args.run(args, out)
        out.flush()
        return code
    except PagecacheError as error:
        out.error(error)
        if verbose:
            traceback.print_exc()
        return error.exit_code
    except KeyboardInterrupt as error:
        out.failure("interrupted", error)
        return INTERRUPTED
    except interrupts.Terminated as error:
        hung_up = error.number == signal.SIGHUP
        out.failure("the terminal hung up" if hung_up else "terminated", error)
        return 128 + error.number
    except BrokenPipeError:
        # The reader has had enough, as `head` does; the exit must not try to flush again.
        out.discard()
        return BROKEN_PIPE
    except OSError as error:
        # What the system refused at a place that no command expects it.
        out.error(_of_system(error))
        if verbose:
            traceback.print_exc()
        return PrivilegeError.exit_code if isinstance(error, PermissionError) else 1
    except Exception as error:
        missing = missing_package(error) if isinstance(error, ModuleNotFoundError) else None
        if missing is not None:
            out.error(missing)
            return missing.exit_code
        out.failure(f"unexpected {type(error).__name__}: {error}", error, report=not verbose)
        if verbose:
            traceback.print_exc()
        return 1


def _of_system(error: OSError) -> PagecacheError:
    """Return what the system refused as an error for people; the file is named if it is known."""
    why = error.strerror or str(error)
    what = f"{error.filename} cannot be used" if error.filename else "the system refused a request"
    docs = f"{TROUBLESHOOTING}#cannot-be-used"
    if isinstance(error, PermissionError):
        return PrivilegeError(what, why, "Run as a user who may, or as root", docs)
    fixes = {
        errno.ENOSPC: "Free some space on that file system",
        errno.EROFS: "Make that file system writable, or name another place",
        errno.EMFILE: "Raise the limit of open files (ulimit -n)",
        errno.ENFILE: "Raise fs.file-max: the machine has no open files left",
        errno.ENOMEM: "Free some memory",
    }
    return PagecacheError(what, why, fixes.get(error.errno or 0, "Run it again with -v"), docs)
