"""The vocabulary of the embedded benchmark: every word of its five tasks, in the order of ids."""

from visualbert.scenes.draw import COLOURS

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
SIZE = 160  # rows of the embedded model's word table
_WORDS = """
? . , 0 1 2 3 4 5 6 7 8 9 yes no
a above an and are at because below biggest both bottommost color colour different digit digits do
does each exactly false fewer first five four have highest how image images in is it large largest
least left leftmost lowest many more most next no not number numbers of on one only or other over
picture right rightmost same second see six small smallest than that the there these this three
tiniest to top topmost true two under which what with written yes you zero
"""


def vocabulary() -> tuple[str, ...]:
    """The words by id; rows that are left over are `[unusedN]`, as in BERT's vocabulary."""
    known = dict.fromkeys((*SPECIAL, *_WORDS.split(), *COLOURS))
    return (*known, *(f"[unused{n}]" for n in range(SIZE - len(known))))
