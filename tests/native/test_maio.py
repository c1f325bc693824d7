# SPDX-License-Identifier: Apache-2.0
"""The policy `maio` on engine agent, on this machine's own kernel."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks.native import read_ahead
from pagecache_bpf.cli.verbs import attach, status
from pagecache_bpf.cli.verbs import template as template_verb
from pagecache_bpf.errors import PagecacheError
from pagecache_bpf.kernel.control_device import PolicyStatus
from pagecache_bpf.policy import agent_device
from pagecache_bpf.policy.catalog import agent_object, find
from pagecache_bpf.policy.engines import Engines
from pagecache_bpf.templates import Template, check, policy_arrays, read
from tests import maio_cases as cases
from tests.native.readahead import device_speed
from tests.unit import weights
from tests.unit.command import run, undocumented
from tests.vm.kernel import wait_for

pytestmark = pytest.mark.native


class Attached:
    """As a case looks at it."""

    @property
    def status(self) -> PolicyStatus:
        """Its record now."""
        with agent_device.AgentDevice() as agent:
            return next(policy for policy in agent.policies() if policy.name == "maio")

    def count(self, counter: str) -> int:
        """One counter."""
        return self.status.counters[counter]

    def idle(self) -> None:
        """Wait until nothing is on its way."""
        wait_for(lambda: self.status.inflight_pages == 0, "the prefetch queue to run empty")

    def replay(self) -> policy_arrays.TemplateReplay:
        """How its template does."""
        with Engines() as engines:
            (found,) = policy_arrays.state(engines, "maio")
        return found


class AgentEngine:
    """Attaches as the command does."""

    across = True
    beyond = 64

    @contextmanager
    def attach(
        self, template: Template | None, files: Sequence[Path], **knobs: int
    ) -> Iterator[Attached]:
        """In the block."""
        info = find("maio")
        named = [] if template is None else [("test", template)]
        agent_device.start()
        with Engines() as engines:
            assert engines.agent is not None
            engines.agent.attach(info, agent_object(info), knobs, policy_arrays.sizes_for(named))
            try:
                for path in files:
                    with path.open("rb") as file:
                        engines.tag(file.fileno(), policy="maio", model="test", path=str(path))
                if template is not None:
                    given = policy_arrays.Assigned("test", template, dict(enumerate(files)))
                    assert policy_arrays.give(engines, "maio", [given]) == len(files)
                yield Attached()
            finally:
                engines.agent.detach("maio")


@pytest.fixture(autouse=True)
def _usual(tmp_path: Path) -> Iterator[None]:
    """The readahead window that distributions ship, and nothing attached afterwards."""
    try:
        with read_ahead(tmp_path, 128), device_speed(tmp_path, 0):
            yield
    except PagecacheError:
        yield
    if agent_device.is_running():
        with agent_device.AgentDevice() as agent:
            for name in agent.details():
                agent.detach(name)


class TestAgent(cases.Cases):
    """The cases, on this machine's own kernel."""

    engine = AgentEngine()

    @pytest.fixture
    def place(self, tmp_path: Path) -> Path:
        return tmp_path

    def test_a_wrong_template_is_dropped(self, file: Path) -> None:
        before = agent_device.LOG.stat().st_size if agent_device.LOG.exists() else 0
        super().test_a_wrong_template_is_dropped(file)
        said = agent_device.LOG.read_text()[before:]
        assert "policy maio: the I/O template of test was wrong too often: dropped" in said


def test_the_command_derives_and_shows_it(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    weights.safetensors(path, {"b": (512, 512), "a": (512, 512)})
    shown = run("attach", "maio", "--engine", "agent", path, "--json")
    assert (shown.code, shown.err) == (0, "")
    assert not undocumented(shown.data, attach.JSON["attach"])
    (given,) = shown.data["templates"]
    assert given["source"] == "derived" and given["file"] is None
    assert given["bytes"] == path.stat().st_size
    listed = run("status", "--json").data
    assert not undocumented(listed, status.JSON["status"])
    (template,) = listed["policies"][0]["templates"]
    assert template["accuracy"] is None and not template["dropped"]
    assert "not used yet" in run("status").out


def test_a_template_of_other_files_is_refused(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        weights.safetensors(tmp_path / name / "model.safetensors", {name: (64, 64)})
    template = tmp_path / "template"
    assert run("template", "derive", tmp_path / "one", "-o", template).code == 0
    words = ("attach", "maio", "--engine", "agent", "--template", template)
    refused = run(*words, tmp_path / "two")
    assert refused.code == 1
    assert "does not fit the files" in refused.err and "model.safetensors" in refused.err
    assert run("status", "--json").data["policies"] == []
    assert run(*words, tmp_path / "one").code == 0


RECORDED = """
import os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
for start in reversed(range(0, 8 << 20, 1 << 20)):
    for at in range(start, start + (512 << 10), 128 << 10):
        os.pread(fd, 128 << 10, at)
if os.fork() == 0:
    os.pread(fd, 4096, 100 * 4096)
    os.pread(fd, 4096, 1900 * 4096)
    os._exit(0)
os.wait()
sys.exit(3)
"""


def test_a_load_is_recorded(tmp_path: Path) -> None:
    """The order of a command and of its child, whatever it exits with, and nobody else's."""
    path = tmp_path / "model.safetensors"
    weights.safetensors(path, {"a": (4 << 20,)})
    out = tmp_path / "template"
    done = run(
        *("template", "record", "--json", "--path", path, "-o", out, "--"),
        *(sys.executable, "-c", RECORDED, path),
    )
    assert done.code == 0 and "exit code 3" in done.err
    assert not undocumented(done.data, template_verb.JSON["template record"])
    assert (done.data["exit_code"], done.data["lost"]) == (3, 0)
    template = read(out)
    assert len(template.consumers) == 2 and check(template, path).whole
    assert [(int(e["offset"]), int(e["length"])) for e in template.of(0)] == [
        (start, 512 << 10) for start in reversed(range(0, 8 << 20, 1 << 20))
    ]
    assert [(int(e["offset"]) // 4096, int(e["length"])) for e in template.of(1)] == [
        (100, 4096),
        (1900, 4096),
    ]
    nothing = run("template", "record", "--path", path, "-o", out, "--", "true")
    assert nothing.code == 1 and "nothing was recorded" in nothing.err
    absent = run("template", "record", "--path", path, "-o", out, "--", "/no/such/command")
    assert absent.code == 2 and "cannot be run" in absent.err


def test_files_without_a_template_are_told(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(b"\x80\x02" + bytes(8192))
    told = run("attach", "maio", "--engine", "agent", path)
    assert told.code == 0 and "has no I/O template" in told.err
    other = tmp_path / "other.safetensors"
    weights.safetensors(other, {"a": (64, 64)})
    told = run("tag", other, "--policy", "maio")
    assert told.code == 0 and "other.safetensors: no I/O template" in told.err
    assert run("detach", "maio").code == 0
    failed = run("attach", "maio", "--engine", "agent", path, "--template", "auto")
    assert failed.code == 2 and "no template can be derived" in failed.err


def test_policies_that_take_none_say_so(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    weights.safetensors(path, {"a": (64, 64)})
    failed = run("attach", "noop", "--engine", "agent", path, "--template", "auto")
    assert failed.code == 2 and "takes no I/O template" in failed.err
