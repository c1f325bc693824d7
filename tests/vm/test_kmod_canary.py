# SPDX-License-Identifier: Apache-2.0
"""A hook that is attached and silent is noticed when a policy is attached, and not later."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pagecache_bpf.errors import PolicyRejected
from pagecache_bpf.kernel.control_device import Device
from pagecache_bpf.policy import loader
from pagecache_bpf.policy.catalog import find
from tests.vm.kernel import ROOT, attached, make_file, read_pages, resident, test_policy, wait_for

pytestmark = pytest.mark.vm


@contextmanager
def silenced(function: str) -> Iterator[None]:
    """A function of the module returns at once."""
    silencer = ROOT / "build" / "kmod" / os.uname().release / "test" / "pcb_silencer.ko"
    subprocess.run(["insmod", str(silencer), f"hook={function}"], check=True)
    try:
        yield
    finally:
        subprocess.run(["rmmod", "pcb_silencer"], check=True)


#: Function of the module, the kernel's function whose hook it is, and a policy that needs that.
SILENT = [
    ("pcb_redirect_sync", "page_cache_sync_ra", "window"),
    ("pcb_redirect_async", "page_cache_async_ra", "window"),
    ("pcb_redirect_order", "page_cache_ra_order", "window"),
    ("pcb_redirect_read", "filemap_read", "every_access"),
    ("pcb_redirect_fault", "filemap_fault", "every_access"),
    ("pcb_on_added", "mm_filemap_add_to_page_cache", "window"),
    ("pcb_on_removed", "mm_filemap_delete_from_page_cache", "window"),
    ("pcb_direct_referenced", "folio_referenced", "keep_all"),
    ("pcb_watch_inode_end", "truncate_inode_pages_final", "pressure_drop"),
    ("pcb_watch_clear", "clear_inode", "pressure_drop"),
]


@pytest.mark.parametrize(("ours", "function", "name"), SILENT)
def test_a_silent_hook_is_not_attached(mount: Path, ours: str, function: str, name: str) -> None:
    """The error names the function; nothing of the policy stays, and others can be attached."""
    policy = find(test_policy(name))
    with silenced(ours), Device() as device:
        with pytest.raises(PolicyRejected, match=rf"{function} is hooked, but .* Engine agent"):
            loader.attach(policy)
        assert not list(device.policies())
        assert list(device.exits())[-1].kind == "hook"
    assert policy.name not in loader.pinned()
    with attached(test_policy(name)) as again:
        assert again.alive


def test_the_canary_leaves_no_trace(mount: Path) -> None:
    """No tag, no page that is counted, and no reference that keeps the module."""
    file = make_file(mount / "weights", 1009)
    with attached(test_policy("window"), file, window_pages=211) as policy:
        assert [tag.path for tag in policy.device.tags()] == [str(file)]
        assert policy.count("added_bytes") == policy.count("readahead_calls") == 0
        read_pages(file, 0, 1)
        assert policy.status.governed_pages == resident(file) == 211
    references = Path("/sys/module/pagecache_bpf/refcnt")
    wait_for(lambda: references.read_text().strip() == "0", "nothing to hold the module")
