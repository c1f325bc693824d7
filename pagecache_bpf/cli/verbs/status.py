# SPDX-License-Identifier: Apache-2.0
"""pagecache-bpf status: what is attached, what it did, and how the last policies ended."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from pagecache_bpf.cli.budget import HELD_JSON, held
from pagecache_bpf.cli.output import TROUBLESHOOTING, Output, pairs, table
from pagecache_bpf.cli.parser import Group
from pagecache_bpf.cli.templating import REPLAY_JSON, replay_rows
from pagecache_bpf.cli.verbs.detach import EXIT_JSON, exit_as_json
from pagecache_bpf.errors import UsageError
from pagecache_bpf.units import format_cached, format_count, format_duration, format_size, plural

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from pagecache_bpf.kernel.control_device import ExitRecord, PolicyStatus, Tag
    from pagecache_bpf.policy.engines import Engines

GROUP = Group.LOOK
HELP = "show attached policies, their counters and how policies ended"
DESCRIPTION = """\
Shows each attached policy with its knobs, its models and its counters, and how the last
policies ended. A policy that ended by itself is shown until it is detached or attached
again. Counters that are 0 are left out; -v shows them."""
EXAMPLES = (
    ("pagecache-bpf status", ""),
    ("pagecache-bpf status sequential --json", "for scripts"),
)
EXITS_SHOWN = 5
JSON = {
    "status": {
        "module.loaded": "whether the kernel module is loaded",
        "module.abi_version": "its ABI version; null if it is not loaded",
        "module.hooks[]": "the hooks that it can attach",
        "agent.running": "whether the process of engine agent runs",
        **HELD_JSON,
        "policies[].name": "the policy",
        "policies[].engine": "struct_ops or agent",
        "policies[].not_honored[]": "what a policy may ask for and this engine does not do",
        "policies[].missing_tracepoints[]": "of engine agent: events that nothing tells of here",
        "policies[].events.*": "of engine agent: what tells of an event, as a BPF section",
        "policies[].lost_requests": "of engine agent: requests that found the ring buffer full",
        "policies[].read_errors.*": "of engine agent: failed reads by errno",
        "policies[].refused_bytes": "of engine agent: asked for, but memory was short",
        "policies[].already_cached_bytes": "of engine agent: asked for, but cached already",
        "policies[].depths.*": "of engine agent: chunks read at once, by device (MAJOR:MINOR)",
        "policies[].workers[]": "of engine agent: the processes that read",
        "policies[].state": "attached, or ended (by itself; not detached yet)",
        "policies[].attached_ns": "since when, in ns since 1970; null if it has ended",
        "policies[].pinned": "whether it stays when the process that attached it ends",
        "policies[].hooks[]": "the hooks it defines",
        "policies[].knobs.*": "each knob with its value",
        "policies[].tags": "number of files it governs",
        "policies[].lent_files": "of engine struct_ops: how many of them loads lend it now, so that"
        " it can read ahead from one into another",
        "policies[].resident_bytes": "bytes of these files in the page cache",
        "policies[].inflight_bytes": "bytes queued for asynchronous prefetch",
        "policies[].kept_bytes": "bytes in the page cache that it keeps from being evicted",
        "policies[].keep_max_bytes": "how many it may; 0 where nothing can be kept",
        "policies[].counters.*": "each counter (see COUNTERS)",
        "policies[].gauges.*": "what the policy itself keeps count of (`policy show`)",
        "policies[].alarms[]": "promises that it does not keep",
        "policies[].models[].name": "a model that it governs",
        "policies[].models[].files": "number of its files",
        "policies[].models[].resident_bytes": "bytes of it in the page cache",
        "policies[].models[].size_bytes": "its size now, without files that are gone",
        "policies[].models[].replaced[]": "tagged files whose names lead to other files now",
        "policies[].models[].gone[]": "tagged files whose names lead nowhere now",
        "policies[].models[].untagged[]": "files of its directory that belong to it without a tag",
        **{f"policies[].templates[].{key}": text for key, text in REPLAY_JSON.items()},
        "policies[].exit": "how it ended; null while it is attached",
        **{f"policies[].exit.{key}": text for key, text in EXIT_JSON.items()},
        "inactive_tags": "number of tagged files whose policy is not attached",
        **{f"exits[].{key}": text for key, text in EXIT_JSON.items()},
    }
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of status."""
    parser.add_argument("policy", metavar="POLICY", nargs="?", help="only this policy")


