# SPDX-License-Identifier: Apache-2.0
"""pagecache-bpf attach: attach a policy and put files under it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pagecache_bpf.cli import interrupts
from pagecache_bpf.cli.budget import ADMISSION_JSON, admission_rows
from pagecache_bpf.cli.knobs import add_knobs
from pagecache_bpf.cli.output import TROUBLESHOOTING, Output, pairs
from pagecache_bpf.cli.parser import Group
from pagecache_bpf.errors import PagecacheError, UnsupportedError
from pagecache_bpf.units import format_size, plural

if TYPE_CHECKING:
    from rich.console import Console

    from pagecache_bpf.cli.tagging import Tagging
    from pagecache_bpf.cli.templating import Chosen
    from pagecache_bpf.policy.catalog import PolicyInfo
    from pagecache_bpf.policy.engines import Engines
    from pagecache_bpf.weights.models import Model

GROUP = Group.USE
HELP = "attach a policy and put files under it"
DESCRIPTION = """\
Attaches POLICY and tags the weight files that each PATH stands for. The policy stays attached
when this command ends, until `detach`, until it ends by itself (`status` says why) or until
the machine goes down. If anything fails, everything is taken back.

Engine struct_ops overrides the kernel's readahead; it needs the kernel module, which is loaded
if it is not. Engine agent runs the same policy on kernel events and reads ahead from a process of
its own: no module, also under lockdown. auto takes struct_ops where it can and says why not."""
EXAMPLES = (
    ("pagecache-bpf attach sequential /models/llama-3-8b", "a directory of shards"),
    (
        "pagecache-bpf attach sequential --knob max_window_mib=256 model.gguf",
        "one file, with a larger window",
    ),
    (
        "pagecache-bpf attach maio --template llama.tp2 /models/llama-3-8b",
        "read ahead in the order of a template made before",
    ),
    (
        "pagecache-bpf attach sequential --update --knob max_window_mib=512",
        "change an attached policy while its files are read",
    ),
    (
        "pagecache-bpf attach ./mine.bpf.c ~/.cache/huggingface/hub/models--org--name",
        "your own policy, compiled first, for a Hugging Face download",
    ),
)
MODELS_JSON = {
    "models[].name": "the model's name",
    "models[].bytes": "size of its files",
    "models[].files[].path": "a tagged file, symbolic links resolved",
    "models[].files[].bytes": "its size",
    "models[].left_out[].path": "what looks like weights beside them and is not tagged,",
    "models[].left_out[].why": "and why not",
}
JSON = {
    "attach": {
        "policy.name": "the policy",
        "policy.object": "the compiled object it was loaded from",
        "policy.hooks[]": "the hooks it defines",
        "policy.knobs.*": "each knob with its value",
        "engine.name": "struct_ops or agent",
        "engine.why": "why not a better one; empty for the best",
        "engine.not_honored[]": "what a policy may ask for and this engine does not do",
        "engine.missing_tracepoints[]": "of engine agent: events that nothing tells of here",
        "module_loaded_from": "the module file, null if it was loaded already or is not needed",
        **MODELS_JSON,
        "templates[].model": "the model that an I/O template is for",
        "templates[].file": "the template's file, null if it was derived now",
        "templates[].source": "derived, recorded or imported",
        "templates[].loader": "whose order it is",
        "templates[].tp": "tensor-parallel ranks of the load",
        "templates[].consumers": "processes that it is for",
        "templates[].extents": "ranges that it lists",
        "templates[].bytes": "bytes that it reads, each once",
        "templates[].fitting_bytes": "of these, those that fit the files",
        **ADMISSION_JSON,
        "undo": "the command that takes it all back",
    }
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of attach."""
    parser.add_argument(
        "policy",
        metavar="POLICY",
        help="name of a policy (`policy list`), or the path of a .bpf.c or .bpf.o file",
    )
    parser.add_argument(
        "paths",
        metavar="PATH",
        nargs="*",
        help="weight file, directory of shards, or Hugging Face snapshot or cache directory; "
        "without one the policy governs nothing until `tag`",
    )
    parser.add_argument(
        "--engine",
        choices=("auto", "struct_ops", "agent"),
        default="auto",
        help="what runs the policy (default: auto, the best this machine has)",
    )
    add_knobs(parser)
    parser.add_argument(
        "--budget",
        metavar="SIZE",
        type=_size,
        help="how much of its files the policy may have in the page cache, like 40GiB (sets the "
        "knob budget_mib)",
    )
    parser.add_argument(
        "--template",
        metavar="FILE",
        action="append",
        default=[],
        help="I/O template that the policy follows (`template derive`, `template record`), one for "
        "each PATH; auto: derived from the headers, none: the policy does without; by default auto "
        "where the policy takes one",
    )
    parser.add_argument(
        "--partial",
        action="store_true",
        help="take of a template what fits the files; without it one that does not fit is refused",
    )
    parser.add_argument(
        "--update",
        action="store_true",
        help="replace the attached policy of that name by this one, without a moment in which "
        "nobody decides (engine struct_ops); knobs that are not given stay as they are, files stay "
        "under it, hints and templates are handed on",
    )
    add_tag_options(parser)


