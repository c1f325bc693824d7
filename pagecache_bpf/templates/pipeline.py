# SPDX-License-Identifier: Apache-2.0
"""Which stages of a pipeline read a tensor: by its layer, and by the ends of the model.

It knows names of tensors and the configuration; shapes and bytes are sharding's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from pagecache_bpf.templates.architectures import PIPELINE_ENDS
from pagecache_bpf.templates.model_config import ModelConfig, layer_of
from pagecache_bpf.templates.parallel import Parallel

_OUTPUTS = ("lm_head", "output", "embed_out")
_EMBEDDINGS = ("embed_tokens", "wte", "tok_embeddings", "word_embeddings", "embed_in")


class Stages:
    """The stages of one model.

    Args:
        config: the model's configuration.
        parallel: how it is spread.
        names: of all its tensors.
    """

    def __init__(self, config: ModelConfig, parallel: Parallel, names: Iterable[str]) -> None:
        self._config = config
        self._layers: list[range] = []
        if parallel.pp == 1:
            return
        names = [name for name in names if config.is_text(name)]
        layers = (number for name in names if (number := layer_of(name)) is not None)
        self._layers = parallel.stages_of(config.layers or max(layers, default=-1) + 1)
        self._ends = bool(config.kinds & PIPELINE_ENDS)
        untied = any(_module_of(name) in _OUTPUTS for name in names if name.endswith(".weight"))
        self._last_embeds = config.ties_embeddings or not untied

    def of(self, name: str) -> frozenset[int] | None:
        """Tell which stages of the pipeline read a tensor.

        Args:
            name: the tensor's name.

        Returns:
            Numbers of stages; None for all of them.
        """
        if not self._layers or not self._config.is_text(name):
            return None
        layer = layer_of(name)
        last = len(self._layers) - 1
        if layer is not None and not re.search(r"\bencoder\.", name):
            at = next((at for at, stage in enumerate(self._layers) if layer in stage), last)
            return frozenset((at,))
        if self._ends and _module_of(name) in _OUTPUTS:
            return frozenset((last,))
        if self._ends and _module_of(name) in _EMBEDDINGS:
            return frozenset((0, last)) if self._last_embeds else frozenset((0,))
        return None


def _module_of(name: str) -> str:
    """Return the last part of the name of a tensor's module."""
    return name.rpartition(".")[0].rpartition(".")[2]
