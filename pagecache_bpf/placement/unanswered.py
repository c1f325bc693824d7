# SPDX-License-Identifier: Apache-2.0
"""Questions that may never be answered, such as those about files whose server is gone.

Nothing interrupts a system call that waits for a server, so each question has a thread of its own,
and who asks waits for so long only.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Unanswered(Exception):
    """There is no answer yet."""


class _Question(Generic[T]):
    """One question, which a thread asks."""

    def __init__(self, ask: Callable[[], T]) -> None:
        self._ask = ask
        self._answer: list[T] = []
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="question", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._answer.append(self._ask())
        except Exception as error:
            self._error = error

    @property
    def is_open(self) -> bool:
        return self._thread.is_alive()

    def answer(self, seconds: float) -> T:
        self._thread.join(seconds)
        if self.is_open:
            raise Unanswered
        if self._error is not None:
            raise self._error
        return self._answer[0]


class Questions:
    """Asks, and does not ask again what has not been answered.

    Args:
        seconds: how long an answer is waited for.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._open: dict[str, _Question[object]] = {}

    def ask(self, name: str, question: Callable[[], T]) -> T:
        """Ask, unless the last question of this name is not answered yet.

        Args:
            name: of the question.
            question: returns the answer; it runs in another thread.

        Returns:
            The answer.

        Raises:
            Unanswered: it was not answered in time, or the one before it is still open.
            Exception: what the question raised.
        """
        last = self._open.pop(name, None)
        if last is not None and last.is_open:
            self._open[name] = last
            raise Unanswered
        asked = _Question(question)
        try:
            return asked.answer(self.seconds)
        except Unanswered:
            self._open[name] = asked  # type: ignore[assignment]
            raise
