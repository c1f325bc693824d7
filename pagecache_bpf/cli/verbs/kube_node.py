# SPDX-License-Identifier: Apache-2.0
"""pagecache-bpf kube-node: publish residency as labels of a Kubernetes node, and prewarm."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from pagecache_bpf.cli.output import Output, pairs
from pagecache_bpf.cli.parser import Group
from pagecache_bpf.cli.scoring import add_score_arguments, watch_of
from pagecache_bpf.cli.stop_signal import StopSignal
from pagecache_bpf.errors import UsageError
from pagecache_bpf.units import parse_size

GROUP = Group.OPERATE
HELP = "in Kubernetes: publish what is in the page cache as labels of the node"
DESCRIPTION = """\
Publishes for each model how much of it is in this node's page cache, in tenths, as a label of the
Kubernetes node, pagecache-bpf.io/CONTENT, until Ctrl-C or SIGTERM; `pagecache-bpf score` tells the
content identity. Labels expire when they are not renewed. A node writes at most once a minute.

With --labels nfd a file of Node Feature Discovery's local source is written; with --labels api the
node is patched, for which the service account has to be allowed to get and patch nodes. --prewarm
brings in the models that annotations of the node ask for. docs/cluster.md has manifests for both.

Needs no root where the files of the models may be written or are the caller's; of others the
controller is asked."""
EXAMPLES = (
    ("pagecache-bpf kube-node /models", "through Node Feature Discovery"),
    ("pagecache-bpf kube-node --labels api --prewarm /models", "with a service account"),
)
JSON = {
    "kube-node": {
        "node": "name of the node: --node, NODE_NAME of the environment, or the host's name",
        "labels": "how they are published: nfd, api or none",
        "models[]": "content identity of a model that is watched",
    }
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of kube-node."""
    parser.add_argument(
        "models", metavar="MODEL", nargs="+", help="path of a model, or directory of models"
    )
    parser.add_argument(
        "--labels", choices=("nfd", "api", "none"), default="nfd", help="how (default: nfd)"
    )
    parser.add_argument(
        "--nfd-directory",
        metavar="DIR",
        type=Path,
        help="NFD's features.d (default: /etc/kubernetes/node-feature-discovery/features.d)",
    )
    parser.add_argument("--node", metavar="NAME", help="name of the node")
    parser.add_argument(
        "--api", metavar="URL", help="API server to use without a token (kubectl proxy)"
    )
    parser.add_argument(
        "--prewarm", action="store_true", help="bring in what annotations of the node ask for"
    )
    parser.add_argument(
        "--prewarm-budget",
        metavar="SIZE",
        type=parse_size,
        help="bytes to bring in at a time (default: half of what the node may still cache)",
    )
    parser.add_argument(
        "--interval", metavar="SECONDS", type=float, default=15.0, help="between looks (15)"
    )
    parser.add_argument(
        "--label-interval",
        metavar="SECONDS",
        type=float,
        default=60.0,
        help="at most one write in so many seconds (60)",
    )
    add_score_arguments(parser)


def run(args: argparse.Namespace, out: Output) -> int:
    """Publish until told to stop."""
    from pagecache_bpf.api import prefetch
    from pagecache_bpf.placement.kubernetes_api import KubernetesApi
    from pagecache_bpf.placement.labels import LabelPlan
    from pagecache_bpf.placement.node_agent import NodeAgent
    from pagecache_bpf.placement.node_labels import NFD_DIRECTORY, NfdFile, NodePatch, Publisher
    from pagecache_bpf.placement.node_watch import node_name

    for name in ("interval", "label_interval"):
        if not getattr(args, name) > 0:
            option = f"--{name.replace('_', '-')}"
            raise UsageError(f"{option} has to be more than 0", f"it is {getattr(args, name)}")
    node = args.node or node_name()
    patch = None
    if args.labels == "api" or args.prewarm:
        api = KubernetesApi(args.api.rstrip("/")) if args.api else KubernetesApi.of_pod()
        patch = NodePatch(api, node)
    publisher: Publisher | None = patch if args.labels == "api" else None
    if args.labels == "nfd":
        publisher = NfdFile(args.nfd_directory or NFD_DIRECTORY)
    watch = watch_of(args, args.models)
    agent = NodeAgent(
        watch,
        LabelPlan(node, args.label_interval, 10 * args.label_interval),
        publisher=publisher,
        node=patch,
        prefetch=(lambda model: prefetch(model.root, budget=model.size)) if args.prewarm else None,
        budget=args.prewarm_budget,
        warn=out.warn,
    )
    stop = StopSignal()
    data = {
        "node": node,
        "labels": args.labels,
        "models": [model.content for model in watch.scores().models],
    }
    rows = [("node", node), ("labels", args.labels), ("models", ", ".join(data["models"]))]
    out.emit(data, lambda console: console.print(pairs(rows)))
    agent.round(time.time())
    while not stop.wait(args.interval):
        agent.round(time.time())
    return 0
