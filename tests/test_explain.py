"""What the explanations guarantee: exact sums on cases computed by hand, padding that counts for
nothing, the same numbers from the three frameworks, a measure of entity grounding that gives 1 to a
planted head and chance to shuffled boxes, and pictures that open, say what they should and come out
byte for byte the same.
"""

import itertools
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import BACKENDS, make_model, tiny_config

from visualbert import ModelOutput, get_backend
from visualbert.errors import InputError, MissingBackendError, UsageError
from visualbert.explain import (
    Annotated,
    EntityGrounding,
    Word,
    attentions_of,
    entity_grounding,
    grounding,
    head_grounding,
    heads_figure,
    merge_pieces,
    picture,
    rolled_grounding,
    rollout,
    save_picture,
    split_attention,
)
from visualbert.explain.pictures import content_words
from visualbert.inputs.regions import Regions
from visualbert.parity import CASES, make_inputs
from visualbert.regions import get_extractor
from visualbert.scenes.draw import make_scene, paint
from visualbert.scenes.tasks import matching

CASE = {case.name: case for case in CASES}
TEXT, REGIONS = 11, 7  # of `make_inputs`
# Two tokens and two regions, one layer, one head.
ROWS = [[0.5, 0.1, 0.3, 0.1], [0.2, 0.2, 0.2, 0.4], [0.1, 0.3, 0.6, 0.0], [0.25] * 4]
HAND = np.array(ROWS)[None, None, None]


@pytest.fixture(scope="module")
def inputs():
    return make_inputs(CASE["right padding"], "VisualBertModel", tiny_config())


def run_model(backend, inputs, dtype="float64", late=False):
    """What a framework's own model returns."""
    model = make_model(backend, "VisualBertModel", tiny_config(bypass_transformer=late), dtype)
    return model, {**inputs, "output_attentions": True}


@pytest.fixture(scope="module", params=[False, True], ids=["early", "late"])
def outputs(request, inputs):
    """Of every framework, in float64, as `Backend.call` gives them."""
    found = {}
    for name in BACKENDS:
        model, given = run_model(name, inputs, late=request.param)
        found[name] = get_backend(name).call(model, given)
    return request.param, found


@pytest.fixture(scope="module")
def scene():
    """An image of digits, its regions, and words with made-up attention to them."""
    image = paint(make_scene(3, 1, "test"))
    regions = get_extractor()(image)
    words = merge_pieces(
        ["[CLS]", "what", "digit", "is", "left", "of", "the", "black", "5", "?", "[MASK]", "[SEP]"]
    )
    shares = np.random.default_rng(0).dirichlet(np.full(len(regions), 0.3), len(words))
    return image, regions, words, shares


@pytest.fixture(scope="module")
def result():
    rng = np.random.default_rng(0)
    accuracy = rng.random((12, 12)) * 0.5
    accuracy[:2] = np.nan
    return EntityGrounding(accuracy, rng.random((12, 12)), 0.19, 0.87, 1000)


def by_frameworks(outputs, measure):
    """A measure of each framework's output, held to 1e-9 of each other."""
    found = {name: measure(output) for name, output in outputs.items()}
    for a, b in itertools.combinations(found.values(), 2):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-9)
    return found["pt"]


# Attentions


