"""Every recipe gives exactly the ids, segments and positions that its checkpoint was trained with.

The expected tokens are written out by hand from the original's loaders, which each case names.
"""

import warnings
from typing import NamedTuple

import numpy as np
import pytest

from visualbert import UsageError, VisualBertConfig
from visualbert.inputs.processor import VisualBertProcessor
from visualbert.inputs.recipes import RECIPES, get_recipe, guess_recipe
from visualbert.inputs.regions import Regions


class Case(NamedTuple):
    """Texts, the tokens that come out, the segment of each, and why."""

    a: str
    b: str | list[str] | None
    tokens: str
    segments: str
    why: str


WHAT = "What's on the man's hat, sir?"
CASES = {
    # vqa_dataset.py: tokenize(" ".join(question_tokens)) + ["?", "[MASK]"], then [CLS] and [SEP];
    # Pythia's question_tokens are lower-cased, without "," and "?", with "'s" apart.
    "vqa": Case(
        WHAT, None,
        "[CLS] what ' s on the man ' s hat sir ? [MASK] [SEP]", "0" * 14,
        "the head reads sum(mask) - 2",
    ),
    # vqa_dataset.py with pretraining and no_next_sentence: question + ["?"] + answer, one segment.
    "vqa-pre": Case(
        "Is it red?", "yes", "[CLS] is it red ? yes [SEP]", "0" * 7, "masked words only"
    ),
    # coco_dataset.py: two captions, the second one of another image in half of the cases.
    "vqa-coco-pre": Case(
        "A cat.", "A dog sits.", "[CLS] a cat . [SEP] a dog sits . [SEP]", "0000011111",
        "two_sentence",
    ),
    "nlvr2-coco-pre": Case(
        "A cat.", "A dog sits.", "[CLS] a cat . [SEP] a dog sits . [SEP]", "0000011111",
        "two_sentence",
    ),
    "vcr-coco-pre": Case(
        "A cat.", "A dog sits.", "[CLS] a cat . [SEP] a dog sits . [SEP]", "0000011111",
        "two_sentence",
    ),
    "flickr-coco-pre": Case(
        "A cat.", "A dog sits.", "[CLS] a cat . [SEP] a dog sits . [SEP]", "0000011111",
        "two_sentence",
    ),
    # nlvr_dataset.py: one sentence; the regions of the left image, then those of the right one.
    "nlvr2": Case(
        "Both dogs sleep.", None, "[CLS] both dogs sleep . [SEP]", "0" * 6, "pooled"
    ),
    "nlvr2-pre": Case(
        "Both dogs sleep.", None, "[CLS] both dogs sleep . [SEP]", "0" * 6, "pooled"
    ),
    # vcr.py: question and choice as a pair, four times.
    "vcr": Case(
        "Why is Casey here?", ["To eat."] * 4,
        "[CLS] why is casey here ? [SEP] to eat . [SEP]", "00000001111", "pooled",
    ),
    "vcr-pre": Case(
        "Why is Casey here?", "To eat.", "[CLS] why is casey here ? [SEP] to eat . [SEP]",
        "00000001111", "one of the eight sequences",
    ),
    # flickr_dataset.py: the caption alone.
    "flickr": Case("A man sits.", None, "[CLS] a man sits . [SEP]", "0" * 6, "phrases"),
    "flickr-pre": Case("A man sits.", None, "[CLS] a man sits . [SEP]", "0" * 6, "words"),
    # mmf/models/visual_bert.py reads sum(mask) - 2 too, but no [MASK] is added: the last token.
    "mmf-vqa": Case("Is it red?", None, "[CLS] is it red ? [SEP]", "0" * 6, "no [MASK]"),
    "mmf-vizwiz": Case("Is it red?", None, "[CLS] is it red ? [SEP]", "0" * 6, "no [MASK]"),
    "mmf-classification": Case("Look at it", None, "[CLS] look at it [SEP]", "0" * 5, "pooled"),
    "mmf-pre": Case(
        "A cat.", "A dog sits.", "[CLS] a cat . [SEP] a dog sits . [SEP]", "0000011111", "words"
    ),
    # demo.ipynb of transformers: the tokenizer's own sequence, no [MASK], visual segments 1.
    "hf": Case("Is it red?", None, "[CLS] is it red ? [SEP]", "0" * 6, "no [MASK]"),
    # tools/train_embedded.py: as vqa.
    "scenes": Case(
        "What digit is red?", None, "[CLS] what digit is red ? [MASK] [SEP]", "0" * 8, "as vqa"
    ),
}  # fmt: skip
READ = {"mask": "[MASK]", "last": None, "first": "[CLS]"}
# Region width, most regions an image, and visual segments: configs/*/*.json, the loaders, MMF.
REGIONS = {
    "vqa": (2048, 100, (0,)),
    "vqa-pre": (2048, 100, (0,)),
    "vqa-coco-pre": (2048, 100, (0,)),
    "nlvr2": (1024, 144, (0, 1)),
    "nlvr2-pre": (1024, 144, (0, 1)),
    "nlvr2-coco-pre": (1024, 144, (0,)),
    "vcr": (512, None, (0,)),
    "vcr-pre": (512, None, (0,)),
    "vcr-coco-pre": (512, None, (0,)),
    "flickr": (2054, 100, (0,)),
    "flickr-pre": (2054, 100, (0,)),
    "flickr-coco-pre": (2054, 100, (0,)),
    "mmf-vqa": (2048, 100, (0,)),
    "mmf-vizwiz": (2048, 100, (0,)),
    "mmf-classification": (2048, 100, (0,)),
    "mmf-pre": (2048, 100, (0,)),
    "hf": (2048, 36, (1,)),
    "scenes": (573, 36, (0,)),
}
PUBLISHED = {
    "uclanlp/visualbert-vqa": ("VisualBertForQuestionAnswering", 2048, "vqa"),
    "uclanlp/visualbert-vqa-pre": ("VisualBertForPreTraining", 2048, "vqa-pre"),
    "uclanlp/visualbert-vqa-coco-pre": ("VisualBertForPreTraining", 2048, "vqa-coco-pre"),
    "uclanlp/visualbert-nlvr2": ("VisualBertForVisualReasoning", 1024, "nlvr2"),
    "uclanlp/visualbert-nlvr2-pre": ("VisualBertForPreTraining", 1024, "nlvr2-pre"),
    "uclanlp/visualbert-nlvr2-coco-pre": ("VisualBertForPreTraining", 1024, "nlvr2-coco-pre"),
    "uclanlp/visualbert-vcr": ("VisualBertForMultipleChoice", 512, "vcr"),
    "uclanlp/visualbert-vcr-pre": ("VisualBertForPreTraining", 512, "vcr-pre"),
    "uclanlp/visualbert-vcr-coco-pre": ("VisualBertForPreTraining", 512, "vcr-coco-pre"),
    "downloads/vqa_fine_tuned.th": ("VisualBertForQuestionAnswering", 2048, "vqa"),
    "downloads/nlvr2_pre_trained.th": ("VisualBertForPreTraining", 1024, "nlvr2-pre"),
    "downloads/vcr_fine_tune.th": ("VisualBertForMultipleChoice", 512, "vcr"),
    "my/visualbert-vqa-tuned": ("VisualBertForQuestionAnswering", 2048, "vqa"),
    "my/reasoner": ("VisualBertForVisualReasoning", 1024, "nlvr2"),
    "my/grounder": ("VisualBertForRegionToPhraseAlignment", 2054, "flickr"),
    "my/body": ("VisualBertModel", 512, "vcr-coco-pre"),
    "my/tf": ("TFVisualBertForMultipleChoice", 512, "vcr"),
}


