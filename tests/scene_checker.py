"""Reads English about scenes and says whether it is so, from the annotations alone.

Written apart from `visualbert.scenes`, which it does not import: words are taken apart by patterns,
things are dictionaries of COCO's instances file. What it cannot read, or what the scene leaves in
doubt, is an error.
"""

import re

COLOURS = ("red", "green", "blue", "orange", "purple", "black")
COLOUR = f"(?P<colour>{'|'.join(COLOURS)})"
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
NUMBER = f"(?:{'|'.join(NUMBERS)})"
RELATIONS = {
    "to the left of": (0, -1),
    "to the right of": (0, 1),
    "left of": (0, -1),
    "right of": (0, 1),
    "above": (1, -1),
    "over": (1, -1),
    "below": (1, 1),
    "under": (1, 1),
}
REL = f"(?P<rel>{'|'.join(RELATIONS)})"
OUTERMOST = {
    "leftmost": (0, -1),
    "rightmost": (0, 1),
    "topmost": (1, -1),
    "highest": (1, -1),
    "lowest": (1, 1),
    "bottommost": (1, 1),
}
EXTREME = {"largest": 1, "biggest": 1, "smallest": -1, "tiniest": -1}
SUPER = f"(?P<super>{'|'.join((*OUTERMOST, *EXTREME))})"
NOUN = "(?:digits?|numbers?|one)"
DOUBT = 24  # pixels


class Doubt(AssertionError):
    """The words say nothing definite about this scene."""


def worlds(instances):
    """image_id -> things, from the JSON of an instances file."""
    names = {c["id"]: c["name"] for c in instances["categories"]}
    found = {image["id"]: [] for image in instances["images"]}
    for item in instances["annotations"]:
        x, y, w, h = item["bbox"]
        found[item["image_id"]].append(
            {
                "digit": names[item["category_id"]],
                "colour": item["attributes"]["colour"],
                "size": item["attributes"]["size"],
                "centre": (x + w / 2, y + h / 2),
                "height": h,
                "box": (x, y, x + w, y + h),
            }
        )
    return found


def such(world, words):
    """The things that a noun phrase without article fits: `large red 7`, `red digits`."""
    things = list(world)
    for word in words.split():
        if word in COLOURS:
            things = [t for t in things if t["colour"] == word]
        elif word in ("small", "large"):
            things = [t for t in things if t["size"] == word]
        elif word.isdecimal():
            things = [t for t in things if t["digit"] == word]
        elif not re.fullmatch(NOUN, word):
            raise Doubt(f"{words!r} is no noun phrase")
    return things


def lies(a, rel, b):
    """Whether `a` lies so of `b`; doubtful within `DOUBT` pixels."""
    axis, sign = RELATIONS[rel]
    gap = sign * (a["centre"][axis] - b["centre"][axis])
    if abs(gap) <= DOUBT:
        raise Doubt(f"{rel}: {gap} pixels")
    return gap > 0


def most(world, word):
    """The thing that a superlative means."""
    if word in EXTREME:
        key, clear = (lambda t: EXTREME[word] * t["height"]), None
    else:
        axis, sign = OUTERMOST[word]
        key, clear = (lambda t: sign * t["centre"][axis]), DOUBT
    *_, second, first = sorted(world, key=key)
    low, high = sorted((first["height"], second["height"]))
    if (high < 1.25 * low) if clear is None else (key(first) - key(second) <= clear):
        raise Doubt(f"two are {word}")
    return first


def the(world, words):
    """The one thing that `the red 7`, `the largest digit` or `a small digit` means."""
    found = re.fullmatch(rf"the {SUPER} {NOUN}", words)
    if found:
        return most(world, found["super"])
    things = such(world, re.sub("^(the|an?) ", "", words))
    if len(things) != 1:
        raise Doubt(f"{words!r} means {len(things)} things")
    return things[0]


def count_of(word):
    return NUMBERS.index(word)


