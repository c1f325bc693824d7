# SPDX-License-Identifier: Apache-2.0
"""Serves the metrics to Prometheus, with the client library's own server.

A scrape asks the engines there and then; nothing is kept between scrapes but the counters'
own state in the kernel and in the agent.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from pagecache_bpf.errors import PagecacheError, PrivilegeError, UnsupportedError, UsageError
from pagecache_bpf.metrics import declarations
from pagecache_bpf.metrics.collect import StatsSnapshot, take
from pagecache_bpf.units import printable

if TYPE_CHECKING:
    from prometheus_client.core import Metric as Family

    from pagecache_bpf.placement.load_score import NodeScores

PORT = 9743
#: Served at a time; others are hung up on.  And how long one may say nothing.
CONNECTIONS = 16
SILENT_SECONDS = 10.0
_DOCS = "docs/troubleshooting.md"


@dataclass(frozen=True)
class Address:
    """Where to listen; port 0 is any free one."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True)
class Tls:
    """Files in PEM: the server's certificate and key, and the authority that signs clients'.

    With clients, only those with a certificate of that authority are served.
    """

    certificate: Path
    key: Path
    clients: Path | None = None


def parse_address(text: str) -> Address:
    """Read an address to listen at.

    Args:
        text: HOST:PORT, [IPV6]:PORT or HOST.

    Returns:
        The address, with the default port if none is given.

    Raises:
        UsageError: the text is no address.
    """
    host, _, port = text.rpartition(":") if not text.endswith("]") else (text, "", "")
    if not host and not text.startswith(":"):
        host, port = text, ""
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise _bad(text, "an IPv6 address stands in brackets")
    if not host:
        raise _bad(text, "there is no host; all addresses are 0.0.0.0")
    if port and not (port.isascii() and port.isdigit() and int(port) < 1 << 16):
        raise _bad(text, f"{port!r} is no port")
    return Address(host, int(port) if port else PORT)


def _bad(text: str, why: str) -> UsageError:
    return UsageError(
        f"{text!r} is not an address",
        why,
        f"Write it like 127.0.0.1:{PORT} or [::1]:{PORT}",
        f"{_DOCS}#is-not-an-address",
    )


def is_loopback(address: Address) -> bool:
    """Tell whether only this machine reaches an address.

    Args:
        address: what parse_address() returned.

    Returns:
        True for the addresses of the loopback interface.

    Raises:
        UsageError: the host is a name without an address.
    """
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise _bad(str(address), f"{address.host}: {why}") from error
    return all(ipaddress.ip_address(entry[4][0]).is_loopback for entry in found)


def take_all() -> StatsSnapshot:
    """Take a snapshot of all counters, with what is cached of each part of a model.

    Returns:
        The snapshot; the exporter turns it into the answer to one scrape.

    Raises:
        PagecacheError: as collect.take().
    """
    return take(declarations.PARTS)


class Collector:
    """What the client library asks at each scrape.

    Args:
        warn: told once when the engines cannot be read, and again after they could.
        source: takes a snapshot of the counters.
        scores: gives those of this node's models; None: /metrics has no scores.
    """

    def __init__(
        self,
        warn: Callable[[str], None] = lambda text: None,
        source: Callable[[], StatsSnapshot] = take_all,
        *,
        scores: Callable[[], NodeScores] | None = None,
    ) -> None:
        self._warn, self._source, self._scores = warn, source, scores
        self._lock = threading.Lock()  # one question at a time, however many scrape
        self._failing = False

    def collect(self) -> Iterator[Family]:
        """Yield every family of metrics, those without a sample too: names and texts always stand.

        Yields:
            Objects of the client library.
        """
        snapshot: StatsSnapshot | None = None
        with self._lock:
            try:
                snapshot = self._source()
                if self._scores is not None:
                    snapshot = replace(snapshot, scores=self._scores())
                self._failing = False
            except (PagecacheError, OSError) as error:
                if not self._failing:
                    self._warn(f"nothing to export: {error}")
                self._failing = True
        yield from families(snapshot)


def families(snapshot: StatsSnapshot | None) -> Iterator[Family]:
    """Yield a snapshot as families of metrics.

    Args:
        snapshot: what the engines counted, None if they could not be read.

    Yields:
        Objects of the client library.
    """
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    for metric in declarations.METRICS:
        made: Any
        if metric.kind == "counter":
            made = CounterMetricFamily(metric.name, metric.help, labels=metric.labels)
        else:
            made = GaugeMetricFamily(metric.name, metric.help, labels=metric.labels)
        for labels, value in metric.read(snapshot):
            made.add_metric([printable(str(label)) for label in labels], value)
        yield made


