"""Answer vocabularies: which answer each label of a VQA head stands for.

The 3,129 labels of the published VQA model have Pythia's order. LXMERT's list holds the same
answers in another one, in which hardly any label means the same, so a list is identified before it
is used: by its digest, and, where it was written anew, by where it has a few answers.
"""

import hashlib
import json
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from visualbert.errors import HubError, InputError

if TYPE_CHECKING:
    from visualbert.config import VisualBertConfig

_MOST = 64 * 2**20  # bytes of a file
_UNNAMED = re.compile(r"LABEL_\d+")


class Order(NamedTuple):
    """A known list: its file, its digests, its length, and the labels of a few answers."""

    title: str
    file: str
    digests: tuple[str, ...]  # MD5 of the file, with and without its last newline
    labels: int
    marks: dict[str, int]


ORDERS = {
    "pythia-vqa": Order(
        "Pythia's order",
        "answers_vqa.txt",
        ("971cad957919ff2cf1f5f1c70bef4d90",),
        3129,
        {"<unk>": 0, "1": 3, "2": 95, "no": 1840, "white": 3038, "yes": 3117},
    ),
    "lxmert-vqa": Order(
        "LXMERT's order",
        "trainval_label2ans.json",
        ("1166604b5dc23aa3bcd8a1024d29146b",),
        3129,
        {"": 0, "1": 2195, "2": 841, "no": 1403, "white": 3006, "yes": 425},
    ),
}


class Answers(NamedTuple):
    """The answers by label, where they are from, and which of `ORDERS` they have, if any."""

    words: tuple[str, ...]
    label: str
    order: str = ""


def read_answers(source: str | os.PathLike) -> Answers:
    """The answers in a file: one a line, or a JSON list, or a JSON object that numbers them.

    Args:
        source: the file; or, on the Hub, `owner/name/path/of/the/file`.

    Raises:
        InputError: there is no such file, or it holds no list of answers.
        HubError: the Hub did not give it.
    """
    path = _find(os.fspath(source))
    try:
        with open(path, "rb") as file:
            data = file.read(_MOST + 1)
    except (OSError, ValueError) as error:  # a name that no file can have
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{source}: cannot be read: {reason}") from None
    if len(data) > _MOST:
        raise InputError(f"{source}: larger than any list of answers")
    words = _parse(str(source), data)
    digests = {hashlib.md5(x, usedforsecurity=False).hexdigest() for x in (data, data + b"\n")}
    known = (name for name, order in ORDERS.items() if digests & set(order.digests))
    return Answers(words, str(source), next(known, "") or identify(words))


def as_answers(given: str | os.PathLike | Sequence[str]) -> Answers:
    """The answers in a list, or in a file as `read_answers` takes it.

    Raises:
        InputError, HubError: as for `read_answers`.
    """
    if isinstance(given, (str, os.PathLike)):
        return read_answers(given)
    words = _checked("answers", given)
    return Answers(words, "answers", identify(words))


def identify(words: Sequence[str]) -> str:
    """Which of `ORDERS` a list has, by its length and a few answers; "" for none."""
    for name, order in ORDERS.items():
        if len(words) == order.labels and all(words[n] == w for w, n in order.marks.items()):
            return name
    return ""


def choose_answers(
    config: "VisualBertConfig", wanted: str, given: Answers | None, model: str
) -> Answers:
    """The answers of a model: those given, if they fit it, or the names in its configuration.

    Args:
        config: of the model.
        wanted: which of `ORDERS` it was trained with; "" where nobody knows.
        given: what the user brought.
        model: what messages call it.

    Raises:
        InputError: they are of the other order or of another length, or there are none.
    """
    if given is None:
        names = tuple((config.id2label or {}).values())
        if names and not all(map(_UNNAMED.fullmatch, names)):
            return Answers(names, f"{model}'s configuration", identify(names))
        hint = ORDERS[wanted].file if wanted else "a file with one answer a line"
        raise InputError(
            f"{model} does not say what its {config.num_labels} labels mean; pass its answers "
            f"({hint}): answers=…, or --answers on the command line"
        )
    if given.order and wanted and given.order != wanted:
        raise InputError(
            f"{given.label} has {ORDERS[given.order].title}, and {model} was trained with "
            f"{ORDERS[wanted].title}, in which its labels mean other answers; pass "
            f"{ORDERS[wanted].file}"
        )
    if len(given.words) != config.num_labels:
        raise InputError(
            f"{given.label} holds {len(given.words)} answers, and {model} has "
            f"{config.num_labels} labels"
        )
    if wanted and not given.order:
        warnings.warn(
            f"{given.label} is not the known {ORDERS[wanted].file}; whether its order is that of "
            f"{model} cannot be told",
            stacklevel=3,
        )
    return given


def _find(name: str) -> Path:
    path = Path(name)
    if path.exists() or path.is_absolute() or name.startswith((".", "~")) or name.count("/") < 2:
        return path
    owner, repository, file = name.split("/", 2)
    from visualbert.hub import fetch

    try:
        return fetch(f"{owner}/{repository}", None, [file], "file") / file
    except ValueError:
        return path
    except HubError as error:
        raise HubError(f"{name}: no such file, and as a file on the Hub: {error}") from None


def _parse(label: str, data: bytes) -> tuple[str, ...]:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{label}: not text, so there are no answers in it") from None
    if not text.lstrip().startswith(("[", "{")):
        words = [line.strip() for line in text.splitlines()]
        return _checked(label, words[:-1] if words and not words[-1] else words)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{label}: not readable as JSON: {error}") from None
    if isinstance(found, dict):
        found = _numbered(label, found)
    return _checked(label, found)


def _numbered(label: str, found: dict) -> list:
    """The answers of `{answer: number}` or `{number: answer}`, in order."""
    pairs = [(n, w) if isinstance(n, int) else (w, n) for w, n in found.items()]
    try:
        numbers = {int(number): word for number, word in pairs}
        return [numbers[n] for n in range(len(found))]
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{label}: the answers are not numbered from 0 without a gap") from None


def _checked(label: str, words: Sequence[object]) -> tuple[str, ...]:
    if not isinstance(words, Sequence) or not words or not all(isinstance(w, str) for w in words):
        raise InputError(f"{label}: expected one answer a line, or a JSON list of answers")
    return tuple(map(str, words))
