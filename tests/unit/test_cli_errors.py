# SPDX-License-Identifier: Apache-2.0
"""Bad input: what is said, on which stream, with which exit code, in a process of its own."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from pagecache_bpf.kernel.kernelfs import LIVE
from tests.unit.command import NO_OVERRIDE, NOBODY, NOBODY_ID, ROOT, Result, run

SEQUENTIAL = ROOT / "build" / "bpf" / "sequential.bpf.o"

needs_no_modules = pytest.mark.skipif(
    Path("/proc/modules").exists(), reason="this kernel loads modules; tests/vm has that"
)
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gets that far")


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    if LIVE.fstype(tmp_path.stat().st_dev) == "tmpfs":
        pytest.skip("the temporary directory is in memory (give --basetemp on a disk)")
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"w" * 4096)
    return path


@pytest.fixture(scope="session", autouse=True)
def policies_are_built() -> None:
    assert SEQUENTIAL.is_file(), "run `make build` first"


def refused(result: Result, code: int, *said: str) -> None:
    """The command failed with that code, said so on stderr only, and without a traceback."""
    assert result.out == ""
    assert result.code == code, result.err
    assert result.err.startswith("pagecache-bpf: error: ")
    assert "Traceback" not in result.err
    for text in said:
        assert text in result.err


@pytest.mark.parametrize(
    "words",
    [
        ("attach", "sequential"),
        ("detach", "sequential"),
        ("detach", "--all"),
        ("status",),
        ("tags",),
        ("untag", "--all"),
        ("module", "load"),
        ("module", "unload"),
    ],
)
def test_without_root(words: tuple[str, ...]) -> None:
    result = run(*words, rights=NOBODY)
    refused(result, 4, "only root can", "sudo", "docs/troubleshooting.md#only-root-can")
    told = run(*words, "--json", rights=NOBODY)
    assert (told.code, told.out) == (4, "")
    assert told.error["type"] == "PrivilegeError"
    assert told.error["exit_code"] == 4


def test_without_root_a_path_is_checked_first(tmp_path: Path) -> None:
    refused(run("tag", tmp_path / "gone", "--policy", "x", rights=NOBODY), 2, "does not exist")


def test_without_root_the_rest_works() -> None:
    assert run("policy", "list", rights=NOBODY).code == 0
    assert run("doctor", rights=NOBODY).code in (3, 4)
    assert run("--version", rights=NOBODY).code == 0


@needs_root
def test_a_file_that_may_not_be_read(weights: Path) -> None:
    weights.chmod(0o600)
    os.chown(weights, NOBODY_ID, NOBODY_ID)
    result = run("attach", "sequential", weights, rights=NO_OVERRIDE)
    refused(result, 4, f"{weights} cannot be opened: permission denied")


def test_no_such_policy() -> None:
    result = run("attach", "sequental", "/etc/hostname")
    refused(result, 2, "there is no policy sequental", "pin, s3fifo, sequential")


@pytest.mark.parametrize("command", ["attach", "policy show"])
def test_a_policy_file_that_is_not_there(command: str) -> None:
    refused(run(*command.split(), "./gone.bpf.o"), 2, "there is no policy in gone.bpf.o")


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("max_window_mib=0", "0 is out of range for the knob max_window_mib: it takes"),
        ("max_window_mib=99999999", "99999999 is out of range for the knob max_window_mib"),
        ("max_window_mib=-1", "-1 is out of range"),
        ("max_window_mib=lots", "'lots' is not a value for the knob max_window_mib"),
        ("window=4", "the policy sequential has no knob window: its knobs are"),
        ("max_window_mib", "'max_window_mib' is not NAME=VALUE"),
        ("=4", "'=4' is not NAME=VALUE"),
        ("max_window_mib=", "is not NAME=VALUE"),
    ],
)
def test_bad_knobs(weights: Path, setting: str, said: str) -> None:
    refused(run("attach", "sequential", "--knob", setting, weights), 2, said)


def test_bad_paths(tmp_path: Path, weights: Path) -> None:
    empty = tmp_path / "empty.gguf"
    empty.touch()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "dir").mkdir()
    for path, said in (
        (tmp_path / "gone", "gone does not exist"),
        (empty, "empty.gguf is empty"),
        (tmp_path / "fifo", "fifo is not a regular file: it is a named pipe"),
        (Path("/dev/null"), "is not a regular file: it is a character device"),
        (tmp_path / "link", "link is a broken symbolic link: it points to nowhere"),
        (tmp_path / "dir", "dir: the directory is empty"),
        (Path("/proc/version"), "/proc/version has no pages to read ahead: the file system (proc)"),
    ):
        # one good path beside a bad one is not enough
        refused(run("attach", "sequential", weights, path), 2, said, "see:  ", "/docs/")


def test_a_bad_model_name(weights: Path) -> None:
    result = run("attach", "sequential", weights, "--model", "my model")
    refused(result, 2, "'my model' is not a model name")


def test_clang_absent_with_source_given(tmp_path: Path, weights: Path) -> None:
    source = tmp_path / "mine.bpf.c"
    source.write_text("int x;\n")
    path = tmp_path / "bin"
    path.mkdir()
    result = run("attach", source, weights, env={"PATH": str(path), "CLANG": ""})
    refused(result, 3, "policies in C need clang 14 or newer", "Install clang")


@pytest.mark.skipif(shutil.which("clang") is None, reason="clang is not installed as clang")
def test_source_that_does_not_compile(tmp_path: Path, weights: Path) -> None:
    source = tmp_path / "mine.bpf.c"
    source.write_text("this is not C\n")
    refused(run("attach", source, weights), 1, "mine.bpf.c does not compile", "error:")


@pytest.mark.parametrize("size", [0, 1, 100, 3000])
def test_a_corrupt_object_file(tmp_path: Path, weights: Path, size: int) -> None:
    damaged = tmp_path / "sequential.bpf.o"
    damaged.write_bytes(SEQUENTIAL.read_bytes()[:size])
    refused(run("attach", damaged, weights), 2, str(damaged))


def test_objects_that_are_no_policies(tmp_path: Path, weights: Path) -> None:
    noise = tmp_path / "noise.bpf.o"
    noise.write_bytes(bytes(range(256)) * 40)
    refused(run("attach", noise, weights), 2, "noise.bpf.o")
    foreign = tmp_path / "foreign.bpf.o"
    shutil.copy(os.path.realpath("/proc/self/exe"), foreign)
    refused(run("attach", foreign, weights), 2, "is not a policy: it is for EM_")
    text = tmp_path / "policy.txt"
    text.touch()
    refused(run("attach", text, weights), 2, "ends in neither .bpf.c nor .bpf.o")


@pytest.mark.parametrize(
    ("library", "said"),
    [("libc.so.6", "libc.so.6 is version 0.0"), ("/gone/libbpf.so.1", "/gone/libbpf.so.1")],
)
def test_libbpf_too_old_or_absent(weights: Path, library: str, said: str) -> None:
    result = run("attach", "sequential", weights, env={"PAGECACHE_BPF_LIBBPF": library})
    refused(result, 3, "libbpf 1.4 or newer is needed", said, "make deps")


@needs_root
@needs_no_modules
def test_a_kernel_that_cannot_load_modules(weights: Path, tmp_path: Path) -> None:
    attach = ("attach", "sequential", "--engine", "struct_ops", weights)
    for words in (attach, ("module", "load", weights)):
        result = run(*words)
        refused(result, 3, "this kernel cannot load modules", "CONFIG_MODULES", "doctor")


@needs_root
@needs_no_modules
def test_without_the_module_nothing_is_attached() -> None:
    assert run("status").out.startswith("no policy is attached\n")
    assert run("tags").out == "no file is tagged\n"
    assert run("module", "unload").out == "the module is not loaded\n"
    refused(run("detach", "sequential"), 2, "the policy sequential is not attached")
    # one that was attached before is told of, as ended
    refused(run("status", "nowhere"), 2, "the policy nowhere is not attached")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "COMMAND"),
        (("attache",), "invalid choice: 'attache'"),
        (("attach",), "required: POLICY"),
        (("attach", "sequential", "--nob", "x=1"), "unrecognized arguments: --nob"),
        (("attach", "sequential", "--knob"), "expected one argument"),
        (("tag", "/etc/hostname"), "required: --policy"),
        (("detach",), "POLICY --all is required"),
        (("detach", "x", "--all"), "not allowed with"),
        (("policy",), "COMMAND"),
        (("completion", "tcsh"), "invalid choice: 'tcsh'"),
        (("untag",), "nothing to untag was named"),
    ],
)
def test_wrong_use(words: tuple[str, ...], said: str) -> None:
    refused(run(*words), 2, said)
    told = run(*words, "--json")
    assert (told.code, told.out) == (2, "")
    assert said in told.error["what"] + told.error["why"]
    assert told.error["type"] == "UsageError"


def test_json_errors_have_all_their_keys() -> None:
    keys = {"type", "what", "why", "fix", "docs", "log", "notes", "exit_code"}
    assert set(run("--json", "attach", "nothing").error) == keys


def test_an_error_names_its_log(tmp_path: Path, weights: Path) -> None:
    if shutil.which("clang") is None:
        pytest.skip("clang is not installed as clang")
    source = tmp_path / "mine.bpf.c"
    source.write_text("#error on purpose\n")
    error = run("attach", source, weights, "--json").error
    if error["log"] is None:
        pytest.skip("no log directory can be written here")
    assert "on purpose" in Path(error["log"]).read_text()
    assert error["log"] in error["fix"]


def test_file_names_that_are_no_text(tmp_path: Path) -> None:
    name = os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe")
    refused(run("attach", "sequential", name), 2, "does not exist")
