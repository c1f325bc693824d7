# SPDX-License-Identifier: Apache-2.0
"""Asks whether a model fits into budgets and memory, when root attaches or tags it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pagecache_bpf.errors import PagecacheError, UsageError

if TYPE_CHECKING:
    from pagecache_bpf.policy.catalog import PolicyInfo
    from pagecache_bpf.policy.engines import Engines
    from pagecache_bpf.weights.models import Model

KNOB = "budget_mib"
ADMISSION_JSON = {
    "admission[].model": "a model that was brought",
    "admission[].kind": "fits, or stream: only a part of it may be in the page cache at a time",
    "admission[].wanted_bytes": "size of its files",
    "admission[].granted_bytes": "what of it may be in the page cache",
    "admission[].message": "the same in words",
}


def budget_knob(info: PolicyInfo, budget: int | None, knobs: dict[str, int]) -> dict[str, int]:
    """Turn --budget into the knob by which a policy bounds what it keeps in the page cache.

    Args:
        info: the policy that is to be attached.
        budget: bytes; None: the option was not given.
        knobs: what --knob has set, by name.

    Returns:
        The knobs with `budget_mib`, in whole MiB, among them.

    Raises:
        UsageError: the policy has no such knob, it was set by --knob as well, or the budget is less
            than 1 MiB.
    """
    if budget is None:
        return knobs
    if not any(knob.name == KNOB for knob in info.knobs):
        raise UsageError(
            f"the policy {info.name} takes no budget",
            f"it has no knob {KNOB}",
            "Leave --budget away, or attach another policy",
        )
    if KNOB in knobs:
        raise UsageError("the budget was given twice", f"by --budget and by --knob {KNOB}")
    if budget < 1 << 20:
        raise UsageError(f"{budget} bytes are no budget", "the least is 1 MiB")
    return {**knobs, KNOB: budget >> 20}


def admit(engines: Engines, models: Sequence[Model], budget: int | None) -> list[dict[str, Any]]:
    """Have each model admitted before it is attached or tagged.

    A controller that runs notes what each holds, and counts it against its budget; without one the
    memory that is free decides, and nothing is noted.

    Args:
        engines: the engines, through which the controller is asked.
        models: the models, in the order in which they were named.
        budget: bytes of all their files together that may be cached; None: no bound but the
            controller's.

    Returns:
        An answer a model, with the keys of ADMISSION_JSON.

    Raises:
        PagecacheError: one of them does not fit; what was noted for the others is taken back.
    """
    answers: list[dict[str, Any]] = []
    try:
        for model in models:
            answers.append(_admit_one(engines, model, budget))
    except BaseException:
        release(engines, [answer["model"] for answer in answers])
        raise
    return answers


def release(engines: Engines, models: Sequence[str]) -> None:
    """Take back what admit() had the controller note.

    Args:
        engines: the engines that admit() was given.
        models: names of the models.
    """
    if engines.agent is not None:
        for name in models:
            engines.agent.release(name)


def _admit_one(engines: Engines, model: Model, budget: int | None) -> dict[str, Any]:
    from pagecache_bpf.kernel.file_key import key_of, open_to_read

    files: dict[str, int] = {}
    for path in model.files:
        fd = open_to_read(path)
        try:
            files[key_of(fd).hex()] = os.fstat(fd).st_size
        finally:
            os.close(fd)
    if engines.agent is not None:
        answer = engines.agent.admit(model.name, files, budget)
    else:
        from pagecache_bpf.controller.admission import Budgets
        from pagecache_bpf.controller.load_ledger import headroom

        sizes = {bytes.fromhex(key): size for key, size in files.items()}
        decision = Budgets().decide_for_root(model.name, sizes, budget, headroom(os.getpid()))
        answer = decision.as_json()
    return {"model": model.name, "wanted_bytes": sum(files.values()), **answer}


def admission_rows(answers: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Make the rows that tell people of models that do not fit into the page cache as a whole.

    Args:
        answers: what admit() returned.

    Returns:
        A (title, text) row for each model of which only a part may be cached at a time.
    """
    return [
        ("budget", f"model {answer['model']}: {answer['message']}")
        for answer in answers
        if answer["kind"] != "fits"
    ]


def held(engines: Engines) -> dict[str, Any]:
    """Ask the controller what loads and models hold of its budget; `status` and `clients` print it.

    Args:
        engines: the engines, through which the controller is asked.

    Returns:
        What HELD_JSON describes.  Where no controller runs it has the same keys, and `serving` is
        false.
    """
    empty: dict[str, Any] = {
        "serving": False,
        "pid": None,
        "listen": None,
        "config": None,
        "persist": False,
        "inherited": [],
        "cpus": None,
        "process_events": None,
        "process_events_why": "",
        "budget": {"total_bytes": None, "claimed_bytes": 0},
        "claims": [],
    }
    if engines.agent is None:
        return empty
    try:
        return {**empty, **engines.agent.controller()}
    except PagecacheError:  # it has ended meanwhile
        return empty


HELD_JSON = {
    "controller.serving": "whether `serve` runs, with a socket for loads",
    "controller.pid": "its process, or the agent's; null: none runs",
    "controller.listen": "its public socket; null: none",
    "controller.config": "its configuration; null: the defaults",
    "controller.persist": "whether its policies and tags are taken up again after a restart",
    "controller.inherited[]": "what it could not put back of what whoever started it lent it",
    "controller.cpus": "CPUs that it may run on; null: none runs",
    "controller.process_events": "how it notices the end of clients: connector or pidfd",
    "controller.process_events_why": "why not by the connector; empty if it is",
    "controller.budget.total_bytes": "bound for all models together; null: the memory's",
    "controller.budget.claimed_bytes": "what is claimed of it",
    "controller.claims[].id": "a load's id, or model:NAME of what was attached or configured",
    "controller.claims[].model": "the model",
    "controller.claims[].uid": "whose it is",
    "controller.claims[].pid": "the process that loads it; null: attached",
    "controller.claims[].wanted_bytes": "size of its files",
    "controller.claims[].granted_bytes": "what of it may be in the page cache at a time",
    "controller.claims[].charged_bytes": "what counts against the total: shared files count once",
}
