# SPDX-License-Identifier: Apache-2.0
"""What is set in a policy's object before it is loaded, and found in it afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from pagecache_bpf.errors import PagecacheError, PolicyRejected, UsageError
from pagecache_bpf.kernel import bpf_object, libbpf
from pagecache_bpf.kernel.btf import Btf, Variable
from pagecache_bpf.policy.catalog import RODATA, PolicyInfo, knob_tags

_STRUCT_OPS_MAP = 26  # BPF_MAP_TYPE_STRUCT_OPS in include/uapi/linux/bpf.h


def built(info: PolicyInfo) -> Path:
    """Return a policy's object for engine struct_ops.

    Args:
        info: the policy.

    Returns:
        The object's path.

    Raises:
        PagecacheError: there is none.
    """
    if info.object is None:
        raise PagecacheError(
            f"the policy {info.name} cannot be attached", "it is not built", "Run `make bpf`"
        )
    return info.object


def load(
    info: PolicyInfo,
    prepare: Callable[[libbpf.Object], None],
    log_dir: Path | None,
    refused: str,
) -> libbpf.Object:
    """Load a policy's object into the kernel.

    Args:
        info: the policy.
        prepare: called with the object before it is loaded.
        log_dir: where the verifier's whole log goes if the policy is refused; None: the run
            directory.
        refused: what is said then.

    Returns:
        The loaded object, which the caller closes.

    Raises:
        PagecacheError: the policy is not built, or its object cannot be read.
        PolicyRejected: the kernel refuses it.
    """
    try:
        return bpf_object.load(built(info), info.name, prepare, f"{info.name}-load.log", log_dir)
    except bpf_object.ProgramsRefused as error:
        raise PolicyRejected(refused, error.why, error.fix, log_path=error.log_path) from error


def knob_variables(btf: Btf) -> Iterator[Variable]:
    """Return the variables that are knobs.

    Args:
        btf: type information of an object, or of its constants.

    Returns:
        The variables, in the object's order.
    """
    return (variable for variable in btf.variables(RODATA) if knob_tags(btf, variable.var_id))


def set_knobs(opened: libbpf.Object, knobs: Mapping[str, int]) -> None:
    """Set knobs of an object that is not loaded yet.

    Args:
        opened: the object.
        knobs: numbers by the knobs' names; names that the object does not have are passed over, as
            check_knobs() refuses them.

    Raises:
        UsageError: a number does not fit its variable.
    """
    if not knobs:
        return
    for name, value in knobs.items():
        try:
            opened.set_constants({name: value})
        except OverflowError:
            raise UsageError(f"{value} does not fit the knob {name}", "it is too large") from None


def enlarge_maps(opened: libbpf.Object, sizes: Mapping[str, int]) -> None:
    """Enlarge maps of an object that is not loaded yet; none becomes smaller.

    Args:
        opened: the object.
        sizes: elements that maps must have room for, by name.
    """
    for bpf_map in opened.maps():
        if sizes.get(bpf_map.name, 0) > bpf_map.max_entries:
            bpf_map.resize(sizes[bpf_map.name])


def pin_maps(opened: libbpf.Object, directory: Path) -> None:
    """Pin every map but the struct_ops one by its name.

    Args:
        opened: a loaded object.
        directory: where, in bpffs.

    Raises:
        OSError: a name is taken.
    """
    for bpf_map in opened.maps():
        if bpf_map.type == _STRUCT_OPS_MAP:
            continue  # held by the link
        # "sequenti.rodata" is a section's; bpffs takes no dots in names.
        name = bpf_map.name.partition(".")[2] or bpf_map.name
        libbpf.pin(bpf_map.fd, directory / name.replace(".", "_"))


def table_of(info: PolicyInfo, opened: libbpf.Object) -> libbpf.ObjectMap:
    """Return the map that is a policy's table of hooks.

    Args:
        info: the policy.
        opened: its object.

    Returns:
        The map, of type struct_ops.

    Raises:
        UsageError: the object has none.
    """
    for bpf_map in opened.maps():
        if bpf_map.type == _STRUCT_OPS_MAP:
            return bpf_map
    raise UsageError(f"{info.object} is not a policy", "it has no table")
