# SPDX-License-Identifier: Apache-2.0
"""Runs the command line as a person would: in a process of its own, with its streams apart."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
NOBODY_ID = 65534
# Not root, but able to find the interpreter and this tree wherever they are.
NOBODY = (
    *("setpriv", f"--reuid={NOBODY_ID}", f"--regid={NOBODY_ID}", "--clear-groups"),
    *("--inh-caps=-all,+dac_read_search", "--ambient-caps=-all,+dac_read_search"),
)
# Root that may not read what others keep to themselves.
NO_OVERRIDE = ("setpriv", "--inh-caps=-all", "--bounding-set=-dac_override,-dac_read_search")
COMMAND = [sys.executable, "-m", "pagecache_bpf"]


@dataclass(frozen=True)
class Result:
    """What a command printed, and its exit code."""

    code: int
    out: str
    err: str

    @property
    def data(self) -> Any:
        """stdout as the one JSON document it has to be."""
        return json.loads(self.out)

    @property
    def error(self) -> dict[str, Any]:
        """The error of a --json command: the last line of stderr."""
        return dict(json.loads(self.err.splitlines()[-1])["error"])


def environment(**changes: str) -> dict[str, str]:
    """This process's environment for a command that runs anywhere; colors are not forced."""
    kept = {name: value for name, value in os.environ.items() if "COLOR" not in name}
    kept.pop("COLUMNS", None)
    return {**kept, "PYTHONPATH": str(ROOT), **changes}


def run(
    *words: str | Path,
    env: Mapping[str, str] | None = None,
    cwd: Path = ROOT,
    rights: Sequence[str] = (),
) -> Result:
    """Run pagecache-bpf; rights: NOBODY or NO_OVERRIDE, which only root can take."""
    done = subprocess.run(
        [*(rights if os.geteuid() == 0 else ()), *COMMAND, *map(str, words)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment(**(env or {})),
        timeout=120,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def done(*words: str | Path) -> Result:
    """Run a command that has to succeed, silently on stderr."""
    result = run(*words)
    assert (result.code, result.err) == (0, "")
    return result


def key_paths(value: Any, prefix: str = "") -> Iterator[str]:
    """Every path to a value in a JSON document, as the documentation writes it: a.b[].c"""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from key_paths(item, f"{prefix}.{key}" if prefix else key)
    elif isinstance(value, list) and value:
        for item in value:
            yield from key_paths(item, f"{prefix}[]")
    else:
        yield prefix


def undocumented(data: Any, documented: Mapping[str, str]) -> set[str]:
    """The key paths of a document that its command does not describe."""
    known = set(documented)
    stars = tuple(key[:-1] for key in known if key.endswith(".*"))

    def is_known(path: str) -> bool:
        # an empty list or object is described by what it would hold
        below = (f"{path}[", f"{path}.")
        return (
            path in known or path.startswith(stars) or any(path.startswith(below) for path in known)
        )

    return {path for path in key_paths(data) if not is_known(path)}
