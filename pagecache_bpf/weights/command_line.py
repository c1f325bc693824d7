# SPDX-License-Identifier: Apache-2.0
"""Which models the command line of an inference server names.

Servers are given several: the model, a draft model (--speculative-config '{"model": ...}'),
adapters (--lora-modules NAME=PATH), a projector (--mmproj).  No option of any server is known here:
every word that leads to weights on this machine counts.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from pagecache_bpf.errors import PagecacheError
from pagecache_bpf.weights.caches import Listed, is_ollama_manifest
from pagecache_bpf.weights.models import find, resolve
from pagecache_bpf.weights.weight_format import format_of

_MAX_WORD = 64 << 10
_SCALED = re.compile(r"(.+\.gguf):\d+(?:\.\d+)?", re.IGNORECASE)


def models_in(command: Sequence[str]) -> tuple[list[str], list[PagecacheError]]:
    """Find the words of a command that lead to weights.

    Args:
        command: the program and its arguments.

    Returns:
        The words, or parts of words, that resolve() takes, each model once and in their order; and
        the errors of those that lead to weights which cannot be used.
    """
    found: dict[tuple[Path, ...], str] = {}
    refused = []
    revision = _revision(command)
    for word in dict.fromkeys(_candidates(command[1:])):
        try:
            name = _located(word, revision)
            if name is None:
                continue
            found.setdefault(resolve(name).files, name)
        except PagecacheError as error:
            if format_of(word) or "model" in error.what:
                refused.append(error)
    return list(found.values()), refused


def _located(word: str, revision: str | None) -> str | None:
    """Return what leads to the weights that a word names; None where it names none."""
    if len(word) > _MAX_WORD or "\0" in word:
        return None
    if revision is not None and not os.path.lexists(word) and "@" not in word:
        try:
            if find(f"{word}@{revision}") != Path(f"{word}@{revision}"):
                return f"{word}@{revision}"
        except PagecacheError:
            pass  # that revision is not here: the server will download it
    place = find(word)
    if isinstance(place, Listed):
        return word
    if not os.path.exists(place):  # which a script in a word may be too long to ask of Path
        return None
    if place.is_file() and not format_of(place.name) and not is_ollama_manifest(place.absolute()):
        return None
    return word


def _revision(command: Sequence[str]) -> str | None:
    """Return what --revision names, as vLLM, SGLang and TGI have it."""
    for word, following in zip(command, [*command[1:], ""], strict=True):
        if word == "--revision" and following:
            return following
        if word.startswith("--revision="):
            return word.partition("=")[2]
    return None


def _candidates(words: Sequence[str]) -> Iterator[str]:
    """Yield words, values of options, values in JSON and what stands behind NAME=."""
    return filter(None, _parts(words))  # nothing is no name of the current directory


def _parts(words: Sequence[str]) -> Iterator[str]:
    """Yield what _candidates() does, and empty texts, too."""
    for before, word in zip(["", *words], words, strict=False):
        value = word.partition("=")[2] if word.startswith("-") else word
        if not value:
            continue
        if before == "-c" and any(map(str.isspace, value)):
            # What a shell is to run or Python: `cat /a/b` is a program of either.
            yield from _candidates(_words(value))
            yield from _literals(value)
            continue
        if value.lstrip()[:1] in ("{", "["):
            try:
                yield from _strings(json.loads(value))
                continue
            except (ValueError, RecursionError):
                pass
        yield value
        if os.path.lexists(value):
            continue
        if "=" in value:
            yield value.partition("=")[2]
        # llama.cpp: --lora A,B and --lora-scaled A:0.5,B:0.25
        parts = value.split(",")
        if len(parts) > 1 or _SCALED.fullmatch(value):
            yield from (
                scaled[1] if (scaled := _SCALED.fullmatch(part)) else part for part in parts
            )


def _literals(script: str) -> list[str]:
    """Return the texts in a Python program, in their order; none where it is no program."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            parsed = ast.parse(script)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    nodes = [node for node in ast.walk(parsed) if isinstance(node, ast.Constant)]
    nodes.sort(key=lambda node: (node.lineno, node.col_offset))
    return [node.value for node in nodes if isinstance(node.value, str)]


def _words(script: str) -> list[str]:
    """Return the words of a line for a shell; none where its quotes do not match."""
    try:
        return shlex.split(script)
    except ValueError:
        return []


def _strings(value: object) -> Iterator[str]:
    """Yield all texts in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
