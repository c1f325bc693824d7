# SPDX-License-Identifier: Apache-2.0
"""`make mutate` tries each module with the tests that import it, in a copy of the tree."""

from __future__ import annotations

from pathlib import Path

from tools import mutate

ROOT = Path(__file__).resolve().parents[2]


def test_the_tests_of_a_module_are_those_that_import_it() -> None:
    module = Path("pagecache_bpf/controller/admission.py")
    assert "tests/unit/test_controller_admission.py" in mutate.tests_of(module, ROOT)
    assert mutate.tests_of(Path("pagecache_bpf/controller/no_such_module.py"), ROOT) == []


def test_a_module_that_no_test_imports_is_tried_through_those_that_import_it() -> None:
    module = Path("pagecache_bpf/weights/siblings.py")
    assert "tests/unit/test_layouts.py" in mutate.tests_of(module, ROOT)


def test_the_copy_has_what_git_tracks(tmp_path: Path) -> None:
    mutate.copy_tree(tmp_path / "tree")
    assert (tmp_path / "tree/pagecache_bpf/__init__.py").is_file()
    assert (tmp_path / "tree/tests/repo" / Path(__file__).name).is_file()
    assert not (tmp_path / "tree/build/venv").exists()
