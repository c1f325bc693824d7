# SPDX-License-Identifier: Apache-2.0
"""Start vLLM as a server does, with two tensor-parallel ranks: `python vllm_start.py MODEL`.

Prints "worker RANK PID" for each of its workers when the model is ready, and ends.
"""

from __future__ import annotations

import os
import sys
from typing import Any


def rank_of(worker: Any) -> tuple[int, int]:
    """Return a worker's rank and its process."""
    from torch import distributed

    return distributed.get_rank(), os.getpid()


def main() -> None:
    """Start, tell, end."""
    from vllm import LLM

    started = LLM(
        sys.argv[1],
        tensor_parallel_size=2,
        skip_tokenizer_init=True,
        enforce_eager=True,
        dtype="bfloat16",
        max_model_len=64,
        max_num_seqs=1,
        distributed_executor_backend="mp",
    )
    for rank, process in started.collective_rpc(rank_of):
        print("worker", rank, process, flush=True)


if __name__ == "__main__":
    main()
