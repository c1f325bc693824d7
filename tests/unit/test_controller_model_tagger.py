# SPDX-License-Identifier: Apache-2.0
"""Models of the configuration under their policies; only tagging itself is a fake."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from pagecache_bpf.controller.admission import Budgets
from pagecache_bpf.controller.client_files import ClientFile
from pagecache_bpf.controller.config import Config, ModelSection
from pagecache_bpf.controller.engine_control import AGENT, PlacedTag
from pagecache_bpf.controller.model_tagger import ModelTagger, knobs_for
from pagecache_bpf.controller.resolved_config import ResolvedConfig
from pagecache_bpf.errors import PagecacheError, UsageError
from pagecache_bpf.kernel.file_key import key_of


class Engines:
    """Policies and tags, in place of the kernel's."""

    def __init__(self) -> None:
        self.tags: dict[bytes, tuple[str, str]] = {}  # policy and model
        self.attached: list[tuple[str, dict[str, int]]] = []
        self.steps: list[str] = []
        self.refuse_after: int | None = None  # so many tags

    def ensure(
        self, policy: str, knobs: dict[str, int], sizes: Mapping[str, int] | None = None
    ) -> tuple[str, str]:
        self.attached.append((policy, knobs))
        return AGENT, ""

    def governor_of(self, file: ClientFile) -> str | None:
        return self.tags.get(file.key, (None, ""))[0]

    def tag(self, fd: int, file: ClientFile, policy: str, engine: str, model: str) -> PlacedTag:
        assert key_of(fd) == file.key and file.key not in self.tags
        if self.refuse_after is not None and len(self.tags) >= self.refuse_after:
            raise UsageError("the map of tags is full")
        self.tags[file.key] = policy, model
        self.steps.append(f"tag {Path(file.path).name}")
        return PlacedTag(engine, policy, file.key)

    def locate(
        self, placed: Mapping[bytes, PlacedTag], files: Sequence[ClientFile]
    ) -> dict[bytes, PlacedTag]:
        return dict(placed)

    def untag(self, placed: PlacedTag) -> None:
        del self.tags[placed.key]
        self.steps.append("untag")


class Templates:
    """What the ledger is asked to do with I/O templates."""

    def __init__(self) -> None:
        self.given: dict[str, str] = {}  # claim: policy
        self.forgotten: list[str] = []
        self.refuse = False

    def prepare(self, policy: str, files: Sequence[Any], fds: Sequence[int], asker: Any) -> Any:
        if self.refuse:
            raise PagecacheError("no template can be derived")
        return f"template for {len(files)}"

    def sizes(self, template: Any) -> dict[str, int]:
        return {} if template is None else {"template_steps": 1}

    def give(self, claim: str, policy: str, engine: str, model: str, *_: Any) -> None:
        self.given[claim] = policy

    def forget(self, claim: str) -> None:
        self.given.pop(claim, None)
        self.forgotten.append(claim)


class Parts:
    """A tagger and what it works on."""

    def __init__(self, root: Path) -> None:
        self.root, self.engines, self.templates = root, Engines(), Templates()
        self.budgets = Budgets()
        ledger: Any = SimpleNamespace(budgets=self.budgets, templates=self.templates)
        self.tagger = ModelTagger(self.engines, ledger)  # type: ignore[arg-type]

    def model(self, name: str, shards: int = 1) -> Path:
        folder = self.root / name
        folder.mkdir()
        for number in range(1, shards + 1):
            path = folder / f"model-{number:05}-of-{shards:05}.safetensors"
            save_file({f"{name}.{number}": np.zeros(1000 + number, np.float32)}, path)
        return folder

    def apply(self, *sections: ModelSection, **config: Any) -> list[str]:
        return self.tagger.apply(ResolvedConfig(Config(models=sections, **config)))

    def by_model(self) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        for policy, model in self.engines.tags.values():
            found.setdefault(model, set()).add(policy)
        return found


@pytest.fixture
def parts(tmp_path: Path) -> Parts:
    return Parts(tmp_path)


def section(folder: Path, policy: str | None = "sequential", **options: Any) -> ModelSection:
    return ModelSection(path=str(folder), name=folder.name, policy=policy, **options)


def test_what_is_configured_is_tagged_once(parts: Parts) -> None:
    a, b = section(parts.model("a", shards=3)), section(parts.model("b"), policy="maio")
    assert parts.apply(a, b) == []
    assert parts.by_model() == {"a": {"sequential"}, "b": {"maio"}}
    assert len(parts.engines.tags) == 4
    claims = parts.budgets.claims
    assert set(claims) == {"config:a", "config:b"}
    sizes = [path.stat().st_size for path in (parts.root / "a").iterdir()]
    assert sorted(claims["config:a"].files.values()) == sorted(sizes)
    assert parts.templates.given == {"config:a": "sequential", "config:b": "maio"}
    steps = list(parts.engines.steps)
    assert parts.apply(a, b) == []
    assert parts.engines.steps == steps
    assert parts.tagger.placed().keys() == parts.engines.tags.keys()


