# SPDX-License-Identifier: Apache-2.0
"""Which policies there are and what each of them declares.

Nothing is listed anywhere: policies are found by their file names, purpose and limits are the
comment at the top of the source, knobs come from the object's type information and data, hooks
from its table.  This needs neither root nor libbpf.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pagecache_bpf.errors import PagecacheError, UsageError
from pagecache_bpf.kernel.btf import Btf, BtfError, BtfKind
from pagecache_bpf.units import did_you_mean

if TYPE_CHECKING:
    from pagecache_bpf.kernel.elf import Elf

PACKAGE = Path(__file__).resolve().parents[1]
SOURCE_TREE = PACKAGE.parent
TABLE_SECTION = ".struct_ops.link"
TABLE_TYPE = "pagecache_ops"
RODATA = ".rodata"
TAG_PREFIX = "pagecache:"

_OBJECT, _SOURCE = ".bpf.o", ".bpf.c"
_SAFE_NAME = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True)
class Knob:
    """A number that can be set when a policy is attached.

    Attributes:
        name: the name of the policy's variable.
        ctype: the variable's type in C.
        default: its value unless it is set.
        unit: what it counts, such as "pages"; "" for a plain number.
        minimum: the least value allowed.
        maximum: the greatest value allowed.
        help: what it does, for people.
    """

    name: str
    ctype: str
    default: int
    unit: str
    minimum: int
    maximum: int
    help: str


@dataclass(frozen=True)
class PolicyInfo:
    """What is known of a policy before it is loaded.

    Attributes:
        name: the policy's name.
        purpose: what it does, in a line; the texts are "" where the source is not at hand.
        when: when to use it.
        limits: what it cannot do.
        hooks: names of the hooks that it has; known only of a compiled policy, as are knobs and
            maps.
        knobs: numbers that can be set when it is attached.
        source: its C source; None: not at hand.
        object: its object for engine struct_ops; None: it is not compiled.
        maps: names of its maps.
    """

    name: str
    purpose: str
    when: str
    limits: str
    hooks: tuple[str, ...]
    knobs: tuple[Knob, ...]
    source: Path | None
    object: Path | None
    maps: tuple[str, ...] = ()

    @property
    def takes_templates(self) -> bool:
        """Whether the policy includes template.bpf.h, so that it can be given I/O templates."""
        return "template_steps" in self.maps


def discover() -> list[PolicyInfo]:
    """Return the policies that come with this package.

    Returns:
        The policies, by name.

    Raises:
        PagecacheError: an object is damaged.
    """
    return [_shipped(name) for name in names()]


def find(name_or_path: str) -> PolicyInfo:
    """Find a policy by name or by file.

    The object of a compiled file lies in a temporary directory and goes when this process ends.

    Args:
        name_or_path: the name of a shipped policy; or a file, NAME.bpf.o, or NAME.bpf.c which is
            compiled now.

    Returns:
        What the policy declares, and where its object is.

    Raises:
        UsageError: there is no such policy or file, or it is no policy.
        CompileError: the compiler refuses the file.
        UnsupportedError: there is no compiler.
        PagecacheError: the policy comes with this package and is not built, or its object is
            damaged.
    """
    known = names()
    if name_or_path in known:
        info = _shipped(name_or_path)
        if info.object is None:
            raise PagecacheError(
                f"the policy {info.name} cannot be used", "it is not built", "Run `make bpf`"
            )
        return info
    if not ("/" in name_or_path or name_or_path.endswith((_OBJECT, _SOURCE, ".o", ".c"))):
        raise UsageError(
            f"there is no policy {name_or_path}",
            f"known are {', '.join(known)}" if known else "none is built",
            did_you_mean(name_or_path, known)
            or "Give one of these, or the path of a .bpf.c or .bpf.o file"
            if known
            else "Run `make bpf`, or give the path of a .bpf.c or .bpf.o file",
        )
    path = Path(name_or_path)
    if not path.is_file():
        why = "it is not a file" if path.exists() else "it does not exist"
        raise UsageError(f"there is no policy in {path}", why, "Check the path")
    if path.suffix == ".o":
        source = path.with_name(path.name.removesuffix(".o") + ".c")
        return read_object(path, source if source.is_file() else None)
    if path.suffix == ".c":
        from pagecache_bpf.policy.compiler import compile_policy

        return read_object(compile_policy(path), path)
    raise UsageError(f"{path} is not a policy", "its name ends in neither .bpf.c nor .bpf.o")


def agent_object(info: PolicyInfo) -> Path:
    """Return a policy's object for engine `agent`; it is compiled now if need be.

    Args:
        info: what find() returned.

    Returns:
        The object's path.

    Raises:
        UnsupportedError: there is no compiler.
        CompileError: the compiler refuses the source.
        UsageError: there is only an object for engine struct_ops.
    """
    if info.object is not None:
        built = info.object.parent / "agent" / f"{info.object.name}"
        if built.is_file():
            return built
    if info.source is None:
        raise UsageError(
            f"the policy {info.name} cannot run on engine agent",
            f"{info.object} is compiled for engine struct_ops only",
            "Give its .bpf.c",
        )
    from pagecache_bpf.policy.compiler import compile_policy

    return compile_policy(info.source, engine="agent")


def _object_dirs() -> list[Path]:
    """Return where objects are: of the installed package, of a source tree."""
    return [PACKAGE / "bpf", SOURCE_TREE / "build" / "bpf"]


def _source_dirs() -> list[Path]:
    """Return where sources are: of the installed package, of a source tree."""
    return [PACKAGE / "bpf", SOURCE_TREE / "bpf" / "policies"]


def _first(directories: list[Path], name: str) -> Path | None:
    """Return the first file of a name in some directories."""
    return next((path for at in directories if (path := at / name).is_file()), None)


def names() -> list[str]:
    """Return the names of the policies that come with this package.

    Returns:
        The names of all sources, sorted; an object without a source is no policy of ours.
    """
    sources = (path for at in _source_dirs() for path in at.glob("*" + _SOURCE))
    return sorted({path.name.removesuffix(_SOURCE) for path in sources})


def _shipped(name: str) -> PolicyInfo:
    """Describe a policy of this package; without an object only its texts are known."""
    source = _first(_source_dirs(), name + _SOURCE)
    obj = _first(_object_dirs(), name + _OBJECT)
    if obj:
        return read_object(obj, source)
    texts = _texts(source)
    return PolicyInfo(name, **texts, hooks=(), knobs=(), source=source, object=None, maps=())


def read_object(path: Path, source: Path | None = None) -> PolicyInfo:
    """Read what a compiled policy declares.

    Args:
        path: the object.
        source: its C source, for the texts.

    Returns:
        What it declares.

    Raises:
        UsageError: the file is damaged or no policy.
    """
    from pagecache_bpf.kernel.elf import Elf  # a quarter of what `status` would import

    with Elf(path) as elf:
        if elf.machine != "EM_BPF":
            raise UsageError(f"{path} is not a policy", f"it is for {elf.machine}, not for BPF")
        try:
            btf = elf.btf()
            name, hooks = _table(elf, btf)
            knobs = _knobs(elf, btf)
            maps = tuple(variable.name for variable in btf.variables(".maps"))
        except BtfError as error:
            raise UsageError(f"{path} is damaged", str(error), "Build it anew") from error
    texts = _texts(source)
    return PolicyInfo(
        name, **texts, hooks=hooks, knobs=knobs, source=source, object=path, maps=maps
    )


def _table(elf: Elf, btf: Btf) -> tuple[str, tuple[str, ...]]:
    """Read the policy's name and its hooks from the struct_ops table.  Raises UsageError."""
    data = elf.section(TABLE_SECTION)
    variables = btf.variables(TABLE_SECTION)
    if data is None or not variables:
        raise UsageError(
            f"{elf.path} is not a policy",
            f"it has no table (section {TABLE_SECTION})",
            "End it with PAGECACHE_POLICY(name, ...)",
        )
    if len(variables) != 1 or btf.name(btf.resolve(variables[0].type_id)) != TABLE_TYPE:
        raise UsageError(
            f"{elf.path} is not a policy", f"its table has to be one struct {TABLE_TYPE}"
        )
    fields = btf.fields(btf.resolve(variables[0].type_id))
    members = {field.offset: field.name for field in fields}
    relocated = (members.get(place.offset) for place in elf.relocations(TABLE_SECTION))
    hooks = {hook for hook in relocated if hook}
    at = next((field for field in fields if field.name == "name"), None)
    raw = data[at.offset : at.offset + at.size] if at else b""
    name = raw.split(b"\0")[0].decode("utf-8", "replace")
    # The name becomes a directory in bpffs, which takes no dots.
    if not _SAFE_NAME.fullmatch(name):
        raise UsageError(
            f"{elf.path} cannot be used",
            f"its name {name!r} is not made of letters, digits, _ and - only",
        )
    return name, tuple(field.name for field in fields if field.name in hooks)


