# SPDX-License-Identifier: Apache-2.0
"""The ABI in Python is the ABI in C: of the policies' objects and of the built module.

Needs what `make build` builds: without it the comparison is skipped, not passed.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pagecache_bpf.agent import worker
from pagecache_bpf.kernel import abi
from pagecache_bpf.kernel.btf import Btf, BtfKind
from pagecache_bpf.kernel.elf import Elf

ROOT = Path(__file__).resolve().parent.parent.parent
ABI_OBJECT = ROOT / "build" / "bpf" / "abi.bpf.o"
# Not those of `make kmod-arm64`, whose kernels' types are on no machine that runs this.
MODULES = [
    path
    for path in sorted((ROOT / "build" / "kmod").glob("*/pagecache_bpf.ko"))
    if "arm64" not in path.parent.name
]
ANY_MODULE = ROOT / "build" / "kmod" / "KERNELRELEASE" / "pagecache_bpf.ko"

STRUCTS = {
    name: value
    for name, value in vars(abi).items()
    if isinstance(value, type) and issubclass(value, ctypes.Structure)
}
# What programs on tracepoints and the agent share; the module has nothing of it but the first.
AGENT_OBJECTS = sorted((ROOT / "build" / "bpf" / "agent").glob("*.bpf.o"))
AGENT_STRUCTS = [
    *("pagecache_file_key", "pagecache_request"),
    *(name for name in STRUCTS if name.startswith("pagecache_agent_")),
]
# What policies that take I/O templates share with user space.
TEMPLATE_STRUCTS = [name for name in STRUCTS if name.startswith("pagecache_template_")]
OBSERVER_STRUCTS = [
    name for name in STRUCTS if name.startswith(("pagecache_observe", "pagecache_recorded"))
]
# What is asked of a file.
FILES_OBJECT = ROOT / "build" / "bpf" / "files" / "identity.bpf.o"
FILES_STRUCTS = ["pagecache_file_question"]
ENUMS = {
    "pagecache_template_source": abi.TemplateSource,
    "pagecache_hook": abi.Hook,
    "pagecache_verdict": abi.Verdict,
    "pagecache_eviction": abi.Eviction,
    "pagecache_kind": abi.Kind,
    "pagecache_exit_kind": abi.ExitKind,
    "pagecache_request_kind": abi.RequestKind,
}


def vmlinux_of(release: str) -> Btf | None:
    """The types of the kernel that a module was built for."""
    places = [
        Path("/lib/modules", release, "build", "vmlinux"),
        Path(f"/usr/src/linux-headers-{release}", "vmlinux"),
        Path("/usr/lib/debug/boot", f"vmlinux-{release}"),
        Path("/usr/lib/debug/lib/modules", release, "vmlinux"),
    ]
    for place in places:
        if place.is_file():
            with Elf(place) as elf:
                return elf.btf()
    if release == os.uname().release:
        return Btf.from_file("/sys/kernel/btf/vmlinux")
    return None


def load(path: Path) -> Btf:
    base = vmlinux_of(path.parent.name) if path.suffix == ".ko" else None
    with Elf(path) as elf:
        if path.suffix == ".ko" and base is None and elf.section(".BTF.base") is None:
            pytest.skip(f"the types of kernel {path.parent.name} are not on this machine")
        return elf.btf(base)


def differences(struct: type[ctypes.Structure], btf: Btf, where: str) -> list[str]:
    """In what a struct differs; each line names both sides and the field."""
    name = struct.__name__
    type_id = btf.find(name, BtfKind.STRUCT)
    if type_id is None:
        return [f"{where} has no struct {name}, abi.py has"]
    found = []
    if btf.size(type_id) != ctypes.sizeof(struct):
        found.append(
            f"struct {name}: {btf.size(type_id)} bytes in {where}, "
            f"{ctypes.sizeof(struct)} in abi.py"
        )
    theirs = {field.name: (field.offset, field.size) for field in btf.fields(type_id)}
    ours = {}
    for field in struct._fields_:
        at = getattr(struct, field[0])
        ours[field[0]] = (at.offset, at.size)
    for field_name in [*theirs, *(ours.keys() - theirs.keys())]:
        if theirs.get(field_name) != ours.get(field_name):
            found.append(
                f"{name}.{field_name} (offset, size): {theirs.get(field_name)} in {where}, "
                f"{ours.get(field_name)} in abi.py"
            )
    return found


@pytest.fixture(scope="module", params=[ABI_OBJECT, *(MODULES or [ANY_MODULE])])
def built(request: pytest.FixtureRequest) -> tuple[Btf, str]:
    path: Path = request.param
    if not path.exists():
        pytest.skip(f"{path.relative_to(ROOT)} is not built: run `make build`")
    return load(path), str(path.relative_to(ROOT))


@pytest.mark.parametrize("name", STRUCTS)
def test_structs_are_laid_out_alike(built: tuple[Btf, str], name: str) -> None:
    foreign = AGENT_STRUCTS[1:] + OBSERVER_STRUCTS + TEMPLATE_STRUCTS + FILES_STRUCTS
    if name in foreign and built[1].endswith(".ko"):
        assert built[0].find(name, BtfKind.STRUCT) is None
        return
    assert differences(STRUCTS[name], *built) == []


@pytest.mark.parametrize("name", AGENT_STRUCTS)
def test_the_agent_shares_its_types_with_its_programs(name: str) -> None:
    """Those that are in maps; a record of the ring buffer is described nowhere in an object."""
    if not AGENT_OBJECTS:
        pytest.skip("build/bpf/agent is not built: run `make build`")
    for path in AGENT_OBJECTS:
        found = differences(STRUCTS[name], load(path), path.name)
        if name == "pagecache_request" and found:
            assert "has no struct" in found[0]
            continue
        assert found == []


@pytest.mark.parametrize("name", FILES_STRUCTS)
def test_what_is_asked_of_a_file_is_known_to_the_programs(name: str) -> None:
    if not FILES_OBJECT.exists():
        pytest.skip("build/bpf/files is not built: run `make build`")
    assert differences(STRUCTS[name], load(FILES_OBJECT), FILES_OBJECT.name) == []


@pytest.mark.parametrize("name", TEMPLATE_STRUCTS)
def test_policies_share_templates_with_user_space(name: str) -> None:
    path = ABI_OBJECT.with_name("maio.bpf.o")
    if not path.exists():
        pytest.skip("build/bpf/maio.bpf.o is not built: run `make build`")
    assert differences(STRUCTS[name], load(path), path.name) == []


@pytest.mark.parametrize("name", ENUMS)
def test_enums_have_the_same_values(built: tuple[Btf, str], name: str) -> None:
    btf, where = built
    type_id = btf.find(name, BtfKind.ENUM)
    if type_id is None and where.endswith(".ko"):
        pytest.skip("the module has no variable of that type, so its types do not have it")
    assert type_id is not None, f"{where} has no enum {name}"
    theirs = sorted(btf.enum_values(type_id).values())
    assert theirs == sorted(member.value for member in ENUMS[name]), f"enum {name} in {where}"


@pytest.mark.parametrize(
    ("enum", "prefix", "family"),
    [
        ("pagecache_counter", "PAGECACHE_COUNTER_", abi.COUNTERS),
        ("pagecache_observed_counter", "PAGECACHE_OBSERVED_", abi.OBSERVED),
        ("pagecache_recorded_counter", "PAGECACHE_RECORDED_", abi.RECORDED),
    ],
)
def test_counters_are_named_alike(
    built: tuple[Btf, str], enum: str, prefix: str, family: tuple[abi.Counter, ...]
) -> None:
    btf, where = built
    type_id = btf.find(enum, BtfKind.ENUM)
    if type_id is None and where.endswith(".ko"):
        pytest.skip("the module has no variable of that type, so its types do not have it")
    assert type_id is not None, f"{where} has no enum {enum}"
    theirs = {value: name.removeprefix(prefix) for name, value in btf.enum_values(type_id).items()}
    ours = {place: counter.name for place, counter in enumerate(family)}
    assert theirs == {**ours, len(ours): "NR"}, f"enum {enum} in {where}"


def test_the_generated_file_is_fresh() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "gen_abi.py"), "--check"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


# The comparison itself: it has to see what it is for.


class pagecache_answer(ctypes.Structure):
    """As in C but for the order of two members and the size of a third."""

    _fields_ = (
        ("nr", ctypes.c_uint64),
        ("start", ctypes.c_uint64),
        ("mark", ctypes.c_uint64),
        ("node", ctypes.c_int32),
        ("order", ctypes.c_uint64),
    )


def test_differences_name_both_sides() -> None:
    if not ABI_OBJECT.exists():
        pytest.skip("build/bpf/abi.bpf.o is not built: run `make build`")
    found = differences(pagecache_answer, load(ABI_OBJECT), "abi.bpf.o")
    assert found == [
        "struct pagecache_answer: 32 bytes in abi.bpf.o, 40 in abi.py",
        "pagecache_answer.start (offset, size): (0, 8) in abi.bpf.o, (8, 8) in abi.py",
        "pagecache_answer.nr (offset, size): (8, 8) in abi.bpf.o, (0, 8) in abi.py",
        "pagecache_answer.order (offset, size): (28, 4) in abi.bpf.o, (32, 8) in abi.py",
    ]


def test_ioctl_numbers_carry_the_sizes() -> None:
    for number, struct in (
        (abi.IOC_INFO, abi.pagecache_info),
        (abi.IOC_TAG, abi.pagecache_tag_request),
        (abi.IOC_UNTAG, abi.pagecache_untag_request),
        (abi.IOC_TAGS, abi.pagecache_tag_record),
        (abi.IOC_POLICIES, abi.pagecache_policy_record),
        (abi.IOC_EXITS, abi.pagecache_exit_record),
    ):
        assert number >> 16 & 0x3FFF == ctypes.sizeof(struct), struct.__name__
        assert number >> 8 & 0xFF == abi.IOC_MAGIC


def test_a_worker_reads_huge_pages() -> None:
    # It imports nothing of the package, so that it starts quickly.
    assert worker.CHUNK_BYTES == abi.HUGE_BYTES
