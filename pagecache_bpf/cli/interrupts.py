# SPDX-License-Identifier: Apache-2.0
"""How signals end a command: the first one raises, so that what is half done is undone.

Every further signal is ignored from then on, so that undoing is not cut short by a second Ctrl-C.
Sections that must not be cut in two are wrapped in deferred(): a signal that arrives inside takes
effect at their end; one that arrives while libbpf calls a function of ours, when libbpf has
returned.  SIGKILL cannot be caught; cli/undo_log.py is for that.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType

#: What kernel.libbpf and kernel.libbpf_messages call the functions that libbpf calls.
_CALLED_BACK = "_called_back"
_AGAIN_SECONDS = 0.02


class Terminated(BaseException):
    """A signal other than SIGINT asked the command to end; SIGINT is a KeyboardInterrupt.

    Args:
        number: the signal's.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@dataclass
class _State:
    """What has arrived in this process.  depth: of nested deferred() sections."""

    arrived: int | None = None
    raised: bool = False
    depth: int = 0


_state = _State()


def install() -> None:
    """Have SIGINT, SIGTERM and SIGHUP end the command by an exception.

    A signal that the caller has ignored (`nohup`, a shell's background job) stays ignored.
    """
    _state.arrived, _state.raised, _state.depth = None, False, 0
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _handle)


@contextmanager
def deferred() -> Iterator[None]:
    """Let signals that arrive in the block take effect at its end only.

    When the block raises, its own exception goes on and the signal is forgotten: the command ends
    in either case.
    """
    _state.depth += 1
    try:
        yield
    finally:
        _state.depth -= 1
    _raise_pending()


def ignore() -> None:
    """Ignore signals from now on: all is done, and the command only has to say so."""
    _state.depth += 1


def leave() -> None:
    """Have the system ignore what is ignored already: the command has ended, Python not yet.

    Python gives signals back their default action before it has taken itself apart, so that one
    more Ctrl-C would end the process by the signal, with another exit status than the command's.
    What it finds ignored it leaves.
    """
    if _state.arrived is None and not _state.depth:
        return
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is _handle:
            signal.signal(number, signal.SIG_IGN)


def _handle(number: int, frame: FrameType | None) -> None:
    if _state.arrived is None:
        if _is_called_back(frame):
            again = threading.Timer(_AGAIN_SECONDS, _send_again, [number])
            again.daemon = True
            again.start()
            return
        _state.arrived = number
        _raise_pending()


def _is_called_back(frame: FrameType | None) -> bool:
    """Tell whether a C library called this code: an exception raised here would be lost."""
    while frame is not None:
        if frame.f_code.co_name == _CALLED_BACK:
            return True
        frame = frame.f_back
    return False


def _send_again(number: int) -> None:
    """Send a signal to the main thread, which has come on in the meantime."""
    with suppress(ProcessLookupError):
        signal.pthread_kill(threading.main_thread().ident or 0, number)


def _raise_pending() -> None:
    if _state.arrived is None or _state.raised or _state.depth:
        return
    _state.raised = True
    if _state.arrived == signal.SIGINT:
        raise KeyboardInterrupt
    raise Terminated(_state.arrived)
