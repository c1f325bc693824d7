# SPDX-License-Identifier: Apache-2.0
"""pagecache-bpf clients: who is connected to the controller, and hanging up on one."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from pagecache_bpf.cli.output import Output, pairs, table
from pagecache_bpf.cli.parser import Group
from pagecache_bpf.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

GROUP = Group.OPERATE
HELP = "list who is connected to the controller, or hang up on a client"
DESCRIPTION = """\
Processes that load models are connected to the controller for as long as a load lasts. `list`
shows them and how the controller does: what waits, and what was refused and why. `kick` hangs up
on one; its loads end, and what it asked to prefetch is forgotten."""
EXAMPLES = (
    ("pagecache-bpf clients list", ""),
    ("pagecache-bpf clients kick 17", "by the number that the list shows"),
)
JSON = {
    "clients list": {
        "clients[].id": "number of the connection, for `clients kick`",
        "clients[].socket": "public, or root: a command",
        "clients[].pid": "the process that connected; 0: it is of another PID namespace",
        "clients[].uid": "its user",
        "clients[].root": "whether it is root of this machine, and not of a container",
        "clients[].seconds": "since it connected",
        "clients[].idle_seconds": "since its last answer, if it waits for none",
        "clients[].waiting_files": "files that it has passed for a load to come",
        "clients[].loads": "its open loads",
        "health.connections": "connections now",
        "health.accepted": "connections so far",
        "health.refused.*": "what was refused before a request was read, by reason",
        "health.requests_waiting": "requests that wait for a thread",
        "health.requests_running": "requests that are worked on",
        "health.threads_not_started": "threads that could not be started",
        "health.inspectors": "processes that read headers and templates of clients now",
        "health.inspectors_filtered": "whether most system calls are kept from them (seccomp)",
        "health.inspectors_started": "how many of them were started so far",
        "health.inspectors_lost.*": "how many ended in the middle of a job, by reason",
        "health.loads_waiting": "loads that wait for room in the budget",
        "health.prefetch_bytes": "bytes that clients have asked to prefetch and are not read yet",
    },
    "clients kick": {"kicked": "number of the connection that is no more"},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the commands below clients."""
    from pagecache_bpf.cli.parser import add_command

    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    listing = add_command(commands, "list", "list who is connected")
    listing.set_defaults(clients_run=_list)
    kick = add_command(commands, "kick", "hang up on a client; its loads end")
    kick.add_argument("client", metavar="ID", type=int, help="its number, as `clients list` has it")
    kick.set_defaults(clients_run=_kick)


def run(args: argparse.Namespace, out: Output) -> int:
    """Run the command below clients."""
    code: int = args.clients_run(args, out)
    return code


def _list(args: argparse.Namespace, out: Output) -> int:
    from pagecache_bpf.cli.tagging import require_root
    from pagecache_bpf.policy.agent_device import AgentDevice

    require_root("list the clients")
    with AgentDevice() as agent:
        data = agent.request("clients")

    def human(console: Console) -> None:
        rows = [
            [
                str(row["id"]),
                row["socket"],
                str(row["pid"]),
                f"{row['uid']}" + ("" if row["uid"] or row["root"] else " (container)"),
                f"{row['seconds']:.0f} s",
                str(row["loads"]),
                str(row["waiting_files"]),
            ]
            for row in data["clients"]
        ]
        kinds = (
            *(("id", "number"), ("socket", "text"), ("pid", "number"), ("user", "text")),
            *(("connected", "number"), ("loads", "number"), ("files", "number")),
        )
        console.print(table(list(kinds), rows))
        health = data["health"]
        refused = [f"{count} {reason}" for reason, count in health["refused"].items()]
        lost = [f"{count}: {reason}" for reason, count in health["inspectors_lost"].items()]
        console.print()
        facts = [
            (
                "requests",
                f"{health['requests_running']} running, {health['requests_waiting']} wait",
            ),
            ("refused", ", ".join(refused) or "nothing"),
            ("helpers lost", ", ".join(lost) or "none"),
        ]
        console.print(pairs(facts))

    out.emit(data, human)
    return 0


def _kick(args: argparse.Namespace, out: Output) -> int:
    from pagecache_bpf.cli.tagging import require_root
    from pagecache_bpf.policy.agent_device import AgentDevice

    require_root("hang up on a client")
    with AgentDevice() as agent:
        found = agent.request("kick", client=args.client)["found"]
    if not found:
        raise UsageError(
            f"there is no client {args.client}",
            "no connection to the public socket has that number",
            "See `pagecache-bpf clients list`",
        )

    def human(console: Console) -> None:
        console.print(pairs([("hung up on", str(args.client))]))

    out.emit({"kicked": args.client}, human)
    return 0
