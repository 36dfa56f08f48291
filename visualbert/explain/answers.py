"""The picture of an answered question."""

from typing import TYPE_CHECKING, Any

from visualbert.errors import InputError
from visualbert.explain.pictures import picture
from visualbert.explain.words import rolled_grounding

if TYPE_CHECKING:
    from visualbert.answering import Answered


def explain_answer(image: Any, answered: "Answered") -> Any:
    """What every word of a question and `[MASK]`, where the answer is read, looked at.

    Attention is rolled up through all layers (`rollout`).

    Args:
        image: as for `picture`.
        answered: of a call with `attentions=True`.

    Returns:
        a `matplotlib.figure.Figure`.

    Raises:
        InputError: the attentions were not kept, or the model saw no regions.
    """
    if answered.attentions is None:
        raise InputError("the attentions were not kept; ask with attentions=True")
    if answered.regions is None:
        raise InputError("the model saw no regions, so there is nothing to draw")
    text = answered.words[-1][2]
    found = rolled_grounding(answered.attentions[:, None], answered.words, text)
    return picture(
        image, answered.regions, answered.words, found, answered.answers, answered.question
    )
