# SPDX-License-Identifier: Apache-2.0
"""What `attach --update` does: replaces an attached policy while its files are read."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from pagecache_bpf.cli.output import TROUBLESHOOTING, Output, pairs
from pagecache_bpf.errors import UnsupportedError, UsageError
from pagecache_bpf.units import plural

if TYPE_CHECKING:
    from rich.console import Console


def update(args: argparse.Namespace, out: Output) -> int:
    """Replace a policy on engine struct_ops.

    Args:
        args: the arguments of attach.
        out: where what was done is said.

    Returns:
        The exit status.

    Raises:
        UsageError: the policy is not attached, or an option makes no sense with --update.
        UnsupportedError: it is attached on engine agent.
        PagecacheError: it was not replaced; what is attached goes on.
    """
    from pagecache_bpf.cli.budget import budget_knob
    from pagecache_bpf.cli.tagging import require_root
    from pagecache_bpf.policy import catalog, replacing
    from pagecache_bpf.policy.engines import AGENT, Engines

    _refuse_others(args)
    info = catalog.find(args.policy)
    knobs = budget_knob(info, args.budget, catalog.parse_knobs(info, dict(args.knob)))
    require_root("replace a policy")
    with Engines() as engines:
        attached = {policy.name: engine for engine, policy in engines.policies()}
        if args.engine == "agent" or attached.get(info.name) == AGENT:
            raise UnsupportedError(
                f"the policy {info.name} was not replaced",
                "engine agent cannot replace a policy",
                f"Detach it (pagecache-bpf detach {info.name}), and attach it again",
            )
        if info.name not in attached and engines.module is None:
            raise UsageError(
                f"the policy {info.name} is not attached",
                "--update replaces one that is",
                f"Attach it with `pagecache-bpf attach {info.name} PATH`",
                f"{TROUBLESHOOTING}#is-not-attached",
            )
    values = replacing.replace(info, knobs)
    with Engines() as engines:
        found = [policy for _, policy in engines.policies() if policy.name == info.name]
    files = sum(policy.tags for policy in found)
    # One that is optional may have been left out.
    hooks = [hook for hook in info.hooks if all(hook in policy.hooks for policy in found)]
    undo = f"pagecache-bpf detach {info.name}"
    data = {
        "policy": {
            "name": info.name,
            "object": str(info.object),
            "hooks": hooks,
            "knobs": {knob.name: values.get(knob.name, knob.default) for knob in info.knobs},
        },
        "engine": {"name": "struct_ops", "why": "", "not_honored": [], "missing_tracepoints": []},
        "module_loaded_from": None,
        "models": [],
        "templates": [],
        "admission": [],
        "undo": undo,
    }

    def human(console: Console) -> None:
        units = {knob.name: knob.unit for knob in info.knobs}
        rows = [("replaced", f"{info.name} (hooks: {', '.join(hooks)})")]
        rows += [
            ("knob", f"{name} = {value} {units[name]}".rstrip()) for name, value in knobs.items()
        ]
        rows += [("tagged", f"{plural(files, 'file')}, as before"), ("undo", undo)]
        console.print(pairs(rows))

    out.emit(data, human)
    return 0


def _refuse_others(args: argparse.Namespace) -> None:
    """Refuse what would change files or templates.  Raises UsageError."""
    given = {
        "PATH": args.paths,
        "--template": args.template,
        "--partial": args.partial,
        "--model": args.model,
        "--replace": args.replace,
        "--no-observe": args.no_observe,
    }
    for name, value in given.items():
        if value:
            raise UsageError(
                f"{name} cannot be given with --update",
                "the policy's files and templates stay as they are",
                "Leave it away, and use `pagecache-bpf tag` for more files",
            )
