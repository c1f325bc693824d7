# SPDX-License-Identifier: Apache-2.0
"""Helm's own install, upgrade, rollback and uninstall, of the chart's archive in build/dist.

Helm is used as a library, as tools/chart.py does, in the environment of `make dist`.
"""

from __future__ import annotations

import itertools
import json
import re
import shlex
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

from tests.cluster.private import STATE
from tests.unit.command import ROOT
from tools import dist

#: What `helm` waits for is asked of the API server by its own code.
_SECONDS = 180
_CODE = """
import json, sys
import helm_python
given = json.load(sys.stdin)
with helm_python.Config(kubeconfig_path=given["kubeconfig"], namespace=given["namespace"]) as helm:
    words = given["words"]
    if given["sets"]:
        words["values"] = helm_python.parse_set_string(",".join(given["sets"]))
    print(json.dumps(getattr(helm, given["action"])(**words)))
"""


def helm(action: str, namespace: str, sets: tuple[str, ...] = (), **words: Any) -> Any:
    """Run an action of Helm; an AssertionError says what Helm said.

    Args:
        action: install, upgrade, rollback, uninstall or history.
        namespace: of the release.
        sets: what `--set` is given.
        words: the other arguments of that action in helm_python.Config.
    """
    given = {"kubeconfig": str(STATE / "admin.conf"), "namespace": namespace, "action": action}
    done = subprocess.run(
        [str(dist.VENV / "bin" / "python"), "-c", _CODE],
        input=json.dumps({**given, "sets": sets, "words": words}),
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=2 * _SECONDS,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def typed(line: str) -> Any:
    """Do what a line of a document that begins with `helm` says, and wait until it is there.

    `upgrade --install` installs where there is no such release, as Helm's command does.
    """
    words = shlex.split(line)
    assert words[0] == "helm", line
    name, archive = re.findall(r"(?<= )pagecache-bpf(?= )|\S+\.tgz", " ".join(words[1:]))[:2]
    pairs = list(itertools.pairwise(words))
    namespace = next(value for option, value in pairs if option in ("-n", "--namespace"))
    sets = tuple(value for option, value in pairs if option == "--set")
    more = {
        "chart": str(_for_this_release(archive)),
        "name": name,
        "wait": "watcher",
        "timeout": _SECONDS,
    }
    if words[1] == "install" or not _installed(name, namespace):
        create = "--create-namespace" in words
        return helm("install", namespace, sets, create_namespace=create, **more)
    return helm("upgrade", namespace, sets, **more)


def _for_this_release(archive: str) -> Path:
    """Unpack a chart of build/dist, whose kubeVersion this old Kubernetes is let through."""
    place = STATE / "chart"
    shutil.rmtree(place, ignore_errors=True)
    with tarfile.open(dist.OUT / archive) as packed:
        packed.extractall(place, filter="data")
    (described,) = place.glob("*/Chart.yaml")
    text, changed = re.subn(
        r"^kubeVersion: .*$", 'kubeVersion: ">=1.20.0-0"', described.read_text(), flags=re.M
    )
    assert changed == 1
    described.write_text(text)
    return described.parent


def _installed(name: str, namespace: str) -> bool:
    """Tell whether there is a release of a name."""
    return name in {release["name"] for release in helm("list", namespace)}
