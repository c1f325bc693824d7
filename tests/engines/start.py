# SPDX-License-Identifier: Apache-2.0
"""Start an engine as its documentation says, and have it answer: `python start.py ENGINE MODEL`.

With --load the model is loaded inside `pagecache_bpf.load()`; vLLM has its plug-in for that.  One
line of JSON tells seconds by phase, and the answer, which depends on every weight.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

PROMPT = [1, 7, 301, 42, 11]
TOKENS = 8

_seconds: dict[str, float] = {}


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """Count the block's seconds as a phase of the start."""
    begun = time.monotonic()
    yield
    _seconds[name] = round(time.monotonic() - begun, 3)


def transformers(model: str, around: Any) -> list[int]:
    """Load with from_pretrained() and generate greedily."""
    with phase("import"):
        import torch
        from transformers import AutoModelForCausalLM
    with phase("load"), around():
        # In another type than the file's: tensors of the same would be mapped and left unread.
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with phase("answer"):
        prompt = torch.tensor([PROMPT])
        made = loaded.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=TOKENS, do_sample=False
        )
    return [int(token) for token in made[0, len(PROMPT) :]]


def sentence_transformers(model: str, around: Any) -> list[float]:
    """Load a model of embeddings and embed a sentence."""
    with phase("import"):
        from sentence_transformers import SentenceTransformer
    with phase("load"), around():
        loaded = SentenceTransformer(model, device="cpu")
    with phase("answer"):
        vector = loaded.encode("The weights reach the device as fast as the disk allows.")
    return [round(float(number), 4) for number in vector[:16]]


def llama_cpp(model: str, around: Any) -> str:
    """Load a GGUF model, mapped as is usual, and complete greedily."""
    with phase("import"):
        import xllamacpp
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.warmup, params.n_ctx, params.n_gpu_layers = False, 64, 0
    with phase("load"), around():
        server = xllamacpp.Server(params)
        assert server.listening_address  # it has loaded the model
    wanted = {"prompt": PROMPT, "n_predict": TOKENS, "temperature": 0, "return_tokens": True}
    with phase("answer"):
        answer = server.handle_completions(wanted)
    text: str = answer["choices"][0]["text"] if "choices" in answer else answer["content"]
    return text


def vllm(model: str, around: Any) -> list[int]:
    """Start an engine of as many ranks as $TP says, and generate greedily."""
    with phase("import"):
        from vllm import LLM, SamplingParams
    with phase("start"):
        loaded = LLM(
            model,
            tensor_parallel_size=int(os.environ.get("TP", "1")),
            skip_tokenizer_init=True,
            enforce_eager=True,
            dtype="bfloat16",
            max_model_len=64,
            max_num_seqs=1,
        )
    with phase("answer"):
        wanted = SamplingParams(max_tokens=TOKENS, temperature=0, detokenize=False)
        (made,) = loaded.generate([{"prompt_token_ids": PROMPT}], wanted, use_tqdm=False)
    return list(made.outputs[0].token_ids)


ENGINES: dict[str, Callable[[str, Any], Any]] = {
    function.__name__: function
    for function in (transformers, sentence_transformers, llama_cpp, vllm)
}


def main() -> None:
    """Start, answer, tell, end."""
    parser = argparse.ArgumentParser()
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("model")
    parser.add_argument("--load", action="store_true")
    args = parser.parse_args()

    @contextlib.contextmanager
    def around() -> Iterator[None]:
        if not args.load:
            yield
            return
        import pagecache_bpf as pc

        with pc.load(args.model) as load:
            yield
        print(load.report(), flush=True)

    answer = ENGINES[args.engine](args.model, around)
    print(json.dumps({"seconds": _seconds, "answer": answer}), flush=True)
    if args.engine == "llama_cpp":
        os._exit(0)  # its threads would wait for requests


if __name__ == "__main__":
    main()
