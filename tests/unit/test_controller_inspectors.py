# SPDX-License-Identifier: Apache-2.0
"""S3, S4, S6: a client's headers are read in a process of its user, which may be lost any time."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from pagecache_bpf.controller import inspectors as module
from pagecache_bpf.controller.cpu_allowance import CpuAllowance
from pagecache_bpf.controller.file_inspector import JOB_CPU_SECONDS, MEMORY_BYTES
from pagecache_bpf.controller.inspectors import Inspectors
from pagecache_bpf.errors import PagecacheError
from pagecache_bpf.ipc import wire
from pagecache_bpf.ipc.public_protocol import TEMPLATE_BYTES
from pagecache_bpf.templates.template import EXTENT
from tests.unit.command import ROOT
from tests.unit.weights import hole_of_strings
from tests.vm.kernel import wait_for

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="a process of another user takes root")
USER = (65533, False)


@pytest.fixture(scope="module")
def found() -> Iterator[Inspectors]:
    inspectors = Inspectors()
    inspectors.prepare()
    yield inspectors
    inspectors.close()
    assert inspectors.count() == 0


@pytest.fixture(autouse=True)
def nobody_has_taken_anything(request: pytest.FixtureRequest) -> None:
    """What one test has cost is not held against the user in the next one."""
    if "found" in request.fixturenames:
        request.getfixturevalue("found")._allowance = CpuAllowance(
            module.SAVED_CPU_SECONDS, module.CPU_SHARE
        )


def weights(path: Path, tensors: int = 3) -> int:
    entries = {
        f"w{n}": {"dtype": "U8", "shape": [10], "data_offsets": [n * 10, n * 10 + 10]}
        for n in range(tensors)
    }
    header = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(tensors * 10))
    return os.open(path, os.O_RDONLY)


def open_hole(path: Path) -> int:
    """Open a GGUF file whose header would take long to read."""
    return os.open(hole_of_strings(path, 1 << 26), os.O_RDONLY)


def process(inspectors: Inspectors) -> int:
    return inspectors._of[USER].process.pid


def test_s3_only_what_the_descriptor_leads_to_is_read(found: Inspectors, tmp_path: Path) -> None:
    """The file is root's alone and its name leads elsewhere by now: the descriptor is the right."""
    path = tmp_path / "w.safetensors"
    fd = weights(path)
    size = path.stat().st_size
    path.chmod(0o600)
    path.unlink()
    path.symlink_to("/etc/shadow")
    facts, data = found.run(USER, USER[0], "derive", [fd], names=["w.safetensors"])
    os.close(fd)
    assert facts == {
        "source": "derived",
        "loader": "safetensors keys",
        "tp": 1,
        "consumers": 1,
        "strided": False,
    }
    extents = np.frombuffer(data, EXTENT)
    assert set(extents["file"].tolist()) == {0}
    assert int(extents["length"].sum()) == size  # header and tensors, each byte once


def test_it_has_no_rights(found: Inspectors, tmp_path: Path) -> None:
    fd = weights(tmp_path / "w.safetensors")
    found.run(USER, USER[0], "derive", [fd], names=["w.safetensors"])
    os.close(fd)
    status = Path(f"/proc/{process(found)}/status").read_text()
    uid = "\t".join(["65533"] * 4)
    for line in (f"Uid:\t{uid}", f"Gid:\t{uid}", "CapPrm:\t0000000000000000", "NoNewPrivs:\t1"):
        assert line in status
    assert "Seccomp:\t2" in status  # a filter
    limits = Path(f"/proc/{process(found)}/limits").read_text()
    assert "Max processes             0                    0" in limits
    for name, bound in (("Max address space", MEMORY_BYTES), ("Max file size", TEMPLATE_BYTES)):
        assert f"{name:<26}{bound:<21}{bound:<21}bytes" in limits
    (cpu,) = [line.split()[3] for line in limits.splitlines() if line.startswith("Max cpu time")]
    assert JOB_CPU_SECONDS < int(cpu) < JOB_CPU_SECONDS + 60  # beside what it has used before
    # Of a process that may not be looked into, these files are root's.
    assert Path(f"/proc/{process(found)}/mem").stat().st_uid == 0
    open_now = [os.readlink(entry) for entry in Path(f"/proc/{process(found)}/fd").iterdir()]
    assert not [path for path in open_now if path.startswith("/") and path != "/dev/null"]