def compared(count, how, number):
    return {
        "exactly": count == number,
        "at least": count >= number,
        "at most": count <= number,
    }[how]


def only(things):
    if len(things) != 1:
        raise Doubt(f"{len(things)} things")
    return things[0]


# Questions


def neighbour(world, rel, words):
    """The one thing that lies so of what the words mean, all others clearly elsewhere."""
    thing = the(world, words)
    return only([o for o in world if o is not thing and lies(o, rel, thing)])


def yes(value):
    return "yes" if value else "no"


ASK = "(?:what|which) (?:colou?r)"
QUESTIONS = (
    (rf"{ASK} is the {SUPER} digit", lambda w, m: most(w, m["super"])["colour"]),
    (rf"what is the {SUPER} digit", lambda w, m: most(w, m["super"])["digit"]),
    (rf"which digit is the {SUPER}", lambda w, m: most(w, m["super"])["digit"]),
    (rf"{ASK} is the digit {REL} (?P<b>.+)", lambda w, m: neighbour(w, m["rel"], m["b"])["colour"]),
    (
        rf"(?:what|what digit|which digit|which number) is {REL} (?P<b>.+)",
        lambda w, m: neighbour(w, m["rel"], m["b"])["digit"],
    ),
    (
        rf"{ASK} (?:is|does) the (?P<d>\d)(?: have)?",
        lambda w, m: only(such(w, m["d"]))["colour"],
    ),
    (r"what is the colou?r of the (?P<d>\d)", lambda w, m: only(such(w, m["d"]))["colour"]),
    (
        rf"(?:what|which) (?:digit|number) is (?:written in )?{COLOUR}",
        lambda w, m: only(such(w, m["colour"]))["digit"],
    ),
    (rf"what is the {COLOUR} {NOUN}", lambda w, m: only(such(w, m["colour"]))["digit"]),
    (
        r"how many (?P<np>.+?) (?:are there|do you see|are in the picture|are in the image)",
        lambda w, m: str(len(such(w, m["np"]))),
    ),
    (
        r"(?:is there|do you see) an? (?P<np>.+?)(?: in the (?:picture|image))?",
        lambda w, m: yes(such(w, m["np"])),
    ),
    (
        rf"is (?P<a>the .+?) {REL} (?P<b>the .+)",
        lambda w, m: yes(lies(the(w, m["a"]), m["rel"], the(w, m["b"]))),
    ),
)


def read(patterns, text, *things):
    """What the first pattern that fits says."""
    for pattern, says in patterns:
        found = re.fullmatch(pattern, text)
        if found:
            return says(*things, found)
    raise Doubt(f"cannot read {text!r}")


def answer(world, question):
    """The answer to a question."""
    return read(QUESTIONS, question.removesuffix("?"), world)


# Statements about a pair


def somewhere(world, a, rel, b):
    """Whether some `a` lies so of some `b`."""
    doubtful = False
    for x in such(world, a):
        for y in such(world, b):
            try:
                if x is not y and lies(x, rel, y):
                    return True
            except Doubt:
                doubtful = True
    if doubtful:
        raise Doubt(f"{a} {rel} {b}")
    return False


def one_of(pair, match):
    return pair[("left", "right").index(match["side"])]


def other_of(pair, match):
    return pair[("right", "left").index(match["side"])]


def same(pair, m):
    what = "digit" if m["end"] == "are the same number" else "colour"
    a, b = (most(world, m["super"]) for world in pair)
    return a[what] == b[what]


