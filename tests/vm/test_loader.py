# SPDX-License-Identifier: Apache-2.0
"""Attaching and detaching with the real module: what stays, what goes, what is said."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import pytest

from benchmarks.cachestat import drop
from pagecache_bpf.errors import (
    PagecacheError,
    PolicyRejected,
    UnsupportedError,
    UsageError,
)
from pagecache_bpf.kernel import abi, libbpf
from pagecache_bpf.kernel.control_device import Device, status
from pagecache_bpf.policy import loader
from pagecache_bpf.policy.catalog import find, parse_knobs, read_object
from pagecache_bpf.policy.compiler import find_clang
from tests.vm.kernel import ROOT, attached, make_file, read_all, test_policy, wait_for

pytestmark = pytest.mark.vm


def names() -> list[str]:
    """What the module says is attached."""
    return [policy.name for policy in status()]


def left() -> list[str]:
    """Everything of ours in bpffs."""
    root = loader.PIN_ROOT
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


def test_attach_and_detach() -> None:
    before = left()
    attachment = loader.attach(find("sequential"))
    assert attachment.pinned
    assert loader.pinned() == names() == ["sequential"]
    assert {"sequential/link", "sequential/maps/files", "sequential/maps/rodata"} <= set(left())
    record = loader.detach("sequential")
    assert record is not None
    assert (record.policy, record.kind, record.code) == ("sequential", "detached", 0)
    assert loader.pinned() == names() == []
    assert left() == before == []
    with pytest.raises(UsageError, match="sequential is not attached"):
        loader.detach("sequential")


def test_pinned_policies_outlive_their_loader() -> None:
    script = "from pagecache_bpf.policy import attach, find; attach(find('noop'))"
    subprocess.run([sys.executable, "-c", script], check=True)
    assert names() == ["noop"]
    record = loader.detach("noop")
    assert record is not None and record.kind == "detached"


def test_a_policy_in_c_is_compiled_and_attached(tmp_path: Path) -> None:
    source = tmp_path / "minimal.bpf.c"
    source.write_text((ROOT / "tests" / "policies" / "minimal.bpf.c").read_text())
    loader.attach(find(str(source)))
    assert names() == loader.pinned() == ["minimal"]


def test_policies_that_are_not_pinned_end_with_their_holder() -> None:
    with loader.attach(find("noop"), pin=False) as attachment:
        assert not attachment.pinned
        assert names() == ["noop"] and loader.pinned() == []
        with pytest.raises(PagecacheError, match="end the process that holds it"):
            loader.attach(find("noop"))
    wait_for(lambda: names() == [], "the policy to go")
    pid = in_child(lambda: (loader.attach(find("noop"), pin=False), die()))
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    wait_for(lambda: names() == [], "the policy of a killed process to go")


def test_attached_already() -> None:
    loader.attach(find("noop"))
    with pytest.raises(PagecacheError, match="attached already") as caught:
        loader.attach(find("noop"))
    assert caught.value.exit_code == 1
    assert "pagecache-bpf detach noop" in str(caught.value)
    assert names() == ["noop"]
    loader.attach(find("sequential"))
    assert sorted(names()) == ["noop", "sequential"]


# Knobs.


def test_knobs_arrive_in_the_kernel() -> None:
    info = find("sequential")
    defaults = {knob.name: knob.default for knob in info.knobs}
    loader.attach(info, parse_knobs(info, {"max-window-mib": "7", "budget_mib": "0x10"}))
    assert loader.knobs_of("sequential") == {**defaults, "max_window_mib": 7, "budget_mib": 16}
    loader.detach("sequential")
    loader.attach(info)
    assert loader.knobs_of("sequential") == defaults


def test_knobs_with_a_sign() -> None:
    info = find(test_policy("window"))
    assert loader.knobs_of(loader.attach(info).name)["node"] == -1
    loader.detach("window")
    loader.attach(info, {"node": 0, "window_pages": 1048576})
    found = loader.knobs_of("window")
    assert (found["node"], found["window_pages"]) == (0, 1048576)


def test_policies_without_knobs() -> None:
    loader.attach(find("noop"))
    assert loader.knobs_of("noop") == {}
    with pytest.raises(UsageError, match="not attached"):
        loader.knobs_of("sequential")


# Refusals.


@pytest.mark.parametrize(
    ("name", "verdict", "line"),
    [
        ("fail_bounds", "write behind the end of struct pagecache_answer", "*behind = 1;"),
        ("fail_context", "only struct pagecache_answer can be written", "ctx->index = 0;"),
        ("fail_return", "R0 !read_ok", "exit"),
    ],
)
def test_the_verifiers_refusal_is_boiled_down(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, verdict: str, line: str
) -> None:
    with pytest.raises(PolicyRejected) as caught:
        loader.attach(find(test_policy(name)), log_dir=tmp_path)
    said, log = str(caught.value), caught.value.log_path
    assert said.startswith(f"the kernel refused to load the policy {name}: {verdict}")
    assert f"at {name}.bpf.c:" in said and line in said
    assert "processed" not in said and "R1_w" not in said
    assert log is not None and log.parent == tmp_path and str(log) in said
    assert "processed" in log.read_text()
    assert capfd.readouterr() == ("", "")
    assert left() == names() == []


@pytest.mark.parametrize(
    ("name", "reason"), [("fail_init", "code -95"), ("fail_no_hook", "the policy has no hook")]
)
def test_the_modules_refusal_is_its_record(name: str, reason: str) -> None:
    with pytest.raises(PolicyRejected, match=f"{name} was not attached") as caught:
        loader.attach(find(test_policy(name)))
    assert reason in str(caught.value)
    assert left() == names() == []


def test_another_abi_is_refused(tmp_path: Path) -> None:
    data = Path(test_policy("minimal")).read_bytes()
    version = abi.ABI_VERSION.to_bytes(4, "little")
    table = version + b"\0\0\0\0" + b"minimal\0"  # abi_version, flags, name
    assert data.count(table) == 1
    path = tmp_path / "minimal.bpf.o"
    path.write_bytes(data.replace(table, b"\x63" + table[1:]))
    with pytest.raises(UnsupportedError, match="another version of the module") as caught:
        loader.attach(read_object(path))
    assert caught.value.exit_code == 3
    assert left() == names() == []


def test_damaged_objects_never_stay_attached(tmp_path: Path) -> None:
    """Whatever is wrong with an object, libbpf and the kernel see it or take it as it is."""
    data, path, chance = (
        Path(test_policy("window")).read_bytes(),
        tmp_path / "x.o",
        random.Random(3),
    )
    for round_number in range(25):
        bad = bytearray(data)
        for _ in range(chance.choice((1, 4, 20))):
            bad[chance.randrange(len(bad))] = chance.choice((0, 255, chance.randrange(256)))
        path.write_bytes(bad)

        def attempt() -> None:
            with suppress(PagecacheError):
                loader.attach(read_object(path), pin=False, log_dir=tmp_path).close()

        pid = in_child(attempt)
        assert os.waitpid(pid, 0)[1] == 0, f"round {round_number}"
        wait_for(lambda: names() == [], f"nothing to be attached after round {round_number}")


def test_an_old_libbpf_is_refused(tmp_path: Path) -> None:
    old = tmp_path / "libbpf.so.1"
    source = (
        "unsigned libbpf_major_version(void) { return 1; }"
        "unsigned libbpf_minor_version(void) { return 1; }"
    )
    command = [find_clang(), "-shared", "-fPIC", "-x", "c", "-", "-o", str(old)]
    subprocess.run(command, input=source, text=True, check=True)
    script = (
        "import sys; from pagecache_bpf import PagecacheError\n"
        "from pagecache_bpf.policy import attach, find\n"
        "try: attach(find('noop'))\n"
        "except PagecacheError as error: sys.exit(f'{error.exit_code} {error}')"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, libbpf.PATH_VARIABLE: str(old)},
        capture_output=True,
        text=True,
    )
    assert done.stderr.startswith("3 libbpf 1.4 or newer is needed")
    assert "version 1.1" in done.stderr and "make deps" in done.stderr
    assert left() == names() == []


def test_without_the_module(module: Any) -> None:
    module.unload()
    try:
        with pytest.raises(UnsupportedError, match="module is not loaded") as caught:
            loader.attach(find("noop"))
        assert caught.value.exit_code == 3
    finally:
        module.load()


def test_bpffs_is_mounted_if_absent() -> None:
    while subprocess.run(["umount", str(loader.BPFFS)], capture_output=True).returncode == 0:
        pass
    loader.attach(find("noop"))
    assert loader.pinned() == ["noop"]


# Policies that have ended by themselves.


def test_what_an_ended_policy_left_is_cleaned_up(mount: Path) -> None:
    path = make_file(mount / "weights", 4001)
    name = "garbage"
    for clean_up_by in ("detach", "attach"):
        with attached(test_policy(name), path) as policy:
            for _ in range(50):
                drop([path])
                read_all(path)
                if not policy.alive:
                    break
            assert not policy.alive
            assert loader.pinned() == [name], "the link stays until it is unpinned"
            if clean_up_by == "detach":
                record = loader.detach(name)
                assert record is not None
                assert (record.policy, record.kind) == (name, "invalid")
                assert record.code != 0 and record.reason
            else:
                loader.attach(find(test_policy(name)))
                assert policy.alive


# Killed at any point.


def in_child(work: Callable[[], object]) -> int:
    """Run work in a child process and return its pid; it ends with 0, or 1 after an exception."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work()
        code = 0
    finally:
        os._exit(code)


