# SPDX-License-Identifier: Apache-2.0
"""The Python API as a process without rights and without a controller has it."""

from __future__ import annotations

import dataclasses
import json
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import pagecache_bpf as pc
from pagecache_bpf import api
from pagecache_bpf.kernel import kernelfs
from pagecache_bpf.loads import begin, unprivileged_window
from pagecache_bpf.loads.residency_snapshot import CHUNK, Snapshot
from tests.unit.command import ROOT, environment, run
from tests.unit.machines import build

FILES, SIZE = 3, 7 * CHUNK + 4096 * 3 + 17
TOTAL = FILES * SIZE


@pytest.fixture(autouse=True)
def _unprivileged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Whoever runs the tests: no controller answers, and no policy may be attached."""

    def refuse(*_: object) -> None:
        raise pc.PagecacheError("attaching a policy takes root")

    monkeypatch.setattr(begin, "_by_policy", refuse)
    monkeypatch.setenv("PAGECACHE_BPF_SOCKET", str(tmp_path / "no.sock"))
    yield
    assert api.report() == []


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A directory of cold shards."""
    path = tmp_path / "llama"
    path.mkdir()
    for number in range(FILES):
        with (path / f"model-{number}.safetensors").open("wb") as out:
            out.write(bytes(range(256)) * (SIZE // 256) + b"x" * (SIZE % 256))
            out.flush()
            os.fsync(out.fileno())
            os.posix_fadvise(out.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if kernelfs.LIVE.fstype(path.stat().st_dev) in ("tmpfs", "ramfs"):
        pytest.skip("the temporary directory is in memory; set TMPDIR to one on a disk")
    return path


def wait_for(condition: object, what: str, seconds: float = 20) -> None:
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: {[str(report) for report in api.report()]}"
        time.sleep(0.005)


def way_of(load: pc.Load) -> unprivileged_window.ReadaheadWindow:
    assert load.ready(20)
    window: unprivileged_window.ReadaheadWindow = load._shared.served._window  # type: ignore[union-attr]
    return window


def resident(path: Path) -> int:
    return pc.residency(path).resident_bytes or 0


def test_a_load_says_who_served_it_and_leaves_the_cache_as_it_was(model: Path) -> None:
    with pc.load(model) as load:
        assert load.ready(20)
        wait_for(lambda: resident(model) >= TOTAL, "all of a small model within the window")
        first = load.report()
        for path in sorted(model.iterdir()):
            path.read_bytes()
    last = load.report()
    assert (first.engine, first.via, first.done) == ("unprivileged", "alone", False)
    assert "no controller" in first.why and "root" in first.why
    assert (first.files, first.bytes, first.resident_before_bytes) == (FILES, TOTAL, 0)
    assert last.done and last.seconds > 0
    assert last.prefetched_bytes == TOTAL
    assert last.resident_bytes == 0 and resident(model) == 0
    assert last.evicted_bytes == TOTAL
    assert last.hit_ratio is None  # nobody has counted
    assert json.loads(json.dumps(last.as_json()))["model"] == "llama"
    assert "engine unprivileged" in str(last) and "hit ratio unknown" in str(last)
    assert load.done() == last  # once is enough


def test_keep_and_what_was_there_before(model: Path) -> None:
    shard = sorted(model.iterdir())[1]
    shard.read_bytes()
    with pc.load(model):
        wait_for(lambda: resident(model) >= TOTAL, "the window to be filled")
    assert resident(shard) >= SIZE and resident(model) == resident(shard)
    with pc.load(model, keep=True) as load:
        wait_for(lambda: resident(model) >= TOTAL, "the window to be filled")
    assert load.report().evicted_bytes == 0 and resident(model) >= TOTAL
    assert pc.drop(model) is not None and resident(model) == 0


@pytest.mark.parametrize("how", ["read", "mmap", "pread"])
def test_the_window_follows_the_reader_and_never_exceeds_the_budget(model: Path, how: str) -> None:
    """A reader that stops holds the window up, and one that goes on moves it."""
    budget = 3 * CHUNK
    with pc.load(model, budget=budget) as load:
        window = way_of(load)
        wait_for(lambda: window.prefetched_bytes == budget, "the first window")
        time.sleep(0.1)  # many looks; there is no event for nothing happening
        assert window.prefetched_bytes == budget and resident(model) == budget
        for path in sorted(model.iterdir()):
            with path.open("rb", buffering=0) as file:
                if how == "mmap":
                    with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapping:
                        _consume(window, budget, lambda at: bytes(mapping[at : at + CHUNK]))
                elif how == "pread":
                    _consume(window, budget, lambda at: os.pread(file.fileno(), CHUNK, at))
                else:
                    _consume(window, budget, lambda at: file.read(CHUNK))
        wait_for(lambda: window.prefetched_bytes >= TOTAL * 3 // 4, "the window to move")
    assert load.report().resident_bytes == 0


def _consume(window: unprivileged_window.ReadaheadWindow, budget: int, read: object) -> None:
    assert callable(read)
    for at in range(0, SIZE, CHUNK):
        assert len(read(at)) == min(CHUNK, SIZE - at)
        before = window.prefetched_bytes
        assert window.outstanding_bytes <= budget
        deadline = time.monotonic() + 0.2
        while window.prefetched_bytes == before and time.monotonic() < deadline:
            time.sleep(0.002)


def test_a_reader_that_bypasses_the_cache_is_left_alone(model: Path) -> None:
    file = sorted(model.iterdir())[0]
    try:
        fd = os.open(file, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        pytest.skip("this file system has no direct I/O")
    with pc.load(file, budget=CHUNK) as load:
        wait_for(lambda: load.report().notes, "the reader to be noticed")
        os.close(fd)
        assert "O_DIRECT" in load.report().notes[0]


def test_workers_of_a_server_are_seen(model: Path) -> None:
    """Tensor-parallel ranks load in processes of their own."""
    file = sorted(model.iterdir())[0]
    code = (
        "import sys\nf = open(sys.argv[1], 'rb', buffering=0)\n"
        "while f.read(1 << 20): pass\nprint(flush=True)\nsys.stdin.read()"
    )
    with pc.load(file, budget=2 * CHUNK) as load:
        window = way_of(load)
        wait_for(lambda: window.prefetched_bytes == 2 * CHUNK, "the first window")
        with subprocess.Popen(
            [sys.executable, "-c", code, file], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as rank:
            assert rank.stdout and rank.stdout.readline() == b"\n"
            wait_for(lambda: not window.outstanding_bytes, "the rank's position to be seen")
            rank.communicate()


def test_two_loads_of_one_model_share_a_window(model: Path) -> None:
    with pc.load(model) as first:
        with pc.load(model / "model-0.safetensors") as other, pc.load(model) as second:
            assert second._shared is first._shared and other._shared is not first._shared
            assert len(pc.report()) == 2
        assert not first.report().done
        wait_for(lambda: resident(model / "model-1.safetensors") >= SIZE, "it to go on")
    assert first.report() == second.report() and first.report().done


def test_the_last_of_several_processes_drops(model: Path) -> None:
    """Ranks end at different times; the first must not take the others' pages away."""
    code = (
        "import sys, pagecache_bpf as pc\nload = pc.load(sys.argv[1])\nload.ready()\n"
        "print(flush=True)\n"
        "sys.stdin.readline()\nprint(load.done().evicted_bytes, flush=True)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, model],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment(PAGECACHE_BPF_API="alone"),
    ) as rank:
        assert rank.stdin and rank.stdout and rank.stdout.readline() == "\n"
        with pc.load(model) as load:
            assert load.ready(20)
            wait_for(lambda: resident(model) >= TOTAL, "the windows to be filled")
        assert load.report().evicted_bytes == 0 and "another process" in load.report().notes[0]
        assert resident(model) >= TOTAL
        rank.communicate("\n")
    # That one has seen an empty cache at its start.
    assert resident(model) == 0


def test_a_load_that_follows_one_that_ends_takes_nothing_for_its_own(model: Path) -> None:
    """Pages that the first has brought in and not dropped yet were not there before the second."""
    for _ in range(5):
        first = pc.load(model)
        assert first.ready(20)
        wait_for(lambda: resident(model) >= TOTAL, "the window to be filled")
        ending = threading.Thread(target=first.done)
        ending.start()
        with pc.load(model) as second:
            assert second.ready(20)
        ending.join()
        assert resident(model) == 0


def test_threads_may_open_and_close_at_once(model: Path) -> None:
    failed = []

    def work() -> None:
        try:
            for _ in range(5):
                with pc.load(model) as load:
                    load.report()
                load.done()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_in_a_forked_child_a_load_is_inert(model: Path) -> None:
    with pc.load(model) as load:
        wait_for(lambda: resident(model) >= TOTAL, "the window to be filled")
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                load.done()
                with pc.load(model) as own:  # the child can have its own
                    own.ready(20)
                    code = 0 if own.report().engine == "unprivileged" and pc.report() != [] else 2
                    own.done(keep=True)
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert resident(model) >= TOTAL and not load.report().done


def test_files_that_vanish_end_nothing(model: Path) -> None:
    with pc.load(model, budget=CHUNK) as load:
        assert load.ready(20)
        for path in model.iterdir():
            path.unlink()
    report = load.report()
    assert report.done


def test_an_order_is_followed(model: Path) -> None:
    files = sorted(model.iterdir())
    window = unprivileged_window.ReadaheadWindow(
        files,
        Snapshot(files),
        order=[(2, 4 * CHUNK + 5, CHUNK), (0, 0, 10), (2, 4 * CHUNK, 1)],
        budget=16 * CHUNK,
    )
    wait_for(lambda: window.prefetched_bytes == 3 * CHUNK, "three chunks, none twice")
    window.stop()
    assert (
        resident(files[2]) == 2 * CHUNK and resident(files[0]) == CHUNK and not resident(files[1])
    )
    assert pc.drop(model) == 3 * CHUNK


def test_prefetch_reads_what_is_asked_and_not_more(model: Path) -> None:
    file = model / "model-0.safetensors"
    assert pc.prefetch(file, extents=[(4096 * 5 + 1, 100), (CHUNK, CHUNK)]) == CHUNK + 101
    assert resident(file) >= CHUNK + 4096
    pc.drop(file)
    assert pc.prefetch(model, budget=CHUNK) == CHUNK == resident(model)
    pc.drop(model)
    with pytest.raises(pc.UsageError, match="do not lie in"):
        pc.prefetch(file, extents=[(SIZE, 1)])
    with pytest.raises(pc.UsageError, match="ambiguous"):
        pc.prefetch(model, extents=[(0, 1)])


def test_mistakes_raise(model: Path, tmp_path: Path) -> None:
    for budget in (0, -1, "-1", "8 apples", True, 1.5, ""):
        with pytest.raises(pc.UsageError):
            pc.load(model, budget=budget)  # type: ignore[arg-type]
    with pytest.raises(pc.UsageError, match="does not exist"):
        pc.load(tmp_path / "nowhere")
    with pytest.raises(pc.UsageError, match="no weight files"):
        (tmp_path / "empty").mkdir()
        pc.load(tmp_path / "empty")
    with pytest.raises(pc.UsageError, match="is not a device"):
        pc.load(model, devices=["gpu:0"])
    with pytest.raises(pc.UsageError, match="there is no policy nonesuch"):
        pc.load(model, policy="nonesuch")
    with pytest.raises(pc.UsageError, match="there is no template"):
        pc.load(model, template=tmp_path / "nowhere")
    with pytest.raises(pc.UsageError, match="time to wait"):
        pc.load(model, wait=-1)


def test_devices_are_placed(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pagecache_bpf import topology

    machine = topology.read(build(tmp_path / "machine", "two-socket-8-gpu"))
    monkeypatch.setattr(topology, "read", lambda: machine)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    class TorchDevice:
        def __str__(self) -> str:
            return "cuda:5"

    with pc.load(model, devices=TorchDevice()) as load:
        report = load.report()
    assert report.node == 1 and report.devices[0]["pci"] == "0000:c3:00.0"
    with pc.load(model, devices=["cuda:0", "cuda:7"]) as load:
        assert load.report().node is None
    with pytest.raises(pc.UsageError, match="there is no device cuda:8"):
        pc.load(model, devices="cuda:8")
    # None of a kind is in sight: that may be us, not them.
    with pc.load(model, devices="npu:0") as load:
        assert load.report().devices[0]["node"] is None and load.report().devices[0]["why"]


def test_names_of_the_hub_are_found_in_its_cache(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = tmp_path / "hub" / "models--org--name"
    (hub / "snapshots").mkdir(parents=True)
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("abc\n")
    (hub / "snapshots" / "abc").symlink_to(model)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    with pc.load("org/name") as load:
        assert load.report().model == "org/name" and load.report().files == FILES
    with pytest.raises(pc.UsageError, match="does not exist"):
        pc.load("org/other")


def test_nothing_at_all_is_still_a_load(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(begin, "_by_threads", fail)
    with pc.load(model) as load:
        assert load.ready(20) and load.report().engine == "none"
    assert "unexpected RuntimeError: a bug" in load.report().why and load.report().done


def test_tag_without_root_says_so(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    tagged = pc.tag(model)
    assert (tagged.files, tagged.engine) == (0, "none") and "root" in tagged.why


# The command for those who cannot touch the code.


def run_it(*words: str | Path, **environ: str) -> subprocess.CompletedProcess[str]:
    nobody = {"PAGECACHE_BPF_API": "alone", **environ}
    return subprocess.run(
        [sys.executable, "-m", "pagecache_bpf", "run", *map(str, words)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(**nobody),
        timeout=120,
    )


# A command that begins to read when something has been read ahead of it.
PATIENT = """
import sys, time
import pagecache_bpf as pc
path, deadline = sys.argv[1], time.monotonic() + 60
while not pc.residency(path).resident_bytes and time.monotonic() < deadline:
    time.sleep(0.01)
print(sum(len(open(file, "rb").read()) for file in pc.residency(path).files))
sys.exit(7)
"""


def test_run_passes_everything_on(model: Path) -> None:
    done = run_it("--json", "--", sys.executable, "-c", PATIENT, model)
    assert done.returncode == 7 and int(done.stdout) == TOTAL
    report = json.loads(done.stderr)["reports"][0]
    assert report["engine"] == "unprivileged" and report["done"]
    assert resident(model) == 0
    done = run_it("--weights", model, "--", "sh", "-c", "kill -USR1 $$")
    assert done.returncode == 128 + signal.SIGUSR1 and "engine " in done.stderr
    assert len(done.stderr.splitlines()) >= 3 and "\\n" not in done.stderr
    assert run_it("--weights", model, "--", "/nonexistent").returncode == 127
    assert run_it("--weights", model, "--", str(ROOT / "README.md")).returncode == 126


def test_run_passes_signals_on(model: Path) -> None:
    code = "trap 'echo got it; exit 3' TERM; echo ready; read x <&3"
    ours, theirs = os.pipe()
    with subprocess.Popen(
        [sys.executable, "-m", "pagecache_bpf", "run", "--weights", model, "--", "sh", "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
        env=environment(PAGECACHE_BPF_API="alone"),
        preexec_fn=lambda: os.dup2(ours, 3),
        close_fds=False,
    ) as command:
        assert command.stdout and command.stdout.readline() == "ready\n"
        command.send_signal(signal.SIGTERM)
        assert command.stdout.readline() == "got it\n"
        assert command.wait(30) == 3
    os.close(theirs)
    os.close(ours)


def test_it_can_be_turned_off(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGECACHE_BPF_API", "off")
    with pc.load(model) as load:
        assert load.ready(20) and load.report().engine == "none" and "is off" in load.report().why


def test_run_needs_weights_and_a_command(model: Path) -> None:
    assert run("run").code == run("run", "--").code == 2
    failed = run("run", "--", "echo", "--json", ROOT / "README.md")
    assert failed.code == 2 and "no weights were found" in failed.err
    assert run("run", "--budget", "x", "--", "cat", model).code == 2


def test_names_in_a_report_cannot_act_on_the_terminal(model: Path) -> None:
    with pc.load(model) as load:
        report = dataclasses.replace(load.report(), notes=("a\x1b[31m\nb is gone",))
    assert str(report).splitlines()[-1] == "  a\\x1b[31m\\nb is gone"
