# SPDX-License-Identifier: Apache-2.0
"""The extender over HTTP, and where it knows the nodes' scores from: it asks their exporters."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from pagecache_bpf.errors import PagecacheError, UsageError
from pagecache_bpf.placement.extender import prioritize
from pagecache_bpf.placement.load_score import NodeScores, from_json

#: The scheduler sends whole Node objects where nodeCacheCapable is not set.
MOST_BYTES = 64 << 20
_ANSWER = 8 << 20
_WORKERS = 32


class ScorePoller:
    """Keeps the last scores of each node, from the exporters at some addresses."""

    def __init__(
        self,
        addresses: Callable[[], Iterable[str]],
        *,
        interval: float = 10.0,
        stale: float = 60.0,
        seconds: float = 5.0,
        context: ssl.SSLContext | None = None,
    ) -> None:
        """Ask nothing yet; start() does.

        Args:
            addresses: gives the URLs of the exporters, without a path, at each round.
            interval: seconds from one round to the next.
            stale: older scores are taken for none; in seconds since the node looked.
            seconds: that a node has for its answer.
            context: for https; by default the system's authorities.
        """
        self._addresses, self._interval, self._stale = addresses, interval, stale
        self._seconds, self._context = seconds, context
        self._lock = threading.Lock()
        self._last: dict[str, tuple[float, NodeScores]] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Ask all nodes once, and then again and again in the background."""
        self.round()
        self._thread.start()

    def close(self) -> None:
        """Stop asking the nodes for their scores."""
        self._ended.set()

    def round(self) -> int:
        """Ask every node once.

        Returns:
            How many have answered.
        """
        try:
            addresses = list(dict.fromkeys(self._addresses()))
        except OSError:  # the name does not resolve now
            return 0
        with ThreadPoolExecutor(_WORKERS) as pool:
            return sum(pool.map(self._ask, addresses))

    def scores_of(self, node: str) -> NodeScores | None:
        """Return what a node said last.

        Args:
            node: the node's name.

        Returns:
            Its scores; None: it has said nothing, or too long ago.
        """
        with self._lock:
            last = self._last.get(node)
        if last is None:
            return None
        received, scores = last
        age = time.monotonic() - received + scores.age_ns / 1e9
        return scores if age <= self._stale else None

    def all(self) -> list[NodeScores]:
        """Return what every node said last.

        Returns:
            Scores that are not too old, in no certain order.
        """
        with self._lock:
            names = list(self._last)
        found = (self.scores_of(name) for name in names)
        return [scores for scores in found if scores is not None]

    def _ask(self, address: str) -> int:
        try:
            with urllib.request.urlopen(
                f"{address}/scores", timeout=self._seconds, context=self._context
            ) as answer:
                scores = from_json(json.loads(answer.read(_ANSWER)))
        except (OSError, ValueError, PagecacheError, http.client.HTTPException):
            return 0  # its last answer becomes stale
        with self._lock:
            self._last[scores.node] = (time.monotonic(), scores)
        return 1

    def _run(self) -> None:
        while not self._ended.wait(self._interval):
            self.round()


def of_service(name: str, port: int, scheme: str = "http") -> Callable[[], Iterable[str]]:
    """Return the exporters behind a headless Service: every address of its name.

    Args:
        name: like pagecache-bpf.pagecache-bpf.svc.
        port: of the exporters.
        scheme: http or https.

    Returns:
        A function that looks the addresses up anew at each call and returns their URLs, sorted.
    """

    def addresses() -> Iterable[str]:
        found = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
        hosts = {str(entry[4][0]) for entry in found}
        return [
            f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
            for host in sorted(hosts)
        ]

    return addresses


class ExtenderServer:
    """POST /prioritize, GET /healthz and GET /scores (of all nodes).  A context manager."""

    def __init__(
        self, host: str, port: int, poller: ScorePoller, context: ssl.SSLContext | None = None
    ) -> None:
        """Serve until close().

        Args:
            host: the address to listen on.
            port: 0 is any free one.
            poller: knows the nodes.
            context: with it, https is served.

        Raises:
            OSError: the address cannot be listened on.
        """
        self._server = _Server((host, port), _Handler)
        self._server.poller = poller
        if context is not None:
            self._server.socket = context.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def __enter__(self) -> ExtenderServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop serving and free the port."""
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    poller: ScorePoller


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 30  # of a connection that says nothing
    server: _Server

    def do_GET(self) -> None:
        if self.path == "/healthz":
            self._answer(200, {"ok": True})
        elif self.path == "/scores":
            self._answer(200, [scores.as_json() for scores in self.server.poller.all()])
        else:
            self._answer(404, {"error": "there are /healthz, /scores and POST /prioritize"})

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if self.path != "/prioritize":
            self._refuse(404, "there is only /prioritize")
        elif not (length.isascii() and length.isdigit()) or int(length) > MOST_BYTES:
            self._refuse(413, f"a body has a Content-Length of at most {MOST_BYTES}")
        else:
            try:
                args = json.loads(self.rfile.read(int(length)))
                self._answer(200, prioritize(args, self.server.poller.scores_of))
            except (ValueError, RecursionError, UsageError) as error:
                self._answer(400, {"error": str(error)})

    def _refuse(self, status: int, why: str) -> None:
        self.close_connection = True  # what follows on it is a body that nobody reads
        self._answer(status, {"error": why})

    def _answer(self, status: int, data: Any) -> None:
        body = json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: the scheduler asks for each pod."""