def add_tag_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that attach and tag have in common: --model, --replace and --no-observe.

    Args:
        parser: the command's own parser.
    """
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="name of the model (default: that of the directory, file or repository)",
    )
    parser.add_argument(
        "--replace",
        action="store_true",
        help="take over files that another policy governs; without it they are an error",
    )
    parser.add_argument(
        "--no-observe",
        action="store_true",
        help="do not count what the readers of these files find in the page cache",
    )


def _size(text: str) -> int:
    from pagecache_bpf.units import parse_size

    try:
        return parse_size(text)
    except PagecacheError as error:
        raise argparse.ArgumentTypeError(f"{error.what}: {error.why}") from None


def run(args: argparse.Namespace, out: Output) -> int:
    """Check everything that needs no root, then change the system."""
    if args.update:
        from pagecache_bpf.cli.updating import update

        return update(args, out)
    from pagecache_bpf.cli.budget import budget_knob
    from pagecache_bpf.cli.tagging import Tagging, require_root, resolve_all
    from pagecache_bpf.cli.templating import choose
    from pagecache_bpf.cli.undo_log import Change, Steps
    from pagecache_bpf.kernel import kmod, libbpf
    from pagecache_bpf.policy import catalog
    from pagecache_bpf.policy.engines import Engines

    info = catalog.find(args.policy)
    knobs = budget_knob(info, args.budget, catalog.parse_knobs(info, dict(args.knob)))
    models = resolve_all(args.paths, args.model)
    templates = choose(info, models, args.template, args.partial, out)
    libbpf.library()
    require_root("attach a policy")
    with Change(f"pagecache-bpf attach {info.name}", out) as change:
        unload = args.engine != "agent" and not kmod.is_loaded()
        change.begin(Steps(undo=True, unload=unload))
        engine = _engine(args.engine, info)
        with Engines(observe=not args.no_observe) as engines:
            refuse_second(engines, info.name)
            tagging = Tagging(engines, info.name, args.replace)
            steps = tagging.steps_back(models, attached=True)
            steps.unload = unload
            change.begin(steps)
            admission = _attach_and_tag(
                engine, info, knobs, models, templates, tagging, args.budget
            )
        interrupts.ignore()
    values = {knob.name: knobs.get(knob.name, knob.default) for knob in info.knobs}
    undo = f"pagecache-bpf detach {info.name}"
    data = {
        "policy": {
            "name": info.name,
            "object": str(info.object if engine.object is None else engine.object),
            "hooks": engine.asked(info),
            "knobs": values,
        },
        "engine": {
            "name": engine.name,
            "why": engine.why,
            "not_honored": list(engine.not_honored),
            "missing_tracepoints": engine.missing,
        },
        "module_loaded_from": str(engine.loaded_from) if engine.loaded_from else None,
        "models": tagging.as_json(),
        "templates": [choice.as_json() for choice in templates],
        "admission": admission,
        "undo": undo,
    }

    def human(console: Console) -> None:
        units = {knob.name: knob.unit for knob in info.knobs}
        rows = [("attached", f"{info.name} (hooks: {', '.join(engine.asked(info))})")]
        if engine.loaded_from:
            rows.insert(0, ("loaded", f"module {engine.loaded_from}"))
        rows.append(("engine", engine.name + (f" ({engine.why})" if engine.why else "")))
        if engine.missing:
            rows.append(("lacking", f"events {', '.join(engine.missing)}"))
        rows += [("not done", text) for text in engine.not_honored if text.startswith("the hook")]
        rows += [("knob", f"{name} = {values[name]} {units[name]}".rstrip()) for name in knobs]
        rows += tagged_rows(tagging)
        rows += [("template", str(choice)) for choice in templates]
        rows += admission_rows(admission)
        if not models:
            rows.append(
                ("tagged", f"nothing yet; next: pagecache-bpf tag PATH --policy {info.name}")
            )
        rows.append(("undo", undo))
        console.print(pairs(rows))

    out.emit(data, human)
    return 0


@dataclass
class Engine:
    """The engine that was chosen, and why not a better one."""

    name: str
    why: str = ""
    loaded_from: Path | None = None
    object: Path | None = None
    missing: list[str] = field(default_factory=list)
    hooks: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    @property
    def not_honored(self) -> tuple[str, ...]:
        """What a policy may ask for and this engine does not do."""
        from pagecache_bpf.agent.unsupported import not_honored

        if self.name == "agent":
            return tuple(not_honored(self.hooks))
        return tuple(f"the hook {hook}: {_LEFT_OUT}" for hook in self.left_out)

    def asked(self, info: PolicyInfo) -> list[str]:
        """Return the hooks of a policy that are asked.

        Args:
            info: the policy.

        Returns:
            Their names, without those that the module has left out.
        """
        return [hook for hook in info.hooks if hook not in self.left_out]


#: Why a policy was attached without a hook that is optional for it.
_LEFT_OUT = "it cannot be had here (the kernel's log says why); the policy does without"


def _engine(wanted: str, info: PolicyInfo) -> Engine:
    """Make the engine ready.  Raises UnsupportedError when this machine has none."""
    from pagecache_bpf.kernel import kmod
    from pagecache_bpf.policy import agent_device, catalog

    why = ""
    if wanted != "agent":
        try:
            return Engine("struct_ops", loaded_from=kmod.load())
        except UnsupportedError as error:
            if wanted == "struct_ops":
                raise
            why = f"no struct_ops: {error.what}"
    engine = Engine("agent", why, object=catalog.agent_object(info), hooks=info.hooks)
    agent_device.start()
    return engine


def tagged_rows(tagging: Tagging) -> list[tuple[str, str]]:
    """Make the rows that tell people what was tagged.

    Args:
        tagging: the tagging after its last add().

    Returns:
        For each model a row with the number of its files and their size, and another for what was
        left out of it, if anything was; rows are (title, text), as cli.output.pairs() prints them.
    """
    from pagecache_bpf.cli.tagging import left_out_json, left_out_row

    rows = []
    for name, files in tagging.models.items():
        size = format_size(sum(file.size for file in files))
        rows.append(("tagged", f"model {name}: {plural(len(files), 'file')}, {size}"))
        if tagging.left_out[name]:
            rows.append(left_out_row(left_out_json(tagging.left_out[name])))
    return rows


def refuse_second(engines: Engines, name: str) -> None:
    """Refuse to attach a policy a second time.

    Args:
        engines: what is attached now, on both engines.
        name: the policy that is to be attached.

    Raises:
        PagecacheError: a policy of that name is attached; the error names `tag` and `detach`.
    """
    for engine, policy in engines.policies():
        if policy.name == name:
            # Engine agent cannot replace a policy.
            replace = f", replace it with `pagecache-bpf attach {name} --update`,"
            raise PagecacheError(
                f"the policy {name} is attached already",
                f"it governs {plural(policy.tags, 'file')}",
                f"Put more files under it with `pagecache-bpf tag PATH --policy {name}`"
                f"{replace if engine != 'agent' else ''} or end it with "
                f"`pagecache-bpf detach {name}`",
                f"{TROUBLESHOOTING}#is-attached-already",
            )


def _attach_and_tag(
    engine: Engine,
    info: PolicyInfo,
    knobs: dict[str, int],
    models: Sequence[Model],
    templates: Sequence[Chosen],
    tagging: Tagging,
    budget: int | None,
) -> list[dict[str, Any]]:
    """Attach, have the models admitted, tag them, and give the policy its templates."""
    from pagecache_bpf.cli.budget import admit
    from pagecache_bpf.cli.templating import give, sizes_of
    from pagecache_bpf.policy import loader

    engines = tagging.device
    sizes = sizes_of(templates)
    if engine.object is None:
        loader.attach(info, knobs, sizes=sizes)
        asked = [policy.hooks for _, policy in engines.policies() if policy.name == info.name]
        engine.left_out = tuple(hook for hook in info.hooks if asked and hook not in asked[0])
    else:
        # One that runs without a policy ends after a moment, so it may have gone since.
        engine.missing = engines.started_agent().attach(info, engine.object, knobs, sizes)
    admission = admit(engines, models, budget)
    for model in models:
        tagging.add(model)
    give(engines, info.name, templates)
    return admission
