# SPDX-License-Identifier: Apache-2.0
"""Build the documentation as one site: `python -m tools.docs_site` (`make docs-site`).

The site holds README.md, the pages of docs/, the documents of other folders, and a reference of
the Python package that mkdocstrings renders from the docstrings.  Nothing lists the pages: a file
that is added to docs/ or a module that is added to the package appears by itself.  Every warning
(a dead link, a missing anchor, a docstring that names a parameter which does not exist) fails the
build.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "pagecache_bpf"
CONFIG = ROOT / "mkdocs.yml"
#: Documents outside of docs/, and the names of their pages.
ELSEWHERE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
    "kmod/README.md": "kernel-module.md",
    "examples/README.md": "examples.md",
}
_LINK = re.compile(r"(!?\[[^\]]*\])\(([^)\s#]*)(#[^)\s]*)?\)")


def pages(root: Path) -> dict[Path, str]:
    """Return every document of the tree with the name of its page.

    Args:
        root: the project's root.

    Returns:
        Paths below `root`, each with the name of the page relative to the site's sources.
    """
    found = {Path(name): page for name, page in ELSEWHERE.items() if (root / name).exists()}
    for path in sorted((root / "docs").glob("**/*.md")):
        inside = path.relative_to(root / "docs")
        found[path.relative_to(root)] = str(inside)
    return found


def relink(text: str, source: Path, known: dict[Path, str], root: Path) -> str:
    """Make the links of a document lead to the pages of the site.

    Args:
        text: the Markdown of the document.
        source: its path below `root`, from which its links are relative.
        known: what pages() returned.
        root: the project's root.

    Returns:
        The text for the site.  A link to a file or folder of the tree that is no page, such as a
        source file, becomes the file's name: the site does not carry the sources.
    """
    here = Path(known[source]).parent

    def changed(match: re.Match[str]) -> str:
        label, target, anchor = match[1], match[2], match[3] or ""
        if "://" in target or target.startswith("mailto:") or not target:
            return match[0]
        path = Path(os.path.normpath(source.parent / target))
        if path in known:
            return f"{label}({os.path.relpath(known[path], here)}{anchor})"
        inside = root / path
        if not inside.exists():
            return match[0]  # what is dead stays to be found
        if label.startswith("!") and path.is_relative_to("docs"):
            # Pictures lie beside the pages, as docs/ has them.
            return f"{label}({os.path.relpath(path.relative_to('docs'), here)})"
        if label.startswith("!"):
            return match[0]
        return f"{label[1:-1]} (`{path}`)"

    return _LINK.sub(changed, text)


def modules(package: Path) -> Iterator[str]:
    """Find all public modules of a package without importing them.

    Args:
        package: the folder of the package.

    Yields:
        Their dotted names, a package before its modules.
    """
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        if not any(part.startswith("_") for part in parts) and not {"bpf", "lib"} & set(parts):
            yield ".".join(parts)


def public_names(init: Path) -> list[str]:
    """Return what `__all__` of a module lists, without importing the module.

    Args:
        init: the module's source file.

    Returns:
        The names in their order; empty: the module has no `__all__`.
    """
    for node in ast.parse(init.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and any(
            isinstance(target, ast.Name) and target.id == "__all__" for target in node.targets
        ):
            return [str(name) for name in ast.literal_eval(node.value)]
    return []


def write_reference(into: Path) -> None:
    """Write the pages of the reference: the public names first, then a page for each package.

    Args:
        into: the folder of the site's sources.
    """
    folder = into / "reference"
    folder.mkdir()
    names = [name for name in public_names(PACKAGE / "__init__.py") if not name.startswith("_")]
    lines = [
        "# Python API",
        "",
        "What `import pagecache_bpf` gives. All else is below, package by package, and may change.",
        "",
    ]
    lines += [f"::: pagecache_bpf.{name}" for name in names]
    (folder / "index.md").write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    by_package: dict[str, list[str]] = {}
    for name in modules(PACKAGE):
        parts = name.split(".")
        if len(parts) > 1:
            by_package.setdefault(parts[1], []).append(name)
    for package, inside in sorted(by_package.items()):
        text = [f"# pagecache_bpf.{package}", *(f"::: {name}" for name in inside)]
        (folder / f"{package}.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")


def gather(into: Path) -> int:
    """Put everything that the site is built from into one folder.

    Args:
        into: the folder; what it held is deleted.

    Returns:
        The number of pages, those of the reference included.
    """
    shutil.rmtree(into, ignore_errors=True)
    into.mkdir(parents=True)
    known = pages(ROOT)
    for source, page in known.items():
        target = into / page
        target.parent.mkdir(parents=True, exist_ok=True)
        text = (ROOT / source).read_text(encoding="utf-8")
        target.write_text(relink(text, source, known, ROOT), encoding="utf-8")
    for suffix in ("png", "svg", "css"):
        for path in (ROOT / "docs").rglob(f"*.{suffix}"):
            target = into / path.relative_to(ROOT / "docs")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    write_reference(into)
    return sum(1 for _ in into.rglob("*.md"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Gather the pages and run mkdocs over them.

    Args:
        arguments: the command line, without the program's name; sys.argv's by default.

    Returns:
        The exit status of mkdocs: not 0 for any warning.
    """
    parser = argparse.ArgumentParser(prog="python -m tools.docs_site", description=__doc__)
    parser.add_argument("--sources", type=Path, default=ROOT / "build" / "site-sources")
    parser.add_argument("--site", type=Path, default=ROOT / "build" / "site")
    options = parser.parse_args(arguments)
    count = gather(options.sources)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    command += ["--config-file", str(CONFIG), "--site-dir", str(options.site)]
    # Not --quiet: mkdocs then counts no warnings either.
    done = subprocess.run(
        command,
        env={**os.environ, "SITE_SOURCES": str(options.sources), "NO_MKDOCS_2_WARNING": "1"},
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    for line in done.stderr.splitlines():
        if not line.startswith("INFO"):
            print(line, file=sys.stderr)
    if done.returncode == 0:
        print(f"{count} pages: open {options.site / 'index.html'}")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