class Exporter:
    """The running server.  A context manager: leaving it stops the server.

    Scoring reads the headers of models, so a scrape does not do it unless it was asked to: it would
    be a reader, and leave pages behind.

    Args:
        address: host and port to listen on.
        tls: certificates; None: plain HTTP.
        allow_remote: listen on an address that other machines reach, also without TLS.
        warn: called with a sentence when the engines cannot be read.
        scores: of this node's models; with it, /scores and /readyz are served beside /metrics, to
            the same readers.
        score_metrics: whether /metrics has them, too.

    Raises:
        UnsupportedError: there is no prometheus_client.
        UsageError: the address can be reached from elsewhere, or a file of TLS is wrong.
        PrivilegeError: the port is below 1024.
        PagecacheError: the port is taken.
    """

    def __init__(
        self,
        address: Address,
        *,
        tls: Tls | None = None,
        allow_remote: bool = False,
        warn: Callable[[str], None] = lambda text: None,
        scores: Callable[[], NodeScores] | None = None,
        score_metrics: bool = False,
    ) -> None:
        if not is_loopback(address) and not (tls or allow_remote):
            raise UsageError(
                f"{address} can be reached from other machines",
                "what models are loaded here would be told to whoever asks",
                "Give --tls-cert and --tls-key, or --allow-remote if the network is trusted",
                f"{_DOCS}#can-be-reached-from-other-machines",
            )
        self._server = _start(
            address, tls, Collector(warn, scores=scores if score_metrics else None)
        )
        if scores is not None:
            from pagecache_bpf.placement.score_pages import beside

            self._server.set_app(beside(self._server.get_app(), scores))
        self.address = Address(address.host, self._server.server_port)
        self.url = f"{'https' if tls else 'http'}://{self.address}/metrics"

    def __enter__(self) -> Exporter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop serving and free the port."""
        self._server.shutdown()
        self._server.server_close()


def _start(address: Address, tls: Tls | None, collector: Collector) -> Any:
    try:
        from prometheus_client import CollectorRegistry, start_http_server
    except ImportError as error:
        raise UnsupportedError(
            "prometheus_client is not installed",
            str(error),
            "Run `pip install 'pagecache-bpf[export]'`",
            f"{_DOCS}#prometheus_client-is-not-installed",
        ) from error
    registry = CollectorRegistry()
    registry.register(collector)
    files: dict[str, Any] = {}
    if tls:
        check_files(tls)
        files = {
            "certfile": str(tls.certificate),
            "keyfile": str(tls.key),
            "client_cafile": str(tls.clients) if tls.clients else None,
            "client_auth_required": tls.clients is not None,
        }
    try:
        server, _ = start_http_server(address.port, address.host, registry, **files)
    except ssl.SSLError as error:
        raise UsageError(
            "the certificates cannot be used", error.reason or str(error), *_PEM
        ) from error
    except OSError as error:
        raise listen_error(address, error) from error
    if tls:
        # Otherwise the handshake is done where connections are accepted, and a client that
        # connects and says nothing would keep all others out.
        server.socket.do_handshake_on_connect = False  # type: ignore[attr-defined]
    _bound(server)
    return server


def _bound(server: Any) -> None:
    """Serve so many connections at a time, each in a thread, and none that says nothing for long.

    The client library has no bound of its own, and any local user can connect.
    """
    serve, finish = server.process_request, server.process_request_thread
    free = threading.BoundedSemaphore(CONNECTIONS)

    def process_request(request: Any, client: Any) -> None:
        if not free.acquire(blocking=False):
            server.shutdown_request(request)
            return
        request.settimeout(SILENT_SECONDS)
        try:
            serve(request, client)
        except BaseException:  # no thread can be started
            free.release()
            raise

    def process_request_thread(request: Any, client: Any) -> None:
        try:
            finish(request, client)
        finally:
            free.release()

    server.process_request, server.process_request_thread = process_request, process_request_thread


_PEM = (
    "Give files in PEM: a certificate, its own key without a password, and the authority that "
    "signed the clients' certificates",
    f"{_DOCS}#the-certificates-cannot-be-used",
)


def check_files(tls: Tls) -> None:
    """Load the certificates once before the port is taken, so that a mistake is told at the start.

    Args:
        tls: paths of the certificate, the key and, if clients need one, their authority.

    Raises:
        UsageError: one of them cannot be read, is no PEM, or does not fit the others.
    """
    for path in filter(None, (tls.certificate, tls.key, tls.clients)):
        try:
            path.open("rb").close()
        except OSError as error:
            why = f"{path}: {error.strerror}"
            raise UsageError("the certificates cannot be used", why, *_PEM) from error
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    names = f"{tls.certificate} and {tls.key}"
    try:
        # An empty password, so that nobody is asked for one.
        context.load_cert_chain(tls.certificate, tls.key, password="")
        if tls.clients:
            names = str(tls.clients)
            context.load_verify_locations(tls.clients)
    except (ssl.SSLError, ValueError, OSError) as error:
        why = f"{names}: {getattr(error, 'reason', None) or error}"
        raise UsageError("the certificates cannot be used", why, *_PEM) from error


def listen_error(address: Address, error: OSError) -> PagecacheError:
    """Return the error for an address that cannot be listened on.

    Args:
        address: host and port that were asked for.
        error: what bind() or listen() raised.

    Returns:
        The error, to raise: its class and its advice depend on what the system said.
    """
    what = f"cannot listen on {address}"
    docs = f"{_DOCS}#cannot-listen-on"
    if error.errno == errno.EADDRINUSE:
        fix = f"Stop it (`ss -ltnp 'sport = :{address.port}'` shows it), or give another port"
        return PagecacheError(what, "another process listens there", fix, docs)
    if error.errno in (errno.EACCES, errno.EPERM):
        why = "ports below 1024 need CAP_NET_BIND_SERVICE"
        return PrivilegeError(what, why, "Give another port", docs)
    if error.errno == errno.EADDRNOTAVAIL:
        why = "no interface of this machine has that address"
        return UsageError(what, why, "`ip address` lists those that it has", docs)
    return PagecacheError(what, os.strerror(error.errno) if error.errno else str(error), "", docs)
