# SPDX-License-Identifier: Apache-2.0
"""The plug-in for vLLM: its weights are read ahead where this package is installed next to it.

vLLM's default loader asks DefaultModelLoader.load_weights(model, model_config) for the weights in
each worker; a load is open around that call, for the worker's own device.  If vLLM has moved it,
the plug-in says so and does nothing.  A recording (`pagecache-bpf record`) gets the phases of each
worker's load: the model is built, its weights are loaded, they are processed, it is ready.
VLLM_PLUGINS chooses plug-ins as ever; PAGECACHE_BPF_BUDGET
("16GiB") bounds what may be in the page cache at a time.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
from typing import Any

import pagecache_bpf as pc

_log = logging.getLogger("vllm.pagecache_bpf")  # below vLLM's own logger, so that it is shown
_MARK = "_read_ahead_by_pagecache_bpf"


def register() -> None:
    """Wrap vLLM's default loader; may be called several times in a process, as vLLM does."""
    try:
        from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

        original = DefaultModelLoader.load_weights
    except (ImportError, AttributeError) as error:
        _log.warning(
            "this vLLM is not known to pagecache-bpf, its weights are not read ahead: %s", error
        )
        return
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def load_weights(self: Any, model: Any, model_config: Any) -> Any:
        load = _open(str(model_config.model))
        pc.phase("weights")
        try:
            return original(self, model, model_config)
        finally:
            pc.phase("weights loaded")
            if load is not None:
                _log.info("%s", load.done())

    setattr(load_weights, _MARK, True)
    DefaultModelLoader.load_weights = load_weights
    _mark_phases(DefaultModelLoader)


def _mark_phases(loader: Any) -> None:
    """Mark where a worker begins to build the model, and where it is ready, if it can be told."""
    original = getattr(loader, "load_model", None)
    if original is None:
        return

    @functools.wraps(original)
    def load_model(*args: Any, **kwargs: Any) -> Any:
        pc.phase("model")
        model = original(*args, **kwargs)
        pc.phase("model ready")
        return model

    loader.load_model = load_model


def _open(path: str) -> pc.Load | None:
    """Open a load for this worker's device; None where there is nothing to read ahead."""
    try:
        return pc.load(path, devices=_device(), budget=os.environ.get("PAGECACHE_BPF_BUDGET"))
    except pc.PagecacheError as error:  # a name that is not downloaded yet, another source
        _log.warning("not read ahead: %s", error)
        return None


def _device() -> str | None:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    return f"cuda:{torch.cuda.current_device()}"
