# SPDX-License-Identifier: Apache-2.0
"""How the layers of deployed architectures are cut between tensor-parallel ranks.

One line an entry.  The last part of a module's name decides, or its last two where one is not
enough; an architecture (config.json's model_type, or one of its architectures) comes before what is
common to all.  A name that is in no table is read whole by every rank, and derive() tells it.

Source: Shoeybi et al., Megatron-LM, section 3; vLLM's model_executor/layers/linear.py and models/.
"""

from __future__ import annotations

import re
from enum import Enum


class Cut(Enum):
    """How a layer's weight is cut."""

    #: Every rank reads it all.
    WHOLE = "whole"
    #: The same, and of layers that a stage of a pipeline does not have, too: the loader puts the
    #: rows of all of them into another order before it looks whose they are.
    REORDERED = "whole, by every stage"
    #: By its output dimension (column-parallel in Megatron's words), in even shares.
    OUTPUT = "output"
    #: By its input dimension (row-parallel).
    INPUT = "input"
    #: By its output dimension, after padding to a multiple of 64.
    VOCABULARY = "vocabulary"
    #: By heads of keys and values, of which several ranks read the same where there are few.
    KEY_VALUE = "key and value heads"
    #: Queries, keys and values one after the other in one tensor.
    QKV = "queries, keys, values"
    #: Queries, keys and values of each key and value head together.
    QKV_GROUPED = "queries, keys, values by group"
    #: Two matrices one after the other (gate and up), each by its output dimension.
    GATE_UP = "gate and up"
    #: Three matrices one after the other, each by its output dimension.
    THIRDS = "three parts"
    #: Queries, keys and values of a linear attention one after the other.
    LINEAR_QKV = "queries, keys, values of a linear attention"
    #: The same and a gate, those of each head of keys together.
    LINEAR_GROUPS = "heads of a linear attention"
    #: What a state-space layer (Mamba) projects its input to: gate, input, states, steps.
    STATE_SPACE_IN = "input of a state-space layer"
    #: The convolution of a state-space layer, by input and states.
    STATE_SPACE_CONV = "convolution of a state-space layer"
    #: All experts in one tensor: expert, then gate and up.
    EXPERTS_GATE_UP = "gate and up of all experts"
    #: All experts in one tensor: expert, then the down projection.
    EXPERTS_DOWN = "down projection of all experts"
    #: All experts in one matrix, one after the other by its first dimension, cut within each.
    EXPERTS_STACKED = "rows of all experts"


