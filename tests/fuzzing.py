# SPDX-License-Identifier: Apache-2.0
"""Every parser of what strangers send, fed with broken variants of what is right.

    python -m tests.fuzzing --seconds 3600 [--targets gguf wire] [--seed 7]

A parser may refuse its input by an error of ours and by nothing else, and what it accepts has to
lie inside of the file.  What fails is written to tests/cases/fuzz as hexadecimal text, called
TARGET-DIGEST.hex, and is tried first by every later run.  tests/unit/test_fuzzing.py runs a short
part of this, the same each time; tests/fuzzing_guided.py has libFuzzer feed TARGETS.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from pagecache_bpf.errors import PagecacheError
from pagecache_bpf.ipc import public_protocol, wire
from pagecache_bpf.templates import Template, text
from pagecache_bpf.weights import index
from pagecache_bpf.weights.headers import parse_open
from tests.unit import weights
from tests.unit.test_template_headers import torch_zip

CORPUS = Path(__file__).parent / "cases" / "fuzz"
#: Numbers where lengths and counts go wrong.
_NUMBERS = tuple(
    (value & (1 << 64) - 1).to_bytes(8, "little")
    for value in (0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**62, 2**63 - 1, 2**63, -1)
)
_WORDS = (b"{", b"}", b"[" * 200, b'"', b"\\u0000", b"null", b"-1", b"1e999", b"NaN", b"\xff\xfe")
_SLOW_SECONDS = 20.0


def _header(data: bytes, name: str) -> None:
    fd = os.memfd_create("fuzz", os.MFD_CLOEXEC)
    try:
        os.write(fd, data)
        found = parse_open(fd, Path(name))
        assert len(found.names) == len(found.offsets) == len(found.lengths)
        assert found.header_from >= 0
        assert found.header_from + found.header_bytes <= len(data)
        for start, length in zip(found.offsets.tolist(), found.lengths.tolist(), strict=True):
            assert start >= 0 and length >= 0 and start + length <= len(data)
    finally:
        os.close(fd)


def _file(data: bytes, read: Callable[[Path], object]) -> object:
    fd = os.memfd_create("fuzz", os.MFD_CLOEXEC)
    try:
        os.write(fd, data)
        return read(Path(f"/proc/self/fd/{fd}"))
    finally:
        os.close(fd)


def _index(data: bytes) -> None:
    # An index is opened through its directory, as a regular file.
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as name:
        path = Path(name) / "model.safetensors.index.json"
        path.write_bytes(data)
        for shard in index.shards_of(path):
            assert not Path(shard).is_absolute() and ".." not in Path(shard).parts


def _template(data: bytes) -> None:
    found = _file(data, text.read)
    assert isinstance(found, Template)
    plain = found.plain()
    sizes = [file.size for file in found.files]
    for extent in plain:
        assert int(extent["offset"]) + int(extent["length"]) <= sizes[int(extent["file"])]


def _wire(data: bytes) -> None:
    with suppress(PagecacheError):
        wire.decode_request(data)
    with suppress(PagecacheError, ValueError, RecursionError):
        assert isinstance(wire.decode_answer(data), dict)
    operation, arguments = public_protocol.check_request(data, len(data) % 3)
    assert operation in public_protocol.OPERATIONS and isinstance(arguments, dict)


TARGETS: dict[str, Callable[[bytes], None]] = {
    "safetensors": lambda data: _header(data, "w.safetensors"),
    "gguf": lambda data: _header(data, "w.gguf"),
    "torch": lambda data: _header(data, "w.bin"),
    "index": _index,
    "template": _template,
    "wire": _wire,
}


def seeds() -> dict[str, list[bytes]]:
    """Return what is right, for every target."""
    found: dict[str, list[bytes]] = {name: [] for name in TARGETS}
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "w.safetensors"
        for tensors in ({"a": (4, 2), "b": (3,)}, {f"layer.{n}": (8,) for n in range(6)}):
            weights.safetensors(path, tensors)
            found["safetensors"].append(path.read_bytes())
        for order in "<>":
            weights.gguf(path, [("t", (4, 2), 0, 0), ("u", (32,), 2, 32)], order=order, data=64)
            found["gguf"].append(path.read_bytes())
        torch_zip(path, storages=2)
        found["torch"].append(path.read_bytes())
        fd = os.open(path, os.O_RDONLY)
        os.close(fd)
        weights.safetensors(path, {"a": (4, 2), "b": (3,)})
        from pagecache_bpf.templates.derive import derive
        from pagecache_bpf.weights.models import resolve

        template = derive(resolve(path))
        found["template"].append(b"".join(text.render(template)))
    weight_map = {f"layer.{n}": f"model-{n % 2}.safetensors" for n in range(4)}
    found["index"].append(json.dumps({"metadata": {}, "weight_map": weight_map}).encode())
    found["wire"] += [
        wire.encode({"op": "open_load", "model": "m", "devices": [{"name": "cuda:0", "node": 0}]}),
        wire.encode({"op": "prefetch", "extents": [[0, 4096], [4096, 0]], "node": -1}),
        wire.encode_answer({"files": 1}),
        wire.encode_error(PagecacheError("what", "why")),
    ]
    return found


def kept(target: str) -> list[bytes]:
    """Return what has failed before."""
    return [bytes.fromhex(path.read_text()) for path in sorted(CORPUS.glob(f"{target}-*.hex"))]


def mutate(chooser: random.Random, data: bytes, other: bytes) -> bytes:
    """Break something: a few bytes, a number, a word, an end, or two files put together."""
    out = bytearray(data)
    for _ in range(chooser.choice((1, 1, 2, 3, 8))):
        at = chooser.randrange(len(out) + 1)
        kind = chooser.randrange(8)
        if kind == 0 and out:
            out[at % len(out)] ^= 1 << chooser.randrange(8)
        elif kind == 1 and out:
            out[at % len(out)] = chooser.randrange(256)
        elif kind == 2:
            number = chooser.choice(_NUMBERS)[: chooser.choice((1, 2, 4, 8))]
            out[at : at + len(number)] = number
        elif kind == 3:
            out[at:at] = chooser.choice(_WORDS)
        elif kind == 4:
            del out[at : at + chooser.randrange(1, 33)]
        elif kind == 5:
            out[at:at] = out[at : at + chooser.randrange(1, 65)]
        elif kind == 6:
            del out[at:]
        else:
            start = chooser.randrange(len(other) + 1)
            out[at:] = other[start : start + (64 << 10)]
    return bytes(out[: 1 << 20])


def attempt(target: str, data: bytes) -> str | None:
    """Feed a parser; returns what is wrong with it, None if nothing is."""
    begun = time.process_time()
    try:
        TARGETS[target](data)
    except PagecacheError as error:
        if not error.what:
            return "an error that says nothing"
    except BaseException:
        return traceback.format_exc()
    took = time.process_time() - begun
    return f"it took {took:.0f} s" if took > _SLOW_SECONDS else None


def inputs(target: str, seed: int) -> Iterator[bytes]:
    """Yield what has failed before, what is right, and then broken variants without end."""
    pool = [*kept(target), *seeds()[target]]
    yield from pool
    chooser = random.Random(f"{seed} {target}")
    while True:
        yield mutate(chooser, chooser.choice(pool), chooser.choice(pool))


def main() -> int:
    """Run until the time is over or something fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=600, help="of all targets together")
    parser.add_argument("--targets", nargs="*", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--seed", type=int, default=None, help="default: another one each time")
    options = parser.parse_args()
    seed = random.randrange(1 << 32) if options.seed is None else options.seed
    failed = 0
    for target in options.targets:
        until = time.monotonic() + options.seconds / len(options.targets)
        count = 0
        for data in inputs(target, seed):
            count += 1
            why = attempt(target, data)
            if why is not None:
                failed += 1
                path = CORPUS / f"{target}-{hashlib.sha256(data).hexdigest()[:12]}.hex"
                path.write_text(data.hex() + "\n")
                print(f"{target}: {path.name}\n{why}", file=sys.stderr)
            if time.monotonic() > until:
                break
        print(f"{target}: {count:,} inputs, seed {seed}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