def test_every_recipe_has_a_case():
    assert CASES.keys() == RECIPES.keys() == REGIONS.keys()
    assert {recipe.source for recipe in RECIPES.values()}.isdisjoint({""})


@pytest.mark.parametrize("name", CASES)
def test_tokens_segments_and_the_position_that_is_read(name, bert_vocabulary):
    case, recipe = CASES[name], get_recipe(name)
    processor = VisualBertProcessor(recipe, bert_vocabulary)
    batch = processor([case.a], None if case.b is None else [case.b])
    ids = batch["input_ids"].reshape(-1, batch["input_ids"].shape[-1])
    tokens = [processor.tokenizer.tokenizer.id_to_token(i) for i in ids[0]]
    assert " ".join(tokens) == case.tokens, case.why
    segments = batch["token_type_ids"].reshape(ids.shape)
    assert "".join(map(str, segments[0])) == case.segments
    assert (batch["attention_mask"] == 1).all()
    if recipe.read in READ:  # what the head reads: the last but one of the text, or the first
        at = 0 if recipe.read == "first" else len(tokens) - 2
        assert tokens[at] == (READ[recipe.read] or case.tokens.split()[-2])
    assert recipe.read != "mask" or batch.mask_positions[0] == len(tokens) - 2


@pytest.mark.parametrize("name", REGIONS)
def test_regions_and_their_segments(name, bert_vocabulary):
    width, most, segments = REGIONS[name]
    case = CASES[name]
    processor = VisualBertProcessor(name, bert_vocabulary)
    rng = np.random.default_rng(0)
    images = [Regions(rng.standard_normal((n, width))) for n in (150, 3)][: len(segments)]
    batch = processor([case.a], None if case.b is None else [case.b], [images])
    counts = [len(image) if most is None else min(len(image), most) for image in images]
    assert batch["visual_embeds"].shape == (1, sum(counts), width)
    want = [segment for segment, n in zip(segments, counts, strict=True) for _ in range(n)]
    assert batch["visual_token_type_ids"].tolist() == [want]
    assert batch["visual_attention_mask"].tolist() == [[1] * len(want)]
    np.testing.assert_array_equal(
        batch["visual_embeds"][0, : counts[0]], images[0].features[: counts[0]]
    )


