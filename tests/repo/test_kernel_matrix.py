# SPDX-License-Identifier: Apache-2.0
"""The tables of docs/kernels.md: what is read from a report of pytest's, and how it is shown."""

from __future__ import annotations

from pathlib import Path

from tools import kernel_matrix

REPORT = """<testsuites><testsuite>
<testcase classname="tests.vm.test_kmod_tags" name="test_a"/>
<testcase classname="tests.vm.test_kmod_tags" name="test_b"><error message="x"/></testcase>
<testcase classname="tests.vm.test_kmod_filesystems" name="test_hooks[xfs-evict]"/>
<testcase classname="tests.vm.test_kmod_filesystems" name="test_hooks[xfs-access]">
<failure message="x"/></testcase>
<testcase classname="tests.vm.test_kmod_filesystems" name="test_hooks[btrfs-evict]">
<skipped message="this kernel has no btrfs"/></testcase>
</testsuite></testsuites>"""


def test_a_report_becomes_rows_of_both_tables(tmp_path: Path) -> None:
    report = tmp_path / "7.3.xml"
    report.write_text(REPORT)
    results = kernel_matrix.read_report(report)
    assert results == {
        "kmod_filesystems": {"failed": 1, "passed": 1, "skipped": 1},
        "kmod_tags": {"failed": 1, "passed": 1},
    }
    cells = kernel_matrix.read_cells(report)
    tables = kernel_matrix.render({"7.3": results}), kernel_matrix.render_cells({"7.3": cells})
    assert "| `kmod_tags` | 1 failed, 1 passed |" in tables[0]
    assert tables[1].splitlines()[0] == "| kernel | file system | evict | access |"
    assert "| 7.3 | xfs | passed | failed |" in tables[1]
    assert "| 7.3 | btrfs | this kernel has no btrfs | not run |" in tables[1]
    page = "before\n" + "".join(
        f"<!-- {name} -->\nold\n<!-- end of {name} -->\nafter\n" for name in kernel_matrix.TABLES
    )
    written = kernel_matrix.page_with(tables, page)
    assert "old" not in written and written.count("after") == 2
    assert kernel_matrix.page_with(tables, written) == written


def test_a_report_of_some_files_leaves_the_others_as_they_were(tmp_path: Path) -> None:
    report = tmp_path / "7.3.xml"
    report.write_text(REPORT)
    results: kernel_matrix.Results = {
        "7.3": {"kmod_evict": {"passed": 36}, "kmod_tags": {"passed": 8}}
    }
    cells: kernel_matrix.Cells = {"7.3": {"ext4": {"evict": "passed"}, "xfs": {"evict": "failed"}}}
    kernel_matrix.take(report, results, cells)
    assert results["7.3"]["kmod_evict"] == {"passed": 36}
    assert results["7.3"]["kmod_tags"] == {"failed": 1, "passed": 1}
    assert list(results["7.3"]) == ["kmod_evict", "kmod_filesystems", "kmod_tags"]
    assert cells["7.3"]["ext4"] == {"evict": "passed"}
    assert cells["7.3"]["xfs"] == {"evict": "passed", "access": "failed"}
