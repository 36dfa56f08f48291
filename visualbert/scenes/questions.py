"""Questions about a scene with one right answer each, in several wordings.

A question is asked only where its answer leaves no doubt: what it names is one thing, and positions
and sizes differ by more than a glance can confuse.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from visualbert.scenes.draw import COLOURS, Scene, Thing

NUMBERS = tuple(str(n) for n in range(10))
ANSWERS = (*NUMBERS, *COLOURS, "yes", "no")
_CLEAR = 24  # pixels by which positions differ
LARGER = 1.25  # factor by which heights differ


class Question(NamedTuple):
    """A question, its answer, which of `KINDS` it is, and the things that the answer is about."""

    text: str
    answer: str
    kind: str
    about: tuple[Thing, ...] = ()


class Side(NamedTuple):
    """A direction: its words, those for what lies furthest that way, and its axis and sign."""

    words: tuple[str, ...]
    outermost: tuple[str, ...]
    axis: int
    sign: int


SIDES = (
    Side(("left of", "to the left of"), ("leftmost",), 0, -1),
    Side(("right of", "to the right of"), ("rightmost",), 0, 1),
    Side(("above", "over"), ("topmost", "highest"), 1, -1),
    Side(("below", "under"), ("lowest", "bottommost"), 1, 1),
)
_COLOUR_WORDS = ("colour", "color")


def describe(thing: Thing, scene: Scene, rng: np.random.Generator) -> str | None:
    """Words that mean this thing alone, if there are any."""
    twins = [other for other in scene.things if other is not thing]
    options = [f"the {thing.colour} {thing.digit}"]
    if all(other.colour != thing.colour for other in twins):
        options += [f"the {thing.colour} digit", f"the {thing.colour} number"]
    if all(other.digit != thing.digit for other in twins):
        options.append(f"the {thing.digit}")
    if any((o.colour, o.digit) == (thing.colour, thing.digit) for o in twins):
        return None
    return pick(rng, options)


def beside(thing: Thing, other: Thing, side: Side) -> bool:
    """Whether `other` lies clearly on that side of `thing`."""
    return side.sign * (other.centre[side.axis] - thing.centre[side.axis]) > _CLEAR


def unsure(thing: Thing, other: Thing, side: Side) -> bool:
    """Whether a glance could not tell."""
    return abs(other.centre[side.axis] - thing.centre[side.axis]) <= _CLEAR


def height(thing: Thing) -> int:
    """Of its box, in pixels."""
    return thing.box[3] - thing.box[1]


def pick(rng: np.random.Generator, options: list | tuple):
    """One of the options, each as likely as the others."""
    return options[int(rng.integers(len(options)))]


def _which_digit(scene: Scene, rng: np.random.Generator) -> Question | None:
    thing = pick(rng, scene.things)
    if sum(other.colour == thing.colour for other in scene.things) > 1:
        return None
    text = pick(
        rng,
        (
            f"what digit is {thing.colour}",
            f"which digit is {thing.colour}",
            f"what is the {thing.colour} digit",
            f"what number is {thing.colour}",
            f"which number is written in {thing.colour}",
            f"what is the {thing.colour} number",
        ),
    )
    return Question(text, str(thing.digit), "digit", (thing,))


def _which_colour(scene: Scene, rng: np.random.Generator) -> Question | None:
    thing = pick(rng, scene.things)
    if sum(other.digit == thing.digit for other in scene.things) > 1:
        return None
    colour = pick(rng, _COLOUR_WORDS)
    text = pick(
        rng,
        (
            f"what {colour} is the {thing.digit}",
            f"which {colour} does the {thing.digit} have",
            f"what is the {colour} of the {thing.digit}",
            f"what {colour} does the {thing.digit} have",
        ),
    )
    return Question(text, thing.colour, "colour", (thing,))


def _how_many(scene: Scene, rng: np.random.Generator) -> Question:
    chosen = int(rng.integers(3))
    if chosen == 0:
        counted, what = scene.things, pick(rng, ("digits", "numbers"))
    elif chosen == 1:
        colour = pick(rng, tuple(COLOURS))
        counted = tuple(thing for thing in scene.things if thing.colour == colour)
        what = f"{colour} {pick(rng, ('digits', 'numbers'))}"
    else:
        size = pick(rng, ("small", "large"))
        counted = tuple(thing for thing in scene.things if thing.size == size)
        what = f"{size} {pick(rng, ('digits', 'numbers'))}"
    endings = ("are there", "do you see", "are in the picture", "are in the image")
    text = f"how many {what} {pick(rng, endings)}"
    return Question(text, str(len(counted)), "count", counted)


def _is_there(scene: Scene, rng: np.random.Generator) -> Question:
    thing, other = pick(rng, scene.things), pick(rng, scene.things)
    digit, colour = thing.digit, thing.colour
    if rng.random() < 0.75:  # mostly not there, though one half of it is
        kind = int(rng.integers(3))
        digit = int(rng.integers(10)) if kind == 0 else other.digit
        colour = pick(rng, tuple(COLOURS)) if kind == 1 else other.colour if kind else colour
        colour, digit = (thing.colour, other.digit) if kind == 2 else (colour, digit)
    whole = rng.random() < 0.7
    there = tuple(t for t in scene.things if t.digit == digit and (t.colour == colour or not whole))
    what = f"{colour} {digit}" if whole else f"{digit}"
    article = "an" if what.startswith("orange") or what == "8" else "a"
    openings, endings = ("is there", "do you see"), ("", " in the picture", " in the image")
    text = f"{pick(rng, openings)} {article} {what}{pick(rng, endings)}"
    return Question(text, "yes" if there else "no", "exists", there)


def _is_beside(scene: Scene, rng: np.random.Generator) -> Question | None:
    first, second = (scene.things[i] for i in rng.permutation(len(scene.things))[:2])
    side = pick(rng, SIDES)
    a, b = describe(first, scene, rng), describe(second, scene, rng)
    if a is None or b is None or unsure(first, second, side):
        return None
    there = beside(second, first, side)
    text = f"is {a} {pick(rng, side.words)} {b}"
    return Question(text, "yes" if there else "no", "position", (first, second))


def _what_beside(scene: Scene, rng: np.random.Generator) -> Question | None:
    thing, side = pick(rng, scene.things), pick(rng, SIDES)
    others = [o for o in scene.things if o is not thing]
    name = describe(thing, scene, rng)
    there = [o for o in others if beside(thing, o, side)]
    if (
        name is None
        or len(there) != 1
        or any(unsure(thing, o, side) for o in others if o is not there[0])
    ):
        return None
    word = pick(rng, side.words)
    if rng.random() < 0.6:
        openings = ("what is", "what digit is", "which digit is", "which number is")
        text = f"{pick(rng, openings)} {word} {name}"
        return Question(text, str(there[0].digit), "neighbour", (there[0],))
    colour = pick(rng, _COLOUR_WORDS)
    text = f"what {colour} is the digit {word} {name}"
    return Question(text, there[0].colour, "neighbour", (there[0],))


def _extreme(scene: Scene, rng: np.random.Generator) -> Question | None:
    ordered = sorted(scene.things, key=lambda t: t.box[3] - t.box[1])
    heights = [t.box[3] - t.box[1] for t in ordered]
    large = rng.random() < 0.5
    thing = ordered[-1 if large else 0]
    a, b = (heights[-1], heights[-2]) if large else (heights[1], heights[0])
    if a < LARGER * b:
        return None
    word = pick(rng, ("largest", "biggest") if large else ("smallest", "tiniest"))
    if rng.random() < 0.6:
        text = pick(rng, (f"what is the {word} digit", f"which digit is the {word}"))
        return Question(text, str(thing.digit), "size", (thing,))
    colour = pick(rng, _COLOUR_WORDS)
    return Question(f"what {colour} is the {word} digit", thing.colour, "size", (thing,))


def _outermost(scene: Scene, rng: np.random.Generator) -> Question | None:
    side = pick(rng, SIDES)
    word = pick(rng, side.outermost)
    ordered = sorted(scene.things, key=lambda t: side.sign * t.centre[side.axis])
    if not beside(ordered[-2], ordered[-1], side):
        return None
    if rng.random() < 0.6:
        text = pick(rng, (f"what is the {word} digit", f"which digit is the {word}"))
        return Question(text, str(ordered[-1].digit), "outermost", (ordered[-1],))
    colour = pick(rng, _COLOUR_WORDS)
    text = f"what {colour} is the {word} digit"
    return Question(text, ordered[-1].colour, "outermost", (ordered[-1],))


KINDS: dict[str, Callable[[Scene, np.random.Generator], Question | None]] = {
    "digit": _which_digit,
    "colour": _which_colour,
    "count": _how_many,
    "exists": _is_there,
    "position": _is_beside,
    "neighbour": _what_beside,
    "size": _extreme,
    "outermost": _outermost,
}
_TRIES = 6


def questions(scene: Scene, rounds: int = 1) -> Iterator[Question]:
    """Up to `rounds` questions of every kind, the same for the same scene."""
    rng = np.random.default_rng([scene.seed, scene.number, 2])
    for _ in range(rounds):
        for make in KINDS.values():
            for _ in range(_TRIES):
                made = make(scene, rng)
                if made is not None:
                    yield made
                    break
