# SPDX-License-Identifier: Apache-2.0
"""The ways a load can be served, the best first; which one is taken is told with the reason."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

from pagecache_bpf.errors import PagecacheError, UsageError, missing_package
from pagecache_bpf.loads.report import NONE, Report
from pagecache_bpf.loads.request import LoadRequest, ServedLoad

#: Narrows what load() tries; see begin().
VARIABLE = "PAGECACHE_BPF_API"


class UnservedLoad:
    """No way at all: the kernel reads as ever."""

    def __init__(self, report: Report) -> None:
        self._report = report

    def report(self) -> Report:
        """Says why."""
        return self._report

    def finish(self, keep: bool) -> Report:
        """Nothing is to be undone."""
        return replace(self._report, done=True)

    def forget(self) -> None:
        """Nothing to let go of."""


def begin(request: LoadRequest) -> ServedLoad:
    """Serve a load in the best way there is.  Never raises because this machine cannot.

    PAGECACHE_BPF_API in the environment narrows it: "alone" to what this process can do by
    itself, "off" to nothing.
    """
    reasons: list[str] = []
    ways = [_remote, _direct, _alone]
    asked = os.environ.get(VARIABLE, "")
    if asked in ("alone", "off"):
        reasons.append(f"{VARIABLE} is {asked}")
        del ways[: 2 if asked == "alone" else 3]
    for try_it in ways:
        try:
            return try_it(request, tuple(reasons))
        except (PagecacheError, OSError) as error:
            reasons.append(_reason(error))
        except Exception as error:  # a bug of ours must not end a server
            missing = missing_package(error) if isinstance(error, ModuleNotFoundError) else None
            reasons.append(
                _reason(missing) if missing else f"unexpected {type(error).__name__}: {error}"
            )
    return UnservedLoad(request.blank(NONE, "none", "; ".join(reasons)))


def _remote(request: LoadRequest, reasons: Sequence[str]) -> ServedLoad:
    from pagecache_bpf.loads.through_controller import ControllerLoad

    return ControllerLoad(request)


def _direct(request: LoadRequest, reasons: Sequence[str]) -> ServedLoad:
    if os.geteuid() != 0:
        raise PagecacheError("attaching a policy takes root")
    from pagecache_bpf.loads.attached import AttachedLoad

    return AttachedLoad(request)


def _alone(request: LoadRequest, reasons: Sequence[str]) -> ServedLoad:
    from pagecache_bpf.loads.unprivileged import UnprivilegedLoad

    return UnprivilegedLoad(request, "; ".join(reasons))


def _reason(error: BaseException) -> str:
    if isinstance(error, PagecacheError):
        return f"{error.what}: {error.why}" if error.why else error.what
    return str(error)


def check_policy(name: str) -> None:
    """Raise UsageError for a policy that does not come with this package and is not attached
    by a controller.
    """
    from pagecache_bpf.policy.catalog import names

    known = names()
    if name in known or not known:
        return
    served: list[str] = []
    try:
        from pagecache_bpf.ipc.public_client import PublicClient

        with PublicClient() as client:
            served = list(client.hello().get("policies", ()))
    except PagecacheError:
        pass
    if name not in served:
        raise UsageError(
            f"there is no policy {name}",
            f"known are {', '.join(sorted({*known, *served}))}",
            "Leave `policy` out to have one chosen",
        )
