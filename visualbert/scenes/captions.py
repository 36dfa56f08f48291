"""Captions of a scene that say which words mean which things, as Flickr30K Entities' do.

The same sentences serve as COCO captions. A phrase means every thing that it fits in its sentence,
and no other; each caption names enough for it to be true of few other scenes.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from visualbert.scenes.draw import COLOURS, Scene, Thing
from visualbert.scenes.questions import SIDES, beside, describe, pick, unsure
from visualbert.scenes.statements import SUPERLATIVES, WORDS, What, article

CAPTIONS = 5  # an image
_ENDINGS = ("in the picture", "in the image")


class Phrase(NamedTuple):
    """Words that mean these things, by their index; none where they say that there is none."""

    text: str
    things: tuple[int, ...]


Caption = tuple[str | Phrase, ...]
_Maker = Callable[[Scene, np.random.Generator], Caption | None]


def text_of(caption: Caption) -> str:
    """Its words with single spaces."""
    return " ".join(part if isinstance(part, str) else part.text for part in caption)


def _two(scene: Scene, rng: np.random.Generator) -> tuple[Thing, Thing]:
    first, second = rng.permutation(len(scene.things))[:2]
    return scene.things[first], scene.things[second]


def _meaning(scene: Scene, text: str, *things: Thing) -> Phrase:
    return Phrase(text, tuple(scene.things.index(thing) for thing in things))


def _whole(scene: Scene, thing: Thing) -> Phrase | None:
    """`a large red 7`, where there is one alone."""
    what = What(thing.colour, thing.size, thing.digit)
    words = article(what.words(""))
    return _meaning(scene, words, thing) if what.count(scene) == 1 else None


def _there(scene: Scene, rng: np.random.Generator) -> Caption | None:
    a, b = (_whole(scene, thing) for thing in _two(scene, rng))
    if a is None or b is None:
        return None
    return pick(rng, ("there is", "you see")), a, "and", b, pick(rng, _ENDINGS), "."


def _beside(scene: Scene, rng: np.random.Generator) -> Caption | None:
    first, second = _two(scene, rng)
    side = pick(rng, SIDES)
    a, b = describe(first, scene, rng), describe(second, scene, rng)
    if a is None or b is None or not beside(second, first, side):
        return None
    word = pick(rng, side.words)
    return _meaning(scene, a, first), f"is {word}", _meaning(scene, b, second), "."


def _which(scene: Scene, rng: np.random.Generator) -> Caption | None:
    """`a large digit left of the blue 7 is red .`"""
    first, second = _two(scene, rng)
    side, name = pick(rng, SIDES), describe(second, scene, rng)
    rest = [thing for thing in scene.things if thing is not second and thing.size == first.size]
    if name is None or any(unsure(second, thing, side) for thing in rest):
        return None
    if [thing for thing in rest if beside(second, thing, side)] != [first]:
        return None
    what = f"{article(first.size)} {pick(rng, ('digit', 'number'))}"
    is_ = pick(rng, (first.colour, article(str(first.digit))))
    other = _meaning(scene, name, second)
    return _meaning(scene, what, first), pick(rng, side.words), other, f"is {is_} ."


def _groups(scene: Scene, rng: np.random.Generator) -> Caption | None:
    """`two red digits and one blue digit are in the image .`"""
    colours = sorted({thing.colour for thing in scene.things})
    if len(colours) < 2:
        return None
    nouns = pick(rng, ("digits", "numbers"))
    phrases = []
    for at in rng.permutation(len(colours))[:2]:
        some = [thing for thing in scene.things if thing.colour == colours[at]]
        noun = nouns if len(some) > 1 else nouns[:-1]
        phrases.append(_meaning(scene, f"{WORDS[len(some)]} {colours[at]} {noun}", *some))
    return phrases[0], "and", phrases[1], "are", pick(rng, _ENDINGS), "."


def _superlative(scene: Scene, rng: np.random.Generator) -> Caption | None:
    """`the leftmost digit is a red 3 and the largest digit is blue .`"""
    first, second = (SUPERLATIVES[i] for i in rng.permutation(len(SUPERLATIVES))[:2])
    a, b = first.pick(scene), second.pick(scene)
    if a is None or b is None or a is b:
        return None
    words = [f"the {most.word} {pick(rng, ('digit', 'number'))}" for most in (first, second)]
    is_a, is_b = (article(f"{thing.colour} {thing.digit}") for thing in (a, b))
    return (
        *(_meaning(scene, words[0], a), f"is {is_a} and"),
        *(_meaning(scene, words[1], b), f"is {is_b} ."),
    )


def _number(scene: Scene, rng: np.random.Generator) -> Caption | None:
    """`there are five digits , and the largest one is a red 3 .`"""
    most = pick(rng, SUPERLATIVES)
    thing = most.pick(scene)
    if thing is None:
        return None
    count = f"{WORDS[len(scene.things)]} {pick(rng, ('digits', 'numbers'))}"
    return (
        *("there are", _meaning(scene, count, *scene.things), ", and"),
        _meaning(scene, f"the {most.word} one", thing),
        f"is {article(f'{thing.colour} {thing.digit}')} .",
    )


def _alike(scene: Scene, rng: np.random.Generator) -> Caption | None:
    """`the 3 and the 7 are both red .`"""
    first, second = _two(scene, rng)
    digits = [thing.digit for thing in scene.things]
    if first.colour != second.colour or any(digits.count(t.digit) > 1 for t in (first, second)):
        return None
    a, b = (_meaning(scene, f"the {thing.digit}", thing) for thing in (first, second))
    return a, "and", b, f"are both {first.colour} ."


def _absent(scene: Scene, rng: np.random.Generator) -> Caption | None:
    """`there is a small red 3 and no purple digit in the image .`"""
    present, colour = _whole(scene, pick(rng, scene.things)), pick(rng, tuple(COLOURS))
    if present is None or any(thing.colour == colour for thing in scene.things):
        return None
    none = Phrase(f"no {colour} {pick(rng, ('digit', 'number'))}", ())
    return "there is", present, "and", none, pick(rng, _ENDINGS), "."


_MAKERS: tuple[_Maker, ...] = (
    _there,
    _beside,
    _which,
    _groups,
    _superlative,
    _number,
    _alike,
    _absent,
)
_ROUNDS = 200


def captions(scene: Scene, stream: int) -> Iterator[Caption]:
    """Five different captions, the same for the same scene and `stream`.

    A scene in which nothing can be told apart has fewer; none is known.
    """
    rng = np.random.default_rng([scene.seed, scene.number, 4, stream])
    known: set[str] = set()
    for _ in range(_ROUNDS):
        for at in rng.permutation(len(_MAKERS)):
            made = _MAKERS[at](scene, rng)
            if made is not None and text_of(made) not in known:
                known.add(text_of(made))
                yield made
                if len(known) == CAPTIONS:
                    return
