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
    IGNORED,
    PREFIX,
    RENAMED,
    TIED,
    VARIANTS,
    Param,
    is_head,
    owner_of,
    owners_of,
    parameters,
)

_SHOWN_LEAVES = 4
_SHOWN_MISMATCHES = 6
_HEAD_NAMES = frozenset(
    p.name for heads in VARIANTS.values() for head in heads.values() for p in head
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
    names, doubled = _canonical(tensors.specs, architecture)
    ignored = [names.pop(name) for name in list(names) if name in IGNORED]
    ties = _pop_ties(names, table, architecture)
    fresh = tuple(name for name, p in table.items() if new_head and is_head(p))
    wanted = {name: p for name, p in table.items() if name not in fresh}
    if new_head or architecture == BODY:
        unneeded = [n for n in names if n not in wanted and owner_of(TIED.get(n, n))]
        ignored += [names.pop(name) for name in unneeded]

    layers, explained = _wrong_layers(names, wanted, config)
    heads, of_heads = _wrong_head(names, wanted, architecture, config)
    explained |= of_heads
    problems = [
        *doubled,
        *_missing(n for n in wanted if n not in names and n not in explained),
        *_unexpected({n: names[n] for n in names if n not in wanted and n not in explained}),
        *layers,
        *heads,
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
                f"{tensors.label!r}: {repeated} differs from {original}, of which VisualBERT's "
                "tied decoder can keep only one; remove the one that was not trained from the file"
            )


def _canonical(
    names: Iterable[str], architecture: str
) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """The file's name of every tensor by today's, with or without the body's prefix as
    `architecture` has it; and a problem for every two that mean the same.
    """
    found: dict[str, str] = {}
    doubled = []
    names = list(names)
    headless = not any(name.startswith(PREFIX) for name in names)
    for name in names:
        today = _rename(name)
        if architecture == BODY:
            today = today.removeprefix(PREFIX)
        elif headless and not owner_of(TIED.get(today, today)):
            today = PREFIX + today.removeprefix(PREFIX)
        if today in found:
            doubled.append(("doubled", f"{name} and {found[today]} are the same parameter"))
        found.setdefault(today, name)
    return found, doubled


def _rename(name: str) -> str:
    for old, new in RENAMED.items():
        if name == old or name.endswith("." + old):
            return name.removesuffix(old) + new
    return name


def _pop_ties(names: dict[str, str], table: Iterable[str], architecture: str) -> dict[str, str]:
    """Take repeated tensors out of `names`; one that is the only copy goes under the original's
    name.
    """
    ties = {}
    for repeated, original in TIED.items():
        original = original.removeprefix(PREFIX) if architecture == BODY else original
        if repeated in names and original in names:
            ties[names.pop(repeated)] = names[original]
        elif repeated in names and original in table:
            names[original] = names.pop(repeated)
    return ties


def _missing(names: Iterable[str]) -> list[tuple[str, str]]:
    return [("missing", line) for line in _grouped(names)]


def _unexpected(names: Mapping[str, str]) -> list[tuple[str, str]]:
    """Names as the file has them, by whose head they are."""
    by_owner: dict[str, list[str]] = {}
    for name, original in names.items():
        by_owner.setdefault(" or ".join(owners_of(name)), []).append(original)
    return [
        ("unexpected", line + (f": the head of {owners}" if owners else ""))
        for owners, group in by_owner.items()
        for line in _grouped(group)
    ]


def _grouped(names: Iterable[str]) -> list[str]:
    """One line: the first parent with its leaves in braces, and how many more there are."""
    groups: dict[str, list[str]] = {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        groups.setdefault(parent, []).append(leaf)
    if not groups:
        return []
    parent, leaves = next(iter(groups.items()))
    shown = leaves[:_SHOWN_LEAVES]
    rest = sum(map(len, groups.values())) - len(shown)
    leaf = shown[0] if len(shown) == 1 else "{" + ", ".join(shown) + "}"
    return [(f"{parent}.{leaf}" if parent else leaf) + (f" and {rest} more" if rest else "")]


def _wrong_layers(
    names: Iterable[str], wanted: Iterable[str], config: VisualBertConfig
) -> tuple[list[tuple[str, str]], set[str]]:
    """Problems of whole layers, which are one field's fault, and the names they account for."""
    problems, explained = [], set()
    have, want = _layers(names), _layers(wanted)
    if have and max(have) != max(want, default=-1):
        count = max(have) + 1
        blame = _blame("num_hidden_layers", config, count)
        layers = f"{count} layer{'s' * (count > 1)}"
        problems.append(("mismatched", f"encoder: the file has {layers}{blame}"))
        beyond = range(min(count, config.num_hidden_layers), 1 + max([*have, *want]))
        explained |= {n for i in beyond for n in (*have.get(i, ()), *want.get(i, ()))}
    extra, asked = (_starting(group, "additional_layer.") for group in (names, wanted))
    if bool(extra) != bool(asked):
        blame = _blame("bypass_transformer", config, bool(extra))
        has = "has one" if extra else "has none"
        problems.append(("mismatched", f"additional_layer: the file {has}{blame}"))
        explained |= {*extra, *asked}
    return problems, explained


def _wrong_head(
    names: Iterable[str], wanted: Iterable[str], architecture: str, config: VisualBertConfig
) -> tuple[list[tuple[str, str]], set[str]]:
    """The problem of a head that another `classifier_head` has, and the names it accounts for."""
    have, want = {n for n in names if owner_of(n)}, {n for n in wanted if owner_of(n)}
    for kind, heads in VARIANTS.items():
        other = have.intersection(p.name for p in heads.get(architecture, ()))
        if other and want and not have & want:
            blame = _blame("classifier_head", config, kind)
            return [("mismatched", f"cls: the file has the {kind} head{blame}")], other | want
    return [], set()


def _starting(names: Iterable[str], start: str) -> list[str]:
    return [name for name in names if name.removeprefix(PREFIX).startswith(start)]


def _layers(names: Iterable[str]) -> dict[int, list[str]]:
    """Names by the number of the encoder's layer."""
    layers: dict[int, list[str]] = {}
    for name in _starting(names, "encoder.layer."):
        number = name.removeprefix(PREFIX).split(".")[2]
        if number.isdecimal() and len(number) < 5:
            layers.setdefault(int(number), []).append(name)
    return layers


def _mismatched(
    tensors: Tensors,
    wanted: Mapping[str, Param],
    names: Mapping[str, str],
    config: VisualBertConfig,
) -> list[tuple[str, str]]:
    problems = []
    blamed: dict[str, int] = {}
    transposed, untyped = [], []
    for name, param in wanted.items():
        if name not in names:
            continue
        spec, shape = tensors.specs[names[name]], param.shape(config)
        if spec.dtype not in DTYPES:
            untyped.append(name)
        elif spec.shape == shape:
            continue
        elif spec.shape == shape[::-1]:
            transposed.append(name)
        else:
            field_, found = _guilty(param, shape, spec.shape)
            if field_ and blamed.get(field_) == found:
                continue  # one wrong field is one problem, however many tensors show it
            blamed[field_] = found
            blame = _blame(field_, config, found)
            problems.append(f"{name}: file {spec.shape}, config {shape}{blame}")
    if len(problems) > _SHOWN_MISMATCHES:
        rest = len(problems) - _SHOWN_MISMATCHES
        problems[_SHOWN_MISMATCHES:] = [f"and {rest} more tensors of the wrong shape"]
    problems += [
        f"{line}: file {tensors.specs[names[untyped[0]]].dtype}, expected one of "
        f"{', '.join(DTYPES)}"
        for line in _grouped(untyped)
    ]
    problems += [f"{line}: transposed; a file holds (out, in)" for line in _grouped(transposed)]
    return [("mismatched", problem) for problem in problems]


def _guilty(param: Param, want: tuple[int, ...], have: tuple[int, ...]) -> tuple[str, int]:
    """The field that the first different axis belongs to, and the axis's size in the file."""
    if len(want) != len(have):
        return "", 0
    symbol, found = next(
        (s, h) for s, w, h in zip(param.symbols.split(), want, have, strict=True) if w != h
    )
    return DIMENSIONS.get(symbol, ""), found


def _blame(field_: str, config: VisualBertConfig, found: int | str) -> str:
    if not field_:
        return ""
    name = "hidden_size / num_attention_heads" if field_ == "head_size" else field_
    return f";\n{name} is {getattr(config, field_)!r}, the file says {found!r}"


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
    mismatched_head = any(text.split(":")[0] in _HEAD_NAMES for _, text in problems)
    if architecture != BODY and (bad_heads or mismatched_head):
        lines.append("To train a new head on this body, pass new_head=True.")
    return "\n".join(lines)
