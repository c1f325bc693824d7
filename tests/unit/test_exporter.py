# SPDX-License-Identifier: Apache-2.0
"""The exporter: addresses, TLS, what is served when the engines come and go."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pagecache_bpf.errors import PagecacheError, PrivilegeError, UnsupportedError, UsageError
from pagecache_bpf.metrics import exporter
from pagecache_bpf.metrics.collect import StatsSnapshot
from pagecache_bpf.metrics.declarations import METRICS
from pagecache_bpf.metrics.exporter import Address, Collector, Exporter, Tls, parse_address
from tests.unit.command import ROOT, environment, run
from tests.unit.snapshots import LLAMA, snapshot
from tests.unit.test_stats import root_only
from tests.vm.kernel import wait_for

pytest.importorskip("prometheus_client", reason="prometheus_client is not installed")

ANY = Address("127.0.0.1", 0)
LOOPBACK_ONLY = Address("127.0.0.1", 9743)


@pytest.fixture(autouse=True)
def _known_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Collector.__init__, "__defaults__", (lambda text: None, snapshot))


def scrape(url: str, context: ssl.SSLContext | None = None) -> str:
    with urllib.request.urlopen(url, timeout=10, context=context) as answer:
        return str(answer.read().decode())


def test_s16_threads_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any local user can connect: so many are served, and the others are hung up on at once."""
    monkeypatch.setattr(exporter, "CONNECTIONS", 3)
    monkeypatch.setattr(exporter, "SILENT_SECONDS", 60.0)
    before = threading.active_count()
    with Exporter(ANY) as running:
        place = (running.address.host, running.address.port)
        silent = [socket.create_connection(place, 20) for _ in range(3)]
        wait_for(lambda: threading.active_count() == before + 4, "the places to be taken", 60)
        with socket.create_connection(place, 20) as late:
            assert late.recv(1) == b""
        for connection in silent:
            connection.close()
        wait_for(lambda: threading.active_count() == before + 1, "the places to be free", 60)
        assert "pagecache" in scrape(running.url)


def test_s16_who_says_nothing_is_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter, "SILENT_SECONDS", 0.1)
    with (
        Exporter(ANY) as running,
        socket.create_connection((running.address.host, running.address.port), 20) as silent,
    ):
        assert silent.recv(1) == b""


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:9743", Address("127.0.0.1", 9743)),
        ("127.0.0.1", Address("127.0.0.1", 9743)),
        ("localhost:0", Address("localhost", 0)),
        ("[::1]:80", Address("::1", 80)),
        ("[::1]", Address("::1", 9743)),
        ("0.0.0.0:65535", Address("0.0.0.0", 65535)),
    ],
)
def test_addresses(text: str, address: Address) -> None:
    assert parse_address(text) == address
    assert parse_address(str(address)) == address


@pytest.mark.parametrize(
    "text", ["", ":9743", "host:", "a:65536", "a:-1", "a:x", "::1:80", "[::1", "a:٣", "[]:1"]
)
def test_bad_addresses(text: str) -> None:
    if text == "host:":
        assert parse_address(text) == Address("host", 9743)
        return
    with pytest.raises(UsageError, match="is not an address"):
        parse_address(text)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "localhost", "::1"])
def test_loopback(host: str) -> None:
    assert exporter.is_loopback(Address(host, 1))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
def test_other_machines_are_kept_out_unless_asked_for(host: str) -> None:
    with pytest.raises(UsageError, match="can be reached from other machines"):
        Exporter(Address(host, 0))


def test_remote_readers_may_be_allowed() -> None:
    with Exporter(Address("0.0.0.0", 0), allow_remote=True) as running:
        assert LLAMA in scrape(f"http://127.0.0.1:{running.address.port}/metrics")


def test_a_name_that_leads_nowhere() -> None:
    with pytest.raises(UsageError, match="is not an address"):
        Exporter(Address("name.invalid", 0))


def test_what_is_served() -> None:
    with Exporter(ANY) as running:
        text = scrape(running.url)
    for metric in METRICS:
        assert f"# TYPE {metric.name} {metric.kind}\n" in text
        assert f"# HELP {metric.name} {metric.help}\n" in text
    value = snapshot().models[0].counters["read_hit_bytes"]
    line = next(
        line
        for line in text.splitlines()
        if line.startswith("pagecache_accessed_bytes_total{")
        and all(part in line for part in (LLAMA, 'access="read"', 'result="hit"'))
    )
    assert float(line.rpartition(" ")[2]) == value


def test_the_port_is_free_afterwards() -> None:
    with Exporter(ANY) as running:
        address = running.address
    with Exporter(address) as again:
        assert again.address == address


def test_many_scrape_at_once() -> None:
    with Exporter(ANY) as running, ThreadPoolExecutor(8) as pool:
        texts = set(pool.map(scrape, [running.url] * 32))
    assert len(texts) == 1


def test_a_port_that_is_taken() -> None:
    with Exporter(ANY) as running, pytest.raises(PagecacheError) as caught:
        Exporter(running.address)
    assert caught.value.exit_code == 1
    assert "another process listens there" in caught.value.why


def test_an_address_of_another_machine() -> None:
    with pytest.raises(UsageError, match="no interface of this machine"):
        Exporter(Address("192.0.2.1", 0), allow_remote=True)


