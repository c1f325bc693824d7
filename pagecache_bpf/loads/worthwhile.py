# SPDX-License-Identifier: Apache-2.0
"""Whether a load lasts long enough for what could serve it to be started at all.

Starting takes time of the process that loads: its interpreter lock while modules are imported and
threads begin, and CPUs while an agent starts and attaches.  A load that is over before that has
ended pays and gains nothing.  So a load is watched first, by what is missing of it in the page
cache and how fast that becomes less.  Whoever waits in Load.ready(), or says how the load is to be
served, has it started at once.
"""

from __future__ import annotations

import time

from pagecache_bpf._run_dir import RUN_DIR
from pagecache_bpf.loads.request import LoadRequest, Starting
from pagecache_bpf.loads.residency_snapshot import Snapshot, resident_of

#: Before the first look at how fast a load goes, and between two, in seconds.
LOOK_SECONDS = 0.1
#: A load has to go on for so long after that, by what serves it, in seconds: threads of this
#: process; a policy whose agent runs; a policy with an agent to be started
#: (docs/performance.md, "What starting costs").
THREADS_SECONDS, ATTACH_SECONDS, AGENT_SECONDS = 0.25, 0.5, 1.5
#: Between two looks at a model that is cached: something of it may go.
_CACHED_SECONDS = 1.0
#: Bytes a second that a reader is taken to read before it has begun.
_USUAL_RATE = 1 << 30
_LOOKING_PART = 20  # of the time at most one part in so many is spent looking


def policy_pays(request: LoadRequest, missing: int, rate: float) -> bool:
    """Tell whether a load lasts long enough to attach a policy for it.

    Args:
        request: what was asked for.
        missing: bytes of the files that are not in the page cache.
        rate: bytes a second that become less of them; 0: its reader has not begun.

    Returns:
        True also where the caller has named a policy, a template or a budget.
    """
    runs = (RUN_DIR / "agent.sock").exists()
    needed = ATTACH_SECONDS if runs else AGENT_SECONDS
    return is_asked_for(request) or missing >= needed * (rate or _USUAL_RATE)


def is_asked_for(request: LoadRequest) -> bool:
    """Tell whether the caller has said how the load is to be served.

    Args:
        request: what was asked for.

    Returns:
        True for a policy, a template, a budget or a recording.
    """
    return any(
        wish is not None
        for wish in (request.policy, request.template, request.budget, request.record)
    )


def wait_until_it_pays(
    request: LoadRequest, snapshot: Snapshot, starting: Starting, is_root: bool
) -> bool:
    """Wait until it pays to start what serves a load; forever where nothing of it is missing.

    Args:
        request: what was asked for.
        snapshot: what of its files was cached before.
        starting: tells when the load is over, or when somebody waits for it to be served.
        is_root: whether a policy could be attached.

    Returns:
        Whether a policy is worth it; otherwise threads of this process are.

    Raises:
        LoadOver: the load was over first.
    """
    if is_asked_for(request) or not snapshot.known:
        return True
    files, size = request.model.files, request.model.size
    there, looked = snapshot.resident, time.monotonic()
    pause = LOOK_SECONDS if there < size else _CACHED_SECONDS
    begun = False
    while not starting.wait(pause):
        before, since = there, looked
        there, looked = resident_of(files) or 0, time.monotonic()
        missing = size - there
        pause = LOOK_SECONDS if missing > 0 else _CACHED_SECONDS
        pause = max(pause, _LOOKING_PART * (time.monotonic() - looked))
        rate = max(0, there - before) / (looked - since)
        was_begun, begun = begun, rate > 0
        # Where the reader has begun between two looks, how fast it is shows at the next one.
        if missing <= 0 or (begun and not was_begun):
            continue
        if is_root and policy_pays(request, missing, rate):
            return True
        # A reader that has not begun is read ahead of while it does something else.
        if (not is_root or not rate) and missing >= THREADS_SECONDS * rate:
            return False
    return True
