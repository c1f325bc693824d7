# SPDX-License-Identifier: Apache-2.0
"""A model is served wherever it lies: on each file system, by each way, to the byte."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pagecache_bpf.policy import agent_device
from tests.native.controller import AGENT, NOBODY, serving, tagged
from tests.native.filesystems import MAKERS, PAGE_SIZE, PAGES, Places, cached, made_in, make_cold
from tests.native.test_agent import KERNEL_AHEAD, MIB, idle, policy, read
from tests.native.test_record import _nothing_attached  # noqa: F401  # a fixture
from tests.observing import counted_since_tag, counts, observing, reader, stream
from tests.unit.command import ROOT, done, environment, run

pytestmark = pytest.mark.native

SIZE = PAGES * PAGE_SIZE
#: squashfs fills whole blocks, so that pages after the file's end are cached; a read() that goes
#: on there is not told of.
UNTOLD = {"squashfs": PAGES % 32}
#: Pages behind the file's end: a block of squashfs at most, and on verity the tree of hashes, which
#: has 128 in a page.
BEHIND = {"verity": -(-PAGES // 128) + 1}
TABLE = ROOT / "docs" / "filesystems.md"


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Places]:
    with made_in(tmp_path_factory.mktemp("places")) as made:
        yield made


def counted(name: str) -> dict[str, int]:
    """What the observer has counted of a model since it was tagged, in pages."""
    model = counted_since_tag(name)
    assert (model["bytes"], model["gone"]) == (SIZE, 0)
    return {
        counter.removesuffix("_bytes"): value // PAGE_SIZE
        for counter, value in model["counters"].items()
        if counter.endswith("_bytes")
    }


def stale() -> tuple[list[str], list[str]]:
    """Tagged files that were replaced or are gone, as `status` tells."""
    ((model,),) = (shown["models"] for shown in done("status", "--json").data["policies"])
    return model["replaced"], model["gone"]


@pytest.mark.parametrize("name", MAKERS)
def test_what_readers_want_is_counted(places: Places, name: str) -> None:
    """Each page once, and as a hit when it is there."""
    path = places.get(name)
    wanted = PAGES - UNTOLD.get(name, 0)
    make_cold(path)
    with observing(path) as observer:
        cold = counts(observer, reader(path, stream()))
        assert cold.read == wanted == cold.read_miss + cold.read_ahead
        assert cold.added >= cached(path) == PAGES
        warm = counts(observer, reader(path, stream()))
        assert (warm.read, warm.read_hit, warm.added) == (wanted, wanted, 0)


@pytest.mark.parametrize("name", MAKERS)
def test_a_model_is_served(places: Places, name: str) -> None:
    path = places.get(name)
    make_cold(path)
    done("attach", "sequential", "--engine", "agent", "--model", name, path)
    read(path, limit=MIB)
    idle()
    head = counted(name)
    assert head["prefetched"] > 0 and policy().counters["prefetch_bytes"] > 0
    assert cached(path) > MIB // PAGE_SIZE + KERNEL_AHEAD
    read(path)
    idle()
    whole = counted(name)
    told = whole["demand"] + whole["readahead"] + whole["prefetched"]
    # A read tells at its end why it brought pages, and no longer of those that are gone by then:
    # the kernel takes back what it wanted of a busy FUSE server, the policy what nobody reads.
    # No reader asks for hashes.
    hashes = BEHIND.get(name, 0)
    assert PAGES <= told <= whole["added"] <= told + whole["removed"] + hashes
    assert cached(path) == PAGES
    # Where a page is still on its way, the kernel does not tell of those that are read with it.
    assert 0.8 * PAGES <= whole["read"] - head["read"] <= PAGES
    (tag,) = done("tags", "--json").data["tags"]
    assert PAGES <= tag["resident_bytes"] // PAGE_SIZE <= PAGES + BEHIND.get(name, 31)
    again = run("tag", "--policy", "sequential", "--model", name, path)  # known to be the same
    assert (again.code, again.err) == (0, "")
    assert stale() == ([], [])
    done("untag", path)


def test_every_file_system_is_in_the_table() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", TABLE.read_text(), re.M)
    assert rows == list(MAKERS)


def test_a_snapshot_is_another_file(places: Places) -> None:
    """With the number, the generation and the superblock of the one that it was made of."""
    there, other = places.get("btrfs_subvolume"), places.get("btrfs_snapshot")
    assert there.stat().st_ino == other.stat().st_ino
    with observing(there) as observer:
        reader(other, stream())
        assert counts(observer).read == 0
        pid = reader(there, stream())
        assert counts(observer, pid).read == PAGES


def test_a_copy_in_the_upper_directory_is_another_file(places: Places) -> None:
    """Its readers find other pages from then on; stat() says that nothing has changed."""
    layer = places.get("ext4").parent
    path = places.overlay("overlay_stale", layer, upper=True) / "model.safetensors"
    done("attach", "sequential", "--engine", "agent", path)
    assert stale() == ([], [])
    os.utime(path)
    assert stale() == ([str(path)], [])
    done("tag", "--policy", "sequential", path)
    assert stale() == ([], [])
    assert len(done("tags", "--json").data["tags"]) == 1


def test_what_is_in_memory_is_refused(places: Places, tmp_path: Path) -> None:
    """The upper directory of an overlay may be on tmpfs, which stat() does not tell."""
    memory = places.mount("tmpfs", places.directory("on/tmpfs"), "tmpfs", "size=4m")
    for part in ("data", "work"):
        (memory / part).mkdir()
    (tmp_path / "lower").mkdir()
    options = f"lowerdir={tmp_path / 'lower'},upperdir={memory / 'data'},workdir={memory / 'work'}"
    at = places.mount("overlay", places.directory("on/memory"), "overlay", options)
    (at / "model.safetensors").write_bytes(bytes(97 * PAGE_SIZE))
    result = run("attach", "sequential", "--engine", "agent", at / "model.safetensors")
    assert result.code == 3 and "tmpfs" in result.err and not result.out
    assert not agent_device.is_running() or done("status", "--json").data["policies"] == []


_LOAD = """
import json, sys
import pagecache_bpf as pc
with pc.load(sys.argv[1]) as load:
    load.ready()
    engine = load.report().engine
    with open(sys.argv[1], "rb", buffering=0) as file:
        while file.read(128 << 10):
            pass
    report = load.report()
