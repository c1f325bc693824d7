# SPDX-License-Identifier: Apache-2.0
"""What the controller does with both engines; attaching and the control device are fakes."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pagecache_bpf.controller import engine_control
from pagecache_bpf.controller.client_files import ClientFile, check_descriptor
from pagecache_bpf.controller.engine_control import (
    AGENT,
    STRUCT_OPS,
    EngineControl,
    PlacedTag,
    policy_info,
)
from pagecache_bpf.errors import PagecacheError, UnsupportedError, UsageError
from pagecache_bpf.kernel import abi, kmod
from pagecache_bpf.policy import loader


class FakeAgent:
    """A policy of engine agent."""

    def __init__(self) -> None:
        self.exit: tuple[int, str, str] | None = None
        self.tags: dict[bytes, Any] = {}
        self.settled: list[float] = []

    def untag(self, key: bytes) -> bool:
        return self.tags.pop(key, None) is not None

    def settle(self, seconds: float) -> bool:
        self.settled.append(seconds)
        return True


class FakeService:
    """The agent's service, without programs."""

    def __init__(self) -> None:
        self.agents: dict[str, FakeAgent] = {}
        self.calls: list[str] = []
        self.forgotten: list[bytes] = []
        self.observed = SimpleNamespace(
            forget=self.forgotten.append, counters=lambda: {"m": {"read_bytes": 5}}
        )
        self.closed = False

    def attach(self, source: str, built: str, knobs: Any, sizes: Any) -> None:
        name = policy_info(source).name
        self.calls.append(f"attach {name} {knobs} {sizes}")
        assert Path(built).name == f"{name}.bpf.o" and Path(built).parent.name == "agent"
        assert name not in self.agents
        self.agents[name] = FakeAgent()

    def detach(self, name: str) -> None:
        self.calls.append(f"detach {name}")
        del self.agents[name]

    def tag(
        self, fd: int, policy: str, model: str, path: str, replace: bool, hold: bool = False
    ) -> None:
        assert hold and not replace, "what a client's path leads to may change"
        key = check_descriptor(fd, None).key
        if key in self.agents[policy].tags:
            raise UsageError("it is tagged already")
        self.agents[policy].tags[key] = SimpleNamespace(model=model)

    def maps(self, policy: str) -> dict[str, Any]:
        return {"maps": {"tags": 7}}

    def close(self) -> None:
        self.closed = True


@dataclass
class FakeTag:
    """A tag as the module tells it: with the device of the file system's pages."""

    policy: str
    model: str
    ino: int
    generation: int
    active: bool = True
    dev_major: int = 250  # not that of stat(), as on btrfs
    dev_minor: int = 9

    @property
    def identity(self) -> tuple[int, int, int, int]:
        return self.ino, self.dev_major, self.dev_minor, self.generation


@dataclass
class Module:
    """The kernel module: whether it is loaded or can be, its policies and tags."""

    loaded: bool = False
    refuses: str = ""
    names: list[str] = field(default_factory=list)
    all_tags: list[FakeTag] = field(default_factory=list)
    detached: list[str] = field(default_factory=list)
    broken: bool = False

    def load(self) -> None:
        if self.refuses:
            raise UnsupportedError(self.refuses)
        self.loaded = True

    def attach(self, info: Any, knobs: Any, sizes: Any = None) -> None:
        self.names.append(info.name)

    def detach(self, name: str) -> None:
        self.detached.append(name)

    # --- its device ---

    def __enter__(self) -> Module:
        if self.broken:
            raise PagecacheError("the device is gone")
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def policies(self) -> list[Any]:
        return [SimpleNamespace(name=name) for name in self.names]

    def tags(self) -> list[FakeTag]:
        return self.all_tags

    def untag(self, *identity: int) -> None:
        self.all_tags = [tag for tag in self.all_tags if tag.identity != identity]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Module:
    made = Module()
    monkeypatch.setattr(kmod, "load", made.load)
    monkeypatch.setattr(kmod, "is_loaded", lambda: made.loaded)
    monkeypatch.setattr(engine_control, "Device", lambda: made)
    monkeypatch.setattr(loader, "attach", made.attach)
    monkeypatch.setattr(loader, "detach", made.detach)
    return made


@pytest.fixture
def service() -> FakeService:
    return FakeService()


@pytest.fixture
def engines(service: FakeService, module: Module) -> EngineControl:
    return EngineControl(service, threading.RLock())  # type: ignore[arg-type]


@pytest.fixture
def file(tmp_path: Path) -> Iterator[tuple[int, ClientFile]]:
    path = tmp_path / "weights"
    path.write_bytes(b"w" * 5000)
    fd = os.open(path, os.O_RDONLY)
    yield fd, check_descriptor(fd, None)
    os.close(fd)


def inode(file: ClientFile) -> tuple[int, int]:
    key = abi.pagecache_file_key.from_buffer_copy(file.key)
    return key.ino, key.generation


