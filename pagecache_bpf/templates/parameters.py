# SPDX-License-Identifier: Apache-2.0
"""What the parameters of a layer are called, and which of their dimensions is which.

It knows names only: what is done with them is sharding's.
"""

from __future__ import annotations

import re

#: Dimensions of a layer's output and of its input in each of its parameters; None: it has none.
PARAMETERS: dict[str, tuple[int | None, int | None]] = {
    "weight": (0, 1),
    "bias": (0, None),
    # AWQ and GPTQ: the input comes first, and one of the two is packed.
    "qweight": (1, 0),
    "qzeros": (1, 0),
    "scales": (1, 0),
    "g_idx": (None, 0),
    # compressed-tensors.
    "weight_packed": (0, 1),
    "weight_scale": (0, 1),
    "weight_zero_point": (0, 1),
    "weight_g_idx": (None, 0),
    "weight_shape": (None, None),
    # FP8 by blocks, NVFP4, and scales of one number.
    "weight_scale_inv": (0, 1),
    "weight_scale_2": (None, None),
    "weight_global_scale": (None, None),
    "input_scale": (None, None),
    "input_global_scale": (None, None),
    "k_scale": (None, None),
    "v_scale": (None, None),
}
SCALES = frozenset(("weight_scale", "weight_scale_inv", "weight_zero_point"))
EXPERTS = re.compile(
    r"(?P<module>.*\bexperts\.(?:gate_up_proj|down_proj|w13|w2))"
    r"(?:[._](?P<suffix>blocks|scales?|bias|weight|weight_scale|scale_inv|weight_scale_inv))?"
)


def module_of(name: str) -> tuple[str, str]:
    """Split a tensor's name.

    Args:
        name: a tensor's name in the checkpoint, such as "model.layers.0.mlp.up_proj.weight".

    Returns:
        The name of its module, and that of its parameter; "" for none.
    """
    matched = EXPERTS.fullmatch(name)
    if matched is not None:
        return matched["module"], ""
    module, _, parameter = name.rpartition(".")
    if parameter in PARAMETERS:
        return module, parameter
    return (name, "bias") if parameter == "sinks" else (name, "")


def experts_base(name: str) -> str:
    """Tell which module holds the experts.

    Args:
        name: the name of a tensor that has all of them.

    Returns:
        The module's name, with a dot at its end.
    """
    matched = EXPERTS.fullmatch(name)
    module = matched["module"] if matched else name.rpartition(".")[0]
    return f"{module.rpartition('.')[0]}."


def sibling(module: str) -> str:
    """Tell which module has the queries beside one of keys or values.

    Args:
        module: the name of that one.

    Returns:
        The other one's name.
    """
    base, _, last = module.rpartition(".")
    name = last.replace("k_", "q_").replace("v_", "q_").replace("wk", "wq").replace("wv", "wq")
    return f"{base}.{name}" if base else name
