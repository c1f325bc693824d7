# SPDX-License-Identifier: Apache-2.0
"""What a model's configuration says about heads, experts, layers and quantization.

config.json of Hugging Face and params.json of Mistral and Meta are read.  Multimodal models nest
the configurations of their parts; the name of a tensor says which one counts.  What is not said
stays unknown (None): nothing is guessed here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pagecache_bpf.kernel.file_key import read_small_file

_CONFIG_BYTES = 16 << 20
#: Nested configurations of the language model, by the names that architectures give them.
_TEXT = (
    *("text_config", "llm_config", "language_config", "language_model_config", "thinker_config"),
    *("decoder_config", "text_model_config", "lm_config", "decoder"),
)
#: Parts of a tensor's name that say that another configuration counts, and which.
_PARTS = (
    (re.compile(r"\b(?:vision\w*|visual|vit\w*|image_\w+|img_\w+|siglip\w*)\b"), "vision_config"),
    (re.compile(r"\b(?:audio\w*|speech\w*|whisper\w*)\b"), "audio_config"),
    (re.compile(r"\btalker\b"), "talker_config"),
)
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads")
_KEY_VALUE_HEADS = (
    *("num_key_value_heads", "n_kv_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num"),
    "kv_n_heads",
)
_EXPERTS = (
    *("n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts", "n_experts"),
    "num_routed_experts",
)
_GROUPS = ("mamba_n_groups", "mamba_ngroups", "n_groups")
_LAYERS = ("num_hidden_layers", "n_layers", "n_layer", "num_layers")
_MAX = 1 << 20
#: What a params.json has of models that are another architecture.
_NOT_PLAIN = frozenset(("moe", "vision_encoder", "multimodal", "kv_lora_rank", "llama_4_scaling"))


@dataclass(frozen=True)
class ModelConfig:
    """A model's configuration as it was found.

    Attributes:
        content: the JSON object; {} where there is none.
    """

    content: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def beside(cls, directory: Path) -> ModelConfig:
        """Read the configuration in a model's directory.

        Args:
            directory: where config.json or params.json would be.

        Returns:
            The configuration; an empty one where there is none that can be read.
        """
        for name in ("config.json", "params.json"):
            try:
                content = json.loads(read_small_file(directory / name, _CONFIG_BYTES))
            except (OSError, ValueError, RecursionError):
                continue
            if isinstance(content, dict):
                plain = name == "params.json" and not content.keys() & _NOT_PLAIN
                # Mistral's own format does not say it; vLLM takes it for this one.
                return cls(
                    {"architectures": ["MistralForCausalLM"], **content} if plain else content
                )
        return cls()

    @property
    def kinds(self) -> frozenset[str]:
        """The model_type and the architectures of the model and of its parts, in lower case."""
        found = set()
        for part in self._all(self.content, 0):
            value = part.get("model_type")
            found |= {value.lower()} if isinstance(value, str) else set()
            listed = part.get("architectures")
            if isinstance(listed, list):
                found |= {item.lower() for item in listed if isinstance(item, str)}
        return frozenset(found)

    def _all(self, part: Mapping[str, Any], depth: int) -> Iterator[Mapping[str, Any]]:
        """Yield a configuration and those nested in it, three levels deep."""
        yield part
        for value in part.values():
            if isinstance(value, dict) and depth < 3:
                yield from self._all(value, depth + 1)

    def part_of(self, name: str) -> Mapping[str, Any]:
        """Return the nested configuration that counts for a tensor.

        Args:
            name: the tensor's name.

        Returns:
            That of the vision or audio tower, or of the language model; {} where it is not there.
        """
        for pattern, key in _PARTS:
            if pattern.search(name):
                for part in self._all(self.content, 0):
                    value = part.get(key)
                    if isinstance(value, dict):
                        nested = value.get("text_config")
                        return nested if isinstance(nested, dict) else value
                return {}
        return self._text(self.content, 0)

    def is_text(self, name: str) -> bool:
        """Tell whether a tensor is of the language model and not of another part.

        Args:
            name: the tensor's name.

        Returns:
            False for vision and audio towers and the like.
        """
        return not any(pattern.search(name) for pattern, _ in _PARTS)

    def _text(self, part: Mapping[str, Any], depth: int) -> Mapping[str, Any]:
        """Return the configuration of the language model within another one."""
        for key in _TEXT:
            value = part.get(key)
            if isinstance(value, dict) and depth < 4:
                return self._text(value, depth + 1)
        return part

    def heads(self, name: str) -> int | None:
        """Tell how many attention heads a tensor's layer has.

        Args:
            name: the tensor's name.

        Returns:
            Heads of queries; None if that is not known.
        """
        part = self.part_of(name)
        sides = {
            side: _number(part, (f"{side}_attention_heads",)) for side in ("encoder", "decoder")
        }
        for side, told in sides.items():
            if told is not None and f".{side}." in f".{name}":
                return told
        heads = _number(part, _HEADS, layer_of(name))
        if heads is None and len({*sides.values()} - {None}) == 1:
            heads = next(value for value in sides.values() if value is not None)
        return heads

    def key_value_heads(self, name: str) -> int | None:
        """Tell how many heads of keys and values a tensor's layer has.

        Args:
            name: the tensor's name.

        Returns:
            Heads of keys; None if that is not known, or differs between layers and is not told of
            this.
        """
        part = self.part_of(name)
        if part.get("multi_query") is True and not part.get("new_decoder_architecture"):
            return 1  # falcon-7b, gpt_bigcode: num_kv_heads is not looked at then
        for section in (part, part.get("attn_config"), part.get("attention_config")):
            if isinstance(section, dict):
                value = _number(section, _KEY_VALUE_HEADS, layer_of(name))
                if value is not None:
                    return value
                if any(isinstance(section.get(key), list) for key in _KEY_VALUE_HEADS):
                    return None  # by layer, and of this layer it is not told
        if isinstance(part.get("block_configs"), list):
            return None  # DeciLM: each layer has its own, in groups of query heads
        return self.heads(name)

    def head_size(self, name: str) -> int | None:
        """Tell how many elements a head has, where the configuration says so itself.

        Args:
            name: the name of a tensor of the layer.

        Returns:
            Elements; None if that is not known.
        """
        return _number(self.part_of(name), ("head_dim", "head_size", "kv_channels"))

    @property
    def experts(self) -> int | None:
        """Experts of a layer; None if that is not known."""
        part = self._text(self.content, 0)
        for section in (part, part.get("ffn_config"), part.get("moe")):
            if isinstance(section, dict) and (value := _number(section, _EXPERTS)) is not None:
                return value
        return None

    @property
    def groups(self) -> int | None:
        """Groups of the state-space layers; None if that is not known."""
        return _number(self._text(self.content, 0), _GROUPS)

    @property
    def linear_heads(self) -> int | None:
        """Heads of keys of the linear attention; None if that is not known."""
        return _number(self._text(self.content, 0), ("linear_num_key_heads",))

    @property
    def layers(self) -> int | None:
        """Layers of the language model; None if that is not known."""
        return _number(self._text(self.content, 0), _LAYERS)

    @property
    def ties_embeddings(self) -> bool:
        """Whether the output layer is the input embedding."""
        text = self._text(self.content, 0)
        return bool(text.get("tie_word_embeddings", self.content.get("tie_word_embeddings", False)))

    @property
    def quantization(self) -> Mapping[str, Any]:
        """quantization_config, wherever it stands; {} without one."""
        for part in self._all(self.content, 0):
            value = part.get("quantization_config")
            if isinstance(value, dict):
                return value
        return {}


def layer_of(name: str) -> int | None:
    """Read the number of a tensor's layer from its name.

    Args:
        name: the tensor's name.

    Returns:
        The layer, counted from 0; None for what is in no layer.
    """
    found = re.search(r"(?:^|\.)(?:layers?|h|blocks?|blk)\.(\d{1,5})(?=\.)", name)
    return int(found[1]) if found else None


def _number(part: Mapping[str, Any], keys: tuple[str, ...], layer: int | None = None) -> int | None:
    """Return the first of these that is a usable number; of a list, that of the layer."""
    for key in keys:
        value = part.get(key)
        if isinstance(value, list) and layer is not None and layer < len(value):
            value = value[layer]
        if type(value) is int and 0 < value < _MAX:
            return value
    return None
