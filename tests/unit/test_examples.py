# SPDX-License-Identifier: Apache-2.0
"""Each example does what it says."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from benchmarks import checkpoints, hosted
from pagecache_bpf.errors import PagecacheError
from pagecache_bpf.recording.format import read as read_recording
from pagecache_bpf.recording.phases import PhaseListener
from tests.unit.command import ROOT, environment
from tests.unit.command import run as run_command

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

EXAMPLES = ROOT / "examples"
#: A report; small files are read before anything is ready to serve them.
SERVED = re.compile(r"engine (unprivileged|none)")


def run(name: str, *words: str | Path, **environ: str) -> str:
    """Run an example as a user without rights would; what it printed."""
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(PAGECACHE_BPF_API="alone", **environ),
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def file(tmp_path: Path) -> Path:
    random = np.random.default_rng(1)
    tensors = {f"layer.{n}": random.random((64 + 2 * n, 1021)) for n in range(5)}
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_plain_safetensors(file: Path) -> None:
    said = run("plain_safetensors.py", file, "--budget", "8MiB")
    size = sum((64 + 2 * n) * 1021 * 8 for n in range(5))
    assert f"5 tensors, {size} bytes" in said and SERVED.search(said)


def test_the_recording_becomes_a_page(tmp_path: Path) -> None:
    """It is small, and says what docs/report.md shows of it."""
    recording = EXAMPLES / "guest.pcrec"
    assert recording.stat().st_size < 100_000
    page = tmp_path / "guest.html"
    result = run_command("report", recording, "-o", page, "--json")
    assert result.code == 0, result.err
    (told,) = result.data["loads"]
    assert told["verdict"].startswith("The reader limited the load")
    assert page.stat().st_size == result.data["bytes"] < 1 << 20
    found = read_recording(recording)
    assert (found.policy, found.engine) == ("maio", "struct_ops")
    # what was read is the two files, to the page
    accessed = sum(
        found.total(name)
        for name in ("hit_bytes", "useful_bytes", "late_bytes", "ahead_bytes", "miss_bytes")
    )
    size = sum(file.bytes for file in found.files)
    assert size <= accessed < 1.01 * size and found.lost == 0
    assert [phase.name for phase in found.phases] == ["open", "weights", "ready"]


def test_two_ranks(file: Path) -> None:
    """Together they have the whole of every tensor."""
    from safetensors import safe_open

    expected = []
    with safe_open(file, framework="np") as opened:
        names = sorted(opened.keys())
        for number in (0, 1):
            digests = []
            for name in names:
                tensor = opened.get_tensor(name)
                half = len(tensor) // 2
                rows = tensor[number * half : (number + 1) * half]
                digests.append(hashlib.sha256(rows.tobytes()).hexdigest())
            expected.append(hashlib.sha256("".join(digests).encode()).hexdigest())
    said = run("two_ranks.py", file, "--devices", "cpu", "cpu")
    for number in (0, 1):
        assert f"rank {number}: 5 tensors {expected[number]}" in said


def write_gguf(path: Path, tensors: dict[str, bytes]) -> None:
    """A small GGUF of version 3 with byte tensors, 32 bytes aligned."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    offset, entries, data = 0, b"", b""
    for name, content in tensors.items():
        entries += text(name) + struct.pack("<IQIQ", 1, len(content), 24, offset)
        data += content + bytes(-len(content) % 32)
        offset = len(data)
    pairs = text("general.architecture") + struct.pack("<I", 8) + text("llama")
    pairs += text("tokens") + struct.pack("<IIQ", 9, 8, 2) + text("<s>") + text("</s>")
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), 2) + pairs + entries
    path.write_bytes(head + bytes(-len(head) % 32) + data)


def test_gguf_mmap(tmp_path: Path) -> None:
    tensors = {f"blk.{n}.weight": bytes([n + 1]) * (100_003 + n) for n in range(4)}
    write_gguf(tmp_path / "small.gguf", tensors)
    said = run("gguf_mmap.py", tmp_path / "small.gguf")
    for name, content in tensors.items():
        assert f"{name} {sum(content)}\n" in said
    assert SERVED.search(said)


@pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None,
    reason="transformers is not installed: `make test-torch` runs this",
)
def test_from_pretrained() -> None:
    """The real MiniLM: the same model with and without."""
    try:
        model = checkpoints.minilm(hosted.MODELS / "all-MiniLM-L6-v2").root
    except PagecacheError as error:
        pytest.skip(str(error))
    if not (model / "config.json").is_file():
        config = """{"model_type": "bert", "architectures": ["BertModel"], "hidden_size": 384,
            "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536,
            "max_position_embeddings": 512, "type_vocab_size": 2, "vocab_size": 30522}"""
        (model / "config.json").write_text(config)
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    with_it = run("from_pretrained.py", model, **offline)
    without = run("from_pretrained.py", model, "--without", **offline)
    count = re.compile(r"(\d+) parameters in")
    assert count.findall(with_it) == count.findall(without) != []
    assert SERVED.search(with_it) and "engine" not in without


# vLLM is too large to install for a test.  What is tested is what it does with a plugin
# (importlib.metadata, as in vllm/plugins/__init__.py) and the wrapped function, on a package that
# has vLLM's module path and the signature DefaultModelLoader.load_weights(self, model,
# model_config) and nothing else of it.

FAKE_LOADER = '''
class DefaultModelLoader:
    def load_weights(self, model, model_config):
        """As vLLM's: reads the weights while it runs."""
        import pagecache_bpf as pc
        self.seen = [(load.path, load.files, load.done) for load in pc.report()]
        if model == "broken":
            raise ValueError("a bad checkpoint")
        return "loaded"

    def load_model(self, vllm_config, model_config):
        """As vLLM's, which it inherits: builds the model, and has it loaded."""
        return self.load_weights(None, model_config)
'''
USE_PLUGIN = """
import sys
from importlib.metadata import entry_points
from types import SimpleNamespace as Config
(plugin,) = [point for point in entry_points(group="vllm.general_plugins")
             if point.name == "pagecache_bpf"]
register = plugin.load()
register()
register()
try:
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
except ImportError:
    print("no loader")
    sys.exit()
loader = DefaultModelLoader()
path = sys.argv[1]
assert loader.load_weights(None, Config(model=path)) == "loaded"
print(loader.seen)
try:
    loader.load_weights("broken", Config(model=path))
except ValueError as error:
    print(error)
assert loader.load_weights(None, Config(model="org/not-downloaded")) == "loaded"
print(loader.seen)
assert loader.load_model(None, model_config=Config(model=path)) == "loaded"
import pagecache_bpf
assert pagecache_bpf.report() == []
"""


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    """The entry points of the package, as pip would lay them out."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    site = tmp_path / "plugin"
    info = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Name: {project['name']}\nVersion: {project['version']}\n")
    lines = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return site


def use_plugin(plugin: Path, weights: Path, *more: Path, **environ: str) -> list[str]:
    """What a process prints that uses it; what it says to people, as one more line."""
    done = subprocess.run(
        [sys.executable, "-c", USE_PLUGIN, weights],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(
            PAGECACHE_BPF_API="alone",
            PYTHONPATH=":".join(map(str, (ROOT, plugin, *more))),
            **environ,
        ),
    )
    assert done.returncode == 0, done.stderr
    return [*done.stdout.splitlines(), done.stderr]


def test_vllm_plugin(plugin: Path, file: Path, tmp_path: Path) -> None:
    package = tmp_path / "site" / "vllm" / "model_executor" / "model_loader"
    package.mkdir(parents=True)
    for directory in (package, package.parent, package.parent.parent):
        (directory / "__init__.py").touch()
    (package / "default_loader.py").write_text(FAKE_LOADER)
    phases = PhaseListener(tmp_path)
    *lines, said = use_plugin(plugin, file, tmp_path / "site", **phases.environment)
    marked = [phase.name for phase in phases.take()]
    phases.close()
    assert marked[-4:] == ["model", "weights", "weights loaded", "model ready"]
    assert lines == [f"[({str(file)!r}, 1, False)]", "a bad checkpoint", "[]"]
    assert "not read ahead" in said  # the model that is not there


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vllm is installed here")
def test_vllm_plugin_without_the_loader_it_knows(plugin: Path, file: Path) -> None:
    line, said = use_plugin(plugin, file)
    assert line == "no loader" and "not read ahead" in said
