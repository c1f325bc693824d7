# SPDX-License-Identifier: Apache-2.0
"""Which I/O templates a policy is given when it is attached."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pagecache_bpf.cli.output import Output
from pagecache_bpf.errors import PagecacheError, UsageError
from pagecache_bpf.units import format_size, plural

if TYPE_CHECKING:
    from pagecache_bpf.policy.catalog import PolicyInfo
    from pagecache_bpf.policy.engines import Engines
    from pagecache_bpf.templates.policy_arrays import Assigned
    from pagecache_bpf.weights.models import Model

AUTO, NONE = "auto", "none"


@dataclass(frozen=True)
class Chosen:
    """A template for a model, and where it comes from."""

    assigned: Assigned
    file: Path | None
    fitting_bytes: int
    total_bytes: int

    def __str__(self) -> str:
        template = self.assigned.template
        text = (
            f"model {self.assigned.name}: {template.source} ({template.loader}), "
            f"{plural(len(template.extents), 'extent')}, {format_size(template.distinct)}"
        )
        if len(template.consumers) > 1:
            text += f", {plural(len(template.consumers), 'consumer')}"
        if self.fitting_bytes < self.total_bytes:
            text += f"; only {format_size(self.fitting_bytes)} of it fit"
        return text

    def as_json(self) -> dict[str, Any]:
        """Return the template as attach prints it.

        Returns:
            Which model it is for, where it comes from, and how much it reads; `fitting_bytes` is
            what of it still fits the model's files.
        """
        template = self.assigned.template
        return {
            "model": self.assigned.name,
            "file": str(self.file) if self.file else None,
            "source": template.source,
            "loader": template.loader,
            "tp": template.tp,
            "consumers": len(template.consumers),
            "extents": len(template.extents),
            "bytes": template.distinct,
            "fitting_bytes": self.fitting_bytes,
        }


def choose(
    info: PolicyInfo, models: Sequence[Model], wanted: Sequence[str], partial: bool, out: Output
) -> list[Chosen]:
    """Choose an I/O template for each model that is to be attached.

    Where none is asked for they are derived if the policy takes templates; a model of which none
    can be derived goes without, with a warning.

    Args:
        info: the policy.
        models: the models, in the order of the command line.
        wanted: what --template says: files, AUTO or NONE, one for all models or one for each;
            empty: the option was not given.
        partial: whether a template that fits a part of the files is good enough.
        out: where warnings go.

    Returns:
        The chosen ones; none for models that go without.

    Raises:
        UsageError: the policy takes no templates, or their number is not that of the models.
        PagecacheError: a template that was asked for cannot be read, made, or does not fit.
    """
    if any(wish != NONE for wish in wanted) and not info.takes_templates:
        raise UsageError(
            f"the policy {info.name} takes no I/O template",
            "it includes no template.bpf.h",
            "Leave --template away, or attach maio",
        )
    if len(wanted) > 1 and len(wanted) != len(models):
        raise UsageError(
            f"{plural(len(wanted), 'template')} were given for {plural(len(models), 'path')}",
            "",
            "Give one for each PATH, in their order",
        )
    if len(wanted) == 1 and wanted[0] not in (AUTO, NONE) and len(models) != 1:
        raise UsageError(
            f"one template was given for {plural(len(models), 'path')}",
            "a template is for one model",
            "Give one for each PATH, in their order",
        )
    if not info.takes_templates:
        return []
    wishes = list(wanted) * (len(models) if len(wanted) == 1 else 1) or [""] * len(models)
    found = []
    for model, wish in zip(models, wishes, strict=True):
        if wish == NONE:
            continue
        try:
            found.append(_one(model, wish, partial))
        except PagecacheError as error:
            if wish:
                raise
            out.warn(f"{model.name} has no I/O template: {error.what}: {error.why}")
    return found


def _one(model: Model, wish: str, partial: bool) -> Chosen:
    from pagecache_bpf import templates
    from pagecache_bpf.templates.policy_arrays import Assigned

    if wish in ("", AUTO):
        template = templates.derive(model)
        paths = dict(enumerate(templates.locate(template, model)))
        assigned = Assigned(model.name, template, paths)
        return Chosen(assigned, None, template.length, template.length)
    file = Path(wish)
    template = templates.read(file)
    fit = templates.check(template, model)
    template = templates.require_fit(template, fit, str(file), partial)
    return Chosen(
        Assigned(model.name, template, fit.paths), file, fit.fitting_bytes, fit.total_bytes
    )


def sizes_of(chosen: Sequence[Chosen]) -> dict[str, int]:
    """Tell how large the policy's maps have to be; that is fixed when the policy is loaded.

    Args:
        chosen: what choose() returned.

    Returns:
        Elements of each map by its name; empty: as the policy has them.
    """
    if not chosen:
        return {}
    from pagecache_bpf.templates.policy_arrays import sizes_for

    return sizes_for([(choice.assigned.name, choice.assigned.template) for choice in chosen])


def give(engines: Engines, policy: str, chosen: Sequence[Chosen]) -> None:
    """Write templates into the maps of an attached policy.

    Args:
        engines: the engines, of which one has the policy.
        policy: its name.
        chosen: what choose() returned; the maps were made with sizes_of() of it.

    Raises:
        PagecacheError: the maps are too small, or the policy has ended.
    """
    if chosen:
        from pagecache_bpf.templates import policy_arrays

        policy_arrays.give(engines, policy, [choice.assigned for choice in chosen])


REPLAY_JSON = {
    "model": "the model that an I/O template of the policy is for",
    "source": "derived, recorded or imported",
    "accuracy": "share of the accessed bytes that came as it says; null before the first access",
    "followed_bytes": "bytes that were accessed as it says",
    "strayed_bytes": "bytes accessed otherwise, and bytes prefetched and passed over",
    "jumps": "times that a consumer went on elsewhere",
    "dropped": "whether the policy has given it up, since it was wrong too often",
    "consumers[].tgid": "the process that reads as this consumer; 0: none yet",
    "consumers[].position_bytes": "how far it has come in its order",
    "consumers[].bytes": "what it reads in all",
}


def replay_rows(templates: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Make the rows by which `status` tells how well templates foretell what is read.

    Args:
        templates: of each what `status --json` prints.

    Returns:
        A (title, text) row a template.
    """
    rows = []
    for template in templates:
        text = f"{template['model']} ({template['source']}): "
        if template["accuracy"] is None:
            text += "not used yet"
        else:
            text += (
                f"{template['accuracy']:.1%} accurate, {format_size(template['followed_bytes'])} "
                f"read as it says, {plural(template['jumps'], 'jump')}"
            )
        if template["dropped"]:
            text += "; dropped: it was wrong too often"
        rows.append(("template", text))
    return rows
