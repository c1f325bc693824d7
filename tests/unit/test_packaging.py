# SPDX-License-Identifier: Apache-2.0
"""What is installed: the dependencies by role, and the service beside the package."""

from __future__ import annotations

import ast
import json
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.unit.command import ROOT, run

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

UNIT = ROOT / "packaging" / "systemd" / "pagecache-bpf.service"
needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed"
)


@needs_systemd
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    """Every line is known to it; only what is not installed here is put aside."""
    unit = tmp_path / UNIT.name
    text = re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", UNIT.read_text(), flags=re.M)
    unit.write_text(re.sub(r"^Documentation=.*$", "", text, flags=re.M))
    done = subprocess.run(
        ["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, timeout=60
    )
    told = [line for line in done.stderr.splitlines() if UNIT.name in line]
    # An older systemd does not know every system call by name, and goes on.
    assert [line for line in told if "system call" not in line] == []


@needs_systemd
def test_the_unit_gives_up_what_it_does_not_need() -> None:
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager", str(UNIT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    found = re.search(r"exposure level for \S+: ([0-9.]+)", done.stdout)
    if not found:
        pytest.skip(f"this systemd-analyze cannot rate a file: {done.stderr.strip()[-100:]}")
    assert float(found[1]) <= 5.0


def test_the_unit_starts_what_there_is() -> None:
    """Its command line parses; the signals and exit codes in it are those of `serve`."""
    text = UNIT.read_text()
    command = re.search(r"^ExecStart=\S+/pagecache-bpf (.+)$", text, re.M)
    assert command
    words = command[1].split()
    assert run(*words, "--help").code == 0
    assert "Type=notify" in text and "kill -HUP" in text
    # What a restart would not cure: usage and what the machine lacks.
    assert "RestartPreventExitStatus=2 3" in text


def declared() -> dict[str, set[str]]:
    """The distributions that pyproject.toml names, by extra; "" is the core."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {"": project["dependencies"], **project["optional-dependencies"]}
    return {
        extra: {canonicalize_name(Requirement(line).name) for line in lines}
        for extra, lines in extras.items()
    }


def imported() -> Iterator[tuple[Path, str]]:
    """Each import of a package that is neither ours nor Python's: (file, top-level name)."""
    for path in sorted((ROOT / "pagecache_bpf").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            for name in {name.partition(".")[0] for name in names}:
                if name not in sys.stdlib_module_names and name != "pagecache_bpf":
                    yield path, name


def test_the_core_needs_no_other_package() -> None:
    assert declared()[""] == set()


def test_what_is_imported_comes_with_a_role() -> None:
    """An import without an extra would fail for everyone but developers."""
    homes = {**packages_distributions(), "pynvml": ["nvidia-ml-py"], "tomllib": ["tomli"]}
    extras = declared()
    alone = ("all", "nvidia", "ray", "torch", "bcc", "perfetto")
    roles = {name for role in alone for name in extras[role]}
    for role in ("cli", "controller", "export", "templates"):
        roles |= extras[role]
    seen = set()
    for path, name in imported():
        if name == "vllm":  # the plug-in's host: it is there, or the plug-in is not called
            continue
        # Not installed here: then it has the same name, or the test would not know better.
        home = {canonicalize_name(found) for found in homes.get(name, [name])}
        assert home & roles, f"{path.relative_to(ROOT)} imports {name}, which no extra brings"
        seen |= home
    assert {"numpy", "pyelftools", "rich"} <= seen


WITHOUT = """
import sys

class Nothing:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in sys.stdlib_module_names and top != "pagecache_bpf":
            raise ModuleNotFoundError(f"No module named {top!r}", name=top)

sys.meta_path.insert(0, Nothing())
"""

LOAD = """
import pagecache_bpf

with pagecache_bpf.load(sys.argv[1]) as load:
    data = open(sys.argv[1], "rb").read()
print(len(data), load.report())
"""

COMMAND_LINE = """
from pagecache_bpf.cli.main import main

sys.exit(main(["policy", "list"]))
"""


def without_packages(program: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run Python code where nothing but the standard library and this package can be imported."""
    command = [sys.executable, "-c", WITHOUT + program, *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)


def test_a_load_needs_only_the_standard_library(tmp_path: Path) -> None:
    size = 1 << 20
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}})
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(size))
    done = without_packages(LOAD, str(file))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{file.stat().st_size} ")
    assert "unexpected" not in done.stdout


def test_a_package_that_is_missing_is_told_with_what_to_install() -> None:
    done = without_packages(COMMAND_LINE)
    assert done.returncode == 3
    assert "pagecache-bpf[all]" in done.stderr and "is not installed" in done.stderr
    assert "bug" not in done.stderr and "Traceback" not in done.stderr


def in_packages() -> dict[str, str]:
    """What setup.py copies into the package: patterns below the root, and folders."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    (copies,) = (
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "COPIES"
    )
    return dict(ast.literal_eval(copies))


def test_an_error_leads_to_a_document_that_is_installed(tmp_path: Path) -> None:
    """Wherever the package lies: --user, --target and a virtual environment differ."""
    package = tmp_path / "lib" / "pagecache_bpf"
    for path in (ROOT / "pagecache_bpf").rglob("*.py"):
        target = package / path.relative_to(ROOT / "pagecache_bpf")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    for pattern, folder in in_packages().items():
        for path in ROOT.glob(pattern) if folder == "docs" else ():
            (package / folder).mkdir(exist_ok=True)
            shutil.copyfile(path, package / folder / path.name)

    def run_there(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pagecache_bpf", *words]
        environment = {"PYTHONPATH": str(package.parent), "PATH": "/usr/bin:/bin"}
        return subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120
        )

    assert f"\n  {package}/docs\n" in run_there("--help").stdout
    done = run_there("--json", "residency", "/dev/null")
    assert done.returncode == 2, done.stderr
    page, _, section = json.loads(done.stderr)["error"]["docs"].partition("#")
    assert Path(page).is_relative_to(tmp_path) and section == "is-not-a-regular-file"
    assert "is not a regular file" in Path(page).read_text()


MANIFESTS = sorted((ROOT / "packaging" / "kubernetes").glob("*.yaml"))
_DURATION = {"type": "string", "pattern": "^([0-9]+(ms|[smhdwy]))+$"}
_TEXT = {"type": "string", "minLength": 1}
_TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}


def _fields(required: str, **properties: Any) -> dict[str, Any]:
    """A JSON schema of an object that has these fields and no other."""
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": 1}


#: Not part of Kubernetes itself: kubernetes-validate has no schema of them.  What we use of the
#: spec, as the Prometheus operator's definitions have it from 0.50 to 0.93: another field has to be
#: looked up there first.
FOREIGN = {
    "PrometheusRule": _fields(
        "groups",
        groups=_list(
            _fields(
                "name rules",
                name=_TEXT,
                rules=_list(
                    _fields(
                        "alert expr",
                        alert=_TEXT,
                        annotations=_TEXTS,
                        expr=_TEXT,
                        labels=_TEXTS,
                        **{"for": _DURATION},
                    )
                ),
            )
        ),
    ),
    "ServiceMonitor": _fields(
        "selector endpoints",
        selector=_fields("matchLabels", matchLabels=_TEXTS),
        endpoints=_list(
            _fields(
                "port",
                interval=_DURATION,
                port=_TEXT,
                relabelings=_list(
                    _fields("targetLabel", sourceLabels=_list(_TEXT), targetLabel=_TEXT)
                ),
            )
        ),
    ),
}


def documents() -> list[dict[str, Any]]:
    """All documents of the plain manifests."""
    return [
        document
        for path in MANIFESTS
        for document in yaml.safe_load_all(path.read_text())
        if document
    ]


def agent() -> dict[str, Any]:
    """The DaemonSet of the agent as it is without any option."""
    plain = yaml.safe_load_all((ROOT / "packaging/kubernetes/pagecache-bpf.yaml").read_text())
    (daemon,) = (document for document in plain if document["kind"] == "DaemonSet")
    return dict(daemon)


def test_the_manifests_are_what_kubernetes_takes() -> None:
    """Strictly: a field that the API does not have is a mistake."""
    kinds = set()
    for document in documents():
        kinds.add(document["kind"])
        if document["kind"] in FOREIGN:
            assert document["apiVersion"] == "monitoring.coreos.com/v1"
            jsonschema.validate(document["spec"], FOREIGN[document["kind"]])
        else:
            for version in ("1.30", kubernetes_validate.latest_version()):
                kubernetes_validate.validate(document, version, strict=True)
    assert kinds >= {
        "DaemonSet",
        "ServiceAccount",
        "ConfigMap",
        "Service",
        "NetworkPolicy",
        *FOREIGN,
    }


def test_a_misspelt_field_would_be_seen() -> None:
    daemons = [agent()]
    daemons[0]["spec"]["template"]["spec"]["hostPid"] = True
    with pytest.raises(kubernetes_validate.ValidationError, match="hostPid"):
        kubernetes_validate.validate(daemons[0], kubernetes_validate.latest_version(), strict=True)
    (monitor,) = (found for found in documents() if found["kind"] == "ServiceMonitor")
    monitor["spec"]["endpoints"][0]["intervall"] = "15s"
    with pytest.raises(jsonschema.ValidationError, match="intervall"):
        jsonschema.validate(monitor["spec"], FOREIGN["ServiceMonitor"])


def test_the_manifests_are_of_this_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    chart = yaml.safe_load((ROOT / "packaging/helm/pagecache-bpf/Chart.yaml").read_text())
    assert (chart["version"], chart["appVersion"]) == (version, version)
    images = set(re.findall(r"image: (\S+)", "".join(path.read_text() for path in MANIFESTS)))
    assert images == {f"localhost/pagecache-bpf:{version}"}
    compose = yaml.safe_load((ROOT / "packaging/container/compose.yaml").read_text())
    assert compose["services"]["agent"]["image"].endswith(f":-{version}}}")


def test_the_alerts_and_the_dashboard_of_the_cluster_are_ours() -> None:
    by_kind = {
        document["kind"]: document
        for document in documents()
        if document["kind"] in (*FOREIGN, "ConfigMap")
    }
    alerts = yaml.safe_load((ROOT / "packaging/prometheus/alerts.yml").read_text())
    assert by_kind["PrometheusRule"]["spec"] == alerts
    boards = [
        document for document in documents() if "pagecache-bpf.json" in document.get("data", {})
    ]
    (board,) = boards
    ours = json.loads((ROOT / "packaging/grafana/pagecache-bpf.json").read_text())
    assert json.loads(board["data"]["pagecache-bpf.json"]) == ours


def test_the_configuration_of_the_cluster_is_correct(tmp_path: Path) -> None:
    (text,) = (
        document["data"]["config.toml"]
        for document in documents()
        if "config.toml" in document.get("data", {})
    )
    file = tmp_path / "config.toml"
    file.write_text(text)
    done = run("config", "check", str(file))
    assert done.code == 0, done.err


def test_the_agents_arguments_parse() -> None:
    """Of the exporter the command line, of the agent what the entry point hands on."""
    daemon = agent()
    containers = {
        container["name"]: container
        for container in daemon["spec"]["template"]["spec"]["containers"]
    }
    assert run(*containers["exporter"]["args"], "--help").code == 0
    assert containers["agent"]["args"] == ["agent"]
    entry = ROOT / "packaging" / "container" / "entrypoint"
    assert "exec pagecache-bpf serve --no-color" in entry.read_text()


def test_the_arguments_of_placement_parse() -> None:
    seen = set()
    for document in documents():
        if document["kind"] in ("DaemonSet", "Deployment"):
            for container in document["spec"]["template"]["spec"]["containers"]:
                if container["args"] != ["agent"]:
                    assert run(*container["args"], "--help").code == 0
                    seen.add(container["args"][0])
    assert seen == {"export", "kube-node", "kube-extender"}


@pytest.mark.parametrize(("doctor", "stays"), [(3, True), (0, False)])
def test_a_node_that_lacks_the_kernel_says_why_and_stays(
    tmp_path: Path, doctor: int, stays: bool
) -> None:
    """The entry point with a command of ours that finds no engine, or finds one."""
    command = tmp_path / "pagecache-bpf"
    command.write_text(f'#!/bin/sh\necho "$@"\n[ "$1" = doctor ] && exit {doctor}\nexit 7\n')
    command.chmod(0o755)
    entry = ROOT / "packaging" / "container" / "entrypoint"
    with subprocess.Popen(
        [str(entry), "agent", "--persist"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
    ) as started:
        assert started.stdout
        lines = [started.stdout.readline(), started.stdout.readline()]
        assert lines[0] == "doctor --no-color\n"
        if stays:
            assert "models load as before" in lines[1]
            assert started.poll() is None
            started.terminate()
            assert started.wait(timeout=60) == 0
        else:
            assert lines[1] == "serve --no-color --persist\n"
            assert started.wait(timeout=60) == 7
