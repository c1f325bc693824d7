# SPDX-License-Identifier: Apache-2.0
"""pagecache-bpf export: serve the metrics to Prometheus."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pagecache_bpf.cli.output import TROUBLESHOOTING, Output
from pagecache_bpf.cli.parser import Group
from pagecache_bpf.cli.scoring import add_score_arguments, watch_of
from pagecache_bpf.errors import UsageError

if TYPE_CHECKING:
    from pagecache_bpf.metrics.exporter import Tls

GROUP = Group.OPERATE
HELP = "serve the metrics to Prometheus"
DESCRIPTION = """\
Serves the metrics (docs/metrics.md) over HTTP in the Prometheus format until Ctrl-C or SIGTERM.
It may be started before anything is attached and goes on when an engine comes or goes.

Only this machine reaches it by default. Any other address needs TLS (--tls-cert and --tls-key;
with --tls-client-ca only clients with a certificate of that authority are served) or
--allow-remote. There is no password: use client certificates, or put a proxy in front that
asks for one (docs/monitoring.md shows both).

Beside /metrics, /scores tells how long a load of each model would take on this machine now, and
/readyz?model=NAME whether it is in the page cache (docs/cluster.md): of the tagged models and of
those that --model names.

Needs prometheus_client: `pip install 'pagecache-bpf[export]'`."""
EXAMPLES = (
    ("pagecache-bpf export", ""),
    (
        "pagecache-bpf export --listen 0.0.0.0:9743 --tls-cert node.crt --tls-key node.key "
        "--tls-client-ca prometheus-ca.crt",
        "to a Prometheus elsewhere that shows a certificate",
    ),
)
JSON = {
    "export": {
        "url": "where the metrics are; printed once, when they can be had",
        "listen": "the address listened on",
    }
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of export."""
    parser.add_argument(
        "--listen",
        metavar="ADDRESS",
        default="127.0.0.1:9743",
        help="HOST:PORT to listen on; port 0 is any free one (default: 127.0.0.1:9743)",
    )
    parser.add_argument(
        "--allow-remote",
        action="store_true",
        help="let other machines read without TLS, where the network is trusted",
    )
    parser.add_argument("--tls-cert", metavar="FILE", type=Path, help="serve HTTPS: certificate")
    parser.add_argument("--tls-key", metavar="FILE", type=Path, help="serve HTTPS: its key")
    parser.add_argument(
        "--tls-client-ca",
        metavar="FILE",
        type=Path,
        help="serve only clients with a certificate of this authority",
    )

    add_score_arguments(parser)
    parser.add_argument(
        "--model",
        metavar="PATH",
        action="append",
        default=[],
        help="score this model, too, or those in this directory; may be repeated; implies --scores",
    )
    parser.add_argument(
        "--scores",
        action="store_true",
        help="have /metrics tell the scores, too; the headers of models are read for them",
    )


def run(args: argparse.Namespace, out: Output) -> int:
    """Serve until told to stop."""
    from pagecache_bpf.cli.tagging import require_root
    from pagecache_bpf.metrics.exporter import Exporter, parse_address

    address, tls = parse_address(args.listen), _tls(args)
    require_root("read the counters")
    # A pipe, as a handler that takes a lock may meet its own thread holding it.
    told, tell = os.pipe2(os.O_CLOEXEC)
    # The end by a signal is the normal one, and has to look like it to systemd.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os.write(tell, b"\0"))
    watch = watch_of(args, args.model)
    with Exporter(
        address,
        tls=tls,
        allow_remote=args.allow_remote,
        warn=out.warn,
        scores=watch.scores,
        score_metrics=args.scores or bool(args.model),
    ) as exporter:
        data = {"url": exporter.url, "listen": str(exporter.address)}
        out.emit(data, lambda console: console.print(f"serving  {exporter.url}"))
        sys.stdout.flush()
        os.read(told, 1)
    return 0


def _tls(args: argparse.Namespace) -> Tls | None:
    from pagecache_bpf.metrics.exporter import Tls

    given = {
        name: getattr(args, name) is not None for name in ("tls_cert", "tls_key", "tls_client_ca")
    }
    if not any(given.values()):
        return None
    if not (given["tls_cert"] and given["tls_key"]):
        raise UsageError(
            "TLS needs both a certificate and its key",
            "",
            "Give --tls-cert and --tls-key",
            f"{TROUBLESHOOTING}#tls-needs-both-a-certificate-and-its-key",
        )
    return Tls(args.tls_cert, args.tls_key, args.tls_client_ca)