def run(args: argparse.Namespace, out: Output) -> int:
    """Show; that nothing is attached, or no module loaded, is an answer and no error."""
    from pagecache_bpf.cli.tagging import require_root
    from pagecache_bpf.policy.engines import Engines

    require_root("read the status")
    with Engines() as engines:
        data = _collect(engines)
    if args.policy is not None:
        data["policies"] = [policy for policy in data["policies"] if policy["name"] == args.policy]
        data["exits"] = [record for record in data["exits"] if record["policy"] == args.policy]
        if not data["policies"] and not data["exits"]:
            raise UsageError(
                f"the policy {args.policy} is not attached",
                "",
                f"Run `pagecache-bpf attach {args.policy} PATH`",
                f"{TROUBLESHOOTING}#is-not-attached",
            )
    out.emit(data, lambda console: _human(console, data, args.verbose))
    return 0


def _collect(engines: Engines) -> dict[str, Any]:
    from pagecache_bpf.cli import stale_tags
    from pagecache_bpf.metrics.collect import replays
    from pagecache_bpf.policy import loader

    info = engines.module.info() if engines.module else None
    tags = list(engines.tags())
    tagged = stale_tags.identities(tags)
    exits = engines.exits()
    pins = loader.pinned() if engines.module else []
    details = engines.agent.details() if engines.agent else {}
    attached = list(engines.policies())
    names = {policy.name for _, policy in attached}
    policies = [
        {
            **_attached(
                engine, policy, tags, tagged, policy.name in pins, details.get(policy.name, {})
            ),
            "templates": replays(engines, engine, policy.name),
        }
        for engine, policy in attached
    ]
    policies += [
        _ended("struct_ops", name, tags, tagged, exits, loader.knobs_of(name))
        for name in pins
        if name not in names
    ]
    policies += [
        _ended("agent", name, tags, tagged, exits, {})
        for name, policy in details.items()
        if "ended" in policy
    ]
    return {
        "module": {
            "loaded": info is not None,
            "abi_version": info.abi_version if info else None,
            "hooks": list(info.hooks) if info else [],
        },
        "agent": {"running": engines.agent is not None},
        "controller": held(engines),
        "policies": policies,
        "inactive_tags": sum(not tag.active for tag in tags),
        "exits": [exit_as_json(record) for record in exits[-EXITS_SHOWN:]],
    }


def _attached(
    engine: str,
    policy: PolicyStatus,
    tags: list[Tag],
    tagged: Mapping[int, set[int]],
    pinned: bool,
    details: dict[str, Any],
) -> dict[str, Any]:
    from pagecache_bpf.kernel.file_pages import PAGE_SIZE
    from pagecache_bpf.policy import hints, loader

    knobs = details.get("knobs", loader.knobs_of(policy.name) if pinned else {})
    gauges, alarms = hints.gauges(policy.name) if pinned or engine == "agent" else ({}, [])
    return {
        "name": policy.name,
        "engine": engine,
        "not_honored": details.get("not_honored", []),
        "missing_tracepoints": details.get("missing", []),
        "events": details.get("events", {}),
        "lost_requests": details.get("lost", 0),
        "read_errors": details.get("errors", {}),
        "refused_bytes": details.get("refused_bytes", 0),
        "already_cached_bytes": details.get("already_cached_bytes", 0),
        "depths": details.get("depths", {}),
        "workers": details.get("workers", []),
        "state": "attached",
        "attached_ns": policy.attached_ns,
        "pinned": pinned or engine == "agent",
        "hooks": list(policy.hooks),
        "knobs": knobs,
        "tags": policy.tags,
        "lent_files": sum(tag.lent > 0 for tag in tags if tag.policy == policy.name),
        "resident_bytes": policy.governed_pages * PAGE_SIZE,
        "inflight_bytes": policy.inflight_pages * PAGE_SIZE,
        "kept_bytes": policy.kept_pages * PAGE_SIZE,
        "keep_max_bytes": policy.keep_max_pages * PAGE_SIZE,
        "counters": policy.counters,
        "gauges": gauges,
        "alarms": alarms,
        "models": _models([tag for tag in tags if tag.policy == policy.name], tagged),
        "templates": [],
        "exit": None,
    }


def _ended(
    engine: str,
    name: str,
    tags: list[Tag],
    tagged: Mapping[int, set[int]],
    exits: list[ExitRecord],
    knobs: dict[str, int],
) -> dict[str, Any]:
    """Return what the JSON output has for a policy that has ended and is still pinned."""
    record = next((candidate for candidate in reversed(exits) if candidate.policy == name), None)
    return {
        "name": name,
        "engine": engine,
        "not_honored": [],
        "missing_tracepoints": [],
        "events": {},
        "lost_requests": 0,
        "read_errors": {},
        "refused_bytes": 0,
        "already_cached_bytes": 0,
        "depths": {},
        "workers": [],
        "state": "ended",
        "attached_ns": None,
        "pinned": True,
        "hooks": [],
        "knobs": knobs,
        "tags": 0,
        "lent_files": 0,
        "resident_bytes": 0,
        "inflight_bytes": 0,
        "kept_bytes": 0,
        "keep_max_bytes": 0,
        "counters": {},
        "gauges": {},
        "alarms": [],
        "models": _models([tag for tag in tags if tag.policy == name], tagged),
        "templates": [],
        "exit": exit_as_json(record) if record else None,
    }