print(json.dumps({"engine": engine, "why": report.why, "resident": report.resident_bytes}))
"""


@pytest.mark.parametrize("name", ["overlay_layer", "overlay_copied_up", "btrfs_subvolume"])
def test_a_load_by_root(places: Places, name: str) -> None:
    path = places.get(name)
    make_cold(path)
    result = subprocess.run(
        [sys.executable, "-c", _LOAD, str(path)],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout)
    assert (told["engine"], told["resident"]) == ("agent", SIZE), told


def test_a_client_in_a_container(places: Places) -> None:
    """Its root is an overlay that only its own mount namespace has, and it is no root of ours."""
    layer = places.get("ext4").parent
    make_cold(layer / "model.safetensors")
    with (
        tempfile.TemporaryDirectory(prefix="pagecache-bpf-", dir="/var/tmp") as name,
        serving(Path(name) / "run", AGENT) as controller,
    ):
        os.chmod(name, 0o755)
        inside, empty = Path(name) / "inside", Path(name) / "empty"
        inside.mkdir()
        empty.mkdir()
        options = f"lowerdir={layer}:{empty}"
        script = (
            f"mount -t overlay -o {options} none {inside} && echo ready && read line && "
            f"exec setpriv --reuid={NOBODY} --regid={NOBODY} --clear-groups "
            f"{sys.executable} -c '{_LOAD}' {inside}/model.safetensors"
        )
        with subprocess.Popen(
            ["unshare", "--mount", "--propagation", "private", "sh", "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment(PAGECACHE_BPF_SOCKET=str(controller.socket)),
        ) as client:
            assert client.stdout is not None
            assert client.stdout.readline() == "ready\n"
            assert not (inside / "model.safetensors").exists()
            out, err = client.communicate("\n", timeout=60)
        assert client.returncode == 0, err
        told = json.loads(out)
        assert told["engine"] == "agent", told
        with controller.root() as root:
            (found,) = root.policies()
            assert found.counters["prefetch_bytes"] > 0
            assert found.counters["added_bytes"] == SIZE
        assert tagged(controller) == []
