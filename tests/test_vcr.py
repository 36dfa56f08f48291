"""VCR's inputs are the original's, worked out by hand from its code, quirks included."""

import numpy as np
import pytest

from visualbert import InputError
from visualbert.inputs.processor import VisualBertProcessor
from visualbert.inputs.regions import Regions
from visualbert.inputs.vcr import vcr_problem

OBJECTS = ["person", "person", "person", "car"]
QUESTION = ["Does", [2], "feel", "comfortable", "?"]
CHOICES = [
    ["Yes", "because", [0, 1], "smile", "."],
    ["No", "."],
    ["Everyone", "sits", "."],
    [[3], "unbelievably", [2], "."],
]


@pytest.fixture(scope="module")
def processor(bert_vocabulary):
    return VisualBertProcessor("vcr", bert_vocabulary)


def test_tags_become_names(processor):
    found = vcr_problem(processor, QUESTION, CHOICES, OBJECTS)
    assert found.text == "Does Casey feel comfortable ?"
    assert found.choices == [
        "Yes because Casey Riley smile .",  # people are counted anew in every choice
        "No .",
        "Everyone sits .",
        "car unbelievably Casey .",  # the one of the question keeps his name
    ]


def test_only_what_is_mentioned_is_seen(processor):
    def seen(question, choices, *also):
        return vcr_problem(processor, question, choices, OBJECTS, also).objects

    assert seen(QUESTION, CHOICES[:2]) == [0, 1, 2]
    assert seen(QUESTION, CHOICES[1:2]) == [2]
    assert seen(QUESTION, CHOICES[2:3]) == [0, 1, 2]  # everyone
    assert seen(["Why", "?"], [["No", "."]]) == [0, 1, 2]  # nobody: all people
    assert seen(QUESTION, CHOICES[1:2], [[3], "stops"]) == [2, 3]


def test_alignment_counts_words(processor):
    found = vcr_problem(processor, QUESTION, CHOICES, OBJECTS)
    assert found.objects == [0, 1, 2, 3]
    assert found.alignment.shape == (4, 5, 2)
    assert (found.alignment[:, 0] == -1).all()  # the whole image
    assert found.alignment[:, 3, 0].tolist() == [2] * 4  # [CLS] Does Casey
    # The choices begin behind [CLS], five wordpieces and [SEP].
    assert found.alignment[0].tolist() == [[-1, -1], [9, -1], [10, -1], [2, -1], [-1, -1]]
    # "unbelievably" is several wordpieces, and counts as one word.
    assert len(processor.tokenizer.pieces("unbelievably")) > 1
    assert found.alignment[3].tolist() == [[-1, -1], [-1, -1], [-1, -1], [2, 9], [7, -1]]


def test_the_context_is_never_shortened(processor):
    question = ["red"] * 90 + [[2]]
    choices = [["blue"] * 60 + [[0]], [[0], *["blue"] * 60]]
    found = vcr_problem(processor, question, choices, OBJECTS)
    with pytest.warns(UserWarning, match="27 of its wordpieces"):
        batch = processor([found.text], [found.choices])
    tokens = [processor.tokenizer.tokenizer.id_to_token(i) for i in batch["input_ids"][0, 0]]
    assert tokens == ["[CLS]", *["red"] * 90, "casey", "[SEP]", *["blue"] * 33, "casey", "[SEP]"]
    # Words keep their numbers, though the beginning is gone; what is cut off is not aligned.
    assert found.alignment[0, 1].tolist() == [93 + 60]
    assert found.alignment[1, 1].tolist() == [-1]


def test_it_feeds_the_model(processor):
    from visualbert import VisualBertConfig, VisualBertForMultipleChoice

    config = VisualBertConfig(
        hidden_size=8, num_attention_heads=2, num_hidden_layers=1, intermediate_size=12,
        visual_embedding_dim=512,
    )  # fmt: skip
    found = vcr_problem(processor, QUESTION, CHOICES, OBJECTS)
    regions = Regions(np.zeros((1 + len(found.objects), 512)))
    batch = processor([found.text], [found.choices], [regions], return_tensors="pt")
    import torch

    alignment = torch.from_numpy(found.alignment[None])
    out = VisualBertForMultipleChoice(config).eval()(**batch, image_text_alignment=alignment)
    assert tuple(out.logits.shape) == (1, 4)


def test_a_tag_without_an_object(processor):
    for token, sentence in [
        ([4], "the tag 4 is not one of 4 objects"),
        ([-1], "the tag -1 is not one of 4 objects"),
        (["car"], "the tag 'car' is not one of 4 objects"),
        (3, "3 is neither a word nor a list of objects' numbers"),
    ]:
        for question, choices in (([token], [["no"]]), (["why"], [["no"], [token]])):
            with pytest.raises(InputError) as error:
                vcr_problem(processor, question, choices, OBJECTS)
            assert str(error.value) == sentence
