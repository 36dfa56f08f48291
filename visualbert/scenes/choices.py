"""Questions about a scene with four answers and four reasons, one right of each, as VCR's.

Wrong answers are about what is in the scene where that is possible, and wrong reasons have the form
of the right one: none can be told by its words, and none is right as well. A reason says what the
right answer can be known by: where the thing lies, or what was counted. Things that are named by
their colour or place alone are mentioned as VCR does it, by their index: `the red [2]`.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from visualbert.scenes.draw import COLOURS, SIZES, Scene, Thing
from visualbert.scenes.questions import SIDES, beside, describe, pick, unsure
from visualbert.scenes.statements import SUPERLATIVES, WORDS, What, article

_COLOUR_WORDS = ("colour", "color")
_ENDINGS = ("are there", "do you see", "are in the picture", "are in the image")
_TRIES = 12
# How often a count is asked for: what is rare in scenes more often, lest words give it away.
_COLOURED = {1: 1, 2: 2, 3: 9, 4: 27}
_SIZED = {1: 1, 2: 1, 3: 1, 4: 2}
_TWO = 0.93  # share of draws in which two of a colour are left out, being what is seen most


class Problem(NamedTuple):
    """A question and its choices; `[2]` in a text is the scene's third thing."""

    kind: str
    question: str
    answers: tuple[str, ...]
    answer: int  # index of the right one
    reasons: tuple[str, ...]
    reason: int


class _Choices(NamedTuple):
    right: str
    wrong: tuple[str, ...]


_Made = tuple[str, _Choices, _Choices]  # question, answers, reasons


def _tagged(name: str, thing: Thing, scene: Scene) -> str:
    """`the red digit` as `the red [2]`."""
    words = name.split()
    tag = f"[{scene.things.index(thing)}]"
    return " ".join(tag if word in ("digit", "number") else word for word in words)


def _three(rng: np.random.Generator, first: Sequence, rest: Sequence) -> tuple | None:
    """Three different ones, of the `rest` only where `first` has too few."""
    found = [options[i] for options in (first, rest) for i in rng.permutation(len(options))]
    found = list(dict.fromkeys(found))[:3]
    return tuple(found) if len(found) == 3 else None


def _reasons(
    scene: Scene, rng: np.random.Generator, thing: Thing, axes: tuple[int, ...], known: Thing | None
) -> _Choices | None:
    """Where `thing` lies: four others or axes, so that no two of the choices contradict.

    Args:
        scene: where it is.
        rng: of this scene.
        thing: what the reason is about.
        axes: along which the question does not say already where it lies.
        known: the thing that the question says it lies beside.
    """
    grounds = []
    for other in scene.things:
        name = describe(other, scene, rng)
        for axis in axes if known in (None, other) else (0, 1):
            sides = [side for side in SIDES if side.axis == axis]
            if name is not None and other is not thing and not unsure(other, thing, sides[0]):
                true, false = sorted(sides, key=lambda s: not beside(other, thing, s))
                grounds.append((true, false, _tagged(name, other, scene)))
    if len(grounds) < 4:
        return None
    chosen = [grounds[i] for i in rng.permutation(len(grounds))[:4]]
    texts = [
        f"it is {pick(rng, (false if n else true).words)} {name} ."
        for n, (true, false, name) in enumerate(chosen)
    ]
    return _Choices(texts[0], tuple(texts[1:]))


def _subject(scene: Scene, rng: np.random.Generator) -> tuple[Thing, str, tuple[int, ...]] | None:
    """A thing by its place or size: the words, and the axes that these leave open."""
    most = pick(rng, SUPERLATIVES)
    thing = most.pick(scene)
    if thing is None:
        return None
    words = f"the {most.word} [{scene.things.index(thing)}]"
    return (
        thing,
        words,
        tuple(axis for axis in (0, 1) if most.side is None or axis != most.side.axis),
    )


def _digit(scene: Scene, rng: np.random.Generator) -> _Made | None:
    found: tuple[Thing, str, tuple[int, ...]] | None
    if rng.random() < 0.5:
        thing = pick(rng, scene.things)
        if What(thing.colour, None, None).count(scene) > 1:
            return None
        found = thing, f"the {thing.colour} [{scene.things.index(thing)}]", (0, 1)
    else:
        found = _subject(scene, rng)
    if found is None:
        return None
    thing, name, axes = found
    others = [o.digit for o in scene.things if o.digit != thing.digit]
    wrong = _three(rng, others, [n for n in range(10) if n != thing.digit])
    reasons = _reasons(scene, rng, thing, axes, None)
    if wrong is None or reasons is None:
        return None
    right, *rest = (f"it is {article(str(n))} ." for n in (thing.digit, *wrong))
    return f"what number is {name} ?", _Choices(right, tuple(rest)), reasons


def _colour(scene: Scene, rng: np.random.Generator) -> _Made | None:
    found: tuple[Thing, str, tuple[int, ...]] | None
    if rng.random() < 0.5:
        thing = pick(rng, scene.things)
        alone = What(None, None, thing.digit).count(scene) == 1
        found = (thing, f"the {thing.digit}", (0, 1)) if alone else None
    else:
        found = _subject(scene, rng)
    if found is None:
        return None
    thing, name, axes = found
    others = [o.colour for o in scene.things if o.colour != thing.colour]
    wrong = _three(rng, others, [c for c in COLOURS if c != thing.colour])
    reasons = _reasons(scene, rng, thing, axes, None)
    if wrong is None or reasons is None:
        return None
    right, *rest = (f"it is {colour} ." for colour in (thing.colour, *wrong))
    question = f"what {pick(rng, _COLOUR_WORDS)} is {name} ?"
    return question, _Choices(right, tuple(rest)), reasons