def test_a_port_that_needs_a_right(monkeypatch: pytest.MonkeyPatch) -> None:
    import prometheus_client

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(prometheus_client, "start_http_server", refuse)
    with pytest.raises(PrivilegeError, match="CAP_NET_BIND_SERVICE"):
        Exporter(Address("127.0.0.1", 80))


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(UnsupportedError, match="prometheus_client is not installed") as caught:
        Exporter(ANY)
    assert "pagecache-bpf[export]" in caught.value.fix


def test_engines_that_go_and_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[StatsSnapshot | None] = [snapshot(), None, None, snapshot(), None]
    warnings: list[str] = []

    def source() -> StatsSnapshot:
        answer = answers.pop(0)
        if answer is None:
            raise PagecacheError("the agent does not answer", "it hung up")
        return answer

    monkeypatch.setattr(Collector.__init__, "__defaults__", (None, source))
    with Exporter(ANY, warn=warnings.append) as running:
        texts = [scrape(running.url) for _ in range(5)]
    assert ["pagecache_up 1.0" in text for text in texts] == [True, False, False, True, False]
    assert ["pagecache_up 0.0" in text for text in texts] == [False, True, True, False, True]
    assert [LLAMA in text for text in texts] == [True, False, False, True, False]
    assert all("pagecache_build_info{" in text for text in texts)
    assert len(warnings) == 2 and "it hung up" in warnings[0]


# --- TLS ---


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates of an authority, of a server and a client that it signed, of a stranger."""
    if not shutil.which("openssl"):
        pytest.skip("openssl is not installed")
    made = tmp_path_factory.mktemp("keys")

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=made, check=True, capture_output=True)

    new = ("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-days", "2")
    for authority in ("ca", "stranger"):
        openssl(
            *new, "-nodes", "-subj", f"/CN={authority}",
            "-keyout", f"{authority}.key", "-out", f"{authority}.crt",
        )  # fmt: skip
    for name in ("server", "client"):
        openssl(
            *new, "-nodes", "-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1",
            "-CA", "ca.crt", "-CAkey", "ca.key", "-keyout", f"{name}.key", "-out", f"{name}.crt",
        )  # fmt: skip
    openssl("ec", "-in", "server.key", "-aes256", "-passout", "pass:x", "-out", "locked.key")
    return made


@pytest.fixture
def served(keys: Path) -> Iterator[Exporter]:
    """An exporter that wants client certificates."""
    tls = Tls(keys / "server.crt", keys / "server.key", keys / "ca.crt")
    with Exporter(ANY, tls=tls) as running:
        yield running


def client(keys: Path, name: str | None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(keys / "ca.crt"))
    if name:
        context.load_cert_chain(keys / f"{name}.crt", keys / f"{name}.key")
    return context


def test_tls_with_a_clients_certificate(keys: Path, served: Exporter) -> None:
    assert served.url.startswith("https://")
    assert LLAMA in scrape(served.url, client(keys, "client"))


@pytest.mark.parametrize("name", [None, "stranger"])
def test_tls_without_a_good_certificate(keys: Path, served: Exporter, name: str | None) -> None:
    with pytest.raises((urllib.error.URLError, OSError)):
        scrape(served.url, client(keys, name))
    with pytest.raises((urllib.error.URLError, OSError)):
        scrape(served.url.replace("https", "http"))
    assert LLAMA in scrape(served.url, client(keys, "client"))


def test_tls_for_everybody(keys: Path) -> None:
    tls = Tls(keys / "server.crt", keys / "server.key")
    with Exporter(Address("0.0.0.0", 0), tls=tls) as running:
        url = f"https://127.0.0.1:{running.address.port}/metrics"
        assert LLAMA in scrape(url, client(keys, None))


def test_a_client_that_says_nothing_keeps_nobody_out(keys: Path, served: Exporter) -> None:
    with socket.create_connection((served.address.host, served.address.port)):
        assert LLAMA in scrape(served.url, client(keys, "client"))


@pytest.mark.parametrize(
    ("certificate", "key"),
    [
        ("server.crt", "client.key"),
        ("server.crt", "locked.key"),
        ("server.key", "server.key"),
        ("missing.crt", "server.key"),
    ],
)
def test_bad_certificates(keys: Path, certificate: str, key: str) -> None:
    with pytest.raises(UsageError, match="the certificates cannot be used"):
        Exporter(ANY, tls=Tls(keys / certificate, keys / key))


def test_a_bad_authority(keys: Path) -> None:
    with pytest.raises(UsageError, match="the certificates cannot be used"):
        Exporter(ANY, tls=Tls(keys / "server.crt", keys / "server.key", keys / "server.key"))


def test_half_of_what_tls_needs() -> None:
    for words in (["--tls-cert", "a"], ["--tls-key", "a"], ["--tls-client-ca", "a"]):
        failed = run("export", *words)
        assert failed.code == 2
        assert "TLS needs both a certificate and its key" in failed.err


# --- the command ---


@root_only
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_serves_until_it_is_told_to_stop(number: int) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "tests.unit.snapshots", "export", "--listen", "127.0.0.1:0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        cwd=ROOT,
    ) as process:
        assert process.stdout and process.stderr
        url = process.stdout.readline().split()[1]
        assert LLAMA in scrape(url)
        os.kill(process.pid, number)
        assert process.wait(30) == 0
        assert process.stderr.read() == ""