def _models(tags: list[Tag], tagged: Mapping[int, set[int]]) -> list[dict[str, Any]]:
    from pagecache_bpf.cli import stale_tags
    from pagecache_bpf.kernel.control_device import size_on_disk
    from pagecache_bpf.kernel.file_pages import PAGE_SIZE

    models: dict[str, dict[str, Any]] = {}
    by_model: dict[str, list[Tag]] = {}
    for tag in tags:
        by_model.setdefault(tag.model, []).append(tag)
        model = models.setdefault(
            tag.model, {"name": tag.model, "files": 0, "resident_bytes": 0, "size_bytes": 0}
        )
        model["files"] += 1
        model["resident_bytes"] += tag.resident_pages * PAGE_SIZE
        model["size_bytes"] += size_on_disk(tag) or 0
    for name, model in models.items():
        model.update(vars(stale_tags.of_model(by_model[name], tagged)))
    return list(models.values())


def _human(console: Console, data: dict[str, Any], verbose: bool) -> None:
    _print_controller(console, data["controller"])
    if not data["policies"]:
        console.print("no policy is attached")
    for policy in data["policies"]:
        _print_policy(console, policy, verbose)
    if data["inactive_tags"]:
        console.print(
            f"{plural(data['inactive_tags'], 'tagged file')} without an attached policy "
            "(see `pagecache-bpf tags`)\n"
        )
    if data["exits"]:
        _print_exits(console, data["exits"])


#: What policies that may stand down tell of it (bpf/include/standby_state.bpf.h).
STANDBY_GAUGES = (
    *("standing_down", "as_fast_alone", "short_files"),
    *("stalls_measured", "stalled_percent", "device_percent"),
)


def _gauge_rows(gauges: dict[str, int]) -> list[tuple[str, RenderableType]]:
    """Return a row a gauge; those of standing down become one sentence of what was measured."""
    rows: list[tuple[str, RenderableType]] = [
        (name, f"{value:,}") for name, value in gauges.items() if name not in STANDBY_GAUGES
    ]
    models = gauges.get("standing_down", 0)
    if models:
        why = "left to the kernel's readahead (how long it makes readers wait is not measured yet)"
        if gauges.get("short_files"):
            why = "its files are so short that the device reads each in an instant"
        elif gauges.get("as_fast_alone"):
            why = "as fast by the kernel's readahead alone as with help"
        elif gauges.get("stalls_measured"):
            stalled, device = gauges["stalled_percent"], gauges.get("device_percent", 0)
            why = f"the kernel keeps up (stalled {stalled}% of the time)"
            if stalled >= 10 and device >= 70:
                why = f"the kernel keeps up ({device}% of the device's speed)"
            elif stalled >= 10:
                why = f"left to the kernel's readahead (stalled {stalled}% of the time)"
        rows.append(("standing down", f"{plural(models, 'model')}: {why}"))
    return rows


