# SPDX-License-Identifier: Apache-2.0
"""Operations of the root socket: methods that say so themselves, called with checked arguments.

A method becomes an operation by the decorator; its parameters are what the request may have, and
their type hints are what is compared.  No name that comes from a stranger ever reaches getattr().
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from pagecache_bpf.ipc.wire import refused, shortened

F = TypeVar("F", bound=Callable[..., Mapping[str, Any]])
_MARK = "_pagecache_operation"


def operation(changes: bool = False) -> Callable[[F], F]:
    """Mark a method as an operation of the root socket.

    Args:
        changes: whether what the state file has to know is another afterwards.

    Returns:
        The decorator.
    """

    def mark(method: F) -> F:
        setattr(method, _MARK, changes)
        return method

    return mark


class Operation:
    """One operation: the bound method, and what its arguments have to be.

    Args:
        method: a method that is marked as an operation, with annotated parameters.
    """

    def __init__(self, method: Callable[..., Mapping[str, Any]]) -> None:
        self._method = method
        self.changes: bool = getattr(method, _MARK)
        self._parameters = inspect.signature(method).parameters
        self._types = typing.get_type_hints(method)

    @property
    def takes_file(self) -> bool:
        """Whether an open file comes along."""
        return "fd" in self._parameters

    def __call__(self, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
        """Call it.

        Args:
            arguments: members of the request, and `fd` for a file that came along.

        Raises:
            UsageError: they are not what it takes.
            PagecacheError: as the operation raises.
        """
        for name, value in arguments.items():
            if name not in self._parameters:
                raise refused(f"{self._method.__name__} has no member {shortened(name)}")
            if not _is(value, self._types[name]):
                raise refused(
                    f"{name} of {self._method.__name__} has a bad value", shortened(value)
                )
        for name, parameter in self._parameters.items():
            if parameter.default is parameter.empty and name not in arguments:
                raise refused(f"{self._method.__name__} needs {name}")
        return self._method(**arguments)


def collect(*owners: object) -> dict[str, Operation]:
    """Collect the operations of some objects.

    Args:
        owners: objects with marked methods.  A name that two of them have is a bug
            (AssertionError).

    Returns:
        Operations by name.
    """
    found: dict[str, Operation] = {}
    for owner in owners:
        for name, function in inspect.getmembers(type(owner), inspect.isfunction):
            if hasattr(function, _MARK):
                assert name not in found, f"two operations are called {name}"
                found[name] = Operation(getattr(owner, name))
    return found


def _is(value: object, kind: Any) -> bool:
    """Tell whether a value of JSON is what a type hint says."""
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return any(_is(value, choice) for choice in typing.get_args(kind))
    if origin is dict:
        of_key, of_value = typing.get_args(kind)
        return isinstance(value, dict) and all(
            _is(key, of_key) and _is(member, of_value) for key, member in value.items()
        )
    if origin is list:
        (of_member,) = typing.get_args(kind)
        return isinstance(value, list) and all(_is(member, of_member) for member in value)
    if kind is Any:
        return True
    if kind is None or kind is type(None):
        return value is None
    if kind is int:
        return type(value) is int
    return isinstance(value, kind)