#: Common to all architectures.
COMMON: dict[str, Cut] = {
    # Attention.
    "q_proj": Cut.OUTPUT,
    "q_b_proj": Cut.OUTPUT,  # multi-head latent attention: by heads
    "kv_b_proj": Cut.OUTPUT,
    "k_proj": Cut.KEY_VALUE,
    "v_proj": Cut.KEY_VALUE,
    "wv": Cut.KEY_VALUE,
    "qkv_proj": Cut.QKV,
    "Wqkv": Cut.QKV,
    "W_pack": Cut.QKV,
    "query_key_value": Cut.QKV_GROUPED,
    "wqkv": Cut.QKV_GROUPED,
    "o_proj": Cut.INPUT,
    "out_proj": Cut.INPUT,
    "wo": Cut.INPUT,
    "self_attn.dense": Cut.INPUT,
    "attention.dense": Cut.INPUT,
    "self_attention.dense": Cut.INPUT,
    "attn.c_proj": Cut.INPUT,
    "self_attn.sinks": Cut.OUTPUT,
    # Feed-forward layers and experts with a tensor each.
    "gate_proj": Cut.OUTPUT,
    "up_proj": Cut.OUTPUT,
    "w1": Cut.OUTPUT,
    "w3": Cut.OUTPUT,
    "fc1": Cut.OUTPUT,
    "fc_in": Cut.OUTPUT,
    "c_fc": Cut.OUTPUT,
    "wi": Cut.OUTPUT,
    "wi_0": Cut.OUTPUT,
    "wi_1": Cut.OUTPUT,
    "dense_h_to_4h": Cut.OUTPUT,
    "gate_up_proj": Cut.GATE_UP,
    "w13": Cut.GATE_UP,
    "down_proj": Cut.INPUT,
    "w2": Cut.INPUT,
    "fc2": Cut.INPUT,
    "fc_out": Cut.INPUT,
    "dense_4h_to_h": Cut.INPUT,
    "mlp.c_proj": Cut.INPUT,
    # All experts in one tensor.
    "experts.gate_up_proj": Cut.EXPERTS_GATE_UP,
    "experts.w13": Cut.EXPERTS_GATE_UP,
    "experts.down_proj": Cut.EXPERTS_DOWN,
    "experts.w2": Cut.EXPERTS_DOWN,
    "block_sparse_moe.input_linear": Cut.EXPERTS_GATE_UP,  # granitemoe
    "block_sparse_moe.output_linear": Cut.EXPERTS_DOWN,
    # One feed-forward layer beside the experts (granitemoeshared).
    "shared_mlp.input_linear": Cut.GATE_UP,
    "shared_mlp.output_linear": Cut.INPUT,
    # State-space layers and linear attention.
    "mamba.in_proj": Cut.STATE_SPACE_IN,
    "mamba.conv1d": Cut.STATE_SPACE_CONV,
    "mamba.dt_proj": Cut.OUTPUT,
    "mamba.norm": Cut.OUTPUT,  # gated, by channels as its input
    "mixer.in_proj": Cut.STATE_SPACE_IN,
    "mixer.conv1d": Cut.STATE_SPACE_CONV,
    "mixer.dt_proj": Cut.OUTPUT,
    "mixer.norm": Cut.OUTPUT,
    "linear_attn.in_proj_qkvz": Cut.LINEAR_GROUPS,
    "linear_attn.in_proj_qkv": Cut.LINEAR_QKV,
    "linear_attn.in_proj_z": Cut.OUTPUT,
    # Vocabularies.
    "embed_tokens": Cut.VOCABULARY,
    "lm_head": Cut.VOCABULARY,
    "wte": Cut.VOCABULARY,
    "tok_embeddings": Cut.VOCABULARY,
    "output": Cut.VOCABULARY,
    "word_embeddings": Cut.VOCABULARY,
    "embed_in": Cut.VOCABULARY,
    "embed_out": Cut.VOCABULARY,
    "backbone.embeddings": Cut.VOCABULARY,
    "shared_head.head": Cut.VOCABULARY,  # DeepSeek's multi-token prediction
    # Known to be whole.
    "wq": Cut.REORDERED,  # of Mistral's own format
    "wk": Cut.REORDERED,
    "q_a_proj": Cut.WHOLE,
    "kv_a_proj_with_mqa": Cut.WHOLE,
    "mlp.gate": Cut.WHOLE,
    "block_sparse_moe.gate": Cut.WHOLE,
    "feed_forward.router": Cut.WHOLE,
    "mlp.router": Cut.WHOLE,
    "router.layer": Cut.WHOLE,  # granitemoe
    "mixer.D": Cut.WHOLE,
    "mamba.D": Cut.WHOLE,
    "linear_attn.in_proj_ba": Cut.WHOLE,  # some quantizations are not cut here; it is small
    "linear_attn.in_proj_a": Cut.WHOLE,
    "linear_attn.in_proj_b": Cut.WHOLE,
    "feed_forward.gate": Cut.WHOLE,
    "shared_expert_gate": Cut.WHOLE,
    "wpe": Cut.WHOLE,
    "embed_positions": Cut.WHOLE,
    "eh_proj": Cut.WHOLE,
}

#: What an architecture has otherwise, by model_type or a name of architectures, in lower case;
#: PART:NAME is a module below that part of the model only.
ARCHITECTURES: dict[str, dict[str, Cut]] = {
    "gpt2": {"c_attn": Cut.QKV},
    "gpt_bigcode": {"c_attn": Cut.QKV, "c_fc": Cut.WHOLE},  # which vLLM does not cut
    # Queries, keys and values of the vision tower are joined.
    "llama4": {"q_proj": Cut.REORDERED, "k_proj": Cut.REORDERED, "vision_model:v_proj": Cut.WHOLE},
    "llama4_text": {"q_proj": Cut.REORDERED, "k_proj": Cut.REORDERED},
    "llama4forcausallm": {"q_proj": Cut.REORDERED, "k_proj": Cut.REORDERED},
    # Its queries, keys and values are in as many parts as its checkpoint was made for.
    "mimo_v2": {"qkv_proj": Cut.WHOLE},
    "mimo_v2_flash": {"qkv_proj": Cut.WHOLE},
    "mimov2forcausallm": {"qkv_proj": Cut.WHOLE},
    "mimov2flashforcausallm": {"qkv_proj": Cut.WHOLE},
    "lfm2": {"conv.in_proj": Cut.THIRDS},
    "lfm2_moe": {"conv.in_proj": Cut.THIRDS},
    "lfm2_vl": {"conv.in_proj": Cut.THIRDS},
    "qwen": {"c_attn": Cut.QKV, "w2": Cut.OUTPUT},
    # vLLM reads all of it and then puts queries, keys and values one after the other.
    "bloom": {"query_key_value": Cut.REORDERED},
    "bloomforcausallm": {"query_key_value": Cut.REORDERED},
    "falcon": {"query_key_value": Cut.WHOLE},
    "falconforcausallm": {"query_key_value": Cut.WHOLE},
    "refinedweb": {"query_key_value": Cut.WHOLE},
    "refinedwebmodel": {"query_key_value": Cut.WHOLE},
    "chatglm": {"query_key_value": Cut.QKV, "dense_h_to_4h": Cut.GATE_UP},
    "glm4v": {"query_key_value": Cut.QKV},
    "bailing_moe": {"query_key_value": Cut.QKV},
    "bailingmoeforcausallm": {"query_key_value": Cut.QKV},
    "bailingmoev2forcausallm": {"query_key_value": Cut.QKV},
    "param2moeforcausallm": {"query_key_value": Cut.QKV},
    # Engines differ in which order they take its rows for, and some copy all of them.
    "internlm2": {"wqkv": Cut.WHOLE},
    "internlm2forcausallm": {"wqkv": Cut.WHOLE},
    "codegen": {"qkv_proj": Cut.WHOLE},  # in four blocks
    "dbrx": {
        "mlp.w1": Cut.EXPERTS_STACKED,
        "mlp.v1": Cut.EXPERTS_STACKED,
        "mlp.w2": Cut.EXPERTS_STACKED,
    },
    "opt": {"project_in": Cut.WHOLE, "project_out": Cut.WHOLE},
    "bart": {"shared": Cut.VOCABULARY},
}

