# SPDX-License-Identifier: Apache-2.0
"""Render, check and pack the Helm chart with Helm's own code: `make chart`.

    tools/chart.py            write packaging/kubernetes/*.yaml, the same as plain manifests
    tools/chart.py --check    fail where they are stale, or where Helm finds a mistake
    tools/chart.py --pack DIR write the archive that `helm install` takes

Helm is used as a library (helm-python-sdk, in the extra `dist`): no helm need be installed.
The alerts and the dashboard lie in the chart only while it is packed; they have one place each.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PACKAGING = Path(__file__).resolve().parents[1] / "packaging"
CHART = PACKAGING / "helm" / "pagecache-bpf"
MANIFESTS = PACKAGING / "kubernetes"
FILES = (PACKAGING / "prometheus" / "alerts.yml", PACKAGING / "grafana" / "pagecache-bpf.json")
#: What others need comes before them in the plain manifests.
FIRST = ("ServiceAccount", "ConfigMap", "ClusterRole", "ClusterRoleBinding")
#: The namespace of the plain manifests.
NAMESPACE = "pagecache-bpf"
HEADER = "# Made from packaging/helm by tools/chart.py: do not edit.\n"
#: What the plain manifests are rendered with: a file each.
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "pagecache-bpf.yaml": {},
    # For the Prometheus operator and Grafana's sidecar.
    "monitoring.yaml": {
        "serviceMonitor": {"enabled": True},
        "alerts": {"enabled": True},
        "dashboard": {"enabled": True},
    },
    # Where replicas start: labels by the API, and the scheduler's extender with all that it does.
    "placement.yaml": {
        "modelPaths": ["/models"],
        "placement": {
            "labels": "api",
            "prewarm": True,
            "extender": {"enabled": True, "gates": True, "sweep": True},
        },
    },
}


@contextmanager
def complete_chart() -> Iterator[Path]:
    """Make a copy of the chart that has the alerts and the dashboard, too.

    Yields:
        The folder of the copy, which is deleted at the end of the block.
    """
    with tempfile.TemporaryDirectory(prefix="pagecache-bpf-chart.") as scratch:
        chart = Path(scratch) / CHART.name
        shutil.copytree(CHART, chart)
        (chart / "files").mkdir()
        for path in FILES:
            shutil.copyfile(path, chart / "files" / path.name)
        yield chart


def render(values: Mapping[str, Any]) -> dict[str, str]:
    """Render the chart as `helm template` does.

    Args:
        values: what overrides values.yaml.

    Returns:
        The text of each template that gives a document, by its file's name.

    Raises:
        helm_python.HelmError: the chart or the values are wrong.
    """
    import helm_python

    with complete_chart() as path, helm_python.Chart.load(str(path)) as chart:
        pages = chart.render(dict(values), name="pagecache-bpf", namespace=NAMESPACE)
    texts = {name.rpartition("/")[2]: text for name, text in pages.items()}
    return {name: text for name, text in sorted(texts.items()) if re.search(r"^kind:", text, re.M)}


def _rank(document: str) -> int:
    """Tell when a document comes, as `helm install` sorts them, which `kubectl apply` does not.

    Pods of a DaemonSet whose ServiceAccount comes after it are tried again a minute later.
    """
    kind = re.search(r"^kind: (\w+)", document, re.M)
    return FIRST.index(kind[1]) if kind and kind[1] in FIRST else len(FIRST)


def manifests() -> dict[str, str]:
    """Render the chart for those who do not use Helm.

    Returns:
        The plain manifests by file name; the second has only what the first has not.
    """
    made: dict[str, str] = {}
    seen: set[str] = set()
    for file, values in VARIANTS.items():
        documents = sorted((text.strip() + "\n" for text in render(values).values()), key=_rank)
        fresh = [document for document in documents if document not in seen]
        seen.update(fresh)
        made[file] = HEADER + "---\n" + "---\n".join(fresh)
    return made


def problems() -> list[str]:
    """Look for stale manifests, and for what `helm lint` calls a warning or an error.

    Returns:
        A sentence for each; empty: all is well.
    """
    import helm_python

    found = []
    for file, text in manifests().items():
        path = MANIFESTS / file
        if not path.is_file() or path.read_text() != text:
            found.append(f"{path} is stale: run `make chart`")
    with complete_chart() as path:
        linted = helm_python.lint(str(path))
    found += [note["error"] for note in linted["messages"] if note["severity"] > 1]
    return found


def pack(out: Path) -> Path:
    """Write the archive of the chart, as `helm package` does.

    Args:
        out: the folder to write it to.

    Returns:
        The archive.
    """
    import helm_python

    with complete_chart() as path, helm_python.Chart.load(str(path)) as chart:
        return Path(chart.save(str(out)))


def main(argv: Sequence[str] | None = None) -> int:
    """Write, check or pack, as the command line says.

    Args:
        argv: the command line, without the program's name; None: sys.argv's.

    Returns:
        The exit status: 1 if --check finds something stale.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="fail where something is stale")
    parser.add_argument("--pack", type=Path, metavar="DIR", help="write the archive to DIR")
    args = parser.parse_args(argv)
    if args.pack:
        print(pack(args.pack))
    elif args.check:
        found = problems()
        print("\n".join(found), file=sys.stderr)
        return 1 if found else 0
    else:
        MANIFESTS.mkdir(exist_ok=True)
        for file, text in manifests().items():
            (MANIFESTS / file).write_text(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
