# SPDX-License-Identifier: Apache-2.0
"""The documentation is one site: all pages are there, every link leads somewhere, nothing warns."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import pagecache_bpf
from tools import docs_site

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs-site` does."""
    folder = tmp_path_factory.mktemp("site")
    arguments = ["--sources", str(folder / "sources"), "--site", str(folder / "site")]
    assert docs_site.main(arguments) == 0
    return folder / "site"


def test_every_document_is_a_page(site: Path) -> None:
    documents = {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert documents and documents <= {path.stem for path in site.glob("*.html")}


def test_the_reference_has_every_public_name(site: Path) -> None:
    found = re.findall(r'id="pagecache_bpf\.(\w+)"', (site / "reference/index.html").read_text())
    assert set(found) == {name for name in pagecache_bpf.__all__ if not name.startswith("_")}


def test_the_reference_has_every_module(site: Path) -> None:
    text = "".join(path.read_text() for path in (site / "reference").glob("*.html"))
    names = set(docs_site.modules(ROOT / "pagecache_bpf")) - {"pagecache_bpf"}
    assert len(names) > 100
    assert {name for name in names if f'id="{name}"' not in text} == set()


def test_a_dead_link_fails_the_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "tree"
    (root / "docs").mkdir(parents=True)
    shutil.copytree(ROOT / "pagecache_bpf" / "topology", root / "pagecache_bpf" / "topology")
    (root / "pagecache_bpf" / "__init__.py").write_text(
        '"""A package."""\n__all__: list[str] = []\n'
    )
    (root / "README.md").write_text("# Here\n\n[a page](docs/page.md#a-title)\n")
    (root / "docs" / "page.md").write_text("# A page\n\n## A title\n\n[back](../README.md)\n")
    shutil.copy(ROOT / "mkdocs.yml", root)
    monkeypatch.setattr(docs_site, "ROOT", root)
    monkeypatch.setattr(docs_site, "PACKAGE", root / "pagecache_bpf")
    monkeypatch.setattr(docs_site, "CONFIG", root / "mkdocs.yml")
    arguments = ["--sources", str(root / "build/sources"), "--site", str(root / "build/site")]
    assert docs_site.main(arguments) == 0
    for broken in ("[gone](docs/gone.md)", "[no such title](docs/page.md#another-title)"):
        (root / "README.md").write_text(f"# Here\n\n{broken}\n")
        assert docs_site.main(arguments) != 0, broken


def test_links_to_sources_become_their_names() -> None:
    known = docs_site.pages(ROOT)
    text = "[Kbuild](../kmod/Kbuild), [the module](../kmod/README.md), [out](https://kernel.org/)"
    assert docs_site.relink(text, Path("docs/agent.md"), known, ROOT) == (
        "Kbuild (`kmod/Kbuild`), [the module](kernel-module.md), [out](https://kernel.org/)"
    )


def test_a_browser_shows_the_site(site: Path) -> None:
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("needs Chromium (apt install chromium)")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    done = subprocess.run(
        [*command, (site / "reference/index.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert 'id="pagecache_bpf.load"' in done.stdout
    assert "load(" in re.sub(r"<[^>]+>", "", done.stdout)
