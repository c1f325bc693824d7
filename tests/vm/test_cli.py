# SPDX-License-Identifier: Apache-2.0
"""The command itself, with the real module: what it prints, what it changes, what it undoes."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.cachestat import PAGE_SIZE
from pagecache_bpf.cli.verbs import attach, detach, status, tags
from tests.unit.command import done, run, undocumented
from tests.vm.conftest import Module
from tests.vm.kernel import make_file, read_all, read_pages, test_policy

pytestmark = pytest.mark.vm

SHARD_PAGES = 257


@pytest.fixture
def model(mount: Path) -> Path:
    """A directory of three shards and a file that is no weights."""
    root = mount / "llama"
    root.mkdir()
    for number in range(3):
        make_file(root / f"model-{number}.safetensors", SHARD_PAGES)
    (root / "config.json").write_text("{}")
    return root


def tagged() -> list[dict[str, object]]:
    """The tags, as the command lists them."""
    listed = done("tags", "--json").data
    assert not undocumented(listed, tags.JSON["tags"])
    return list(listed["tags"])


def policies() -> list[str]:
    """What is attached, as the command sees it."""
    data = done("status", "--json").data
    return [policy["name"] for policy in data["policies"] if policy["state"] == "attached"]


def test_attach_status_detach(model: Path) -> None:
    attached = done("attach", "sequential", model, "--knob", "max_window_mib=8", "--json").data
    assert not undocumented(attached, attach.JSON["attach"])
    assert attached["policy"]["name"] == "sequential"
    assert [(model["name"], len(model["files"])) for model in attached["models"]] == [("llama", 3)]
    assert attached["models"][0]["bytes"] == 3 * SHARD_PAGES * PAGE_SIZE

    for shard in sorted(model.glob("*.safetensors")):
        read_all(shard, 32 * PAGE_SIZE)
    shown = done("status", "--json").data
    assert not undocumented(shown, status.JSON["status"])
    (policy,) = shown["policies"]
    assert policy["knobs"]["max_window_mib"] == 8
    assert policy["tags"] == 3
    assert policy["resident_bytes"] == 3 * SHARD_PAGES * PAGE_SIZE
    assert policy["counters"]["readahead_override"] > 0
    assert policy["models"] == [
        {
            "name": "llama",
            "files": 3,
            "resident_bytes": 3 * SHARD_PAGES * PAGE_SIZE,
            "size_bytes": 3 * SHARD_PAGES * PAGE_SIZE,
            "replaced": [],
            "gone": [],
            "untagged": [],
        }
    ]
    assert {tag["resident_bytes"] for tag in tagged()} == {SHARD_PAGES * PAGE_SIZE}

    gone = done("detach", "sequential", "--json").data
    assert not undocumented(gone, detach.JSON["detach"])
    assert gone["detached"][0]["untagged"] == 3
    assert gone["detached"][0]["exit"]["kind"] == "detached"
    assert not tagged() and not policies()


def test_people_are_shown_the_same(model: Path) -> None:
    text = done("attach", "sequential", model).out
    assert "attached  sequential (hooks: readahead, evict)" in text
    assert "model llama: 3 files, 3.0 MiB" in text
    assert "undo      pagecache-bpf detach sequential" in text
    shown = done("status").out
    assert "governs  3 files" in shown and "llama" in shown
    assert "untagged  3 files" in done("detach", "sequential").out
    assert "no policy is attached" in done("detach", "--all").out


def test_snapshots_lead_to_their_blobs(mount: Path) -> None:
    repository = mount / "models--org--tiny"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / "0123abcd"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    blob = make_file(blobs / "cafe", SHARD_PAGES)
    (snapshot / "model.safetensors").symlink_to("../../blobs/cafe")
    done("attach", "sequential", snapshot)
    (tag,) = tagged()
    assert (tag["path"], tag["ino"]) == (str(blob), blob.stat().st_ino)
    done("untag", snapshot)
    assert tagged() == []


def test_attached_already(model: Path) -> None:
    done("attach", "sequential", model)
    again = run("attach", "sequential", model, "--json")
    assert (again.code, again.out) == (1, "")
    assert again.error["what"] == "the policy sequential is attached already"
    assert "pagecache-bpf detach sequential" in again.error["fix"]
    assert len(tagged()) == 3


def test_a_failed_attach_leaves_everything_as_it_was(model: Path, mount: Path) -> None:
    """The last of its files is another policy's: those before it are not tagged, either."""
    done("attach", "noop")
    done("tag", model / "model-2.safetensors", "--policy", "noop", "--model", "mine")
    before = tagged()
    failed = run("attach", "sequential", model)
    assert failed.code == 1
    assert "model-2.safetensors is tagged already: the policy noop governs it" in failed.err
    assert "rolled back: the policy sequential is detached" in failed.err
    assert tagged() == before and policies() == ["noop"]

    done("attach", "sequential", model, "--replace")
    assert {tag["policy"] for tag in tagged()} == {"sequential"}


def test_kept_tags_are_governed_by_the_next_attach(model: Path) -> None:
    done("attach", "sequential", model)
    done("detach", "sequential", "--keep-tags")
    assert [tag["active"] for tag in tagged()] == [False] * 3
    assert done("status", "--json").data["inactive_tags"] == 3
    done("attach", "sequential")
    assert [tag["active"] for tag in tagged()] == [True] * 3


def test_a_policy_that_ended_by_itself_is_reported(model: Path) -> None:
    done("attach", test_policy("quitter"), model)
    read_pages(model / "model-0.safetensors", 0, 1)
    shown = done("status", "--json").data
    (policy,) = shown["policies"]
    assert policy["state"] == "ended"
    assert policy["exit"]["kind"] == "policy" and policy["exit"]["code"] == 4711
    assert policy["exit"]["message"] == "the test asked for it"
    text = " ".join(done("detach", "quitter").out.split())
    assert "it had ended by itself (policy, code 4711)" in text
    assert "the test asked for it" in text
    assert policies() == []


def test_the_verifier_is_quoted_and_its_log_kept(model: Path) -> None:
    refused = run("attach", test_policy("fail_context"), model, "--json")
    assert refused.code == 1
    assert "at fail_context.bpf.c:" in refused.error["why"]
    logs = [word.strip("`,.") for word in str(refused.error).split() if ".log" in word]
    assert logs and Path(logs[0].strip("'")).stat().st_size > 200
    assert not tagged() and not policies()


def test_the_module_is_loaded_on_demand(module: Module, model: Path) -> None:
    module.unload()
    assert not done("status", "--json").data["module"]["loaded"]
    assert tagged() == []
    loaded = done("attach", "noop", model, "--json").data["module_loaded_from"]
    assert loaded.endswith("pagecache_bpf.ko")
    busy = run("module", "unload")
    assert busy.code == 1 and "detach" in busy.err
    done("detach", "--all")
    assert done("module", "unload", "--json").data == {"unloaded": True}
    assert done("module", "unload", "--json").data == {"unloaded": False}


def test_doctor_finds_nothing_wrong() -> None:
    data = done("doctor", "--json").data
    assert data["ready"] is True
    assert data["engines"] == {"client": None, "struct_ops": [], "agent": []}
