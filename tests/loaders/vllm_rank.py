# SPDX-License-Identifier: Apache-2.0
"""One rank of vLLM on the CPU that builds models and loads their weights, without an engine.

`python vllm_rank.py RANK WORLD PORT` answers one line of JSON with another: {"build": DIRECTORY,
...} makes the model (all ranks have to), {"load": true} loads its weights by vLLM's own loader,
{"drop": true} forgets it.  So one rank can load while the others wait, and importing vLLM, which
takes longest, is done once.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from typing import Any


class Rank:
    """The model that this rank has built, and vLLM's configuration of it."""

    def __init__(self, rank: int, world: int, port: int) -> None:
        self.rank, self.world, self.port = rank, world, port
        self.model: Any = None
        self.config: Any = None

    def build(self, directory: str, tp: int, pp: int, ep: bool, options: dict[str, Any]) -> None:
        """Build the model of a checkpoint, with empty weights."""
        import torch
        from vllm import distributed
        from vllm.config import set_current_vllm_config
        from vllm.engine.arg_utils import EngineArgs
        from vllm.model_executor.model_loader.utils import initialize_model

        chosen: dict[str, Any] = {"dtype": "bfloat16", **options}
        arguments = EngineArgs(
            directory,
            tensor_parallel_size=tp,
            pipeline_parallel_size=pp,
            enable_expert_parallel=ep,
            skip_tokenizer_init=True,
            enforce_eager=True,
            max_model_len=64,
            **chosen,
        )
        self.config = arguments.create_engine_config()
        self.config.parallel_config.rank = self.rank
        with set_current_vllm_config(self.config):
            method = f"tcp://127.0.0.1:{self.port}"
            distributed.init_distributed_environment(
                self.world, self.rank, method, self.rank, "gloo"
            )
            distributed.initialize_model_parallel(tp, pp)
            with torch.device("cpu"):
                torch.set_default_dtype(getattr(torch, chosen["dtype"]))
                self.model = initialize_model(self.config)

    def load(self) -> None:
        """Load the weights of the model that was built."""
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader import get_model_loader

        with set_current_vllm_config(self.config):
            loader = get_model_loader(self.config.load_config)
            loader.load_weights(self.model, self.config.model_config)

    def drop(self) -> None:
        """Forget the model, so that none of its files is mapped any longer."""
        from vllm import distributed

        self.model = self.config = None
        distributed.destroy_model_parallel()
        gc.collect()


def emulate_nvfp4() -> None:
    """Have vLLM take NVFP4 layers on the CPU by its own emulation, as it does on old GPUs.

    It refuses them otherwise, since it lists no kernel for CPUs.  Nothing is computed here; how
    weights are loaded does not hang on the kernel.
    """
    from vllm.model_executor.kernels import linear
    from vllm.platforms import PlatformEnum

    linear.register_linear_kernel(linear.EmulationNvFp4LinearKernel, PlatformEnum.CPU, "nvfp4")


def pretend_tiles() -> None:
    """Have vLLM take FP8 layers on every CPU: its kernels for them are for those with AMX alone."""
    import torch
    from vllm import _custom_ops

    torch.cpu._is_amx_tile_supported = lambda: True
    _custom_ops._supports_cpu_fp8_w8a16 = True


def main() -> None:
    """Answer until the standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM writes to both
    rank = Rank(*map(int, sys.argv[1:4]))
    for line in sys.stdin:
        request = json.loads(line)
        error = ""
        try:
            if "build" in request:
                if "nvfp4" in request["build"]:
                    emulate_nvfp4()
                if "fp8" in request["build"]:
                    pretend_tiles()
                rank.build(request.pop("build"), **request)
            elif "load" in request:
                rank.load()
            else:
                rank.drop()
        except Exception as failure:
            traceback.print_exc()
            error = f"{type(failure).__name__}: {failure}"[:2000]
            del failure
        print(json.dumps({"error": error}), file=answers, flush=True)


if __name__ == "__main__":
    main()
