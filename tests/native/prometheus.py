# SPDX-License-Identifier: Apache-2.0
"""A real Prometheus on a free port of this machine, with its data in a temporary directory."""

from __future__ import annotations

import json
import math
import socket
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.vm.kernel import wait_for

ROOT = Path(__file__).resolve().parents[2]
BIN = ROOT / "build" / "deps" / "prometheus" / "bin"
ALERTS = ROOT / "packaging" / "prometheus" / "alerts.yml"
CONFIG = """\
global:
  scrape_interval: 1s
  scrape_timeout: 1s
  evaluation_interval: 1s
rule_files: [{alerts}]
scrape_configs:
  - job_name: pagecache-bpf
    static_configs: [{{targets: ["{target}"]}}]
"""


class Prometheus:
    """Scrapes one target.  A context manager: leaving it ends the server."""

    def __init__(self, directory: Path, target: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{probe.getsockname()[1]}"
        config = directory / "prometheus.yml"
        config.write_text(CONFIG.format(alerts=ALERTS, target=target))
        self._log = directory / "prometheus.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [
                    BIN / "prometheus",
                    f"--config.file={config}",
                    f"--storage.tsdb.path={directory / 'data'}",
                    f"--web.listen-address={self.address}",
                ],
                stdout=log,
                stderr=log,
            )

    def __enter__(self) -> Prometheus:
        wait_for(self._is_ready, "Prometheus to be ready", 60)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _is_ready(self) -> bool:
        assert self._process.poll() is None, self._log.read_text()
        try:
            with urllib.request.urlopen(f"http://{self.address}/-/ready", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def get(self, path: str, **parameters: str) -> Any:
        """What the HTTP API answers."""
        query = urllib.parse.urlencode(parameters)
        url = f"http://{self.address}/api/v1/{path}?{query}"
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                reply = json.load(answer)
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{parameters}: {error.read().decode()}") from error
        assert reply["status"] == "success", reply
        assert not reply.get("warnings"), reply
        return reply["data"]

    def query(self, query: str) -> dict[tuple[tuple[str, str], ...], float]:
        """The values of an instant query, by their labels."""
        data = self.get("query", query=query)
        assert data["resultType"] == "vector"
        return {
            tuple(sorted(series["metric"].items())): float(series["value"][1])
            for series in data["result"]
        }

    def value(self, query: str) -> float:
        """The one value of a query; NaN if there is none yet."""
        values = list(self.query(query).values())
        assert len(values) <= 1, values
        return values[0] if values else math.nan