def _knobs(elf: Elf, btf: Btf) -> tuple[Knob, ...]:
    """Read the knobs: variables of .rodata with our tags, in the order of their addresses."""
    data, symbols = elf.section(RODATA) or b"", elf.symbols()
    knobs = []
    for variable in btf.variables(RODATA):
        tags = knob_tags(btf, variable.var_id)
        symbol = symbols.get(variable.name)
        if not tags or not symbol:
            continue
        # The object is not linked, so it is the symbol that knows where the variable is.
        size = btf.size(variable.type_id)
        raw = data[symbol.value : symbol.value + size]
        signed = btf.int_signed(variable.type_id)
        if symbol.section != RODATA or len(raw) != size:
            raise UsageError(f"{elf.path} is damaged", f"knob {variable.name} has no value")
        knob = Knob(
            name=variable.name,
            ctype=_type_name(btf, variable.type_id),
            default=int.from_bytes(raw, "little", signed=signed),
            unit=tags.get("unit", ""),
            minimum=_bound(elf, variable.name, tags, "min"),
            maximum=_bound(elf, variable.name, tags, "max"),
            help=tags.get("help", ""),
        )
        knobs.append((symbol.value, knob))
    return tuple(knob for _, knob in sorted(knobs, key=lambda placed: placed[0]))


