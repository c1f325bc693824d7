# SPDX-License-Identifier: Apache-2.0
"""Puts other programs in the place of an attached policy's, on engine struct_ops.  Root only.

The kernel asks the old programs or the new ones, and never nobody: files stay under the policy,
and what it keeps in the page cache stays kept.  What user space has given it (hints, templates) is
handed on; what it has learned by itself is not, since the new programs may understand it otherwise.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from pagecache_bpf.errors import PagecacheError, PolicyRejected, UnsupportedError, UsageError
from pagecache_bpf.kernel import bpf_links, libbpf
from pagecache_bpf.kernel.control_device import Device
from pagecache_bpf.policy import loader, objects
from pagecache_bpf.policy.catalog import PolicyInfo, check_knobs
from pagecache_bpf.policy.hint_maps import HintMap, maps_of

_TEMPLATES = "template_"


def replace(
    info: PolicyInfo,
    knobs: Mapping[str, int] | None = None,
    *,
    log_dir: Path | None = None,
) -> dict[str, int]:
    """Replace an attached policy by another version of it, or by the same with other knobs.

    Args:
        info: what catalog.find() returned; a policy of that name is attached and pinned.
        knobs: numbers by the knobs' names; the others stay as they are.
        log_dir: where the verifier's whole log goes if the policy is refused (default:
            /run/pagecache-bpf).

    Returns:
        The knobs that are set now, by name.

    Raises:
        PrivilegeError: the caller is not root.
        UnsupportedError: there is no module or no libbpf.
        UsageError: no such policy is attached, or a knob is wrong.
        PolicyRejected: the new programs are refused; the old ones go on.
        PagecacheError: the policy has ended by itself, or its pins cannot be changed.
    """
    check_knobs(info, knobs or {})
    objects.built(info)
    libbpf.library()
    with Device() as device, loader.locked():
        if info.name not in loader.pinned():
            raise UsageError(
                f"the policy {info.name} is not attached",
                "only one that is can be replaced",
                f"Attach it: pagecache-bpf attach {info.name}",
            )
        kept = loader.knobs_of(info.name)
        known = {knob.name for knob in info.knobs}
        values = {name: value for name, value in kept.items() if name in known}
        values.update(knobs or {})
        directory = loader.PIN_ROOT / info.name
        with _handed_on(info, directory / "maps") as maps, _new_pins(directory) as fresh:

            def prepare(opened: libbpf.Object) -> None:
                objects.set_knobs(opened, values)
                for table in opened.maps():
                    if table.name in maps:
                        table.reuse(maps[table.name])

            _load_and_update(info, prepare, device, directory / "link", fresh, log_dir)
            _swap_pins(fresh, directory / "maps")
        return values


def _load_and_update(
    info: PolicyInfo,
    prepare: Callable[[libbpf.Object], None],
    device: Device,
    link: Path,
    maps: Path,
    log_dir: Path | None,
) -> None:
    """Load the new programs, pin their maps, and let the link hold them.  Raises PagecacheError."""
    refused = f"the policy {info.name} was not replaced: the kernel refused to load the new one"
    with objects.load(info, prepare, log_dir, refused) as opened:
        table = objects.table_of(info, opened)
        objects.pin_maps(opened, maps)
        since = loader.last_exit(device)
        try:
            _make_ready(info, table)
            bpf_links.update_pinned(link, table.fd)
        except OSError as error:
            raise _refusal(info, device, since, error) from error


def _make_ready(info: PolicyInfo, table: libbpf.ObjectMap) -> None:
    """Have the kernel build what calls the programs.  Raises OSError.

    libbpf does that when it attaches a map, which fails then: the name is taken.
    """
    try:
        table.attach_struct_ops().close()
    except OSError as error:
        if error.errno != errno.EEXIST:
            raise
    else:
        raise OSError(errno.ESHUTDOWN, f"{info.name} has ended")


def _refusal(info: PolicyInfo, device: Device, since: int, error: OSError) -> PagecacheError:
    """Turn the errno of an update into why, with what the module has recorded about it."""
    what = f"the policy {info.name} was not replaced"
    if error.errno in (errno.ESHUTDOWN, errno.ENOLINK):
        return PagecacheError(
            what,
            "it has ended by itself: `pagecache-bpf status` says why",
            f"Detach it (pagecache-bpf detach {info.name}), and attach it again",
        )
    if error.errno == errno.EOPNOTSUPP and loader.last_exit(device) == since:
        return UnsupportedError(
            what,
            "the module that is loaded cannot replace policies",
            "Load the module that goes with this version: pagecache-bpf module load",
        )
    record = loader.newest_exit(device, info.name, lambda record: record.seq > since)
    return PolicyRejected(what, str(record) if record else error.strerror or str(error))


@contextmanager
def _handed_on(info: PolicyInfo, directory: Path) -> Iterator[dict[str, int]]:
    """Open the pinned maps that the new programs go on with: descriptors by name."""
    hints = {found.name: found for found in maps_of(info) if found.kind == "hint"}
    maps: dict[str, int] = {}
    try:
        for path in directory.iterdir():
            if path.name not in hints and not path.name.startswith(_TEMPLATES):
                continue
            maps[path.name] = fd = libbpf.open_pinned(path)
            if path.name in hints and not _alike(libbpf.map_info(fd), hints[path.name]):
                os.close(maps.pop(path.name))
        yield maps
    finally:
        for fd in maps.values():
            os.close(fd)


@contextmanager
def _new_pins(directory: Path) -> Iterator[Path]:
    """Make a directory for the new maps' pins; what is in it afterwards goes."""
    fresh = directory / "new"
    loader.remove_directory(fresh)
    fresh.mkdir(mode=0o700)
    try:
        yield fresh
    finally:
        loader.remove_directory(fresh)


def _swap_pins(fresh: Path, maps: Path) -> None:
    """Give the new maps the old ones' names, one after the other."""
    names = {path.name for path in fresh.iterdir()}
    for name in sorted(names):
        (fresh / name).rename(maps / name)
    for path in list(maps.iterdir()):
        if path.name not in names:
            path.unlink()


def _alike(there: libbpf.MapInfo, wanted: HintMap) -> bool:
    """Tell whether a map that exists has the type and sizes that the new programs expect."""
    mine = (there.type, there.key_size, there.value_size, there.max_entries)
    return mine == (wanted.type, wanted.key_size, wanted.value_size, wanted.max_entries)
