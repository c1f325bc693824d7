# SPDX-License-Identifier: Apache-2.0
"""The configuration put to use: which file belongs to which configured model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pagecache_bpf.controller.config import Config, ModelConfig
from pagecache_bpf.errors import PagecacheError
from pagecache_bpf.policy import catalog
from pagecache_bpf.weights.models import Model, resolve


@dataclass(frozen=True)
class ConfiguredModel:
    """A [[model]] whose files were found."""

    model: Model
    config: ModelConfig

    @property
    def name(self) -> str:
        """Its name, given or by default."""
        return self.model.name

    @property
    def keep(self) -> bool:
        """Whether its pages stay when a load is done."""
        return self.config.keep


class ResolvedConfig:
    """A configuration and the models that it names, as their files are now.

    policies: those of loads.policies that there are.  missing: sentences about models that were
    not found; they are looked for again at a reload.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        known = {each.name for each in catalog.discover()}
        self.policies = [name for name in config.policies if name in known]
        self.models: list[ConfiguredModel] = []
        self.missing: list[str] = []
        for each in config.models:
            try:
                self.models.append(ConfiguredModel(resolve(each.path, each.name), each))
            except PagecacheError as error:
                self.missing.append(str(error))
        self._by_path = {str(path): found for found in self.models for path in found.model.files}

    @property
    def budgets(self) -> dict[str, int]:
        """Budgets by model."""
        return {
            found.name: found.config.budget
            for found in self.models
            if found.config.budget is not None
        }

    def model_of(self, paths: Iterable[str]) -> ConfiguredModel | None:
        """The configured model that any of these files is of."""
        return next((self._by_path[path] for path in paths if path in self._by_path), None)
