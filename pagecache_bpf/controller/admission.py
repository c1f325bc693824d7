# SPDX-License-Identifier: Apache-2.0
"""Who may have how much of the page cache: budgets, claims, and what a new load is told.

A claim is the most that a load may have in the cache at a time.  Files that several loads share
(the ranks of one model) are charged once, to the load that came first.  All numbers are bytes;
nothing here asks the kernel.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from pagecache_bpf.errors import NotAdmitted

#: What is done with a load that does not fit into what is left.
RULES = ("stream", "queue", "refuse")
#: Names of claims of what root attaches and tags begin with it.
MODEL_CLAIM = "model:"
#: Streaming needs a window; with less than this left nothing is gained by it.
LEAST_BYTES = 64 << 20

_STREAM = "will stream"
_DOCS = "docs/troubleshooting.md"


@dataclass(frozen=True)
class Decision:
    """What becomes of a load.

    kind: fits (all of it may stay), stream (a part at a time may), queue (nothing yet) or refuse;
    granted: bytes it may claim; message: for people.
    """

    kind: str
    granted: int
    message: str

    def as_json(self) -> dict[str, Any]:
        """Return it as commands print it."""
        return {"kind": self.kind, "granted_bytes": self.granted, "message": self.message}


@dataclass
class Claim:
    """A load's: its files (by identity, with their sizes) and the most it was granted.

    pending: of a claim of root's, that the command which is to set its tags is still under way.
    owner: whose share of the budget it counts into; None: of nobody's, as root made it.
    """

    model: str
    uid: int
    files: Mapping[bytes, int]
    granted: int
    pending: bool = False
    owner: object = None

    @property
    def size(self) -> int:
        """Return the bytes of its files."""
        return sum(self.files.values())


@dataclass
class Budgets:
    """The bounds of memory, and what loads have claimed of them.

    total: for all models together, None for no bound but the memory; per_user: for all loads of
    one user; models: by name, of those that have one; rule: see RULES.
    """

    total: int | None = None
    per_user: int | None = None
    models: dict[str, int] = field(default_factory=dict)
    rule: str = "stream"
    claims: dict[str, Claim] = field(default_factory=dict)

    def charges(self) -> dict[str, int]:
        """Return the bytes of each claim: shared files count for the first that has them."""
        seen: set[bytes] = set()
        charged = {}
        for name, claim in list(self.claims.items()):
            new = sum(size for key, size in claim.files.items() if key not in seen)
            seen.update(claim.files)
            charged[name] = min(claim.granted, new)
        return charged

    @property
    def claimed(self) -> int:
        """Return the bytes that are charged to all claims."""
        return sum(self.charges().values())

    def _claimed_by(self, owner: object) -> int:
        charges = self.charges()
        return sum(
            charges.get(name, 0)
            for name, claim in list(self.claims.items())
            if claim.owner == owner
        )

    def of_model(self, model: str, asked: int | None = None) -> int | None:
        """Find the budget of a model: a load may ask for less than is configured, never for more.

        Args:
            model: its name.
            asked: bytes that a load asks for; None: it has no bound of its own.

        Returns:
            Bytes; None: there is no bound.
        """
        bounds = [bound for bound in (self.models.get(model), asked) if bound is not None]
        return min(bounds, default=None)

    def decide(
        self,
        model: str,
        files: Mapping[bytes, int],
        asked: int | None = None,
        headroom: int | None = None,
        owner: object = None,
    ) -> Decision:
        """Judge a load that wants these files; claims nothing.

        Args:
            model: the model's name.
            files: bytes by the key of each file.
            asked: the load's own bound in bytes; None: it has none.
            headroom: bytes that memory cgroup and machine leave; None: no bound.  Pages of files
                that other loads hold are part of it, as they can be reclaimed, so what is claimed
                but not yet read is not taken off.
            owner: whose share it counts into; None: nobody's.

        Returns:
            Whether it fits, and what of it may be cached.
        """
        size = sum(files.values())
        held = {key for claim in list(self.claims.values()) for key in claim.files}
        new = sum(count for key, count in files.items() if key not in held)
        budget = self.of_model(model, asked)
        wanted = size if budget is None else min(size, budget)
        need = min(wanted, new)
        bounds = {}
        if self.total is not None:
            claimed = self.claimed
            bounds["budget left" if claimed else "budget"] = max(0, self.total - claimed)
        if self.per_user is not None and owner is not None:
            mine = self._claimed_by(owner)
            name = "of this user's budget left" if mine else "budget of one user"
            bounds[name] = max(0, self.per_user - mine)
        if headroom is not None:
            bounds["memory left"] = headroom
        which = min(bounds, key=lambda name: bounds[name], default="")
        left = bounds.get(which, need)
        if need <= left:
            if budget is None or size <= budget:
                return Decision("fits", wanted, f"{_gb(size)} wanted, fits")
            return Decision(
                "stream", wanted, f"{_gb(size)} wanted, {_gb(budget)} budget, {_STREAM}"
            )
        text = f"{_gb(size)} wanted, {_gb(left)} {which}"
        bounds_for_ever = [self.total] if owner is None else [self.total, self.per_user]
        may_fit_later = all(bound is None or need <= bound for bound in bounds_for_ever)
        if self.rule == "queue" and may_fit_later:
            return Decision("queue", 0, f"{text}, waits for room")
        if self.rule != "refuse" and left >= LEAST_BYTES:
            return Decision("stream", left, f"{text}, {_STREAM}")
        return Decision("queue" if self.rule == "queue" else "refuse", 0, text)

    def decide_for_root(
        self, model: str, files: Mapping[bytes, int], asked: int | None, headroom: int | None
    ) -> Decision:
        """Judge what a command brings: only budgets refuse it, memory that is short does not.

        Args:
            model: its name.
            files: bytes by the key of the file.
            asked: its own bound in bytes; None: it has none.
            headroom: bytes that memory has room for; None: there is no bound.

        Returns:
            The decision; nothing is claimed.
        """
        decision = self.decide(model, files, asked, headroom)
        if decision.kind in ("fits", "stream"):
            return decision
        bounded = self.decide(model, files, asked)
        if bounded.kind in ("fits", "stream"):
            granted = min(bounded.granted, LEAST_BYTES)
            return Decision("stream", granted, f"{decision.message}, {_STREAM}")
        return bounded

    def claim(self, name: str, claim: Claim) -> None:
        """Take note of a load that was admitted.

        Args:
            name: the load's id, or a prefix and the name of a model.
            claim: what it claims.
        """
        self.claims[name] = claim

    def release(self, name: str) -> None:
        """Take back a claim, as its load is over.

        Args:
            name: as for claim(); one that is not known is left alone.
        """
        self.claims.pop(name, None)

    def release_untagged(self, models: Collection[str]) -> None:
        """Release the claims of root's models that no file is tagged for, nor is about to be.

        Args:
            models: names of the models that files are tagged for.
        """
        for name, claim in list(self.claims.items()):
            if name.startswith(MODEL_CLAIM) and not claim.pending and claim.model not in models:
                self.release(name)


def refusal(model: str, decision: Decision) -> NotAdmitted:
    """Make the error for a load that was not admitted.

    Args:
        model: its name.
        decision: what was decided.

    Returns:
        The error; it is not raised.
    """
    return NotAdmitted(
        f"the load of {model} was not admitted",
        decision.message,
        "Wait until another load ends, or raise the budget (total_budget in the configuration)",
        f"{_DOCS}#was-not-admitted",
    )


def _gb(count: int) -> str:
    """Format a size as people compare models: "61.0 GB"; small ones in MB."""
    return f"{count / 10**9:.1f} GB" if count >= 10**9 else f"{count / 10**6:.1f} MB"