HOW = "(?P<how>exactly|at least|at most)"
N = f"(?P<n>{NUMBER})"
SIDE = "the (?P<side>left|right) (?:image|picture)"
STATEMENTS = (
    (
        rf"{HOW} {N} {NOUN} in {SIDE} (?:is|are) (?P<what>\w+)",
        lambda p, m: compared(len(such(one_of(p, m), m["what"])), m["how"], count_of(m["n"])),
    ),
    (
        rf"there are {HOW} {N} (?P<np>.+) in the two images",
        lambda p, m: compared(sum(len(such(w, m["np"])) for w in p), m["how"], count_of(m["n"])),
    ),
    (r"both images have an? (?P<np>.+)", lambda p, m: all(such(w, m["np"]) for w in p)),
    (r"there is an? (?P<np>.+) in both images", lambda p, m: all(such(w, m["np"]) for w in p)),
    (
        r"there is an? (?P<np>.+) in (?:only|exactly) one of the images",
        lambda p, m: len([w for w in p if such(w, m["np"])]) == 1,
    ),
    (
        r"there is no (?P<np>.+) in (?:these|the two) images",
        lambda p, m: not any(such(w, m["np"]) for w in p),
    ),
    (
        rf"there is (?:an?|at least one) (?P<np>.+) in {SIDE}",
        lambda p, m: bool(such(one_of(p, m), m["np"])),
    ),
    (
        rf"there are {HOW} {N} (?P<np>.+) in {SIDE}",
        lambda p, m: compared(len(such(one_of(p, m), m["np"])), m["how"], count_of(m["n"])),
    ),
    (
        rf"there are (?P<more>more|fewer) (?P<np>.+) in {SIDE} than in the (?:left|right) image",
        lambda p, m: (
            (len(such(one_of(p, m), m["np"])) - len(such(other_of(p, m), m["np"])))
            * (1 if m["more"] == "more" else -1)
            > 0
        ),
    ),
    (
        r"the two images have the same number of (?P<np>.+)",
        lambda p, m: len(such(p[0], m["np"])) == len(such(p[1], m["np"])),
    ),
    (
        rf"in {SIDE} there is an? (?P<a>.+?) {REL} an? (?P<b>.+)",
        lambda p, m: somewhere(one_of(p, m), m["a"], m["rel"], m["b"]),
    ),
    (
        rf"the {SUPER} digit in {SIDE} is (?:an? )?(?P<what>\w+)",
        lambda p, m: most(one_of(p, m), m["super"]) in such(one_of(p, m), m["what"]),
    ),
    (
        rf"the {SUPER} digits in (?:the two|both) images "
        r"(?P<end>have the same colou?r|are the same number)",
        same,
    ),
)


def holds(pair, statement):
    """Whether a statement is true of a pair of worlds."""
    return read(STATEMENTS, statement.removesuffix("."), pair)


# Captions


def both(world, m):
    return all(such(world, m[name]) for name in ("a", "b"))


CAPTIONS = (
    (
        r"there is an? (?P<a>.+) and no (?P<b>.+) in the (?:picture|image) \.",
        lambda w, m: bool(such(w, m["a"])) and not such(w, m["b"]),
    ),
    (r"(?:there is|you see) an? (?P<a>.+) and an? (?P<b>.+) in the (?:picture|image) \.", both),
    (
        rf"(?P<n>{NUMBER}) (?P<a>.+) and (?P<k>{NUMBER}) (?P<b>.+) are in the (?:picture|image) \.",
        lambda w, m: (
            (len(such(w, m["a"])), len(such(w, m["b"]))) == (count_of(m["n"]), count_of(m["k"]))
        ),
    ),
    (
        rf"the (?P<p>\w+) {NOUN} is an? (?P<a>\w+ \d) and the (?P<q>\w+) {NOUN} is an? "
        r"(?P<b>\w+ \d) \.",
        lambda w, m: most(w, m["p"]) in such(w, m["a"]) and most(w, m["q"]) in such(w, m["b"]),
    ),
    (
        rf"there are (?P<n>{NUMBER}) {NOUN} , and the (?P<p>\w+) one is an? (?P<a>\w+ \d) \.",
        lambda w, m: len(w) == count_of(m["n"]) and most(w, m["p"]) in such(w, m["a"]),
    ),
    (
        rf"the (?P<a>\d) and the (?P<b>\d) are both {COLOUR} \.",
        lambda w, m: all(only(such(w, m[n]))["colour"] == m["colour"] for n in ("a", "b")),
    ),
    (
        rf"an? (?P<np>\w+ {NOUN}) {REL} (?P<b>the .+) is (?:an? )?(?P<what>\w+) \.",
        lambda w, m: beside(w, m) in such(w, m["what"]),
    ),
    (
        rf"(?P<a>the .+?) is {REL} (?P<b>the .+) \.",
        lambda w, m: lies(the(w, m["a"]), m["rel"], the(w, m["b"])),
    ),
)


