# SPDX-License-Identifier: Apache-2.0
"""pagecache-bpf kube-extender: tell kube-scheduler which nodes start a model soonest."""

from __future__ import annotations

import argparse
import ssl
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from pagecache_bpf.cli.output import TROUBLESHOOTING, Output, pairs
from pagecache_bpf.cli.parser import Group
from pagecache_bpf.cli.stop_signal import StopSignal
from pagecache_bpf.errors import PagecacheError, UsageError

if TYPE_CHECKING:
    from pagecache_bpf.placement.extender_server import ScorePoller
    from pagecache_bpf.placement.kubernetes_api import KubernetesApi

GROUP = Group.OPERATE
HELP = "in Kubernetes: tell the scheduler which nodes start a model soonest"
DESCRIPTION = """\
Answers the `prioritize` of kube-scheduler's extenders until Ctrl-C or SIGTERM: 0 to 10 points for
each node by the seconds that a load of the pod's model would take there. The pod names its model in
the annotation pagecache-bpf.io/model. The nodes are asked for their scores (`pagecache-bpf export`)
every few seconds; one that says nothing counts as cold.

--gates releases pods that wait for a node with their model (scheduling gate pagecache-bpf.io/warm),
--sweep takes away labels that nobody renews; both need a service account. docs/cluster.md has the
manifests and the scheduler's configuration.

Only this machine reaches it by default: --allow-remote or TLS serve others."""
EXAMPLES = (
    ("pagecache-bpf kube-extender --service pagecache-bpf.pagecache-bpf.svc:9743", ""),
    ("pagecache-bpf kube-extender --exporter http://node1:9743 --exporter http://node2:9743", ""),
)
JSON = {
    "kube-extender": {
        "url": "what urlPrefix of the scheduler's configuration has to lead to",
        "listen": "the address listened on",
        "nodes": "how many nodes have answered at the start",
    }
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of kube-extender."""
    parser.add_argument(
        "--listen",
        metavar="ADDRESS",
        default="127.0.0.1:8787",
        help="HOST:PORT to listen on; port 0 is any free one (default: 127.0.0.1:8787)",
    )
    parser.add_argument(
        "--allow-remote", action="store_true", help="let other machines ask without TLS"
    )
    parser.add_argument("--tls-cert", metavar="FILE", type=Path, help="serve HTTPS: certificate")
    parser.add_argument("--tls-key", metavar="FILE", type=Path, help="serve HTTPS: its key")
    parser.add_argument(
        "--service", metavar="NAME:PORT", help="headless service of the nodes' exporters"
    )
    parser.add_argument(
        "--exporter",
        metavar="URL",
        action="append",
        default=[],
        help="an exporter, without a path; may be repeated",
    )
    parser.add_argument(
        "--exporter-ca", metavar="FILE", help="authority of exporters that serve HTTPS"
    )
    parser.add_argument(
        "--interval", metavar="SECONDS", type=float, default=10.0, help="between rounds (10)"
    )
    parser.add_argument(
        "--stale", metavar="SECONDS", type=float, default=60.0, help="older scores are none (60)"
    )
    parser.add_argument(
        "--gates", action="store_true", help="release pods that wait for a warm node"
    )
    parser.add_argument("--sweep", action="store_true", help="take expired labels away")
    parser.add_argument(
        "--api", metavar="URL", help="API server to use without a token (kubectl proxy)"
    )


def run(args: argparse.Namespace, out: Output) -> int:
    """Serve until told to stop."""
    from pagecache_bpf.metrics.exporter import is_loopback, listen_error, parse_address
    from pagecache_bpf.placement.extender_server import ExtenderServer, ScorePoller
    from pagecache_bpf.placement.kubernetes_api import KubernetesApi

    address = parse_address(args.listen)
    context = _tls(args)
    if not is_loopback(address) and not (context or args.allow_remote):
        raise UsageError(
            f"{address} can be reached from other machines",
            "where models are cached would be told to whoever asks",
            "Give --tls-cert and --tls-key, or --allow-remote if the network is trusted",
            f"{TROUBLESHOOTING}#can-be-reached-from-other-machines",
        )
    api = None
    if args.gates or args.sweep:
        api = KubernetesApi(args.api.rstrip("/")) if args.api else KubernetesApi.of_pod()
    trust = ssl.create_default_context(cafile=args.exporter_ca) if args.exporter_ca else None
    poller = ScorePoller(_sources(args), interval=args.interval, stale=args.stale, context=trust)
    stop = StopSignal()
    try:
        server = ExtenderServer(address.host, address.port, poller, context)
    except OSError as error:
        raise listen_error(address, error) from error
    with server:
        poller.start()
        scheme = "https" if context else "http"
        shown = type(address)(address.host, server.port)
        nodes = len(poller.all())
        data = {"url": f"{scheme}://{shown}", "listen": str(shown), "nodes": nodes}
        rows = [("url", f"{scheme}://{shown}"), ("nodes", str(nodes))]
        out.emit(data, lambda console: console.print(pairs(rows)))
        said = ""
        while not stop.wait(args.interval):
            try:
                if api is not None:
                    _tend(args, api, poller)
                said = ""
            except PagecacheError as error:
                if str(error) != said:
                    out.warn(str(error))
                said = str(error)
        poller.close()
    return 0


def _tend(args: argparse.Namespace, api: KubernetesApi, poller: ScorePoller) -> None:
    """Do what --gates and --sweep ask for, once."""
    from pagecache_bpf.placement.node_labels import sweep
    from pagecache_bpf.placement.warm_gates import run_gates

    if args.gates:
        run_gates(api, poller.all(), time.time())
    if args.sweep:
        sweep(api, time.time())


def _sources(args: argparse.Namespace) -> Callable[[], Iterable[str]]:
    """Return what gives the URLs of the exporters."""
    from pagecache_bpf.placement.extender_server import of_service

    if not args.service and not args.exporter:
        raise UsageError(
            "there is no node to ask", "", "Give --service, or --exporter for each node"
        )
    for name in ("interval", "stale"):
        if not getattr(args, name) > 0:
            raise UsageError(f"--{name} has to be more than 0", f"it is {getattr(args, name)}")
    fixed = [url.rstrip("/") for url in args.exporter]
    for url in fixed:
        if not url.startswith(("http://", "https://")):
            raise UsageError(f"{url!r} is no URL of an exporter", "", "Write http://NODE:9743")
    if not args.service:
        return lambda: fixed
    name, _, port = args.service.rpartition(":")
    if not name or not port.isascii() or not port.isdigit() or int(port) >= 1 << 16:
        raise UsageError(f"{args.service!r} is no service", "", "Write it like NAME.NS.svc:9743")
    found = of_service(name, int(port), "https" if args.exporter_ca else "http")

    def addresses() -> Iterable[str]:
        try:
            return [*fixed, *found()]
        except OSError:  # the name does not resolve now; those that were named are asked anyway
            return fixed

    return addresses


def _tls(args: argparse.Namespace) -> ssl.SSLContext | None:
    from pagecache_bpf.metrics.exporter import Tls, check_files

    if args.tls_cert is None and args.tls_key is None:
        return None
    if args.tls_cert is None or args.tls_key is None:
        raise UsageError(
            "TLS needs both a certificate and its key",
            "",
            "Give --tls-cert and --tls-key",
            f"{TROUBLESHOOTING}#tls-needs-both-a-certificate-and-its-key",
        )
    check_files(Tls(args.tls_cert, args.tls_key))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(args.tls_cert, args.tls_key)
    return context
