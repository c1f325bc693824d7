# SPDX-License-Identifier: Apache-2.0
"""The configuration put to use: which file belongs to which configured model."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pagecache_bpf.controller.config import Config, ModelSection
from pagecache_bpf.errors import PagecacheError
from pagecache_bpf.kernel.file_key import key_of, open_to_read
from pagecache_bpf.policy import catalog
from pagecache_bpf.weights.models import Model, resolve


@dataclass(frozen=True)
class ConfiguredModel:
    """A [[model]] whose files were found."""

    model: Model
    config: ModelSection

    @property
    def name(self) -> str:
        """Return its name, given or by default."""
        return self.model.name

    @property
    def keep(self) -> bool:
        """Return whether its pages stay when a load is done."""
        return self.config.keep


class ResolvedConfig:
    """A configuration and the models that it names, as their files are now.

    Args:
        config: what was read; paths in it are looked at once, here.

    Attributes:
        policies: those of loads.policies that there are.
        models: those that were found.
        missing: sentences about models that were not; they are looked for again at a reload.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        known = {policy.name for policy in catalog.discover()}
        self.policies = [name for name in config.policies if name in known]
        self.models: list[ConfiguredModel] = []
        self.missing: list[str] = []
        self._by_key: dict[bytes, ConfiguredModel] = {}
        for wanted in config.models:
            try:
                found = ConfiguredModel(resolve(wanted.path, wanted.name), wanted)
                keys = [_key(path) for path in found.model.files]
            except PagecacheError as error:
                self.missing.append(str(error))
            else:
                self.models.append(found)
                self._by_key.update(dict.fromkeys(keys, found))

    @property
    def budgets(self) -> dict[str, int]:
        """Return the budgets, in bytes, of the models that have one."""
        return {
            found.name: found.config.budget
            for found in self.models
            if found.config.budget is not None
        }

    def model_of(self, keys: Iterable[bytes]) -> ConfiguredModel | None:
        """Find the configured model that any of some files is of.

        Args:
            keys: what the files are (file_key.key_of), whatever their paths.

        Returns:
            The model; None: they are of none.
        """
        return next((self._by_key[key] for key in keys if key in self._by_key), None)


def _key(path: Path) -> bytes:
    """Return a file's key: device, inode number and generation.  Raises PagecacheError."""
    fd = open_to_read(path)
    try:
        return key_of(fd)
    finally:
        os.close(fd)