def beside(world, m):
    other = the(world, m["b"])
    some = [t for t in such(world, m["np"]) if t is not other]
    return only([t for t in some if lies(t, m["rel"], other)])


def describes(world, caption):
    """Whether a caption is true of a world."""
    return read(CAPTIONS, caption, world)


def meant(world, words, caption):
    """The things that a phrase means in its caption."""
    m = re.fullmatch(CAPTIONS[6][0], caption)
    if m and re.match("an? ", words):
        return [beside(world, m)]
    found = re.fullmatch(rf"({NUMBER}|no) (.+)", words)
    if found:
        things = such(world, found[2])
        assert len(things) == (0 if found[1] == "no" else count_of(found[1]))
        return things
    return [the(world, words)]


# Choices


def named(tokens):
    """Words with `digit` for a mention, and the mentions."""
    words = [token if isinstance(token, str) else "digit" for token in tokens]
    return " ".join(words), [token for token in tokens if not isinstance(token, str)]


def subject(world, question):
    """The thing that a question of VCR's kind is about, if it is about one."""
    for pattern in (
        r"what number is (?P<a>the .+) \?",
        r"what colou?r is (?P<a>the .+) \?",
    ):
        m = re.fullmatch(pattern, question)
        if m:
            return the(world, m["a"])
    m = re.fullmatch(rf"what is {REL} (?P<b>.+) \?", question)
    return neighbour(world, m["rel"], m["b"]) if m else None


def listed(world, m):
    digits = sorted(t["digit"] for t in such(world, m["a"]))
    return digits == sorted(re.findall(r"\d", m["list"]))


def most_colour(world):
    counts = {colour: len(such(world, colour)) for colour in COLOURS}
    *_, second, first = sorted(COLOURS, key=counts.get)
    if counts[first] == counts[second]:
        raise Doubt("two colours are as frequent")
    return first


CHOICES = (
    (rf"it is {REL} (?P<b>the .+) \.", lambda w, it, m: lies(it, m["rel"], the(w, m["b"]))),
    (r"it is (?:an? )?(?P<what>.+) \.", lambda w, it, m: it in such(w, m["what"])),
    (
        rf"there (?:is|are) {N} (?P<np>.+) \.",
        lambda w, it, m: len(such(w, m["np"])) == count_of(m["n"]),
    ),
    (rf"the most digits are {COLOUR} \.", lambda w, it, m: most_colour(w) == m["colour"]),
    (
        r"the (?:only )?(?P<a>\w+) digits? (?:is|are) (?P<list>.*\d) \.",
        lambda w, it, m: listed(w, m),
    ),
    (
        rf"{N} of the (?P<of>{NUMBER}) digits are {COLOUR} \.",
        lambda w, it, m: (
            (count_of(m["n"]), count_of(m["of"])) == (len(such(w, m["colour"])), len(w))
        ),
    ),
)


def right(world, question, choices):
    """Which of the choices are true answers or reasons."""
    text, _ = named(question)
    it = subject(world, text)
    for tokens in (question, *choices):
        words, found = named(tokens)
        for mention in found:  # the thing mentioned is the one that the words mean
            m = re.search(r"the (?P<np>\w+ digit)", words)
            assert the(world, f"the {m['np']}") is world[only(mention)], words
    return [n for n, c in enumerate(choices) if read(CHOICES, named(c)[0], world, it)]
