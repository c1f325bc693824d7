# SPDX-License-Identifier: Apache-2.0
"""pagecache-bpf reload: have the controller read its configuration again."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from pagecache_bpf.cli.output import Output, pairs
from pagecache_bpf.cli.parser import Group

if TYPE_CHECKING:
    from rich.console import Console

GROUP = Group.OPERATE
HELP = "have the controller read its configuration again"
DESCRIPTION = """\
As SIGHUP and `systemctl reload pagecache-bpf` do, but it tells what came of it: a configuration
with a mistake changes nothing and every mistake is told with its line. Models that are not in it
any more are untagged, new ones are tagged, connections stay. socket.listen and
socket.trust_containers change with the next start only."""
EXAMPLES = (("pagecache-bpf reload", ""),)
JSON = {"reload": {"failed[]": "what of the configuration could not be done"}}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add nothing: reload takes no arguments."""


def run(args: argparse.Namespace, out: Output) -> int:
    """Have the controller read its configuration again; settings that need a restart are shown."""
    from pagecache_bpf.cli.tagging import require_root
    from pagecache_bpf.policy.agent_device import AgentDevice

    require_root("reload the configuration")
    with AgentDevice() as agent:
        data = agent.request("reload")

    def human(console: Console) -> None:
        rows = [("reloaded", "the configuration was read again")]
        rows += [("failed", sentence) for sentence in data["failed"]]
        console.print(pairs(rows))

    out.emit(data, human)
    return 0
