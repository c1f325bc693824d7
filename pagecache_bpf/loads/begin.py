# SPDX-License-Identifier: Apache-2.0
"""Tries the ways in which a load can be served, the best first; a report says why none is better.

The controller is asked first; then this process attaches a policy, if it is root; then threads of
its own read ahead.  Where none of them works, the kernel's readahead goes on as without us.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace

from pagecache_bpf._run_dir import socket_path
from pagecache_bpf.errors import NotAdmitted, PagecacheError, UsageError, missing_package
from pagecache_bpf.loads.report import NONE, Report
from pagecache_bpf.loads.request import LoadOver, LoadRequest, ServedLoad, Starting
from pagecache_bpf.loads.residency_snapshot import Snapshot
from pagecache_bpf.loads.worthwhile import wait_until_it_pays

#: Narrows what load() tries; see begin().
VARIABLE = "PAGECACHE_BPF_API"

_log = logging.getLogger(__name__)


class UnservedLoad:
    """A load that nothing serves: the kernel's own readahead goes on as ever.

    Args:
        report: what is told of it, with the reason; the same to its end.
    """

    def __init__(self, report: Report) -> None:
        self._report = report

    def report(self) -> Report:
        """Tell why nothing serves the load.

        Returns:
            A report without numbers, whose `why` has the reasons.
        """
        return self._report

    def finish(self, keep: bool) -> Report:
        """End the load, of which nothing has to be undone.

        Args:
            keep: not used, as nothing was read or dropped.

        Returns:
            The last report.
        """
        return replace(self._report, done=True)

    def forget(self) -> None:
        """Do nothing: nothing is held."""


def begin(request: LoadRequest, snapshot: Snapshot, starting: Starting) -> ServedLoad:
    """Serve a load in the best way there is.

    PAGECACHE_BPF_API in the environment narrows it: "alone" to what this process can do by
    itself, "off" to nothing.

    Args:
        request: what was asked for.
        snapshot: what of its files was cached before.
        starting: tells when the load is over before it is served.

    Returns:
        What serves it; what this machine cannot do is told in its report, and raises nothing.

    Raises:
        LoadOver: it is over already; everything has been taken back.

    A controller is told of each load at once.  What takes this process's own time begins when that
    pays (worthwhile).
    """
    reasons: list[str] = []
    ways = [_by_controller, _by_policy, _by_threads]
    asked = os.environ.get(VARIABLE, "")
    if asked in ("alone", "off"):
        reasons.append(f"{VARIABLE} is {asked}")
        del ways[: 2 if asked == "alone" else 3]
    if ways and (asked == "alone" or not socket_path().exists()):
        can_attach = asked != "alone" and os.geteuid() == 0
        if not wait_until_it_pays(request, snapshot, starting, can_attach) and can_attach:
            reasons.append("it is over before a policy is attached")
            ways = [_by_threads]
    for serve in ways:
        try:
            return serve(request, snapshot, starting, tuple(reasons))
        except LoadOver:
            raise
        except NotAdmitted as error:  # whatever else served it would go past the budget
            reasons.append(_reason(error))
            break
        except (PagecacheError, OSError) as error:
            starting.check()  # a connection that was hung up is no reason
            reasons.append(_reason(error))
            _log.debug("%s does not serve %s", serve.__name__, request.model.name, exc_info=True)
        except Exception as error:  # a bug of ours must not end a server
            missing = missing_package(error) if isinstance(error, ModuleNotFoundError) else None
            reasons.append(
                _reason(missing) if missing else f"unexpected {type(error).__name__}: {error}"
            )
            _log.debug("%s failed for %s", serve.__name__, request.model.name, exc_info=True)
    return UnservedLoad(request.blank(NONE, "none", "; ".join(reasons)))


def _by_controller(
    request: LoadRequest, snapshot: Snapshot, starting: Starting, reasons: Sequence[str]
) -> ServedLoad:
    """Have the controller serve the load.  Raises as ControllerLoad does."""
    from pagecache_bpf.loads.through_controller import ControllerLoad

    return ControllerLoad(request, snapshot, starting)


def _by_policy(
    request: LoadRequest, snapshot: Snapshot, starting: Starting, reasons: Sequence[str]
) -> ServedLoad:
    """Serve the load by a policy that this process attaches.  Raises PagecacheError unless root."""
    if os.geteuid() != 0:
        raise PagecacheError("attaching a policy takes root")
    from pagecache_bpf.loads.attached import AttachedLoad

    return AttachedLoad(request, snapshot, starting)


def _by_threads(
    request: LoadRequest, snapshot: Snapshot, starting: Starting, reasons: Sequence[str]
) -> ServedLoad:
    """Serve the load by threads of this process; the report tells why nothing better does."""
    from pagecache_bpf.loads.unprivileged import UnprivilegedLoad

    return UnprivilegedLoad(request, snapshot, "; ".join(reasons))


def _reason(error: BaseException) -> str:
    """Return the cause of an error without its fix: load() goes on, so nobody has to act."""
    if isinstance(error, PagecacheError):
        return f"{error.what}: {error.why}" if error.why else error.what
    return str(error)


def check_policy(name: str) -> None:
    """Check that a policy comes with this package or is attached by a controller that runs.

    Args:
        name: the policy.

    Raises:
        UsageError: there is no such policy.
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
        _log.debug("no controller was asked for its policies", exc_info=True)
    if name not in served:
        raise UsageError(
            f"there is no policy {name}",
            f"known are {', '.join(sorted({*known, *served}))}",
            "Leave `policy` out to have one chosen",
        )
