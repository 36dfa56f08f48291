"""The strict comparison of a table of parameters with what a file and a model hold.

`match` compares both ways, collects every problem, and raises once, before anything is written. It
never reshapes, transposes or guesses; what it forgives is data in `visualbert.schema` (ties,
ignored names, older spellings) and the one deliberate step between a body and a body with a head.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from visualbert.checkpoint.tensors import DTYPES, Tensors
from visualbert.config import VisualBertConfig
from visualbert.errors import CheckpointError
from visualbert.schema import (
    BODY,
    DIMENSIONS,
    HEADS,
    IGNORED,
    PREFIX,
    RENAMED,
    TIED,
    Param,
    is_head,
    owner_of,
    parameters,
)


@dataclass(frozen=True)
class Match:
    """Where every parameter of an architecture comes from."""

    sources: dict[str, str]  # canonical name -> name in the file
    fresh: tuple[str, ...] = ()  # canonical names that are drawn anew
    ties: dict[str, str] = field(default_factory=dict)  # file's repeated tensor -> file's original
    ignored: tuple[str, ...] = ()  # the file's tensors that this model has no use for


def match(
    tensors: Tensors,
    architecture: str,
    config: VisualBertConfig,
    *,
    new_head: bool = False,
    backend: str = "",
) -> Match:
    """Find a tensor for every parameter of `architecture`, or say all that is wrong.

    Args:
        tensors: what the file holds.
        architecture: the class to be filled.
        config: its configuration.
        new_head: draw the head anew, whatever the file holds for it.
        backend: for the error's first line.

    Raises:
        CheckpointError: a tensor is missing, unexpected, of another shape, or not floating-point.
    """
    table = {p.name: p for p in parameters(architecture, config)}
    names = _canonical(tensors.specs, architecture)
    ignored = [names.pop(name) for name in list(names) if name in IGNORED]
    ties = _pop_ties(names, architecture)
    fresh = tuple(name for name, p in table.items() if new_head and is_head(p))
    heads_of_others = {
        name for name in names if (new_head or architecture == BODY) and owner_of(name) is not None
    }
    ignored += [names.pop(name) for name in heads_of_others - (set(table) - set(fresh))]
    wanted = {name: p for name, p in table.items() if name not in fresh}

    problems = [
        *_missing(name for name in wanted if name not in names),
        *_unexpected(name for name in names if name not in wanted),
        *_mismatched(tensors, wanted, names, config),
    ]
    if problems:
        raise CheckpointError(
            _report(tensors.label, architecture, backend, problems, names, wanted)
        )
    return Match({name: names[name] for name in wanted}, fresh, ties, tuple(sorted(ignored)))


def check_ties(tensors: Tensors, found: Match) -> None:
    """Read every repeated tensor and compare it with its original.

    Raises:
        CheckpointError: they differ, so one of the two would be lost.
    """
    for repeated, original in found.ties.items():
        if not np.array_equal(tensors.read(repeated), tensors.read(original), equal_nan=True):
            raise CheckpointError(
                f"{tensors.label!r}: {repeated} differs from {original}, but VisualBERT's "
                "decoder is tied to its word table; untie neither, or drop the decoder from the file"
            )


def _canonical(names: Iterable[str], architecture: str) -> dict[str, str]:
    """Today's name of every tensor, with or without the body's prefix as `architecture` has it."""
    renamed = {_rename(name): name for name in names}
    headless = not any(name.startswith(PREFIX) for name in renamed)
    if architecture == BODY:
        return {name.removeprefix(PREFIX): original for name, original in renamed.items()}
    if headless:
        return {
            name if owner_of(name) else PREFIX + name: original
            for name, original in renamed.items()
        }
    return renamed


def _rename(name: str) -> str:
    for old, new in RENAMED.items():
        if name == old or name.endswith("." + old):
            return name.removesuffix(old) + new
    return name


def _pop_ties(names: dict[str, str], architecture: str) -> dict[str, str]:
    ties = {}
    for repeated, original in TIED.items():
        original = original.removeprefix(PREFIX) if architecture == BODY else original
        if repeated in names and original in names:
            ties[names.pop(repeated)] = names[original]
        elif repeated in names and architecture == BODY:
            names.pop(repeated)
    return ties


def _missing(names: Iterable[str]) -> list[tuple[str, str]]:
    return [("missing", line) for line in _grouped(names)]


def _unexpected(names: Iterable[str]) -> list[tuple[str, str]]:
    by_owner: dict[str | None, list[str]] = {}
    for name in names:
        by_owner.setdefault(owner_of(name), []).append(name)
    return [
        ("unexpected", line + (f": the head of {owner}" if owner else ""))
        for owner, group in by_owner.items()
        for line in _grouped(group)
    ]


def _grouped(names: Iterable[str], shown: int = 1) -> list[str]:
    """One line: the first parent with its leaves in braces, and how many more there are."""
    groups: dict[str, list[str]] = {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        groups.setdefault(parent, []).append(leaf)
    if not groups:
        return []
    parts = []
    for parent, leaves in list(groups.items())[:shown]:
        leaf = leaves[0] if len(leaves) == 1 else "{" + ", ".join(leaves) + "}"
        parts.append(f"{parent}.{leaf}" if parent else leaf)
    rest = sum(len(leaves) for leaves in list(groups.values())[shown:])
    return [", ".join(parts) + (f" and {rest} more" if rest else "")]


def _mismatched(
    tensors: Tensors,
    wanted: Mapping[str, Param],
    names: Mapping[str, str],
    config: VisualBertConfig,
) -> list[tuple[str, str]]:
    problems = []
    blamed: dict[str, int] = {}
    for name, param in wanted.items():
        if name not in names:
            continue
        spec, shape = tensors.specs[names[name]], param.shape(config)
        if spec.shape != shape:
            field_, found = _guilty(param, shape, spec.shape)
            if blamed.get(field_) == found and field_:
                continue  # one wrong field is one problem, however many tensors show it
            blamed[field_] = found
            problems.append(
                (
                    "mismatched",
                    f"{name}: file {spec.shape}, config {shape}{_blame(field_, config, found)}",
                )
            )
        elif spec.dtype not in DTYPES:
            problems.append(
                ("mismatched", f"{name}: file {spec.dtype}, expected one of {', '.join(DTYPES)}")
            )
    return problems


def _guilty(param: Param, want: tuple[int, ...], have: tuple[int, ...]) -> tuple[str, int]:
    if len(want) != len(have):
        return "", 0
    symbol, found = next(
        (s, h) for s, w, h in zip(param.symbols.split(), want, have, strict=True) if w != h
    )
    return DIMENSIONS.get(symbol, ""), found


def _blame(field_: str, config: VisualBertConfig, found: int) -> str:
    return f";\n{field_} is {getattr(config, field_)}, the file says {found}" if field_ else ""


def _report(
    label: str,
    architecture: str,
    backend: str,
    problems: list[tuple[str, str]],
    names: Mapping[str, str],
    wanted: Mapping[str, Param],
) -> str:
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
    where = f"{architecture} ({backend})" if backend else architecture
    lines = [f"cannot load {where} from {label!r}: {count}"]
    indent = " " * 14
    lines += [f"  {kind:<11} {text}".replace("\n", "\n" + indent) for kind, text in problems]
    bad_heads = [n for n in wanted if is_head(wanted[n]) and n not in names] + [
        n for n in names if n not in wanted and owner_of(n)
    ]
    mismatched_head = any(t.split(":")[0] in HEAD_NAMES for k, t in problems if k == "mismatched")
    if architecture != BODY and (bad_heads or mismatched_head):
        lines.append("To train a new head on this body, pass new_head=True.")
    return "\n".join(lines)


HEAD_NAMES = frozenset(p.name for head in HEADS.values() for p in head)
