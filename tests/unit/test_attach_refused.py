# SPDX-License-Identifier: Apache-2.0
"""What `attach` says where the policy is attached already, or is to be replaced and is not."""

from __future__ import annotations

from argparse import Namespace
from types import SimpleNamespace
from typing import Any

import pytest

from pagecache_bpf.cli import tagging, undo_log, updating
from pagecache_bpf.cli.verbs import attach
from pagecache_bpf.errors import PagecacheError, UsageError
from pagecache_bpf.policy import engines as engines_module


def engines(engine: str) -> Any:
    policy = SimpleNamespace(name="sequential", tags=4)
    return SimpleNamespace(policies=lambda: iter([(engine, policy)]))


def test_only_what_the_engine_can_is_advised() -> None:
    with pytest.raises(PagecacheError) as refused:
        attach.refuse_second(engines("struct_ops"), "sequential")
    assert "attach sequential --update" in refused.value.fix
    with pytest.raises(PagecacheError) as refused:
        attach.refuse_second(engines("agent"), "sequential")
    assert "--update" not in refused.value.fix and "detach sequential" in refused.value.fix
    attach.refuse_second(engines("agent"), "maio")


def test_an_update_of_what_is_not_attached_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the module is loaded or not."""

    class Nothing:
        module = None

        def __enter__(self) -> Nothing:
            return self

        def __exit__(self, *_: object) -> None: ...

        def policies(self) -> list[Any]:
            return []

    monkeypatch.setattr(engines_module, "Engines", Nothing)
    monkeypatch.setattr(tagging, "require_root", lambda _: None)
    args = Namespace(
        **{name: None for name in ("budget", "model")},
        **{name: [] for name in ("paths", "knob", "template")},
        **{name: False for name in ("partial", "replace", "no_observe")},
        policy="sequential",
        engine="auto",
    )
    with pytest.raises(UsageError, match="sequential is not attached") as refused:
        updating.update(args, SimpleNamespace())  # type: ignore[arg-type]
    assert "attach sequential PATH" in refused.value.fix


@pytest.mark.parametrize(
    ("error", "told"), [(PagecacheError("refused"), False), (KeyboardInterrupt(), True)]
)
def test_a_command_that_was_refused_says_nothing_of_a_rollback(
    error: BaseException, told: bool, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(undo_log, "PATH", tmp_path / "change.lock")
    nothing = f"rolled back: {undo_log._NOTHING_LEFT}"
    monkeypatch.setattr(undo_log, "_take", lambda _: (nothing, True, {}))
    with pytest.raises(type(error)) as raised, undo_log.Change("x", SimpleNamespace()) as change:  # type: ignore[arg-type]
        change.begin(undo_log.Steps(undo=True))
        raise error
    assert (nothing in getattr(raised.value, "__notes__", [])) == told
