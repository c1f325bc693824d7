# SPDX-License-Identifier: Apache-2.0
"""Puts the models of the configuration under their policies, at start and after each reload."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from pagecache_bpf.controller.admission import Claim
from pagecache_bpf.controller.client_files import ClientFile, check_descriptor
from pagecache_bpf.controller.engine_control import EngineControl, PlacedTag, policy_info
from pagecache_bpf.controller.load_ledger import LoadLedger
from pagecache_bpf.controller.load_templates import Asker
from pagecache_bpf.controller.resolved_config import ConfiguredModel, ResolvedConfig
from pagecache_bpf.errors import PagecacheError, UsageError
from pagecache_bpf.kernel.file_key import open_to_read

if TYPE_CHECKING:
    from pagecache_bpf.templates.template import Template

_log = logging.getLogger(__name__)
BUDGET_KNOB = "budget_mib"
_CLAIM = "config:"
_ROOT = (0, True)  # whose the files of the configuration are


class ModelTagger:
    """Keeps the tags as the configuration wants them.

    Args:
        engines: attaches policies and tags files.
        ledger: has the budgets and the templates that models are claimed from.
    """

    def __init__(self, engines: EngineControl, ledger: LoadLedger) -> None:
        self._engines, self._ledger = engines, ledger
        self._placed: dict[bytes, tuple[str, PlacedTag]] = {}  # with the model's name

    def placed(self) -> dict[bytes, PlacedTag]:
        """Return the tags that are set because of the configuration, by file."""
        return {key: placed for key, (_, placed) in self._placed.items()}

    def apply(self, settings: ResolvedConfig) -> list[str]:
        """Tag what is configured, and untag what is not any more.

        Args:
            settings: the configuration and the files of its models.

        Returns:
            A sentence for each thing that failed.
        """
        failed = list(settings.missing)
        wanted = {model.name: model for model in settings.models if model.config.policy}
        for key, (name, placed) in list(self._placed.items()):
            model = wanted.get(name)
            if model is None or model.config.policy != placed.policy:
                self._engines.untag(placed)
                self._ledger.templates.forget(f"{_CLAIM}{name}")
                del self._placed[key]
        for name in [name for name in self._ledger.budgets.claims if name.startswith(_CLAIM)]:
            if name.removeprefix(_CLAIM) not in wanted:
                self._ledger.budgets.release(name)
        for model in wanted.values():
            try:
                self._tag(model, knobs_for(model.config.policy or "", settings))
            except (PagecacheError, OSError) as error:
                failed.append(f"model {model.name}: {error}")
        for sentence in failed:
            _log.warning("%s", sentence)
        return failed

    def _tag(self, model: ConfiguredModel, knobs: dict[str, int]) -> None:
        policy = model.config.policy or ""
        name = policy_info(policy).name
        files: list[ClientFile] = []
        fresh: dict[bytes, PlacedTag] = {}
        with ExitStack() as opened:
            fds = []
            for path in model.model.files:
                fds.append(open_to_read(path))
                opened.callback(os.close, fds[-1])
                files.append(check_descriptor(fds[-1], None))
            template = self._template(model, name, files, fds)
            engine, _ = self._engines.ensure(
                policy, knobs, sizes=self._ledger.templates.sizes(template)
            )
            try:
                for file, fd in zip(files, fds, strict=True):
                    if file.key in self._placed:
                        continue
                    by = self._engines.governor_of(file)
                    if by is None:
                        fresh[file.key] = self._engines.tag(fd, file, name, engine, model.name)
                    elif by != name:
                        raise UsageError(f"{file.path} was not tagged", f"{by} governs it")
            finally:
                for key, placed in self._engines.locate(fresh, files).items():
                    self._placed[key] = (model.name, placed)
        if template is not None:
            claim = f"{_CLAIM}{model.name}"
            self._ledger.templates.give(claim, name, engine, model.name, template, files)
        sizes = {file.key: file.size for file in files}
        budgets = self._ledger.budgets
        budgets.release(f"{_CLAIM}{model.name}")
        decision = budgets.decide(model.name, sizes)
        _log.info("model %s: %s", model.name, decision.message)
        budgets.claim(f"{_CLAIM}{model.name}", Claim(model.name, 0, sizes, decision.granted))

    def _template(
        self, model: ConfiguredModel, policy: str, files: Sequence[ClientFile], fds: Sequence[int]
    ) -> Template | None:
        """Return the I/O template of a configured model; None: its policy needs none."""
        try:
            return self._ledger.templates.prepare(policy, files, fds, Asker(_ROOT, 0))
        except PagecacheError as error:
            _log.warning("model %s has no I/O template: %s", model.name, error)
            return None


def knobs_for(policy: str, settings: ResolvedConfig) -> dict[str, int]:
    """Return the knobs of a policy: those configured, and the budget of its models together.

    The budget goes to the knob budget_mib, which policies bound their prefetching by.

    Args:
        policy: name of a policy.
        settings: the configuration.

    Returns:
        Values by name.
    """
    models = [model for model in settings.models if model.config.policy == policy]
    knobs = dict(models[0].config.knobs) if models else {}
    info = policy_info(policy)
    if BUDGET_KNOB in knobs or not any(knob.name == BUDGET_KNOB for knob in info.knobs):
        return knobs
    budgets = [model.config.budget for model in models]
    bounds = [sum(budget for budget in budgets if budget)] if models and all(budgets) else []
    if settings.config.total_budget is not None:
        bounds.append(settings.config.total_budget)
    if bounds:
        knobs[BUDGET_KNOB] = max(1, min(bounds) >> 20)
    return knobs
