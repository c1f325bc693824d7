# SPDX-License-Identifier: Apache-2.0
"""pagecache-bpf detach: end a policy."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from pagecache_bpf.cli import interrupts
from pagecache_bpf.cli.output import TROUBLESHOOTING, Output, add_note, pairs
from pagecache_bpf.cli.parser import Group
from pagecache_bpf.errors import PagecacheError
from pagecache_bpf.units import plural

if TYPE_CHECKING:
    from rich.console import Console

    from pagecache_bpf.cli.undo_log import Change
    from pagecache_bpf.kernel.control_device import ExitRecord
    from pagecache_bpf.policy.engines import Engines

GROUP = Group.USE
HELP = "detach a policy; the kernel's own behavior takes over"
DESCRIPTION = """\
Detaches POLICY and takes the tags off its files. Readers notice nothing: the kernel's own
readahead takes over at once. Also clears away what a policy that ended by itself has left."""
EXAMPLES = (
    ("pagecache-bpf detach sequential", ""),
    ("pagecache-bpf detach --all --keep-tags", "the next attach governs the same files"),
)
EXIT_JSON = {
    "seq": "number of the record; grows",
    "time_ns": "when, in ns since 1970",
    "policy": "the policy",
    "kind": "detached, policy (it asked to end), invalid (wrong answers), init or hook "
    "(it never got attached), killed (the agent was)",
    "code": "the policy's own code, or a negative errno",
    "hook": "the hook it happened in",
    "reason": "why, in words",
    "message": "more about it; may be empty",
}
JSON = {
    "detach": {
        "detached[].name": "a policy that is detached now",
        "detached[].untagged": "number of files untagged",
        "detached[].exit": "how it ended; null if the kernel has not said so yet",
        **{f"detached[].exit.{key}": text for key, text in EXIT_JSON.items()},
    }
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of detach."""
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("policy", metavar="POLICY", nargs="?", help="name of an attached policy")
    which.add_argument("--all", action="store_true", help="every attached policy")
    parser.add_argument(
        "--keep-tags",
        action="store_true",
        help="leave the files tagged: they are governed again when the policy is attached again",
    )


def run(args: argparse.Namespace, out: Output) -> int:
    """Detach one policy or all."""
    from pagecache_bpf.cli.tagging import require_root
    from pagecache_bpf.cli.undo_log import Change
    from pagecache_bpf.policy.engines import Engines

    require_root("detach a policy")
    ended: list[dict[str, Any]] = []
    try:
        with Change("pagecache-bpf detach", out, required=False) as change, Engines() as engines:
            for name in engines.attached() if args.all else [args.policy]:
                recovered = {**args.recovered, **change.recovered}
                if name in recovered and name not in engines.attached():
                    # It was half attached by a command that was killed, and has just gone.
                    ended.append(_entry(name, 0, recovered[name]))
                    continue
                with interrupts.deferred():  # a policy is detached as a whole
                    ended.append(_detach(engines, change, name, args.keep_tags))
    except BaseException as error:
        if ended:
            add_note(error, f"detached: {', '.join(entry['name'] for entry in ended)}")
        raise
    interrupts.ignore()

    def human(console: Console) -> None:
        if not ended:
            console.print("no policy is attached")
        rows = []
        for entry in ended:
            rows.append(("detached", f"{entry['name']}{_how(entry['exit'])}"))
            if entry["untagged"]:
                rows.append(("untagged", plural(entry["untagged"], "file")))
        console.print(pairs(rows))

    out.emit({"detached": ended}, human)
    return 0


def _detach(engines: Engines, change: Change, name: str, keep_tags: bool) -> dict[str, Any]:
    from pagecache_bpf.cli.tagging import untag
    from pagecache_bpf.cli.undo_log import Steps

    if engines.engine_of(name) and name not in engines.attached():
        raise PagecacheError(
            f"the policy {name} cannot be detached",
            "another process holds it",
            "End that process: the policy ends with it",
            f"{TROUBLESHOOTING}#cannot-be-detached",
        )
    tags = [tag for tag in engines.tags() if tag.policy == name]
    left = [] if keep_tags else [tag.identity for tag in tags]
    if name in engines.attached():
        change.begin(Steps(undo=False, detach=[name], untag=left))
    record = engines.detach(name)
    gone = []
    if not keep_tags:
        # Those of engine agent have gone with the policy.
        still = {tag.identity: tag for tag in engines.tags() if tag.policy == name}
        gone = [tag for tag in tags if tag.identity not in still]
        gone += untag(engines, still.values())
    return _entry(name, len(gone), record)


def _entry(name: str, untagged: int, record: ExitRecord | None) -> dict[str, Any]:
    """Return what the JSON output has for a policy that was just detached."""
    return {"name": name, "untagged": untagged, "exit": exit_as_json(record) if record else None}


def exit_as_json(record: ExitRecord) -> dict[str, Any]:
    """Return the record of how a policy ended, as every command prints it.

    Args:
        record: what the kernel or the agent noted when the policy was detached.

    Returns:
        The record's fields that EXIT_JSON describes, by name.
    """
    return {key: getattr(record, key) for key in EXIT_JSON}


def _how(record: dict[str, Any] | None) -> str:
    if record is None:
        return "; the kernel has not reported its end yet (see `pagecache-bpf status`)"
    if record["kind"] == "detached":
        return ""
    text = f"{record['reason']}: {record['message']}" if record["message"] else record["reason"]
    return f"; it had ended by itself ({record['kind']}, code {record['code']}): {text}"
