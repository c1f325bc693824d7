# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.guest [options] [-- COMMAND...]`: boot the guest, run a command.

Without a command: the tests that need the module, tests/vm.  The exit code is the command's;
2 is a usage error or a machine that cannot boot a guest, 70 a guest that was lost, 71 a kernel
that complained while the command succeeded.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.guest.runner import Disk, Guest, GuestError, end_on_sigterm, explain

CANNOT, LOST, COMPLAINED = 2, 70, 71
TESTS = ["python", "-m", "pytest", "tests/vm", "-p", "no:cacheprovider", "-rsf"]
DISKS = ("2G:bps=64M", "2G:bps=64M")


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of this command's options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.guest", description=__doc__)
    parser.add_argument("--cpus", type=int, default=2)
    parser.add_argument("--memory", default="3G")
    parser.add_argument("--numa", type=int, default=1, metavar="NODES")
    parser.add_argument("--kernel", type=Path, help="image, or a built kernel tree")
    parser.add_argument("--disk", action="append", metavar="SIZE[:bps=RATE]")
    parser.add_argument("--timeout", type=float, default=1800.0, metavar="SECONDS")
    parser.add_argument("--name", default="run", help="prefix of the logs below build/guest")
    parser.add_argument(
        "--serial", action="store_true", help="emulate the CPUs in one thread (see Guest.serial)"
    )
    parser.add_argument(
        "--icount", action="store_true", help="the guest's clock counts instructions"
    )
    parser.add_argument("--shell", action="store_true", help="an interactive shell instead")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    return parser


def main() -> int:
    """Parse, boot, report."""
    options = make_parser().parse_args()
    end_on_sigterm()
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    try:
        guest = Guest(
            cpus=options.cpus,
            memory=options.memory,
            numa=options.numa,
            disks=[Disk.parse(text) for text in options.disk or DISKS],
            kernel=options.kernel,
            timeout_s=options.timeout,
            name=options.name,
            serial=options.serial,
            icount=options.icount,
        )
        if options.shell:
            return guest.shell()
        result = guest.run(command or TESTS, echo=sys.stdout)
    except GuestError as error:
        print(error, file=sys.stderr)
        return CANNOT
    explain(result)
    if result.lost:
        return LOST
    return result.returncode or (COMPLAINED if result.problems else 0)


if __name__ == "__main__":
    sys.exit(main())