def test_every_framework_gives_the_same_array(outputs):
    late, found = outputs
    attentions = by_frameworks(found, attentions_of)
    size = TEXT + REGIONS
    assert attentions.shape == (3 if late else 2, 3, 3, size, size)
    assert attentions.dtype == np.float64
    assert np.isnan(attentions[:2, ..., TEXT:]).all() == late
    np.testing.assert_allclose(np.nansum(attentions[..., :TEXT, :], -1), 1, atol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_models_own_output_is_taken(backend, dtype, inputs):
    model, given = run_model(backend, inputs, dtype)
    output = model(**given)
    assert dtype in str(output.attentions[0].dtype)
    found = attentions_of(output)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found.sum(-1), 1, atol=1e-5 if dtype == "float32" else 0.02)
    for same in (output.attentions, list(output.attentions), dict(output), found):
        np.testing.assert_array_equal(attentions_of(same), found)
    exact = attentions_of(get_backend("pt").call(*run_model("pt", inputs)))
    assert np.abs(found - exact).max() < (1e-5 if dtype == "float32" else 0.05)
    assert np.abs(found[::-1] - exact).max() > 0.1  # the layers are in order


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (
            ModelOutput(last_hidden_state=np.zeros((1, 2, 3))),
            "the output holds no attentions; call the model with output_attentions=True",
        ),
        (None, "the output holds no attentions; call the model with output_attentions=True"),
        (
            {"logits": np.zeros((1, 2))},
            "the output holds no attentions; call the model with output_attentions=True",
        ),
        (
            np.zeros((2, 3, 3)),
            "attentions must be a model's output, one array a layer, or an array (layers, batch, "
            "heads, positions, positions), got shape (2, 3, 3)",
        ),
        (
            [np.zeros((1, 2, 3, 4))],
            "a layer's attention has shape (1, 2, 3, 4), expected (batch, heads, positions, "
            "positions)",
        ),
        (
            [np.zeros((1, 2, 3, 3)), np.zeros((2, 2, 4, 4))],
            "the layers' attentions have shapes (1, 2, 3, 3), (2, 2, 4, 4): not those of one call",
        ),
    ],
)
def test_what_holds_no_attentions_is_refused(output, message):
    with pytest.raises(InputError) as caught:
        attentions_of(output)
    assert str(caught.value) == message


# The four directions


def test_split_by_hand():
    found = split_attention(HAND, [[1, 1]])
    assert [part.shape for part in found] == [(1, 1, 1)] * 4
    assert [part.item() for part in found] == pytest.approx([0.5, 0.5, 0.45, 0.55], abs=1e-15)


def test_split_counts_visible_queries_only():
    masked = HAND.copy()
    masked[..., [1, 3]] = 0
    masked[..., 0, [0, 2]] = 0.7, 0.3
    masked[..., 2, [0, 2]] = 0.4, 0.6
    found = split_attention(masked, [[1, 0]], [[1, 0]])
    assert [part.item() for part in found] == pytest.approx([0.7, 0.3, 0.4, 0.6], abs=1e-15)


def test_split_without_a_visible_region():
    found = split_attention(HAND, [[1, 1]], [[0, 0]])
    assert np.isnan(found.region_to_text).all() and np.isnan(found.region_to_region).all()
    assert found.text_to_region.item() == 0


def test_split_of_text_alone():
    found = split_attention(HAND, [[1, 1, 1, 1]])
    assert found.text_to_text.item() == 1
    assert all(np.isnan(part).all() for part in found[1:])


def test_split_of_a_model(outputs, inputs):
    late, found = outputs
    masks = inputs["attention_mask"], inputs["visual_attention_mask"]
    assert (masks[0] == 0).any() and (masks[1] == 0).any()
    parts = by_frameworks(found, lambda output: np.array(split_attention(output, *masks)))
    joint = parts[:, 2:] if late else parts
    np.testing.assert_allclose(joint[0] + joint[1], 1, atol=1e-12)
    np.testing.assert_allclose(joint[2] + joint[3], 1, atol=1e-12)
    assert (joint > 0.01).all()  # both directions of every head carry something
    if late:
        np.testing.assert_allclose(parts[0, :2], 1, atol=1e-12)
        assert np.isnan(parts[1:, :2]).all()


def test_split_folds_choices():
    two = np.repeat(HAND, 2, axis=1)
    found = split_attention(two, np.ones((1, 2, 2)))
    assert found.text_to_text.shape == (1, 2, 1)


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (
            ([[1, 1]] * 2,),
            "attention_mask has shape (2, 2), the attentions are of 1 examples; pass the mask that "
            "the model got",
        ),
        (
            ([[1, 1]], [[1, 1, 1]]),
            "the masks cover 2 tokens and 3 regions, the attentions 4 positions; pass the masks "
            "that the model got",
        ),
    ],
)
def test_masks_of_another_batch_are_refused(masks, message):
    with pytest.raises(InputError) as caught:
        split_attention(HAND, *masks)
    assert str(caught.value) == message


# Words


def test_pieces_are_merged_to_words():
    pieces = ["[CLS]", "a", "zeb", "##ra", "##s", "##", "[SEP]"]
    assert merge_pieces(pieces) == [
        Word("[CLS]", 0, 1),
        Word("a", 1, 2),
        Word("zebras", 2, 5),
        Word("##", 5, 6),
        Word("[SEP]", 6, 7),
    ]