def die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("survived SIGKILL")


def kill_before(nth: int) -> None:
    """Make this process kill itself before the nth step that the kernel or bpffs sees."""
    steps = 0

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any, **more: Any) -> Any:
            nonlocal steps
            steps += 1
            if steps == nth:
                die()
            return real(*arguments, **more)

        return step

    called = libbpf.library()
    for name in ("load", "open_file", "close"):
        setattr(called, f"bpf_object__{name}", counted(getattr(called, f"bpf_object__{name}")))
    for name in ("bpf_obj_pin", "bpf_map__attach_struct_ops", "bpf_link__destroy"):
        setattr(called, name, counted(getattr(called, name)))
    for name in ("mkdir", "unlink", "rmdir"):
        setattr(Path, name, counted(getattr(Path, name)))


def killed_at(nth: int, work: Callable[[], object]) -> bool:
    """Do work in a child that dies before its nth step; False if it ended before that."""

    def doomed() -> None:
        kill_before(nth)
        work()

    end = os.waitpid(in_child(doomed), 0)[1]
    assert end == 0 or os.WTERMSIG(end) == signal.SIGKILL, f"step {nth}"
    return end != 0


def test_a_loader_killed_at_any_point_leaves_nothing_half() -> None:
    info = find("sequential")
    loader.attach(info)
    complete = left()
    loader.detach("sequential")
    outcomes = set()
    nth = 1
    while killed_at(nth, lambda: loader.attach(info)):
        whole = loader.pinned() == ["sequential"]
        outcomes.add(whole)
        wait_for(lambda: names() == loader.pinned(), f"module and pins to agree, step {nth}")
        if whole:
            assert left() == complete, f"step {nth}"
            loader.detach("sequential")
        loader.attach(info)
        assert names() == loader.pinned() == ["sequential"], f"step {nth}"
        loader.detach("sequential")
        assert left() == names() == [], f"step {nth}"
        nth += 1
    assert nth > 8, "the loader has more steps than that"
    assert outcomes == {True, False}
    loader.detach("sequential")


def test_a_detach_killed_at_any_point_leaves_nothing_half() -> None:
    info = find("noop")
    loader.attach(info)
    nth = 1
    while killed_at(nth, lambda: loader.detach("noop")):
        wait_for(lambda: names() == loader.pinned(), f"module and pins to agree, step {nth}")
        if not loader.pinned():
            loader.attach(info)
        assert names() == loader.pinned() == ["noop"], f"step {nth}"
        nth += 1
    assert nth > 3, "detaching has more steps than that"
    assert left() == names() == []


def test_loaders_do_not_mix(tmp_path: Path) -> None:
    """Two at once: one attaches, the other hears that it is attached."""
    info = find("noop")
    pids = [in_child(lambda: loader.attach(info)) for _ in range(4)]
    ends = [os.waitpid(pid, 0)[1] for pid in pids]
    assert sorted(os.waitstatus_to_exitcode(end) for end in ends) == [0, 1, 1, 1]
    assert names() == loader.pinned() == ["noop"]
    with Device() as device:
        assert device.info().policies == 1
