# SPDX-License-Identifier: Apache-2.0
"""Attach and detach policies as a user does: through the command line."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pagecache_bpf.errors import PagecacheError


def pagecache_bpf(*words: str) -> str:
    """Run one `pagecache-bpf` command and return what it printed.

    It runs in a fork of this process, with the modules it needs imported already: a fresh
    interpreter takes seconds to start in an emulated guest. Raises PagecacheError with the
    command's own message when it fails.
    """
    from pagecache_bpf.cli.main import main

    out_r, out_w = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.dup2(out_w, 1)
            os.dup2(out_w, 2)
            code = main(words)
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)
    os.close(out_w)
    with os.fdopen(out_r, encoding="utf-8", errors="replace") as pipe:
        text = pipe.read().strip()
    _, status = os.waitpid(pid, 0)
    if status != 0:
        code = os.waitstatus_to_exitcode(status)
        raise PagecacheError(f"`pagecache-bpf {' '.join(words)}` failed (exit code {code})", text)
    return text


@contextmanager
def on_agent(policy: str, root: Path, *options: str) -> Iterator[None]:
    """Have a policy of engine agent govern what is in `root` for the block.

    Args:
        policy: its name.
        root: a file or a directory.
        options: of `pagecache-bpf attach`.
    """
    pagecache_bpf("attach", "--engine", "agent", *options, policy, str(root))
    try:
        yield
    finally:
        pagecache_bpf("detach", policy)


class CommandLine:
    """Control (see rounds.Control) through the command line."""

    def __init__(self, engine: str = "auto") -> None:
        self.engine = engine
        self.transcript: list[tuple[str, str]] = []

    def _run(self, words: Sequence[str]) -> None:
        text = pagecache_bpf(*words)
        self.transcript.append((f"pagecache-bpf {' '.join(words)}", text))

    def attach(self, policy: str, root: Path) -> None:
        """`pagecache-bpf attach POLICY ROOT`, on an engine if one was named."""
        engine = [] if self.engine == "auto" else ["--engine", self.engine]
        self._run(["attach", *engine, policy, str(root)])

    def detach(self, policy: str, root: Path) -> None:
        """`pagecache-bpf detach POLICY`, which takes the tags off too."""
        self._run(["detach", policy])