def test_grounding_by_hand():
    words = merge_pieces(["ze", "##bra"])
    np.testing.assert_allclose(grounding(HAND, words, 2), [[0.25, 0.25]])
    np.testing.assert_allclose(grounding(HAND, [("ze", 0, 1)], 2), [[0.3, 0.1]])
    assert grounding(HAND, [], 2).shape == (0, 2)


def test_grounding_chooses_layers_heads_and_examples(outputs, inputs):
    late, found = outputs
    words = [("one", 0, 1), ("two", 1, 4)]
    whole = by_frameworks(found, lambda output: head_grounding(output, words, TEXT, 2))
    assert whole.shape == (3 if late else 2, 3, 2, REGIONS)
    attentions = attentions_of(found["pt"])
    np.testing.assert_array_equal(whole[:, :, 0], attentions[:, 2, :, 0, TEXT:])
    np.testing.assert_allclose(whole[:, :, 1], attentions[:, 2, :, 1:4, TEXT:].mean(2), atol=1e-15)
    seen = whole[2:] if late else whole
    pt = found["pt"]
    for arguments, expected in (
        ({}, seen.mean((0, 1))),
        ({"layer": -1}, seen[-1].mean(0)),
        ({"head": 1}, seen[:, 1].mean(0)),
        ({"layer": -1, "head": -1}, seen[-1, -1]),
    ):
        np.testing.assert_allclose(grounding(pt, words, TEXT, 2, **arguments), expected)
    hidden = inputs["visual_attention_mask"][0] == 0
    assert hidden.any() and not grounding(pt, words, TEXT, 0)[:, hidden].any()


def test_rollout_by_hand():
    first = np.array([[0.5, 0.5], [0.0, 1.0]])
    second = np.array([[0.2, 0.8], [0.6, 0.4]])
    attentions = np.stack([first, second])[:, None, None]
    # (0.5 second + 0.5 I) (0.5 first + 0.5 I)
    expected = [[0.6 * 0.75, 0.6 * 0.25 + 0.4], [0.3 * 0.75, 0.3 * 0.25 + 0.7]]
    np.testing.assert_allclose(rollout(attentions, 1)[0], expected, atol=1e-15)
    np.testing.assert_allclose(rolled_grounding(attentions, [("w", 0, 1)], 1), [[0.55]])
    heads = np.concatenate([attentions, attentions[:, :, :, ::-1]], 2)  # the mean, then the product
    mixed = [0.25 * (first + first[::-1]), 0.25 * (second + second[::-1])]
    expected = (mixed[1] + np.eye(2) / 2) @ (mixed[0] + np.eye(2) / 2)
    np.testing.assert_allclose(rollout(heads, 1)[0], expected, atol=1e-15)


def test_rollout_of_a_model(outputs, inputs):
    late, found = outputs
    rolled = by_frameworks(found, lambda output: rollout(output, TEXT))
    np.testing.assert_allclose(rolled.sum(-1), 1, atol=1e-12)
    visible = np.concatenate([inputs["attention_mask"], inputs["visual_attention_mask"]], 1) == 1
    for example, kept in zip(rolled, visible, strict=True):
        assert not example[np.ix_(kept, ~kept)].any() and example[np.ix_(kept, kept)].all()
    if late:  # text reaches regions only through the last layer
        last = 0.5 * attentions_of(found["pt"])[2].mean(1)
        np.testing.assert_allclose(rolled[:, :TEXT, TEXT:], last[:, :TEXT, TEXT:], atol=1e-12)


def test_late_fusion_names_the_layers_that_saw_regions():
    layers = [np.full((1, 1, 2, 2), 0.5), HAND[0]]
    with pytest.raises(InputError) as caught:
        grounding(layers, [("w", 0, 1)], 2, layer=0)
    assert str(caught.value) == "layer 0 saw no regions (late fusion); of those that did: 1"
    with pytest.raises(InputError) as caught:
        grounding(layers, [("w", 0, 1)], 3)
    assert str(caught.value) == "text_length=3, but layer 0 saw 2 of 4 positions"
    np.testing.assert_allclose(grounding(layers, [("w", 0, 1)], 2), [[0.3, 0.1]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"text_length": 5},
            "text_length=5 does not fit attentions over 4 positions; it is the padded length of "
            "the text, where the regions begin",
        ),
        ({"words": [("zebra", 1, 3)]}, "the word 'zebra' has wordpieces 1 to 2, the text 2"),
        ({"example": 1}, "example=1 is not in a batch of 1, counted from 0"),
        ({"layer": 1}, "layer=1 is not one of 1, counted from 0"),
        ({"head": -2}, "head=-2 is not one of 1, counted from 0"),
        (
            {"text_length": 4},
            "the model saw no regions: there is nothing to ground words in",
        ),
    ],
)
def test_grounding_refuses(arguments, message):
    with pytest.raises(InputError) as caught:
        grounding(**{"attentions": HAND, "words": [("a", 0, 1)], "text_length": 2, **arguments})
    assert str(caught.value) == message


