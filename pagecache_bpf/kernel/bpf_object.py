# SPDX-License-Identifier: Apache-2.0
"""Loads a BPF object and says in a few words why the kernel refuses it.

The one way in which policies of both engines and the observer are loaded.  It knows nothing of
what is in an object: callers set it up (`prepare`) and say what its refusal means to people.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pagecache_bpf._run_dir import write_log
from pagecache_bpf.errors import PagecacheError, UnsupportedError, UsageError
from pagecache_bpf.kernel import libbpf
from pagecache_bpf.kernel.verifier_log import boil_down

_PACKAGE = Path(__file__).resolve().parent.parent


class ProgramsRefused(PagecacheError):
    """The kernel refuses the programs of an object.

    Args:
        name: what the object is, for people.
        why: what the verifier says in short.
        log_path: where all that the verifier and libbpf have said was written; None: nowhere.
    """

    def __init__(self, name: str, why: str, log_path: Path | None) -> None:
        fix = f"The whole log is in {log_path}" if log_path else ""
        super().__init__(f"the kernel refused to load {name}", why, fix)
        self.log_path = log_path


def compiled(place: str, what: str) -> Path:
    """Find a compiled object: built in this tree, or installed with the package.

    Args:
        place: where it lies below bpf/, such as "observer/observer.bpf.o".
        what: what does not work without it, for people.

    Returns:
        Its path.

    Raises:
        UnsupportedError: there is none.
    """
    places = [_PACKAGE.parent / "build" / "bpf" / place, _PACKAGE / "bpf" / place]
    for path in places:
        if path.is_file():
            return path
    raise UnsupportedError(what, f"there is no {places[0]}", "Run `make build`")


def load(
    path: Path,
    name: str,
    prepare: Callable[[libbpf.Object], None],
    log_name: str,
    log_dir: Path | None = None,
) -> libbpf.Object:
    """Open an object, set it up, create its maps and have its programs verified.

    Args:
        path: the object file.
        name: what the kernel's lists call it.
        prepare: called with the opened object before it is loaded: sets constants and the sizes
            of maps, and leaves programs out.
        log_name: the file that gets the verifier's whole log if it refuses.
        log_dir: the directory for that; None: the run directory.

    Returns:
        The loaded object, which the caller closes.

    Raises:
        UsageError: it is no object file; or what `prepare` raises.
        ProgramsRefused: the kernel refuses it.
    """
    with libbpf.Messages() as messages:
        try:
            opened = libbpf.Object(path, name)
        except OSError as error:
            why = "; ".join(messages.lines[:2]) or error.strerror or str(error)
            raise UsageError(f"{path} cannot be loaded", why, "Build it anew") from error
        try:
            prepare(opened)
            try:
                opened.load()
            except OSError as error:
                log = opened.kernel_log
                written = write_log(log_name, "\n".join([*messages.lines, "", log]), log_dir)
                why = boil_down(log) or "; ".join(messages.lines[:2])
                why = why or error.strerror or str(error)
                raise ProgramsRefused(name, why, written) from error
        except BaseException:
            opened.close()
            raise
    return opened