@pytest.mark.parametrize("source", PUBLISHED)
def test_a_checkpoint_without_processor_files_gets_its_recipe(source):
    architecture, width, name = PUBLISHED[source]
    config = VisualBertConfig(visual_embedding_dim=width, architectures=(architecture,))
    with pytest.warns(UserWarning, match="recipe") as caught:
        assert guess_recipe(source, config).name == name
    by = "its name" if "my/" not in source else "its head and the width of its regions"
    assert str(caught[0].message) == (
        f"{source} has no processor files; the recipe {name!r} is taken by {by}. Another one: "
        "recipe=…, or --recipe on the command line"
    )


def test_a_body_without_the_published_head_is_not_taken_by_name():
    config = VisualBertConfig(
        visual_embedding_dim=2048, architectures=("VisualBertForVisualReasoning",)
    )
    with pytest.warns(UserWarning, match="by its head"):
        recipe = guess_recipe("uclanlp/visualbert-vqa", config)
    assert (recipe.name, recipe.width, recipe.detector) == ("nlvr2", 2048, "")


def test_mmf_is_known_by_its_classifier():
    config = VisualBertConfig(
        visual_embedding_dim=2048,
        classifier_head="mlp",
        architectures=("VisualBertForQuestionAnswering",),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        recipe = guess_recipe("somewhere", config)
    assert (recipe.name, recipe.scores) == ("mmf-vqa", "sigmoid")


def test_polarity_of_the_labels():
    # coco_dataset.py: is_correct 1 for a caption of the image; nlvr_dataset.py: 1 for "True".
    assert RECIPES["vqa-coco-pre"].labels == ("a random caption", "a caption of the image")
    assert RECIPES["nlvr2"].labels == ("False", "True")


def test_unknown_recipe():
    with pytest.raises(UsageError) as error:
        get_recipe("vqa2")
    assert str(error.value) == "unknown recipe 'vqa2'; did you mean 'vqa'?"
