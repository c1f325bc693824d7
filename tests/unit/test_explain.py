# SPDX-License-Identifier: Apache-2.0
"""The dry run: what it computes, what it leaves alone, and what whom it tells."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from pagecache_bpf.cli.verbs import explain
from pagecache_bpf.errors import UnsupportedError
from pagecache_bpf.explain import device_speed, estimate
from pagecache_bpf.explain.estimate import DryRun, dry_run
from pagecache_bpf.kernel import cgroups
from pagecache_bpf.kernel.cachestat import cached_pages
from pagecache_bpf.kernel.cgroups import Level, Memory
from pagecache_bpf.kernel.file_pages import PAGE_SIZE
from pagecache_bpf.weights.models import resolve
from tests.unit.command import NOBODY, run, undocumented

MIB = 1 << 20
PAGES = 1021
FREE = Memory(2, "/job")
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture(autouse=True)
def _own_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Speeds are remembered where no other test looks."""
    monkeypatch.setenv("PAGECACHE_BPF_RUN_DIR", str(tmp_path / "run"))
    monkeypatch.setattr(device_speed, "RUN_DIR", tmp_path / "run")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Path]:
    """A cold file that everybody may read."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(os.urandom(PAGES * PAGE_SIZE - 17))
    path.chmod(0o644)
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    if cached_pages(fd):
        pytest.skip("the temporary directory's file system keeps its pages")
    yield path
    os.close(fd)


def resident(path: Path) -> int:
    with path.open("rb") as file:
        return cached_pages(file.fileno())


def host(monkeypatch: pytest.MonkeyPatch, free: int, available: int) -> None:
    memory = {"MemTotal": 64 * MIB, "MemFree": free, "MemAvailable": available}
    monkeypatch.setattr(cgroups, "host_memory", lambda: memory)


def look(path: Path, memory: Memory = FREE) -> DryRun:
    return dry_run(resolve(path), memory, may_probe=False)


def test_the_probe_measures_and_leaves_the_cache_alone(file: Path) -> None:
    with file.open("rb") as open_file:
        open_file.read(7 * PAGE_SIZE)
    before = resident(file)
    speed = device_speed.measure([file])
    assert resident(file) == before > 0
    assert speed.bytes == PAGES * PAGE_SIZE - 17
    assert speed.bytes_per_second == pytest.approx(speed.bytes / speed.seconds)


def test_the_probe_is_bounded(file: Path) -> None:
    assert device_speed.measure([file], limit=2 * MIB).bytes == 2 * MIB
    assert (
        device_speed.measure([file] * 200).bytes
        == (PAGES * PAGE_SIZE - 17) * device_speed.MAX_FILES
    )


def test_without_direct_io_there_is_no_speed() -> None:
    shm = Path("/proc/self/status")
    with pytest.raises(UnsupportedError, match="no direct I/O"):
        device_speed.measure([shm])


def test_the_last_speed_is_remembered(file: Path) -> None:
    device = file.stat().st_dev
    assert device_speed.last(device) is None
    never = look(file)
    assert (never.speed, never.speed_source, never.seconds) == (None, "none", None)
    assert "not measured" in never.speed_why
    measured = dry_run(resolve(file), FREE)
    assert measured.speed_source == "probe" and measured.speed == device_speed.last(device)
    again = look(file)
    assert (again.speed, again.speed_source) == (measured.speed, "last")
    assert again.speed
    assert again.seconds == pytest.approx(again.to_read / again.speed.bytes_per_second)


def test_little_is_not_measured_again(file: Path) -> None:
    """What a small file takes says more about the start than about the device."""
    kept = device_speed.Speed(1e9, device_speed.ENOUGH_BYTES, 1.0, 1)
    device_speed.remember(file.stat().st_dev, kept)
    assert dry_run(resolve(file), FREE).speed == kept


def test_the_speed_of_another_boot_is_none(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = file.stat().st_dev
    device_speed.remember(device, device_speed.Speed(1.0, 1, 1.0, 1))
    monkeypatch.setattr(device_speed, "_boot", lambda: "another")
    assert device_speed.last(device) is None
    monkeypatch.undo()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"boot": 1}', '{"boot": null, "devices": []}'])
def test_a_damaged_memory_is_forgotten(file: Path, text: str) -> None:
    device_speed.remember(1, device_speed.Speed(1.0, 1, 1.0, 1))
    device_speed._memory().write_text(text)
    assert device_speed.last(1) is None
    device_speed.remember(1, device_speed.Speed(2.0, 1, 1.0, 1))
    assert device_speed.last(1) == device_speed.Speed(2.0, 1, 1.0, 1)


def test_what_is_cached_is_not_read_again(file: Path) -> None:
    size = file.stat().st_size
    assert (look(file).resident, look(file).to_read) == (0, size)
    file.read_bytes()
    assert (look(file).resident, look(file).to_read) == (PAGES * PAGE_SIZE, 0)


def test_it_fits_in_at_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host(monkeypatch, 32 * MIB, 40 * MIB)
    found = look(file)
    assert found.fits and found.tightest is None
    assert [place.name for place in found.places] == ["host"]


def test_it_fits_in_when_others_go(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host(monkeypatch, 1 * MIB, 40 * MIB)
    found = look(file)
    assert found.fits and found.tightest
    assert found.tightest.reclaimed == file.stat().st_size - MIB
    assert found.tightest.missing == 0


def test_it_does_not_fit_into_the_cgroup(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host(monkeypatch, 32 * MIB, 40 * MIB)
    levels = (
        Level("/pod/job", 64 * MIB, None, 8 * MIB, 0),
        Level("/pod", 8 * MIB, 4 * MIB, 3 * MIB, MIB),
        Level("/", None, None, 3 * MIB, MIB),
    )
    found = look(file, Memory(2, "/pod/job", levels))
    assert [place.name for place in found.places] == ["host", "cgroup /pod/job", "cgroup /pod"]
    assert not found.fits and found.tightest
    assert found.tightest.name == "cgroup /pod"
    assert found.tightest.bound == 4 * MIB
    assert found.tightest.missing == file.stat().st_size - 2 * MIB


def test_a_policy_that_drops_behind_needs_less(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host(monkeypatch, 32 * MIB, 40 * MIB)
    memory = Memory(2, "/job", (Level("/job", 3 * MIB, None, MIB, 0),))
    assert not look(file, memory).fits
    found = dry_run(resolve(file), memory, may_probe=False, window=2 * MIB)
    assert found.fits and found.peak == 2 * MIB
    assert found.to_read == file.stat().st_size
    shown = run("explain", file, "--no-probe", "--window", "2MiB", "--json").data
    assert shown["peak_cache_bytes"] == 2 * MIB
    assert run("explain", file, "--window", "much").code == 2


def test_the_models_own_pages_are_to_stay(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They could be reclaimed, but are no room for the rest of the model."""
    host(monkeypatch, 32 * MIB, 40 * MIB)
    with file.open("rb", buffering=0) as open_file:
        os.posix_fadvise(open_file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        half = open_file.read(2 * MIB)
    found = look(file, Memory(2, "/job", (Level("/job", 3 * MIB, None, 3 * MIB, 3 * MIB),)))
    assert found.resident == len(half) == 2 * MIB
    assert found.places[1].room == MIB
    assert found.places[1].missing == found.to_read - MIB


def test_one_page_cache_line_for_each_file(file: Path, tmp_path: Path) -> None:
    (tmp_path / "other.safetensors").write_bytes(b"x" * PAGE_SIZE)
    found = look(tmp_path)
    assert [file.size for file in found.files] == [PAGES * PAGE_SIZE - 17, PAGE_SIZE]
    assert isinstance(found.files[0], estimate.File)


# --- the command ---


def test_the_command(file: Path) -> None:
    shown = run("explain", file, "--json")
    assert shown.code == 0 and shown.err == ""
    assert not undocumented(shown.data, explain.JSON["explain"])
    assert shown.data["speed"]["source"] == "probe"
    assert shown.data["seconds"] > 0
    assert shown.data["resident_bytes"] == 0
    text = run("explain", file, "--no-probe").out
    assert "ago: direct I/O" in text and "peak cache" in text and "host" in text
    assert resident(file) == 0


def test_what_is_not_read_is_told_with_its_reason(file: Path) -> None:
    names = ("optimizer.pt", "original/consolidated.00.pth", "model.fp16.safetensors", "x.onnx")
    for name in names:
        (file.parent / name).parent.mkdir(exist_ok=True)
        (file.parent / name).write_bytes(b"x" * PAGE_SIZE)
    shown = run("explain", file.parent, "--no-probe", "--json")
    assert [Path(found["path"]).name for found in shown.data["files"]] == [file.name]
    told = {item["path"]: item["why"] for item in shown.data["left_out"]}
    assert told.keys() == {"optimizer.pt", "original", "model.fp16.safetensors", "x.onnx"}
    text = " ".join(run("explain", file.parent, "--no-probe").out.split())
    assert all(why in text for why in told.values())


@root_only
def test_whom_the_kernel_does_not_tell_gets_no_residency(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Neither by what is said to be read: all of it is, for them."""
    path = tmp_path_factory.mktemp("open") / "model.safetensors"
    path.write_bytes(os.urandom(PAGES * PAGE_SIZE))
    path.chmod(0o644)
    with path.open("rb") as open_file:
        os.fsync(open_file.fileno())
    assert resident(path)
    shown = run("explain", path, "--no-probe", "--json", rights=NOBODY)
    assert shown.code == 0, shown.err
    assert shown.data["resident_bytes"] is None
    assert shown.data["to_read_bytes"] == PAGES * PAGE_SIZE
    assert "not told to this user" in run("explain", path, "--no-probe", rights=NOBODY).out


def test_cgroups_can_be_named(file: Path) -> None:
    own = run("explain", file, "--no-probe", "--pid", str(os.getpid()), "--json").data["cgroup"]
    assert own["path"] == cgroups.of_process().path
    for words in (
        ("--pid", "999999999"),
        ("--cgroup", "/no/such"),
        ("--pid", "1", "--cgroup", "/"),
    ):
        assert run("explain", file, "--no-probe", *words).code == 2


def test_a_path_that_is_no_model(tmp_path: Path) -> None:
    failed = run("explain", tmp_path / "missing")
    assert failed.code == 2 and "does not exist" in failed.err
    assert run("explain", tmp_path).code == 2