def _print_policy(console: Console, policy: dict[str, Any], verbose: bool) -> None:
    from rich.text import Text

    from pagecache_bpf.cli.stale_tags import StaleFiles
    from pagecache_bpf.policy.read_errors import meaning

    if policy["state"] == "ended":
        console.print(
            Text.assemble((policy["name"], "bold"), "  ", ("ended by itself", "bold red"))
        )
        record = policy["exit"]
        rows: list[tuple[str, RenderableType]] = [("why", _reason(record))] if record else []
        rows.append(("next", f"pagecache-bpf detach {policy['name']}   (or attach it again)"))
    else:
        age = format_duration(max(time.time_ns() - policy["attached_ns"], 0))
        state = f"attached {age} ago"
        if policy["engine"] == "agent":
            state += " (engine agent)"
        elif not policy["pinned"]:
            state += ", held by a process"
        console.print(Text.assemble((policy["name"], "bold"), "  ", (state, "green")))
        rows = [
            ("governs", f"{plural(policy['tags'], 'file')}"),
            (
                "cached",
                f"{format_size(policy['resident_bytes'])}, "
                f"{format_size(policy['inflight_bytes'])} more on the way",
            ),
            ("hooks", ", ".join(policy["hooks"])),
        ]
        if policy["lent_files"]:
            rows.append(("reads on", f"into {plural(policy['lent_files'], 'file')} lent by loads"))
        if "evict" in policy["hooks"] and policy["keep_max_bytes"]:
            kept, most = format_size(policy["kept_bytes"]), format_size(policy["keep_max_bytes"])
            rows.append(("keeps", f"{kept} of at most {most}"))
        functions = [text for text in policy["events"].values() if not text.startswith("raw_tp/")]
        if functions:
            rows.append(("told by", f"functions, in place of tracepoints: {', '.join(functions)}"))
        if policy["missing_tracepoints"]:
            rows.append(("lacking", f"events {', '.join(policy['missing_tracepoints'])}"))
        if policy["lost_requests"]:
            rows.append(("lost", f"{policy['lost_requests']:,} requests: the buffer was full"))
        if policy["refused_bytes"]:
            rows.append(("refused", f"{format_size(policy['refused_bytes'])}: memory was short"))
        if policy["read_errors"]:
            failed = (f"{n} x {meaning(int(c))}" for c, n in policy["read_errors"].items())
            rows.append(("failed", f"reads: {', '.join(failed)}"))
    for model in policy["models"]:
        stale = StaleFiles(model["replaced"], model["gone"], model["untagged"])
        for sentence in stale.sentences(policy["name"], model["name"]):
            rows.append(("stale", f"{model['name']}: {sentence}"))
    rows += _gauge_rows(policy["gauges"])
    rows += [("ALARM", Text(text, "bold red")) for text in policy["alarms"]]
    rows += replay_rows(policy["templates"])
    if policy["knobs"]:
        rows.append(("knobs", ", ".join(f"{k} = {v}" for k, v in policy["knobs"].items())))
    console.print(pairs(rows, indent=2))
    console.print()
    if policy["models"]:
        columns = [("model", "text"), ("files", "number"), ("cached", "number"), ("size", "number")]
        lines = [
            [
                model["name"],
                f"{model['files']:,}",
                format_cached(model["resident_bytes"], model["size_bytes"]),
                format_size(model["size_bytes"]),
            ]
            for model in policy["models"]
        ]
        console.print(table(columns, lines))
        console.print()
    _print_counters(console, policy["counters"], verbose)


def _print_counters(console: Console, counters: dict[str, int], verbose: bool) -> None:
    from pagecache_bpf.kernel.control_device import COUNTERS

    lines = [
        [counter.name, format_count(counters[counter.name], counter.unit), counter.help]
        for counter in COUNTERS
        if counter.name in counters and (counters[counter.name] or verbose)
    ]
    if lines:
        console.print(table([("counter", "text"), ("value", "number"), ("", "text")], lines))
        console.print()


def _print_controller(console: Console, controller: dict[str, Any]) -> None:
    """Print the controller and who holds what; nothing where no controller answers."""
    claims = controller["claims"]
    for sentence in controller["inherited"]:
        console.print(f"the agent runs with limits: {sentence}")
    if not controller["serving"] and not claims:
        return
    total, claimed = controller["budget"]["total_bytes"], controller["budget"]["claimed_bytes"]
    of = f" of {format_size(total)}" if total is not None else ""
    rows = [("budget", f"{format_size(claimed)}{of} claimed")]
    if controller["serving"]:
        rows.insert(0, ("controller", f"process {controller['pid']}, on {controller['listen']}"))
    console.print(pairs(rows))
    if claims:
        columns = [("model", "text"), ("user", "number"), ("process", "number")]
        columns += [("wants", "number"), ("may hold", "number"), ("counted", "number")]
        lines = []
        for claim in claims:
            sizes = (claim[f"{name}_bytes"] for name in ("wanted", "granted", "charged"))
            process = str(claim["pid"]) if claim["pid"] else "-"
            lines.append([claim["model"], str(claim["uid"]), process, *map(format_size, sizes)])
        console.print(table(columns, lines))
    console.print()


def _print_exits(console: Console, exits: list[dict[str, Any]]) -> None:
    columns = [("ended", "text"), ("policy", "text"), ("how", "text"), ("why", "text")]
    lines = []
    for record in reversed(exits):
        when = datetime.fromtimestamp(record["time_ns"] / 10**9, tz=timezone.utc).astimezone()
        lines.append(
            [f"{when:%Y-%m-%d %H:%M:%S}", record["policy"], record["kind"], _reason(record)]
        )
    console.print(table(columns, lines))


def _reason(record: dict[str, Any]) -> str:
    """Everything a record says, in one line."""
    text: str = record["reason"] or record["kind"]
    if record["kind"] == "detached":
        return "on request" if text == "detached" else text
    if record["kind"] == "killed":
        return text
    if record["message"]:
        text += f": {record['message']}"
    return f"{text} (hook {record['hook']}, code {record['code']})"
