"""Statements about a pair of scenes that are true of it or false, as NLVR2's.

A statement is made for a set of two pairs and is true of one of them and false of the other, which
is how NLVR2 was collected: nothing in the words, and nothing in a pair, tells which. What a glance
could not tell is never stated.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from visualbert.scenes.draw import COLOURS, SIZES, Scene, Thing
from visualbert.scenes.questions import (
    LARGER,
    SIDES,
    Side,
    beside,
    height,
    pick,
    unsure,
)

Pair = tuple[Scene, Scene]  # left, right
WORDS = ("zero", "one", "two", "three", "four", "five", "six")
_IMAGES = ("left", "right")
_NOUNS = ("digits", "numbers")
_COLOUR_WORDS = ("colour", "color")
_TRIES = 400


class Claim(NamedTuple):
    """Words, and whether they hold of a pair: None where a glance could not tell."""

    text: str
    holds: Callable[[Pair], bool | None]


class Statement(NamedTuple):
    """A sentence about two pairs of scenes, whether it holds of each, and which of `KINDS`."""

    text: str
    labels: tuple[bool, bool]
    kind: str


class What(NamedTuple):
    """A description that any number of things may meet."""

    colour: str | None
    size: str | None
    digit: int | None

    def meets(self, thing: Thing) -> bool:
        """Whether a thing is such."""
        wanted = (self.colour, self.size, self.digit)
        found = (thing.colour, thing.size, thing.digit)
        return all(want in (None, have) for want, have in zip(wanted, found, strict=True))

    def count(self, scene: Scene) -> int:
        """How many there are."""
        return sum(map(self.meets, scene.things))

    def words(self, noun: str) -> str:
        """`large red 7`, or with `noun` where the digit is left open."""
        last = noun if self.digit is None else str(self.digit)
        return " ".join(filter(None, (self.size, self.colour, last)))


def article(words: str) -> str:
    """The words with `a` or `an` before them."""
    return f"an {words}" if words.startswith(("orange", "8")) else f"a {words}"


def _what(rng: np.random.Generator, *parts: str) -> What:
    """A random description with these parts, such as `colour` and `digit`."""
    options = {"colour": tuple(COLOURS), "size": tuple(SIZES), "digit": tuple(range(10))}
    return What(*(pick(rng, options[k]) if k in parts else None for k in What._fields))


def _side(rng: np.random.Generator) -> tuple[int, str]:
    at = int(rng.integers(2))
    return at, f"the {_IMAGES[at]} {pick(rng, ('image', 'picture'))}"


_COMPARE: dict[str, Callable[[int, int], bool]] = {
    "exactly": lambda count, n: count == n,
    "at least": lambda count, n: count >= n,
    "at most": lambda count, n: count <= n,
}


def _count(rng: np.random.Generator) -> Claim:
    (at, image), word, n = _side(rng), pick(rng, tuple(_COMPARE)), int(rng.integers(1, 4))
    what = _what(rng, pick(rng, ("colour", "size")))
    nouns = pick(rng, _NOUNS)
    noun, verb = (nouns[:-1], "is") if n == 1 else (nouns, "are")
    text = f"{word} {WORDS[n]} {noun} in {image} {verb} {what.colour or what.size}"
    return Claim(text, lambda pair: _COMPARE[word](what.count(pair[at]), n))


def _total(rng: np.random.Generator) -> Claim:
    (at, image), word, n = _side(rng), pick(rng, tuple(_COMPARE)), int(rng.integers(3, 7))
    text = f"there are {word} {WORDS[n]} {pick(rng, _NOUNS)} in {image}"
    return Claim(text, lambda pair: _COMPARE[word](len(pair[at].things), n))


def _both(rng: np.random.Generator) -> Claim:
    what = _what(rng, *pick(rng, (("digit",), ("colour",), ("colour", "size"))))
    words = article(what.words("digit"))
    text = pick(rng, (f"both images have {words}", f"there is {words} in both images"))
    return Claim(text, lambda pair: all(map(what.count, pair)))


def _one(rng: np.random.Generator) -> Claim:
    what = _what(rng, *pick(rng, (("digit",), ("colour",), ("colour", "digit"), ("size",))))
    word = pick(rng, ("only", "exactly"))
    text = f"there is {article(what.words('digit'))} in {word} one of the images"
    return Claim(text, lambda pair: sum(what.count(scene) > 0 for scene in pair) == 1)


def _neither(rng: np.random.Generator) -> Claim:
    what = _what(rng, *pick(rng, (("digit",), ("colour",), ("colour", "size"))))
    where = pick(rng, ("these images", "the two images"))
    text = f"there is no {what.words('digit')} in {where}"
    return Claim(text, lambda pair: not any(map(what.count, pair)))


def _some(rng: np.random.Generator) -> Claim:
    at, image = _side(rng)
    what = _what(rng, *pick(rng, (("colour", "size"), ("colour", "digit"), ("size", "digit"))))
    opening = pick(rng, (f"there is at least one {what.words('digit')}", None))
    text = f"{opening or 'there is ' + article(what.words('digit'))} in {image}"
    return Claim(text, lambda pair: what.count(pair[at]) > 0)


def _more(rng: np.random.Generator) -> Claim:
    at, word = int(rng.integers(2)), pick(rng, ("more", "fewer"))
    what, sign = _what(rng, pick(rng, ("colour", "size", "none"))), 1 if word == "more" else -1
    here, there = _IMAGES[at], _IMAGES[1 - at]
    text = (
        f"there are {word} {what.words(pick(rng, _NOUNS))} in the {here} image than in the "
        f"{there} image"
    )
    return Claim(text, lambda pair: sign * (what.count(pair[at]) - what.count(pair[1 - at])) > 0)


def _same(rng: np.random.Generator) -> Claim:
    what = _what(rng, pick(rng, ("colour", "size", "none")))
    text = f"the two images have the same number of {what.words(pick(rng, _NOUNS))}"
    return Claim(text, lambda pair: what.count(pair[0]) == what.count(pair[1]))


def _sum(rng: np.random.Generator) -> Claim:
    word, n = pick(rng, tuple(_COMPARE)), int(rng.integers(2, 6))
    what = _what(rng, pick(rng, ("colour", "size")))
    text = f"there are {word} {WORDS[n]} {what.words(pick(rng, _NOUNS))} in the two images"
    return Claim(text, lambda pair: _COMPARE[word](sum(map(what.count, pair)), n))


def _position(rng: np.random.Generator) -> Claim:
    (at, image), side = _side(rng), pick(rng, SIDES)
    parts = pick(rng, (("colour", "colour"), ("colour", "size"), ("size", "colour")))
    a, b = (_what(rng, part) for part in parts)
    words = f"{article(a.words('digit'))} {pick(rng, side.words)} {article(b.words('digit'))}"

    def holds(pair: Pair) -> bool | None:
        things = pair[at].things
        pairs = [(x, y) for x in things for y in things if x is not y and a.meets(x) and b.meets(y)]
        if any(beside(y, x, side) for x, y in pairs):
            return True
        return None if any(unsure(x, y, side) for x, y in pairs) else False

    return Claim(f"in {image} there is {words}", holds)


def last(scene: Scene, side: Side) -> Thing | None:
    """What lies clearly furthest to a side."""
    *_, second, first = sorted(scene.things, key=lambda t: side.sign * t.centre[side.axis])
    return first if beside(second, first, side) else None


def extreme(scene: Scene, sign: int) -> Thing | None:
    """What is clearly the largest (`sign` 1) or the smallest (-1)."""
    *_, second, first = sorted(scene.things, key=lambda t: sign * height(t))
    small, large = sorted((height(first), height(second)))
    return first if large >= LARGER * small else None


class Superlative(NamedTuple):
    """A word that picks one thing of a scene, if the scene is clear about it."""

    word: str
    side: Side | None  # None for sizes
    sign: int  # 1 for the largest, -1 for the smallest

    def pick(self, scene: Scene) -> Thing | None:
        """The thing that is meant."""
        return extreme(scene, self.sign) if self.side is None else last(scene, self.side)


SUPERLATIVES = (
    *(Superlative(word, side, side.sign) for side in SIDES for word in side.outermost),
    *(Superlative(word, None, 1) for word in ("largest", "biggest")),
    *(Superlative(word, None, -1) for word in ("smallest", "tiniest")),
)


def _extreme(rng: np.random.Generator) -> Claim:
    (at, image), most = _side(rng), pick(rng, SUPERLATIVES)
    parts = ("colour", "digit", "size") if most.side else ("colour", "digit")
    what = _what(rng, pick(rng, parts))
    is_ = what.colour or what.size or article(str(what.digit))

    def holds(pair: Pair) -> bool | None:
        thing = most.pick(pair[at])
        return None if thing is None else what.meets(thing)

    return Claim(f"the {most.word} digit in {image} is {is_}", holds)


def _agree(rng: np.random.Generator) -> Claim:
    most, same = pick(rng, SUPERLATIVES), pick(rng, ("colour", "digit"))
    ending = (
        f"have the same {pick(rng, _COLOUR_WORDS)}" if same == "colour" else "are the same number"
    )
    images = pick(rng, ("the two images", "both images"))

    def holds(pair: Pair) -> bool | None:
        things = [most.pick(scene) for scene in pair]
        found = {getattr(thing, same, None) for thing in things}
        return None if None in found else len(found) == 1

    return Claim(f"the {most.word} digits in {images} {ending}", holds)


KINDS: dict[str, Callable[[np.random.Generator], Claim]] = {
    "count": _count,
    "total": _total,
    "both": _both,
    "one": _one,
    "neither": _neither,
    "some": _some,
    "more": _more,
    "same": _same,
    "sum": _sum,
    "position": _position,
    "extreme": _extreme,
    "agree": _agree,
}


def statements(first: Pair, second: Pair) -> Iterator[Statement]:
    """A statement of every kind about two pairs, the same for the same scenes.

    Kinds are left out of which nothing is found that holds of one pair and not of the other.
    """
    scene = first[0]
    rng = np.random.default_rng([scene.seed, scene.number, 3])
    for kind, make in KINDS.items():
        for _ in range(_TRIES):
            claim = make(rng)
            a, b = claim.holds(first), claim.holds(second)
            if a is not None and b is not None and a != b:
                yield Statement(claim.text, (a, b), kind)
                break