def knob_tags(btf: Btf, var_id: int) -> dict[str, str]:
    """Return what PAGECACHE_KNOB has noted about a variable.

    Args:
        btf: the object's type information.
        var_id: the number of the variable in it.

    Returns:
        Texts by what they are about (unit, range, help); none if it is no knob.
    """
    pairs = (tag.removeprefix(TAG_PREFIX) for tag in btf.tags(var_id) if tag.startswith(TAG_PREFIX))
    return dict(pair.partition("=")[::2] for pair in pairs)


def _bound(elf: Elf, knob: str, tags: Mapping[str, str], which: str) -> int:
    """Read a knob's minimum or maximum from its tags.  Raises UsageError."""
    try:
        return int(tags[which].rstrip("uUlL"), 0)
    except (KeyError, ValueError):
        raise UsageError(
            f"{elf.path} cannot be used", f"its knob {knob} has no {which}imum that is a number"
        ) from None


def _type_name(btf: Btf, type_id: int) -> str:
    """Return the name that a type was declared with, without const and volatile."""
    while btf.kind(type_id) in (BtfKind.CONST, BtfKind.VOLATILE):
        type_id = btf.target(type_id)
    return btf.name(type_id)


def _texts(source: Path | None) -> dict[str, str]:
    """Read purpose, when to use it and limits from the comment at the top of the source."""
    text = source.read_text(encoding="utf-8", errors="replace") if source else ""
    comment = re.search(r"/\*(.*?)\*/", text, re.S)
    lines = comment.group(1).splitlines() if comment else []
    body = "\n".join(re.sub(r"^\s*\*", "", line).strip() for line in lines)
    patterns = {
        "purpose": r"^\S+ - (.*)$",
        "when": r"^When to use:(.*?)(?=\n\n|\n[A-Z][a-z ]*:|\Z)",
        "limits": r"^Limits:(.*?)(?=\n\n|\n[A-Z][a-z ]*:|\Z)",
    }
    texts = {}
    for key, pattern in patterns.items():
        flags = re.M if key == "purpose" else re.M | re.S
        found = re.search(pattern, body, flags)
        texts[key] = " ".join(found.group(1).split()) if found else ""
    return texts


def parse_knobs(info: PolicyInfo, settings: Mapping[str, str]) -> dict[str, int]:
    """Read settings that a person has written, and check them against the policy's knobs.

    Numbers may be written in decimal or as 0x...; their unit is the knob's.

    Args:
        info: the policy.
        settings: texts by the knobs' names.

    Returns:
        Numbers by the knobs' names.

    Raises:
        UsageError: there is no such knob, a text is no number, or one is out of range.
    """
    knobs = {name: _knob(info, name) for name in settings}
    return {knobs[name].name: _value(knobs[name], text) for name, text in settings.items()}


def check_knobs(info: PolicyInfo, values: Mapping[str, int]) -> None:
    """Check numbers against the policy's knobs.

    Args:
        info: the policy.
        values: numbers by the knobs' names.

    Raises:
        UsageError: there is no such knob, or a number is out of range.
    """
    for name, value in values.items():
        _check_range(_knob(info, name), value)


def _knob(info: PolicyInfo, name: str) -> Knob:
    # People type the hyphens of options; C has none.
    """Find a knob by its name, which may have hyphens.  Raises UsageError."""
    wanted = name.replace("-", "_")
    for knob in info.knobs:
        if knob.name == wanted:
            return knob
    names = ", ".join(knob.name for knob in info.knobs)
    raise UsageError(
        f"the policy {info.name} has no knob {name}",
        f"its knobs are {names}" if names else "it has no knobs",
        did_you_mean(name, [knob.name for knob in info.knobs]),
    )


def _value(knob: Knob, text: str) -> int:
    """Read a number that a person has written for a knob.  Raises UsageError."""
    try:
        value = int(text.strip(), 0)
    except ValueError:
        raise UsageError(
            f"{text!r} is not a value for the knob {knob.name}",
            f"it takes a whole number ({knob.unit})",
        ) from None
    _check_range(knob, value)
    return value


def _check_range(knob: Knob, value: int) -> None:
    """Check a number against the bounds of a knob.  Raises UsageError."""
    if not knob.minimum <= value <= knob.maximum:
        raise UsageError(
            f"{value} is out of range for the knob {knob.name}",
            f"it takes {knob.minimum} to {knob.maximum} {knob.unit}".rstrip(),
        )