def test_the_engine_that_is_asked_for(engines: EngineControl, module: Module) -> None:
    assert engines.best(AGENT)[0] == AGENT and not module.loaded
    module.refuses = "the module is not signed"
    assert engines.best() == (AGENT, "no struct_ops: the module is not signed")
    with pytest.raises(UnsupportedError, match="not signed"):
        engines.best(STRUCT_OPS)
    module.refuses = ""
    assert engines.best() == (STRUCT_OPS, "")


def test_what_is_expected_changes_nothing(engines: EngineControl, module: Module) -> None:
    assert engines.expected() == (AGENT, "the kernel module is not loaded")
    assert engines.expected(AGENT) == (AGENT, "") and not module.loaded
    module.loaded = True
    assert engines.expected() == (STRUCT_OPS, "")
    assert engines.expected(AGENT)[0] == AGENT


def test_a_policy_is_attached_once(engines: EngineControl, service: FakeService) -> None:
    knobs, sizes = {"max_window_mib": 8}, {"template_steps": 100}
    assert engines.ensure("sequential", knobs, AGENT, sizes)[0] == AGENT
    assert engines.ensure("sequential", wanted=AGENT) == (AGENT, "")
    assert service.calls == [f"attach sequential {knobs} {sizes}"]
    assert engines.attached() == {"sequential": AGENT} == engines.own


def test_one_that_ended_by_itself_is_attached_anew(
    engines: EngineControl, service: FakeService
) -> None:
    engines.ensure("sequential", wanted=AGENT)
    service.agents["sequential"].exit = (-1, "it had enough", "access")
    assert engines.attached() == {}
    engines.ensure("sequential", wanted=AGENT)
    assert service.calls[1:] == ["detach sequential", "attach sequential {} {}"]
    assert service.agents["sequential"].exit is None


def test_the_modules_policies_are_kept_or_not(engines: EngineControl, module: Module) -> None:
    """At the end only those go that were attached here, and none if they are to be kept."""
    module.names.append("others")
    engines.ensure("sequential")
    assert engines.attached() == {"others": STRUCT_OPS, "sequential": STRUCT_OPS}
    engines.close(keep=True)
    assert module.detached == []
    engines.ensure("maio")
    engines.close(keep=False)
    assert module.detached == ["maio"]


def test_an_agents_tag(
    engines: EngineControl, service: FakeService, file: tuple[int, ClientFile]
) -> None:
    fd, known = file
    assert engines.governor_of(known) is None
    engines.ensure("sequential", wanted=AGENT)
    placed = engines.tag(fd, known, "sequential", AGENT, "m")
    assert engines.governors([known]) == {known.key: "sequential"}
    assert engines.tagged_models() == {"m"}
    assert engines.tag_keys("sequential", AGENT, [known]) == {0: known.key}
    assert engines.tag_keys("maio", AGENT, [known]) == {}
    assert engines.locate({known.key: placed}, [known]) == {known.key: placed}
    service.agents["sequential"].exit = (0, "", "access")
    assert engines.governors([known]) == {}  # a policy that has ended governs nothing
    engines.untag(placed)
    engines.untag(placed)
    assert service.agents["sequential"].tags == {}
    assert service.forgotten == [known.key, known.key]


def test_a_tag_of_the_module_is_found_by_its_inode(
    engines: EngineControl, module: Module, file: tuple[int, ClientFile]
) -> None:
    """The device that the module tells may be another than that of stat()."""
    _, known = file
    ino, generation = inode(known)
    other = FakeTag("others", "o", ino, generation + 1)
    module.all_tags = [other, FakeTag("sequential", "m", ino, generation)]
    assert engines.governors([known]) == {}  # the module is not loaded
    module.loaded = True
    assert engines.governors([known]) == {known.key: "sequential"}
    assert engines.tagged_models() == {"m", "o"}
    (key,) = engines.tag_keys("sequential", STRUCT_OPS, [known]).values()
    raw = abi.pagecache_file_key.from_buffer_copy(key)
    assert (raw.ino, raw.dev_major, raw.dev_minor, raw.generation) == (ino, 250, 9, generation)
    placed = {known.key: PlacedTag(STRUCT_OPS, "sequential", known.key)}
    located = engines.locate(placed, [known])[known.key]
    assert located.identity == (ino, 250, 9, generation)
    engines.untag(located)
    assert module.all_tags == [other]


def test_a_tag_whose_policy_has_ended_governs_nothing(
    engines: EngineControl, module: Module, file: tuple[int, ClientFile]
) -> None:
    _, known = file
    module.loaded = True
    module.all_tags = [FakeTag("sequential", "m", *inode(known), active=False)]
    assert engines.governors([known]) == {}
    module.broken = True
    assert engines.governors([known]) == {} == engines.attached()


def test_what_the_observer_says(engines: EngineControl, service: FakeService) -> None:
    assert engines.observed("m") == {"read_bytes": 5}
    assert engines.observed("other") is None
    assert engines.map_ids("sequential") == {"tags": 7}
    engines.ensure("sequential", wanted=AGENT)
    engines.settle(9.0)
    (seconds,) = service.agents["sequential"].settled
    assert 0 < seconds <= 9.0