#: Architectures whose layers are transformers' Conv1D: the input dimension comes first.
CONV1D = frozenset(("gpt2", "gpt2lmheadmodel", "openai-gpt", "decision_transformer"))
#: Architectures of which fused queries, keys and values are known to lie by groups; of others they
#: may lie one after the other, and both readings are read.
GROUPED = frozenset(("gpt_neox", "gptneoxforcausallm", "persimmon", "persimmonforcausallm"))
#: Architectures of which gate and up lie in turns, so that an even share has both.
INTERLEAVED = frozenset(("gpt_oss", "gptossforcausallm"))

#: Architectures, in lower case, of which vLLM has the embedding on the first stage of a
#: pipeline only (on the last, too, where it is the output layer) and lm_head on the last one only.
#: Of others every stage reads both.  Source: vLLM 0.32, PPMissingLayer in models/.
PIPELINE_ENDS = frozenset(
    {
        "afmoeforcausallm",
        "apertusforcausallm",
        "arceeforcausallm",
        "axk1forcausallm",
        "decilmforcausallm",
        "deepseekforcausallm",
        "deepseekv2forcausallm",
        "deepseekv3forcausallm",
        "ernie4_5_moeforcausallm",
        "exaone4forcausallm",
        "exaonemoeforcausallm",
        "falconh1forcausallm",
        "gptneoxforcausallm",
        "glm4forcausallm",
        "glm4moeforcausallm",
        "glm4moeliteforcausallm",
        "graniteforcausallm",
        "hunyuandensev1forcausallm",
        "hyperclovaxforcausallm",
        "internlm3forcausallm",
        "iquestcoderforcausallm",
        "lagunaforcausallm",
        "llama4forcausallm",
        "llama4forconditionalgeneration",
        "llamaforcausallm",
        "longcatflashforcausallm",
        "mimoforcausallm",
        "mimov2forcausallm",
        "mimov2flashforcausallm",
        "minimaxm2forcausallm",
        "mistralforcausallm",
        "nemotronforcausallm",
        "olmo2forcausallm",
        "olmo3forcausallm",
        "panguembeddedforcausallm",
        "pangupromoev2forcausallm",
        "panguultramoeforcausallm",
        "param2moeforcausallm",
        "phi3forcausallm",
        "phiforcausallm",
        "phimoeforcausallm",
        "qwen2forcausallm",
        "qwen3forcausallm",
        "sarvammlaforcausallm",
        "sarvammoeforcausallm",
        "seedossforcausallm",
        "solarforcausallm",
        "step1forcausallm",
        "step3p5forcausallm",
        "step3textforcausallm",
        "telechat3forcausallm",
    }
)

#: Names that are whole whatever they are part of.
_WHOLE = re.compile(
    r"(?:.*[._])?(?:\w*norm\w*|ln_\w+|ln\d?|rotary_emb|inv_freq|lora_\w+|indexer|conv\d?|conv1d"
    r"|\w*position_embedding\w*|e_score_correction_bias|expert_bias|A_log|dt_bias|dt_proj|x_proj"
    r"|act_fn|patch_embed\w*|class_embedding|relative_attention_bias|\w*projector|merger)(?:[._].*)?",
    re.IGNORECASE,
)


def cut_of(module: str, kinds: frozenset[str]) -> Cut | None:
    """Tell how a module is cut between tensor-parallel ranks.

    Args:
        module: its full name, without the parameter (".weight").
        kinds: model_type and architectures of the model, in lower case.

    Returns:
        How; None for a name that no table has.
    """
    if "lora_" in module or ".indexer." in f".{module}.":
        return Cut.WHOLE
    parts = module.rsplit(".", 2)
    names = (".".join(parts[-2:]), parts[-1])
    above = [f"{part}:{parts[-1]}" for part in module.split(".")[:-1]]
    for kind in sorted(kinds & ARCHITECTURES.keys()):
        for name in (*above, *names):
            if name in ARCHITECTURES[kind]:
                return ARCHITECTURES[kind][name]
    for name in names:
        if name in COMMON:
            return COMMON[name]
    return Cut.WHOLE if _WHOLE.fullmatch(module) else None