def test_it_has_none_of_the_controllers_groups(tmp_path: Path) -> None:
    before = os.getgroups()
    os.setgroups([4, 5])
    try:
        inspectors = Inspectors()
        inspectors.prepare()
    finally:
        os.setgroups(before)
    fd = weights(tmp_path / "w.safetensors")
    inspectors.run(USER, USER[0], "derive", [fd], names=["w"])
    os.close(fd)
    status = Path(f"/proc/{process(inspectors)}/status").read_text()
    inspectors.close()
    assert [line.split()[1:] for line in status.splitlines() if line.startswith("Groups:")] == [[]]


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.unit.test_controller_inspectors import USER, Inspectors, process, weights
inspectors = Inspectors()
fd = weights(Path(sys.argv[1]))
inspectors.run(USER, USER[0], "derive", [fd], names=["w"])
os.kill(process(inspectors), signal.SIGSTOP)
print(process(inspectors), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_it_ends_with_the_controller_whatever_it_does(tmp_path: Path) -> None:
    """A stopped one sees no end of its connection: it is the kernel that ends it."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "w.safetensors")],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL
    pid = int(done.stdout)

    def ended() -> bool:
        with suppress(OSError):
            stat = Path(f"/proc/{pid}/stat").read_text()
            return stat.rpartition(")")[2].split()[0] in "ZX"  # nobody reaps it, perhaps
        return True

    try:
        wait_for(ended, "the process to end with its controller", 60)
    finally:
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)


LYING = (
    "import socket, sys; s = socket.socket(fileno=int(sys.argv[1])); "
    "s.recv(1); s.sendall(b'\\xff' * 8); s.recv(1 << 20); sys.stdin.read(); s.recv(1 << 20); "
    "import time; time.sleep(60)"
)


def test_s6_an_answer_without_end_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_START", LYING)
    monkeypatch.setattr(module, "JOB_SECONDS", 20.0)
    inspectors = Inspectors()
    fd = weights(tmp_path / "w.safetensors")
    with pytest.raises(PagecacheError, match="its answer is too long"):
        inspectors.run(USER, USER[0], "derive", [fd], names=["w"])
    os.close(fd)
    inspectors.close()


@pytest.mark.parametrize("name", ["__name__", "annotations", "dataclass", "no such class"])
def test_s6_errors_that_it_tells_are_of_our_classes_only(name: str) -> None:
    told = {"class": name, "what": "what", "why": "y" * 10_000, "fix": 3}
    error = wire.told_error(told, most=500)
    assert type(error) is PagecacheError
    assert (error.what, error.why, error.fix) == ("what", "y" * 500, "3")


def test_s6_an_error_that_is_none_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = b'{"error": [1]}'
    answer = len(text).to_bytes(4, "little") + bytes(4) + text
    lying = LYING.replace("b'\\xff' * 8", repr(answer))
    assert lying != LYING
    monkeypatch.setattr(module, "_START", lying)
    inspectors = Inspectors()
    fd = weights(tmp_path / "w.safetensors")
    with pytest.raises(PagecacheError, match="its error is no object"):
        inspectors.run(USER, USER[0], "derive", [fd], names=["w"])
    os.close(fd)
    inspectors.close()


def test_s6_users_together_have_so_many_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PROCESSES", 1)
    monkeypatch.setattr(module, "TURN_SECONDS", 0.1)
    inspectors = Inspectors()
    fd = weights(tmp_path / "w.safetensors")
    inspectors.run(USER, USER[0], "derive", [fd], names=["w"])
    with pytest.raises(PagecacheError, match="those of 1 other users are"):
        inspectors.run((USER[0] + 1, False), USER[0] + 1, "derive", [fd], names=["w"])
    os.close(fd)
    inspectors.close()


def test_what_is_no_weight_file_is_told(found: Inspectors, tmp_path: Path) -> None:
    path = tmp_path / "shadow"
    path.write_bytes(b"root:*:20000:0:99999:7:::\n" * 20)
    with path.open("rb") as file, pytest.raises(PagecacheError) as caught:
        found.run(USER, USER[0], "derive", [file.fileno()], names=["model"])
    assert "it is neither safetensors nor " in str(caught.value)
    assert "root" not in str(caught.value)


def test_s6_time_and_memory_are_bounded(
    found: Inspectors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hole costs its own user some seconds, and the next job is done by a new process."""
    fd = open_hole(tmp_path / "hole.gguf")
    with monkeypatch.context() as patched:
        # A fast machine is through with the hole, and refuses it, before the usual bound.
        patched.setattr(module, "JOB_SECONDS", 2.0)
        with pytest.raises(PagecacheError, match="were not looked at"):
            found.run(USER, USER[0], "derive", [fd] * 16, names=[f"{n}.gguf" for n in range(16)])
    os.close(fd)
    good = weights(tmp_path / "w.safetensors")
    assert found.run(USER, USER[0], "derive", [good], names=["w"])[0]["consumers"] == 1
    os.close(good)


def test_s6_it_ends_when_nobody_waits_any_more(found: Inspectors, tmp_path: Path) -> None:
    fd = open_hole(tmp_path / "hole.gguf")
    since = time.monotonic()
    with pytest.raises(PagecacheError, match="has hung up"):
        found.run(
            *(USER, USER[0], "derive", [fd] * 16),
            wanted=lambda: time.monotonic() < since + 0.5,
            names=[f"{n}.gguf" for n in range(16)],
        )
    os.close(fd)
    assert found.lost["the client has hung up"] >= 1


def test_kill_9_in_the_middle(found: Inspectors, tmp_path: Path) -> None:
    fd = open_hole(tmp_path / "hole.gguf")
    small = weights(tmp_path / "w.safetensors")
    found.run(USER, USER[0], "derive", [small], names=["w"])
    pid = process(found)
    threading.Timer(0.3, os.kill, (pid, signal.SIGKILL)).start()
    with pytest.raises(PagecacheError, match="its process has ended"):
        found.run(USER, USER[0], "derive", [fd] * 16, names=[f"{n}.gguf" for n in range(16)])
    os.close(fd)
    assert found.run(USER, USER[0], "derive", [small], names=["w"])[0]["consumers"] == 1
    os.close(small)
    assert process(found) != pid


def test_s12_a_process_that_cannot_be_started_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    inspectors = Inspectors()
    monkeypatch.setattr("pagecache_bpf.controller.inspectors.subprocess.Popen", refuse)
    inspectors.prepare()
    with pytest.raises(PagecacheError, match="no process can be started"):
        inspectors.run(USER, USER[0], "derive", [0], names=["w"])
    monkeypatch.undo()
    fd = weights(tmp_path / "w.safetensors")
    assert inspectors.run(USER, USER[0], "derive", [fd], names=["w"])[0]["tp"] == 1
    os.close(fd)
    inspectors.close()


def test_idle_processes_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_IDLE_SECONDS", 0.0)
    inspectors = Inspectors()
    fd = weights(tmp_path / "w.safetensors")
    for uid in (65531, 65532):
        inspectors.run((uid, False), uid, "derive", [fd], names=["w"])
    os.close(fd)
    assert inspectors.count() == 2

    def swept() -> bool:
        inspectors.sweep()
        return inspectors.count() == 1  # the spare one

    wait_for(swept, "the processes to be ended")
    inspectors.close()


def test_s6_who_takes_much_gets_only_what_nobody_else_wants(
    found: Inspectors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the processor; another user's process is not slowed down, and one that waits hurries."""

    greedy, modest = (USER[0] + 10, False), (USER[0] + 11, False)

    def policies() -> dict[int, int]:
        return {
            owner[0]: os.sched_getscheduler(process.process.pid)
            for owner, process in found._of.items()
        }

    monkeypatch.setattr(module, "EAGER_CPU_SECONDS", 0.0)
    hole = open_hole(tmp_path / "hole.gguf")
    seen: list[int] = []

    def wanted() -> bool:
        seen.append(policies().get(greedy[0], -1))
        return os.SCHED_IDLE not in seen

    with pytest.raises(PagecacheError, match="hung up"):
        found.run(greedy, greedy[0], "derive", [hole], wanted, names=["model"])
    os.close(hole)
    assert seen[0] == os.SCHED_OTHER and seen[-1] == os.SCHED_IDLE
    fd = weights(tmp_path / "w.safetensors")
    monkeypatch.setattr(module, "EAGER_CPU_SECONDS", 60.0)
    for owner in (greedy, modest):
        found.run(owner, owner[0], "derive", [fd], names=["w.safetensors"])
    os.close(fd)
    told = policies()
    assert (told[greedy[0]], told[modest[0]]) == (os.SCHED_IDLE, os.SCHED_OTHER)


def test_s6_cpu_time_of_a_user_is_bounded(found: Inspectors, tmp_path: Path) -> None:
    """Who has taken too much is refused for a while; others and root are served."""
    fd = weights(tmp_path / "w.safetensors")

    def derive(owner: tuple[int, bool]) -> int:
        return int(found.run(owner, owner[0], "derive", [fd], names=["w"])[0]["tp"])

    found._allowance = CpuAllowance(0.0, 1e-9)
    assert derive(USER) == 1  # what it costs is known only then
    started = found.started
    with pytest.raises(PagecacheError, match="took too much time of the processor"):
        derive(USER)
    assert found.started == started
    assert derive((USER[0] + 12, False)) == 1
    for _ in range(2):
        assert derive((0, True)) == 1
    os.close(fd)


def test_s6_what_is_lost_is_charged_with_its_successor(
    found: Inspectors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a user could have one process after the other started, and spend nothing."""
    fd = open_hole(tmp_path / "hole.gguf")
    monkeypatch.setattr(module, "_LOST_CPU_SECONDS", 100.0)
    found._allowance = CpuAllowance(150.0, 1e-9)
    for _ in range(2):
        waits = iter([True])  # when the job is given to the process, and no longer
        with pytest.raises(PagecacheError, match="hung up"):
            found.run(
                *(USER, USER[0], "derive", [fd] * 16),
                wanted=lambda waits=waits: next(waits, False),  # type: ignore[misc]
                names=[f"{n}.gguf" for n in range(16)],
            )
    with pytest.raises(PagecacheError, match="took too much time of the processor"):
        found.run(USER, USER[0], "derive", [fd], names=["w"])
    os.close(fd)


def test_s6_a_client_that_has_gone_costs_no_process(found: Inspectors, tmp_path: Path) -> None:
    """Its job waited for its turn: the process goes on with what others of the user want."""
    fd = weights(tmp_path / "w.safetensors")
    found.run(USER, USER[0], "derive", [fd], names=["w"])
    pid, lost = process(found), found.lost.total()
    with pytest.raises(PagecacheError, match="the client has hung up"):
        found.run(USER, USER[0], "derive", [fd], lambda: False, names=["w"])
    assert (process(found), found.lost.total()) == (pid, lost)
    os.close(fd)


def test_s6_a_job_outlives_the_process_that_it_waited_for(
    found: Inspectors, tmp_path: Path
) -> None:
    """Another one of the user had it ended: the job is done by the next process."""
    hole, fd = open_hole(tmp_path / "hole.gguf"), weights(tmp_path / "w.safetensors")
    over = threading.Event()
    told: list[str] = []

    def first() -> None:
        try:
            found.run(
                *(USER, USER[0], "derive", [hole] * 16),
                wanted=lambda: not over.is_set(),
                names=[f"{n}.gguf" for n in range(16)],
            )
        except PagecacheError as error:
            told.append(str(error))

    def second() -> None:
        facts, _ = found.run(USER, USER[0], "derive", [fd], names=["w"])
        told.append(f"{facts['consumers']} consumer")

    threads = [threading.Thread(target=job) for job in (first, second)]
    threads[0].start()
    wait_for(lambda: USER in found._of and found._of[USER].busy.locked(), "the first to begin", 60)
    threads[1].start()
    over.set()
    for thread in threads:
        thread.join(60)
    assert len(told) == 2 and "1 consumer" in told
    os.close(hole)
    os.close(fd)