def test_a_model_without_a_policy_is_left_alone(parts: Parts) -> None:
    assert parts.apply(section(parts.model("a"), policy=None)) == []
    assert not parts.engines.tags and not parts.budgets.claims


def test_one_that_is_configured_no_more_is_let_go(parts: Parts) -> None:
    a, b = section(parts.model("a", shards=2)), section(parts.model("b"))
    parts.apply(a, b)
    parts.apply(b)
    assert parts.by_model() == {"b": {"sequential"}}
    assert set(parts.budgets.claims) == {"config:b"} == set(parts.templates.given)
    assert len(parts.tagger.placed()) == 1


def test_another_policy_takes_over(parts: Parts) -> None:
    folder = parts.model("a", shards=2)
    parts.apply(section(folder))
    parts.apply(section(folder, policy="maio"))
    assert parts.by_model() == {"a": {"maio"}}
    assert len(parts.engines.tags) == 2 == len(parts.tagger.placed())
    assert parts.engines.steps[2:4] == ["untag", "untag"]


def test_files_of_another_policy_are_left_to_it(parts: Parts) -> None:
    """It is said, and the other models are tagged all the same."""
    a, b = section(parts.model("a")), section(parts.model("b"))
    (path,) = (parts.root / "a").iterdir()
    fd = os.open(path, os.O_RDONLY)
    parts.engines.tags[key_of(fd)] = ("pin", "somebody's")
    os.close(fd)
    (failed,) = parts.apply(a, b)
    assert "model a" in failed and "pin governs it" in failed
    assert parts.by_model() == {"somebody's": {"pin"}, "b": {"sequential"}}
    assert len(parts.tagger.placed()) == 1
    parts.apply()
    assert parts.by_model() == {"somebody's": {"pin"}}


def test_files_that_the_same_policy_has_are_not_ours(parts: Parts) -> None:
    """Somebody has tagged them by hand: they stay tagged when the configuration forgets them."""
    a = section(parts.model("a"))
    (path,) = (parts.root / "a").iterdir()
    fd = os.open(path, os.O_RDONLY)
    parts.engines.tags[key_of(fd)] = ("sequential", "by hand")
    os.close(fd)
    assert parts.apply(a) == []
    parts.apply()
    assert parts.by_model() == {"by hand": {"sequential"}}


def test_what_was_tagged_before_a_failure_is_known(parts: Parts) -> None:
    a = section(parts.model("a", shards=3))
    parts.engines.refuse_after = 2
    (failed,) = parts.apply(a)
    assert "model a" in failed and "full" in failed
    assert len(parts.engines.tags) == 2 == len(parts.tagger.placed())
    parts.engines.refuse_after = None
    assert parts.apply(a) == []
    assert len(parts.engines.tags) == 3 == len(parts.tagger.placed())


def test_what_is_missing_is_said(parts: Parts) -> None:
    (failed,) = parts.apply(section(parts.root / "nowhere"), section(parts.model("a")))
    assert "nowhere" in failed
    assert parts.by_model() == {"a": {"sequential"}}


def test_without_a_template_the_model_is_tagged_all_the_same(parts: Parts) -> None:
    parts.templates.refuse = True
    assert parts.apply(section(parts.model("a"), policy="maio")) == []
    assert parts.by_model() == {"a": {"maio"}} and not parts.templates.given


@pytest.mark.parametrize(
    ("budgets", "total", "expected"),
    [
        ((None,), None, None),
        ((64 << 20,), None, 64),
        ((64 << 20, 32 << 20), None, 96),
        ((64 << 20, None), None, None),  # one without a bound: all of them have none
        ((64 << 20, 32 << 20), 50 << 20, 50),
        ((None,), 50 << 20, 50),
        ((1000,), None, 1),
    ],
)
def test_the_budget_is_a_knob(
    parts: Parts, budgets: tuple[int | None, ...], total: int | None, expected: int | None
) -> None:
    sections = [
        section(parts.model(f"m{number}"), budget=budget, knobs={"max_window_mib": 8})
        for number, budget in enumerate(budgets)
    ]
    other = section(parts.model("other"), policy="maio", budget=1 << 20)
    settings = ResolvedConfig(Config(models=(*sections, other), total_budget=total))
    knobs = {"max_window_mib": 8}
    if expected is not None:
        knobs["budget_mib"] = expected
    assert knobs_for("sequential", settings) == knobs


def test_a_knob_that_is_given_is_followed(parts: Parts) -> None:
    model = section(parts.model("a"), budget=64 << 20, knobs={"budget_mib": 5})
    assert parts.apply(model) == []
    assert parts.engines.attached == [("sequential", {"budget_mib": 5})]
