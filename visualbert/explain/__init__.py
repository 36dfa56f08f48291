"""What the model looked at, in numbers and in pictures, from any framework's attentions.

`attentions_of` turns a model's output into one numpy array; everything else works on that. Pictures
need matplotlib, which is imported when one is drawn.
"""

from visualbert.explain.answers import explain_answer
from visualbert.explain.attentions import Split, attentions_of, split_attention
from visualbert.explain.entities import Annotated, EntityGrounding, entity_grounding
from visualbert.explain.heads import heads_figure
from visualbert.explain.pictures import picture
from visualbert.explain.style import save_picture
from visualbert.explain.words import (
    Word,
    grounding,
    head_grounding,
    merge_pieces,
    rolled_grounding,
    rollout,
)

__all__ = [
    "Annotated",
    "EntityGrounding",
    "Split",
    "Word",
    "attentions_of",
    "entity_grounding",
    "explain_answer",
    "grounding",
    "head_grounding",
    "heads_figure",
    "merge_pieces",
    "picture",
    "rolled_grounding",
    "rollout",
    "save_picture",
    "split_attention",
]
