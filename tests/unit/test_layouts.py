# SPDX-License-Identifier: Apache-2.0
"""Which files are the model, and in which order: layouts as people report them.

What is right was taken from the loaders: transformers, vLLM, diffusers, llama.cpp and Ollama.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from pagecache_bpf import templates
from pagecache_bpf.errors import UsageError
from pagecache_bpf.weights.command_line import models_in
from pagecache_bpf.weights.models import resolve
from tests.unit import weights
from tests.unit.layouts import BIN, POINTER, SAFE, SHARDS, hub, tree

#: Files, indexes, and what is the model of them.
LAYOUTS: dict[str, tuple[list[str], dict[str, list[str]], list[str]]] = {
    "a copy in original/ and one for Metal": (
        ["model-00000-of-00001.safetensors", "original/model.safetensors", "metal/model.bin"],
        {SAFE: ["model-00000-of-00001.safetensors"]},
        ["model-00000-of-00001.safetensors"],
    ),
    "consolidated below original/": (
        ["a-1.safetensors", "original/consolidated.00.pth"],
        {SAFE: ["a-1.safetensors"]},
        ["a-1.safetensors"],
    ),
    "original/ without an index": (
        ["model.safetensors", "original/consolidated.00.pth"],
        {},
        ["model.safetensors"],
    ),
    "training state": (
        [
            *("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt"),
            *("rng_state_3.pth", "training_args.bin", "optimizer.bin", "global_step9/a.pt"),
            *("checkpoint-500/model.safetensors", "checkpoint-500/optimizer.pt"),
        ],
        {},
        ["model.safetensors"],
    ),
    "pickled weights with training state": (
        ["pytorch_model.bin", "optimizer.bin", "training_args.bin"],
        {},
        ["pytorch_model.bin"],
    ),
    "all formats": (
        [
            *("model.safetensors", "pytorch_model.bin", "tf_model.h5", "flax_model.msgpack"),
            *("rust_model.ot", "onnx/model.onnx", "openvino/openvino_model.bin", "m.Q8_0.gguf"),
        ],
        {},
        ["model.safetensors"],
    ),
    "safetensors beside an index of pickled files": (
        ["model.safetensors", "pytorch_model-00001-of-00001.bin"],
        {BIN: ["pytorch_model-00001-of-00001.bin"]},
        ["model.safetensors"],
    ),
    "both indexes": (
        ["model-1.safetensors", "pytorch_model-1.bin"],
        {SAFE: ["model-1.safetensors"], BIN: ["pytorch_model-1.bin"]},
        ["model-1.safetensors"],
    ),
    "an index into a directory": (
        ["weights/part-1.safetensors", "weights/unused.safetensors"],
        {SAFE: ["weights/part-1.safetensors"]},
        ["weights/part-1.safetensors"],
    ),
    "the publisher's names beside those of Hugging Face": (
        ["model-1.safetensors", "consolidated-00001-of-00001.safetensors"],
        {
            SAFE: ["model-1.safetensors"],
            "consolidated.safetensors.index.json": ["consolidated-00001-of-00001.safetensors"],
        },
        ["model-1.safetensors"],
    ),
    "the publisher's names without an index": (
        [
            *("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
            "consolidated.safetensors",
        ],
        {},
        ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
    ),
    "the publisher's names only": (
        ["consolidated.safetensors", "params.json"],
        {},
        ["consolidated.safetensors"],
    ),
    "ranks of the publisher": (
        ["consolidated.10.pth", "consolidated.2.pth", "params.json"],
        {},
        ["consolidated.2.pth", "consolidated.10.pth"],
    ),
    "a stale index": (
        ["model.safetensors"],
        {SAFE: [f"model-0000{number}-of-00005.safetensors" for number in range(1, 6)]},
        ["model.safetensors"],
    ),
    "variants": (
        ["model.safetensors", "model.fp16.safetensors", "model.int8-00001-of-00002.safetensors"],
        {"model.safetensors.index.fp16.json": ["absent.safetensors"]},
        ["model.safetensors"],
    ),
    "one variant only": (["model.fp16.safetensors"], {}, ["model.fp16.safetensors"]),
    "an adapter beside a model": (
        ["model.safetensors", "adapter_model.safetensors"],
        {},
        ["model.safetensors"],
    ),
    "an adapter": (["adapter_model.safetensors"], {}, ["adapter_model.safetensors"]),
    "numbers without zeros": (
        [f"part-{number}.safetensors" for number in (10, 9, 1, 2, 100)],
        {},
        [f"part-{number}.safetensors" for number in (1, 2, 9, 10, 100)],
    ),
    "one quantization in two splits, and a projector": (
        ["m-Q4-00001-of-00002.gguf", "m-Q4-00002-of-00002.gguf", "mmproj-F16.gguf"],
        {},
        ["m-Q4-00001-of-00002.gguf", "m-Q4-00002-of-00002.gguf"],
    ),
    "a quantization below its directory": (["Q8_0/m-Q8_0.gguf"], {}, ["Q8_0/m-Q8_0.gguf"]),
    "Megatron-LM": (
        [
            *("iter_0000100/mp_rank_00/model_optim_rng.pt", "iter_0000200/mp_rank_10/model.pt"),
            "iter_0000200/mp_rank_02/model.pt",
        ],
        {},
        ["iter_0000200/mp_rank_02/model.pt", "iter_0000200/mp_rank_10/model.pt"],
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_which_files_are_the_model(disk: Path, layout: str) -> None:
    files, indexes, wanted = LAYOUTS[layout]
    root = tree(disk / "m", *files, index=indexes)
    if layout == "Megatron-LM":
        (root / "latest_checkpointed_iteration.txt").write_text("200\n")
    model = resolve(root)
    assert list(model.names) == wanted
    assert [path.relative_to(root) for path in model.files] == [Path(name) for name in wanted]
    # What is left out has a reason: as a file, or by the directory above it.
    told = {item.path: item.why for item in model.left_out}
    assert all(told.values())
    for name in set(files) - set(wanted) - {"params.json"}:
        if not name.startswith(("iter_", "global_step")):
            assert {name, *(str(above) for above in Path(name).parents)} & told.keys(), name


@pytest.mark.parametrize("shared", [False, True])
def test_a_snapshot_is_in_the_order_of_its_links_by_every_path(
    disk: Path, monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    cache = hub(disk / "hub", SHARDS, disk / "shared" / "blobs" if shared else None)
    config = cache / "snapshots" / "0123abc" / "config.json"
    config.write_text('{"num_key_value_heads": 1, "num_attention_heads": 2, "head_dim": 4}')
    monkeypatch.setenv("HUGGINGFACE_HUB_CACHE", str(disk / "hub"))
    ways: list[str | Path] = [
        cache,
        cache / "snapshots",
        cache / "snapshots" / "0123abc",
        "acme/tiny",
        "acme/tiny@main",
        "acme/tiny@012",
    ]
    found = []
    for way in ways:
        model = resolve(way)
        assert list(model.names) == SHARDS
        assert [path.name for path in model.files] != sorted(path.name for path in model.files)
        assert model.directory == cache / "snapshots" / "0123abc"
        found.append(templates.derive(model, tp=2))
        assert templates.check(found[-1], model).whole
    # The same slices by every path: k_proj has one head, which both ranks read.
    for template in found:
        assert template.extents.tolist() == found[0].extents.tolist()
        assert [file.path for file in template.files] == SHARDS
    plain = disk / "plain"
    plain.mkdir()
    for name in SHARDS:
        weights.safetensors(plain / name, {f"layers.{name}.k_proj.weight": (4, 8)})
    tree(plain, index={SAFE: random.Random(1).sample(SHARDS, 12)})
    (plain / "config.json").write_bytes(config.read_bytes())
    assert templates.derive(resolve(plain), tp=2).extents.tolist() == found[0].extents.tolist()


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({"HF_HUB_CACHE": "{}/a"}, "a"),
        ({"HUGGINGFACE_HUB_CACHE": "{}/b"}, "b"),
        ({"HF_HOME": "{}/c"}, "c/hub"),
        ({"XDG_CACHE_HOME": "{}/d"}, "d/huggingface/hub"),
        ({"HF_HUB_CACHE": "{}/e", "HUGGINGFACE_HUB_CACHE": "{}/b", "HF_HOME": "{}/c"}, "e"),
        ({}, "home/.cache/huggingface/hub"),
    ],
)
def test_where_the_hub_cache_is(
    disk: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], place: str
) -> None:
    hub(disk / place, SHARDS[:1])
    for name, value in variables.items():
        monkeypatch.setenv(name, value.format(disk))
    assert resolve("acme/tiny").root == disk / place / "models--acme--tiny"


def test_a_revision_that_is_not_here(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub(disk, SHARDS[:1])
    monkeypatch.setenv("HF_HUB_CACHE", str(disk))
    with pytest.raises(UsageError, match=r"has no revision v9: its snapshots are 0123abc"):
        resolve("acme/tiny@v9")


def test_other_caches(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scope = tree(disk / "scope/models/acme/tiny-1___5", "model.safetensors")
    monkeypatch.setenv("MODELSCOPE_CACHE", str(disk / "scope"))
    assert resolve("acme/tiny-1.5").root == scope
    studio = tree(disk / "home/.lmstudio/models/acme/seven-GGUF", "seven-Q4_K_M.gguf")
    assert resolve("acme/seven-GGUF").files == (studio / "seven-Q4_K_M.gguf",)
    llama = tree(disk / "llama", "acme_eight-GGUF_sub_eight-Q8_0.gguf")
    (llama / "manifest=acme=eight-GGUF=latest.json").write_text(
        json.dumps({"ggufFile": {"rfilename": "sub/eight-Q8_0.gguf"}})
    )
    monkeypatch.setenv("LLAMA_CACHE", str(llama))
    assert resolve("acme/eight-GGUF").files[0].name == "acme_eight-GGUF_sub_eight-Q8_0.gguf"


def test_ollama(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = tree(disk / "ollama", "blobs/sha256-1a1a", "blobs/sha256-2b2b", "blobs/sha256-3c3c")
    kinds = ("model", "params", "projector")
    layers = [
        {"mediaType": f"application/vnd.ollama.image.{kind}", "digest": f"sha256:{digest}"}
        for kind, digest in zip(kinds, ("1a1a", "2b2b", "3c3c"), strict=True)
    ]
    manifest = models / "manifests/registry.ollama.ai/library/seven/8b"
    manifest.parent.mkdir(parents=True)
    manifest.write_text(json.dumps({"layers": layers}))
    monkeypatch.setenv("OLLAMA_MODELS", str(models))
    ways: list[str | Path] = ["seven:8b", "ollama:seven:8b", manifest, manifest.parent, models]
    for way in ways:
        model = resolve(way)
        assert [path.name for path in model.files] == ["sha256-1a1a", "sha256-3c3c"]
        assert model.name == "seven@8b"
    with pytest.raises(UsageError, match="Ollama has no model seven"):
        resolve("ollama:seven")
    for name in ("hf.co/acme/nine-GGUF", "registry.ollama.ai/people/ten"):
        other = models / "manifests" / name / "Q4_K_M"
        other.parent.mkdir(parents=True)
        other.write_bytes(manifest.read_bytes())
        told = name.removeprefix("registry.ollama.ai/")
        for way in (f"{told}:Q4_K_M", f"ollama:{told}:Q4_K_M"):
            assert [path.name for path in resolve(way).files] == ["sha256-1a1a", "sha256-3c3c"]
    with pytest.raises(UsageError, match="holds 3 models"):
        resolve(models)
    (models / "blobs/sha256-3c3c").rename(models / "blobs/sha256-3c3c-partial")
    with pytest.raises(UsageError, match=r"sha256-3c3c is missing.*a download is in progress"):
        resolve("seven:8b")


def test_a_directory_of_quantizations_asks(disk: Path) -> None:
    names = ["a-7b-BF16.gguf", "a-7b-Q4_K_M.gguf", "a-7b-Q8_0-00001-of-00002.gguf"]
    root = tree(disk / "m", *names, "a-7b-Q8_0-00002-of-00002.gguf", "mmproj-F16.gguf")
    with pytest.raises(UsageError, match=r"m holds 3 models") as caught:
        resolve(root)
    assert all(name in caught.value.why for name in names)
    assert "mmproj" not in caught.value.why
    below = tree(disk / "n", "Q4/x-Q4.gguf", "Q8/x-Q8.gguf")
    with pytest.raises(UsageError, match="n holds 2 models"):
        resolve(below)


def test_quantizations_below_a_projector(disk: Path) -> None:
    """As they are published for llama.cpp: splits of each in a directory, projectors above."""
    splits = [f"Q4_K_XL/m-Q4_K_XL-0000{number}-of-00002.gguf" for number in (1, 2)]
    root = tree(disk / "m", "mmproj-F16.gguf", "mmproj-BF16.gguf", "imatrix.gguf", *splits)
    model = resolve(root)
    assert list(model.names) == splits
    assert {"mmproj-F16.gguf", "mmproj-BF16.gguf", "imatrix.gguf"} == {
        item.path for item in model.left_out
    }
    tree(root, "BF16/m-BF16-00001-of-00001.gguf")
    with pytest.raises(UsageError, match="m holds 2 models") as caught:
        resolve(root)
    assert splits[0] in caught.value.why and "mmproj" not in caught.value.why
    alone = tree(disk / "p", "mmproj-F16.gguf")
    assert list(resolve(alone).names) == ["mmproj-F16.gguf"]
    with pytest.raises(UsageError, match="p holds 2 models"):
        resolve(tree(alone, "mmproj-F32.gguf"))


def test_several_models_side_by_side_ask(disk: Path) -> None:
    root = tree(disk / "m", "bf16/model.safetensors", "fp8/model.safetensors", "README.md")
    assert len(resolve(root).files) == 2  # parts of one, as far as anybody can tell
    tree(root, "bf16/config.json", "fp8/config.json")
    with pytest.raises(UsageError, match=r"m holds 2 models: there are bf16, fp8"):
        resolve(root)
    tree(root, "config.json")  # one model, whose parts are configured by themselves
    assert len(resolve(root).files) == 2
    for name in ("one", "two"):
        (hub(disk / name, SHARDS[:1])).rename(disk / "one" / f"models--acme--{name}")
        if name == "one":
            assert resolve(disk / "one").directory.parent.name == "snapshots"
    with pytest.raises(UsageError, match=r"one holds 2 models: .*models--acme--two"):
        resolve(disk / "one")


@pytest.mark.parametrize("named", [1, 2, 3])
def test_any_split_is_the_model(disk: Path, named: int) -> None:
    names = [f"big-Q4-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    root = tree(disk / "m", *names, "big-Q4-00001-of-00002.gguf")
    model = resolve(root / names[named - 1])
    assert (list(model.names), model.name) == (names, "big-Q4.gguf")
    (root / names[1]).unlink()
    if named != 2:
        with pytest.raises(UsageError, match=f"{names[1]} is missing"):
            resolve(root / names[named - 1])


def test_a_diffusers_pipeline(disk: Path) -> None:
    root = tree(
        disk / "m",
        *("unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"),
        *("vae/diffusion_pytorch_model.fp16.safetensors", "text_encoder/model.safetensors"),
        *("safety_checker/model.safetensors", "sd15-pruned.safetensors", "unet/model.bin"),
    )
    parts = ("text_encoder", "unet", "vae")
    manifest: dict[str, object] = {name: ["diffusers", "Some"] for name in parts}
    manifest |= {"_class_name": "Some", "safety_checker": [None, None], "scheduler": ["d", "S"]}
    (root / "model_index.json").write_text(json.dumps(manifest))
    model = resolve(root)
    assert list(model.names) == [
        "text_encoder/model.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    told = {item.path for item in model.left_out}
    assert {"sd15-pruned.safetensors", "vae/diffusion_pytorch_model.fp16.safetensors"} <= told
    assert model.format == "safetensors"


def test_a_pipeline_of_parts_in_two_formats_has_none(disk: Path) -> None:
    root = tree(disk / "m", "unet/model.safetensors", "vae/diffusion_pytorch_model.bin")
    manifest = {name: ["diffusers", "Some"] for name in ("unet", "vae")}
    (root / "model_index.json").write_text(json.dumps(manifest))
    model = resolve(root)
    assert len(model.names) == 2
    assert model.format == ""


def test_a_projector_alone_is_the_model_and_may_not_be_empty(disk: Path) -> None:
    root = tree(disk / "m", "mmproj-F16.gguf")
    assert list(resolve(root).names) == ["mmproj-F16.gguf"]
    (root / "mmproj-F16.gguf").write_bytes(b"")
    with pytest.raises(UsageError, match=r"mmproj-F16\.gguf is empty"):
        resolve(root)


def test_modules_of_sentence_transformers(disk: Path) -> None:
    root = tree(disk / "m", "model.safetensors", "2_Dense/model.safetensors", "onnx/model.onnx")
    (root / "modules.json").write_text(
        json.dumps([{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}])
    )
    assert list(resolve(root).names) == ["model.safetensors", "2_Dense/model.safetensors"]


def test_models_in_a_command_line(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub(disk / "hub", SHARDS[:2])
    monkeypatch.setenv("HF_HUB_CACHE", str(disk / "hub"))
    draft, adapter = tree(disk / "draft", "model.safetensors"), tree(disk / "lora", "a.safetensors")
    projector = tree(disk, "mmproj-F16.gguf") / "mmproj-F16.gguf"
    speculative = json.dumps({"model": str(draft), "num_speculative_tokens": 3})
    command = [
        *("vllm", "serve", "acme/tiny", "--speculative-config", speculative, "--port", "8000"),
        *("--lora-modules", f"sql={adapter}", f"--mmproj={projector}", "--tokenizer=acme/tiny"),
        *("--chat-template", str(tree(disk, "chat.jinja") / "chat.jinja")),
    ]
    found, refused = models_in(command)
    assert found == ["acme/tiny", str(draft), str(adapter), str(projector)]
    assert not refused
    (adapter / "a.safetensors").write_text(POINTER.format("1" * 64))
    command.append(str(adapter / "a.safetensors"))
    found, refused = models_in(command)
    assert len(found) == 3
    assert "is a Git LFS pointer" in str(refused[0])
    found, _ = models_in(["vllm", "serve", "acme/tiny", "--revision", "0123abc"])
    assert found == ["acme/tiny@0123abc"]


def test_models_in_the_command_lines_of_other_servers(disk: Path) -> None:
    gguf = [str(tree(disk, name) / name) for name in ("a.gguf", "d.gguf", "l.gguf", "m.gguf")]
    model, draft, one, two = gguf
    llama = ["llama-server", "-m", model, "-md", draft, "--port", "8080"]
    assert models_in([*llama, "--lora", f"{one},{two}"]) == (gguf, [])
    assert models_in([*llama, "--lora-scaled", f"{one}:0.5,{two}:2"]) == (gguf, [])
    assert models_in([*llama, "--lora-scaled", f"{one}:0.5"]) == (gguf[:3], [])
    served = [str(tree(disk / name, "model.safetensors")) for name in ("x", "y", "z")]
    sglang = ["python", "-m", "sglang.launch_server", f"--model-path={served[0]}"]
    sglang += ["--speculative-draft-model-path", served[1], "--lora-paths", f"sql={served[2]}"]
    assert models_in(sglang) == (served, [])
    dotted = [*("vllm", "serve", served[0]), f"--speculative-config.model={served[1]}"]
    assert models_in([*dotted, "--lora-modules", json.dumps({"path": served[2]})]) == (served, [])
    script = f"exec vllm serve {served[0]} --served-model-name 'my model' --tokenizer={served[1]}"
    assert models_in(["bash", "-c", script]) == (served[:2], [])
    assert models_in(["bash", "-c", f"echo 'no end {served[0]}"]) == ([], [])
    assert models_in(["sh", "-c", f"cat {served[0]}"]) == (served[:1], [])
    code = f"import x; a = x.load({served[1]!r}, 'x', b='')\nx.load('{served[0]}')"
    assert models_in(["python", "-c", code]) == ([served[1], served[0]], [])


def test_an_empty_word_is_not_the_current_directory(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tree(disk / "here", "model.safetensors"))
    for code in ("a = 1", "print('a b', 2)", "f(a, '')", "x ''"):
        assert models_in(["python", "-c", code]) == ([], [])
    assert models_in(["server", "", "--model=", "a=", "a,", "="]) == ([], [])
    assert models_in(["server", "."]) == (["."], [])


def test_names_in_an_index_are_paths(disk: Path) -> None:
    names = ["./model-1.safetensors", "model-1.safetensors", "sub/../model-2.safetensors"]
    root = tree(disk / "m", "model-1.safetensors", "sub/model-3.safetensors")
    tree(root, index={SAFE: [*names[:2], "./sub//model-3.safetensors"]})
    assert list(resolve(root).names) == ["model-1.safetensors", "sub/model-3.safetensors"]
    tree(root, index={SAFE: names})
    with pytest.raises(UsageError, match="outside its directory"):
        resolve(root)


def test_a_pipeline_of_shards_and_single_files(disk: Path) -> None:
    """As FLUX.1 is published: the same weights as single files for another program beside it."""
    parts = [f"transformer/diffusion_pytorch_model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    encoder = [f"text_encoder_2/model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    others = ["text_encoder/model.safetensors", "vae/diffusion_pytorch_model.safetensors"]
    beside = ["flux1-dev.safetensors", "ae.safetensors", "lora/pytorch_lora_weights.safetensors"]
    root = tree(
        disk / "m",
        *(*parts, *encoder, *others, *beside, "transformer_fp8/model.safetensors"),
        index={
            "transformer/diffusion_pytorch_model.safetensors.index.json": [
                Path(name).name for name in reversed(parts)
            ]
        },
    )
    components = ("scheduler", "text_encoder", "text_encoder_2", "tokenizer", "transformer", "vae")
    (root / "model_index.json").write_text(json.dumps({name: ["l", "C"] for name in components}))
    assert list(resolve(root).names) == [others[0], *encoder, *parts, others[1]]
