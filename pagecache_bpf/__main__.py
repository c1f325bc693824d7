# SPDX-License-Identifier: Apache-2.0
"""Where the command starts: `pagecache-bpf` and `python -m pagecache_bpf`.

Until the command has read its arguments it has done nothing, so a Ctrl-C ends it as it ends any
program, without a traceback of whatever was being imported.
"""

import signal
import sys


def main() -> int:
    """Run the command line.

    Returns:
        The exit status; see `man pagecache-bpf`.
    """
    try:
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
    except KeyboardInterrupt:  # it came in between
        return 130
    from pagecache_bpf.cli import interrupts
    from pagecache_bpf.cli.main import main as run

    status = run()
    interrupts.leave()
    return status


if __name__ == "__main__":
    sys.exit(main())