def _neighbour(scene: Scene, rng: np.random.Generator) -> _Made | None:
    thing, side = pick(rng, scene.things), pick(rng, SIDES)
    others = [o for o in scene.things if o is not thing]
    name = describe(thing, scene, rng)
    if name is None or any(unsure(thing, o, side) for o in others):
        return None
    there = [o for o in others if beside(thing, o, side)]
    if len(there) != 1:
        return None
    right = (there[0].colour, there[0].digit)
    present = [(o.colour, o.digit) for o in others]
    mixed = [(a.colour, b.digit) for a in scene.things for b in scene.things]
    wrong = _three(rng, *([x for x in group if x != right] for group in (present, mixed)))
    reasons = _reasons(scene, rng, there[0], (1 - side.axis,), thing)
    if wrong is None or reasons is None:
        return None
    first, *rest = (f"it is {article(f'{c} {d}')} ." for c, d in (right, *wrong))
    question = f"what is {pick(rng, side.words)} {_tagged(name, thing, scene)} ?"
    return question, _Choices(first, tuple(rest)), reasons


def _listed(what: What, digits: Sequence[int]) -> str:
    """What was counted, one by one."""
    word = what.colour or what.size
    if len(digits) == 1:
        return f"the only {word} digit is {article(str(digits[0]))} ."
    *most, last = (article(str(digit)) for digit in sorted(digits))
    return f"the {word} digits are {' , '.join(most)} and {last} ."


def _swaps(rng: np.random.Generator, digits: Sequence[int]) -> list[tuple[int, ...]] | None:
    """The digits, and three lists like them.

    One digit alone gives way to any; of several, two give way, either or both, so that each of the
    four lists is as like the others as the right one is.
    """
    places = rng.permutation(len(digits))[:2]
    if len(places) == 1:
        others = [n for n in rng.permutation(10) if n != digits[0]]
        return [(digits[0],), *((int(n),) for n in others[:3])]
    found = [tuple(digits)]
    for at in places:
        new = int(rng.integers(10))
        found += [(*known[:at], new, *known[at + 1 :]) for known in found]
    return found if len({tuple(sorted(some)) for some in found}) == 4 else None


def _count(scene: Scene, rng: np.random.Generator) -> _Made | None:
    if rng.random() < 0.3:
        options, weights = [What(colour, None, None) for colour in COLOURS], _COLOURED
    else:
        options, weights = [What(None, size, None) for size in SIZES], _SIZED
    groups = {n: [what for what in options if what.count(scene) == n] for n in weights}
    numbers = [n for n in weights if groups[n]]
    if not numbers:
        return None
    share = np.array([weights[n] for n in numbers], float)
    number = int(rng.choice(numbers, p=share / share.sum()))
    what = pick(rng, groups[number])
    lists = _swaps(rng, [thing.digit for thing in scene.things if what.meets(thing)])
    if lists is None:
        return None
    word, nouns = what.colour or what.size, pick(rng, ("digits", "numbers"))
    first, *rest = (
        f"there {'is' if n == 1 else 'are'} {WORDS[n]} {word} {nouns[: None if n > 1 else -1]} ."
        for n in (number, *(n for n in weights if n != number))
    )
    right, *wrong = (_listed(what, digits) for digits in lists)
    question = f"how many {word} {nouns} {pick(rng, _ENDINGS)} ?"
    return question, _Choices(first, tuple(rest)), _Choices(right, tuple(wrong))


def _most(scene: Scene, rng: np.random.Generator) -> _Made | None:
    counts = {colour: What(colour, None, None).count(scene) for colour in COLOURS}
    *_, second, first = sorted(COLOURS, key=lambda colour: counts[colour])
    most, total = counts[first], len(scene.things)
    if most == counts[second] or (most == 2 and rng.random() < _TWO):
        return None
    present = [c for c in COLOURS if counts[c] and c != first]
    colours = _three(rng, present, [c for c in COLOURS if c != first])
    number = 3 if most == 2 else most - 1
    totals = [n for n in range(max(most, number), 7) if n != total]
    if colours is None or not totals:
        return None
    other = pick(rng, totals)
    answers = [f"the most digits are {colour} ." for colour in (first, *colours)]
    reasons = [
        f"{WORDS[n]} of the {WORDS[of]} digits are {first} ."
        for n in (most, number)
        for of in (total, other)
    ]
    question = f"which {pick(rng, _COLOUR_WORDS)} do the most digits have ?"
    return (
        question,
        _Choices(answers[0], tuple(answers[1:])),
        _Choices(reasons[0], tuple(reasons[1:])),
    )


KINDS: dict[str, Callable[[Scene, np.random.Generator], _Made | None]] = {
    "digit": _digit,
    "colour": _colour,
    "neighbour": _neighbour,
    "count": _count,
    "most": _most,
}


def _shuffled(rng: np.random.Generator, choices: _Choices) -> tuple[tuple[str, ...], int]:
    texts = (choices.right, *choices.wrong)
    order = [int(i) for i in rng.permutation(4)]
    return tuple(texts[i] for i in order), order.index(0)


def problems(scene: Scene) -> Iterator[Problem]:
    """At most one problem of every kind, the same for the same scene."""
    rng = np.random.default_rng([scene.seed, scene.number, 5])
    for kind, make in KINDS.items():
        for _ in range(_TRIES):
            made = make(scene, rng)
            if made is not None:
                question, answers, reasons = made
                yield Problem(kind, question, *_shuffled(rng, answers), *_shuffled(rng, reasons))
                break