# Entities

GRID = np.array([[x, y, x + 10, y + 10] for y in (0, 20) for x in range(0, 100, 20)], float)


def annotated_set(count, seed=0, shuffled=False, late=False):
    """Pictures of three entities over ten boxes; head (1, 2) looks at the right one."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        layers = rng.dirichlet(np.ones(14), (2, 3, 14))  # four tokens, then the regions
        right = rng.permutation(10)[:3]
        positions = rng.permutation(4)[:3]
        layers[1, 2, positions, 4 + right] += 1
        layers[1, 2] /= layers[1, 2].sum(-1, keepdims=True)
        gold = [GRID[[r]] + rng.uniform(-1, 1, 4) for r in right]
        boxes = GRID[rng.permutation(10)] if shuffled else GRID
        layers = layers[:, None]
        attentions = [layers[0, ..., :4, :4], layers[1]] if late else layers
        yield Annotated(attentions, positions, boxes, gold, 4, rng.random(10))


def test_a_planted_head_is_found():
    found = entity_grounding(annotated_set(400))
    assert found.accuracy.shape == found.mass.shape == (2, 3)
    assert found.accuracy[1, 2] == 1 and found.best == (1, 2)
    others = np.delete(found.accuracy.ravel(), 5)
    assert np.abs(others - 0.1).max() < 0.05 and abs(found.baseline - 0.1) < 0.05
    assert found.count == 1200 and found.bound == 1
    assert np.abs(np.delete(found.mass.ravel(), 5) - 10 / 14).max() < 0.02
    assert found.mass[1, 2] == pytest.approx((1 + 10 / 14) / 2, abs=0.02)
    lines = found.table().splitlines()
    assert lines[0] == "layer  best head  accuracy    mean  to regions"
    assert lines[2].split()[:3] == ["2", "3", "100.0%"]
    assert lines[3].startswith("1200 entities; most confident detection ")
    assert lines[3].endswith("; no head can surpass 100.0%")


def test_shuffled_boxes_leave_chance():
    found = entity_grounding(annotated_set(400, shuffled=True))
    assert np.abs(found.accuracy - 0.1).max() < 0.05 and found.bound == 1


def test_words_do_not_count_and_padding_is_left_out():
    attentions = np.zeros((1, 1, 5, 5))  # two tokens, two regions, one padded
    attentions[0, 0, 1] = 0.9, 0.01, 0.05, 0.04, 0
    far, near = [50, 0, 60, 10], [0, 0, 10, 10]
    found = entity_grounding([(attentions, [1], [near, far], [[[0, 0, 10, 5]]], 2, [0.1, 0.9])])
    assert found.accuracy.item() == 1  # an overlap of exactly one half
    assert (found.mass.item(), found.baseline) == (pytest.approx(0.09), 0)
    assert found.light.item()
    half = [(attentions, [1], [near, far], [[[0, 0, 10, 4.99]]], 2)]
    found = entity_grounding(half)
    assert (found.accuracy.item(), found.bound) == (0, 0) and np.isnan(found.baseline)
    assert "most confident detection unknown" in found.table()
    assert entity_grounding(half, least_overlap=0.4).accuracy.item() == 1


def test_any_gold_box_will_do_and_phrases_without_one_are_not_counted():
    attentions = np.full((1, 1, 4, 4), 0.25)
    gold = [[[90, 0, 99, 9], [0, 0, 10, 10]], []]
    found = entity_grounding([(attentions, [0, 1], GRID[:2], gold, 2)])
    assert found.count == 1 and found.accuracy.item() == 1


def test_late_fusion_has_no_accuracy_where_no_region_was_seen():
    found = entity_grounding(annotated_set(20, late=True))
    assert np.isnan(found.accuracy[0]).all() and found.light[0].all()
    assert found.accuracy[1, 2] == 1 and found.best == (1, 2)
    assert found.table().splitlines()[1] == "    1  saw no regions"


def test_pictures_are_read_one_at_a_time():
    alive = []

    def pictures():
        for item in annotated_set(3):
            alive.append(len(alive))
            yield item

    assert entity_grounding(pictures()).count == 9 and alive == [0, 1, 2]


def test_entities_in_scenes_and_in_a_models_output():
    """Regions from pixels, annotations of the scenes, a head that follows the annotation."""
    scenes = [make_scene(n, 5, "test") for n in range(8)]

    def pictures():
        for scene in scenes:
            regions = get_extractor()(paint(scene))
            shown = matching(regions.boxes, scene)
            size = len(scene.things) + len(regions)
            attentions = np.full((2, 1, 1, size, size), 1 / size, np.float32)
            for region, thing in enumerate(shown):
                if thing >= 0:
                    attentions[1, 0, 0, thing, len(scene.things) + region] = 0.9
            gold = [[thing.box] for thing in scene.things]
            output = ModelOutput(attentions=tuple(attentions))
            yield output, range(len(gold)), regions.boxes, gold, len(gold), regions.scores

    found = entity_grounding(pictures())
    assert found.count == sum(len(scene.things) for scene in scenes)
    assert found.accuracy[1, 0] == found.bound >= 0.9
    assert found.accuracy[0, 0] == 0  # all even: the first region, which is the whole image


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positions": [4]}, "picture 0: 1 positions, but 2 lists of gold boxes"),
        ({"positions": [0, 2]}, "picture 0: position 2 is not in a text of 2"),
        ({"boxes": GRID[:3]}, "picture 0: 3 boxes, but attention to 2 regions"),
        ({"boxes": GRID[:2, :3]}, "picture 0: boxes has shape (2, 3), expected (boxes, 4)"),
        ({"boxes": []}, "picture 0: it has no regions"),
        ({"gold": [[], [[1, 2]]]}, "picture 0: gold[1] has shape (1, 2), expected (boxes, 4)"),
        ({"scores": [1.0]}, "picture 0: scores has shape (1,), expected (2,)"),
        (
            {"attentions": np.zeros((1, 2, 1, 4, 4))},
            "picture 0: the attentions are of 2 examples; pass one at a time: "
            "attentions_of(output)[:, i]",
        ),
        (
            {"attentions": ModelOutput()},
            "picture 0: the output holds no attentions; call the model with output_attentions=True",
        ),
        ({"gold": [[], []]}, "no entity with a gold box: there is nothing to measure"),
    ],
)
def test_pictures_that_do_not_fit_are_refused(change, message):
    good = Annotated(HAND, [0, 1], GRID[:2], [GRID[:1], GRID[:1]], 2)
    assert entity_grounding([good]).count == 2
    with pytest.raises(InputError) as caught:
        entity_grounding([good._replace(**change)])
    assert str(caught.value) == message


def test_models_of_two_sizes_are_not_mixed():
    pictures = [(np.zeros((n, 1, 4, 4)), [0], GRID[:2], [GRID[:1]], 2) for n in (1, 2)]
    with pytest.raises(InputError) as caught:
        entity_grounding(pictures)
    assert str(caught.value) == "picture 1: (2, 1) layers and heads, (1, 1) before it"


# Pictures


def test_content_words():
    words = ["[CLS]", "is", "there", "a", "red", "4", "left", "of", "it", "?", "[MASK]", "[SEP]"]
    assert [words[i] for i in content_words(words)] == ["red", "4", "left", "[MASK]"]
    assert content_words(["is", "the", "?"]) == [0, 1, 2]


@pytest.mark.parametrize("suffix", [".png", ".pdf", ".svg"])
def test_a_picture_is_the_same_every_time(scene, suffix, tmp_path):
    made = []
    for name in "ab":
        answers = [("8", 0.9), ("7", 0.05)]
        figure = picture(*scene, answers, "what is left of the black 5?")
        path = tmp_path / (name + suffix)
        save_picture(figure, path)
        made.append(path.read_bytes())
    assert made[0] == made[1]
    start = {".png": b"\x89PNG", ".pdf": b"%PDF", ".svg": b"<?xml"}[suffix]
    assert made[0].startswith(start)
    if suffix == ".svg":
        for text in ("what is left of the black 5?", ">answer<", ">black<", "90.0 %", ">8<"):
            assert text in made[0].decode()
        assert ">the<" not in made[0].decode()


def test_the_right_boxes_are_shaded(tmp_path):
    """A white image of two boxes, each word looking at one of them."""
    image = np.full((100, 200, 3), 255, np.uint8)
    boxes = [[20, 20, 60, 80], [140, 20, 180, 80]]
    figure = picture(image, boxes, ["red", "blue"], [[0.4, 0.0], [0.05, 0.15]])
    save_picture(figure, tmp_path / "a.png")
    panels = [axes for axes in figure.axes if axes.images][1:3]
    size = np.array(Image.open(tmp_path / "a.png").convert("RGB"), float)
    tints = []
    for axes in panels:
        for x in (40, 160):
            at = figure.transFigure.inverted().transform(axes.transData.transform((x, 50)))
            row, column = int((1 - at[1]) * size.shape[0]), int(at[0] * size.shape[1])
            red, _, blue = size[row, column]
            tints.append(red - blue)
    assert tints[0] > 150 and abs(tints[1]) < 3
    assert 20 < tints[2] < 0.5 * tints[3] and tints[3] < tints[0]


NOISE = np.random.default_rng(0).integers(0, 256, (4000, 3), np.uint8)


@pytest.mark.parametrize(
    ("shape", "regions", "words", "question", "answers"),
    [
        ((1, 1), 3, "red 猫 [MASK]", "猫 what? 😀\x00\ud800", [("no", 0.0)]),
        ((2000, 2), 10, "what is the red big digit near [MASK]", "what?", [("yes", 1.0)]),
        ((2, 2000), 10, "what is the red big digit near [MASK]", "what?", [("yes", 0.5)] * 20),
        ((40, 50), 100, "very $x^2$ Pneumonoultramicroscopic " * 9, "$\\alpha_{x$ " * 900, []),
        ((40, 50), 2, "red", "x" * 9000, [("an answer that never ends " * 40, 0.5)]),
        ((40, 50), 0, "red", "", []),
        ((40, 50), 3, "", "", []),
    ],
    ids=["one pixel", "tall", "wide", "crowded", "long", "no regions", "no words"],
)
def test_nothing_is_clipped(shape, regions, words, question, answers, tmp_path):
    rng = np.random.default_rng(1)
    image = np.resize(NOISE, (*shape, 3))
    corners = rng.random((regions, 2, 2)) * 1.5 * [shape[1], shape[0]]
    boxes = np.concatenate([corners.min(1), corners.max(1)], 1)
    words = words.split()
    shares = rng.dirichlet(np.ones(regions), len(words)) if regions else np.zeros((len(words), 0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = picture(image, boxes, words, shares, answers, question)
        for suffix in (".png", ".svg"):
            save_picture(figure, tmp_path / f"a{suffix}")
    pixels = np.array(Image.open(tmp_path / "a.png").convert("RGB"))
    width, height = figure.get_size_inches()
    assert width == 7 and 1 < height < 12
    assert abs(pixels.shape[0] - 200 * height) <= 1 and pixels.shape[1] == 1400
    edge = [pixels[:4], pixels[-4:], pixels[:, :4], pixels[:, -4:]]
    assert all((part == 255).all() for part in edge)
    assert (pixels < 255).any()


def test_many_words_become_a_dozen_panels(tmp_path):
    words = [f"word{i}" for i in range(30)]
    shares = np.full((30, 2), 0.1)
    shares[10:22] = 0.3
    figure = picture(np.full((40, 50), 200, np.uint8), GRID[:2], words, shares)
    save_picture(figure, tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text()
    assert [w for w in words if f">{w}<" in text] == words[10:22]
    figure = picture(np.full((40, 50), 200, np.uint8), GRID[:2], words, shares, panels=[0, 29])
    save_picture(figure, tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text()
    assert [w for w in words if f">{w}<" in text] == ["word0", "word29"]


def test_the_users_settings_play_no_part(scene, tmp_path):
    import matplotlib

    save_picture(picture(*scene), tmp_path / "a.png")
    with matplotlib.rc_context({"font.size": 30, "savefig.bbox": "tight", "axes.facecolor": "red"}):
        save_picture(picture(*scene), tmp_path / "b.png")
        assert matplotlib.rcParams["font.size"] == 30
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert matplotlib.rcParams["svg.fonttype"] == "path"


def test_the_heads_figure(result, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = heads_figure(result, "a title that is long " * 20)
        for suffix in (".png", ".pdf", ".svg"):
            save_picture(figure, tmp_path / f"a{suffix}")
    text = (tmp_path / "a.svg").read_text()
    layer, head = result.best
    best = f"layer {layer + 1}, head {head + 1}: {100 * np.nanmax(result.accuracy):.1f} %"
    for expected in (best, "most confident detection: 19.0 %", "right, % of 1000 entities"):
        assert expected in text
    dark, light = figure.axes[0].collections[:2]
    assert len(light.get_offsets()) == (result.mass[2:] < 0.2).sum() > 0
    assert len(dark.get_offsets()) + len(light.get_offsets()) == 120
    pixels = np.array(Image.open(tmp_path / "a.png").convert("RGB"))
    assert pixels.shape[:2] == (620, 920)
    assert (pixels[:, [0, 1, -2, -1]] == 255).all() and (pixels[[0, 1, -2, -1]] == 255).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"grounding": np.zeros((2, 2))},
            "grounding has shape (2, 2), expected (1, 2) for 1 words and 2 regions",
        ),
        (
            {"grounding": [[np.nan, 1]]},
            "grounding holds numbers that are no attention (negative, infinite or not a number); "
            "a layer that saw no regions cannot be drawn",
        ),
        (
            {"regions": Regions(np.zeros((2, 3), np.float32))},
            "the regions have no boxes: there is no place to draw them",
        ),
        (
            {"regions": [[0, 0, 1, np.inf]]},
            "boxes has shape (1, 4), expected finite numbers (regions, 4)",
        ),
        ({"answers": [("a", 1.5)]}, "the answer 'a' has probability 1.5, expected 0 to 1"),
        ({"panels": [1]}, "panels names word 1 of 1, counted from 0"),
        ({"image": b"no"}, "the image: not an image of a known format"),
    ],
)
def test_pictures_of_what_does_not_fit_are_refused(change, message):
    good = {"image": np.zeros((9, 9, 3), np.uint8), "regions": GRID[:2], "words": ["red"]}
    with pytest.raises(InputError) as caught:
        picture(**{**good, "grounding": [[0.5, 0.5]], **change})
    assert str(caught.value) == message


def test_places_that_cannot_be_written_are_refused(result, tmp_path):
    figure = heads_figure(result)
    with pytest.raises(UsageError) as caught:
        save_picture(figure, tmp_path / "a.bmp")
    assert str(caught.value) == f"{tmp_path / 'a.bmp'}: a picture is written as .png, .pdf, .svg"
    with pytest.raises(UsageError) as caught:
        save_picture(figure, tmp_path / "none" / "a.png")
    expected = f"{tmp_path / 'none' / 'a.png'}: cannot be written: No such file or directory"
    assert str(caught.value) == expected


def test_matplotlib_is_optional(monkeypatch, result):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingBackendError) as caught:
        heads_figure(result)
    assert str(caught.value) == "pictures need matplotlib: pip install visualbert[plots]"


def test_importing_imports_neither_frameworks_nor_matplotlib():
    code = (
        "import sys, visualbert.explain as e; "
        "print([m for m in ('torch', 'tensorflow', 'jax', 'matplotlib', 'PIL') if m in "
        "sys.modules]); e.entity_grounding"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_pyplot_is_not_used(tmp_path):
    code = (
        "import sys, numpy as np; from visualbert.explain import picture, save_picture; "
        "save_picture(picture(np.zeros((9, 9)), [[0, 0, 5, 5]], ['red'], [[1]]), sys.argv[1]); "
        "print('matplotlib' in sys.modules, 'matplotlib.pyplot' in sys.modules)"
    )
    path = tmp_path / "a.png"
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    assert done.stdout == "True False\n" and path.exists()


def test_the_documentation_runs(tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[1] / "docs" / "explain.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile("\n".join(blocks), "docs/explain.md", "exec"), {})
    assert len(blocks) == 2 and {p.name for p in tmp_path.iterdir()} == {
        "looked-at.pdf",
        "heads.png",
    }
    assert "most confident detection" in capsys.readouterr().out
