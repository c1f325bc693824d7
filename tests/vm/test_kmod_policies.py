# SPDX-License-Identifier: Apache-2.0
"""Which policies load, which are refused, and how they end."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.cachestat import drop
from pagecache_bpf.errors import PolicyRejected
from pagecache_bpf.kernel.control_device import Device, ExitRecord
from pagecache_bpf.policy import loader
from pagecache_bpf.policy.catalog import find
from tests.vm.kernel import (
    attached,
    make_file,
    map_all,
    read_all,
    read_pages,
    resident,
    test_policy,
    wait_for,
)

pytestmark = pytest.mark.vm

PAGES = 2053
HOOKS = {"init": 0, "readahead": 2, "access": 3, "added": 4, "removed": 5}


@pytest.fixture
def file(mount: Path) -> Path:
    return make_file(mount / "weights", PAGES)


def last_exit() -> ExitRecord:
    with Device() as device:
        return list(device.exits())[-1]


def test_minimal(file: Path) -> None:
    with attached(test_policy("minimal"), file) as policy:
        read_all(file)
        assert policy.status.hooks == ("readahead",)
        assert policy.count("readahead_calls") == policy.count("readahead_default") > 0
    record = last_exit()
    assert (record.policy, record.kind, record.code) == ("minimal", "detached", 0)


def test_maximal_sees_everything(file: Path) -> None:
    """Every hook runs, with its fields filled in, and every action is taken."""
    with attached(test_policy("maximal"), file) as policy:
        for reader in (read_all, map_all):
            drop([file])
            reader(file)
        policy.idle()
        drop([file])
        seen = policy.variable("seen")
        assert all(seen[hook] for hook in HOOKS.values())
        assert policy.count("prefetch_calls") > 0
        assert policy.count("drop_calls") > 0
        assert policy.variable("prefetched")[0] > 0
        words = policy.variable("last")
    words_per_hook = len(words) // 8
    ctx = words[HOOKS["readahead"] * words_per_hook :][:words_per_hook]
    info = file.stat()
    assert ctx[0] == info.st_ino
    assert ctx[1] != 0  # file_id
    assert ctx[4] == PAGES
    assert ctx[8] > 0  # time_ns
    dev_major, dev_minor = ctx[10] & 0xFFFFFFFF, ctx[10] >> 32
    assert (dev_major << 8 | dev_minor) == info.st_dev


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fail_return", "R0"),
        ("fail_context", "only struct pagecache_answer can be written"),
        ("fail_bounds", "behind the end of struct pagecache_answer"),
        ("fail_kfunc", "calling kernel function bpf_pagecache_prefetch is not allowed"),
        ("fail_lent", "calling kernel function bpf_pagecache_next_file is not allowed"),
        ("fail_no_hook", "the policy has no hook"),
        ("fail_flags", "Invalid argument"),
        ("fail_init", "init returned an error"),
    ],
)
def test_refused(name: str, message: str) -> None:
    with pytest.raises(PolicyRejected) as caught:
        loader.attach(find(test_policy(name)))
    assert message in str(caught.value)
    assert name not in loader.pinned()
    with Device() as device:
        assert not list(device.policies())


def test_same_name_twice(file: Path) -> None:
    with attached(test_policy("minimal"), file), pytest.raises(Exception, match="already"):
        loader.attach(find(test_policy("minimal")))


def test_garbage_never_hurts_a_reader(file: Path) -> None:
    with attached(test_policy("garbage"), file) as policy:
        for _ in range(20):
            drop([file])
            read_all(file, 70_001 // 4096 * 4096)
            drop([file])
            map_all(file)
            if not policy.alive:
                break
        wait_for(lambda: not policy.alive, "the policy to be ended")
        record = last_exit()
        assert (record.policy, record.kind, record.hook) == ("garbage", "invalid", "readahead")
        # From here on the kernel reads as if there were no policy.
        drop([file])
        read_pages(file, 0, 1)
        assert resident(file) <= 32
        (tag,) = policy.device.tags()
        assert not tag.active


@pytest.mark.parametrize("hook", [name for name in HOOKS if name != "init"])
def test_exit_from_each_hook(file: Path, hook: str) -> None:
    with Device() as device:
        before = list(device.exits())
    with attached(test_policy("quitter"), file, quit_hook=HOOKS[hook], quit_code=-17) as policy:
        read_all(file)
        drop([file])
        wait_for(lambda: not policy.alive, "the policy to end")
        # It is written after the policy has ended.
        record = wait_for(
            lambda: (last := list(policy.device.exits())[-1:]) != before[-1:] and last[0],
            "the exit record",
        )
        assert isinstance(record, ExitRecord)
        assert (record.kind, record.code, record.hook) == ("policy", -17, hook)
        assert record.message == "the test asked for it"
        read_all(file)


def test_exit_from_init() -> None:
    with pytest.raises(PolicyRejected, match="the test asked for it"):
        loader.attach(find(test_policy("quitter")), {"quit_hook": 0})
    assert last_exit().hook == "init"


def test_attach_again_after_it_ended(file: Path) -> None:
    with attached(test_policy("quitter"), file, quit_hook=2) as policy:
        read_all(file)
        wait_for(lambda: not policy.alive, "the policy to end")
        loader.attach(find(test_policy("quitter")), {"quit_hook": 7})
        drop([file])
        read_all(file)
        assert policy.alive
        # The tag names the policy, so the new one governs the file.
        assert policy.status.tags == 1
        assert policy.count("readahead_calls") > 0


def test_tags_outlive_their_policy(file: Path) -> None:
    with attached(test_policy("minimal"), file) as policy:
        loader.detach("minimal")
        (tag,) = policy.device.tags()
        assert (tag.policy, tag.active) == ("minimal", False)
        read_all(file)
