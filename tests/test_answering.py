"""From a picture and a question to an answer: the model that comes with the package answers about
handwriting that it never saw, the same in three frameworks, and any other model by its own recipe.
"""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from PIL import Image

import visualbert
from visualbert import InputError, UsageError, VisualBertConfig, VisualBertProcessor
from visualbert.answering import EMBEDDED, embedded, pipeline
from visualbert.inputs.answers import ORDERS
from visualbert.inputs.regions import Regions
from visualbert.regions import get_extractor
from visualbert.scenes.draw import make_scene, paint
from visualbert.scenes.questions import questions

BACKENDS = ("pt", "tf", "flax")
SCENES, SEED = 24, 4_321  # no seed of the training


@pytest.fixture(scope="module")
def seen():
    """Test scenes: their pictures, and the questions about them."""
    scenes = [make_scene(number, SEED, "test") for number in range(SCENES)]
    return [(paint(scene), list(questions(scene))) for scene in scenes]


@pytest.fixture(scope="module")
def asked(seen):
    """Every question with the regions of its picture."""
    extract = get_extractor()
    regions = [extract(image) for image, _ in seen]
    return [(question, regions[n]) for n, (_, own) in enumerate(seen) for question in own]


@pytest.fixture(scope="module")
def pipelines():
    return {name: pipeline("vqa", backend=name) for name in BACKENDS}


@pytest.fixture(scope="module")
def answered(pipelines, asked):
    """What every framework answers."""
    items = [(question.text, regions) for question, regions in asked]
    return {
        name: [one for batch in pipe.stream(items) for one in batch]
        for name, pipe in pipelines.items()
    }


@pytest.mark.parametrize("name", BACKENDS)
def test_questions_about_unseen_handwriting_are_answered(name, answered, asked):
    right = [
        one.answer == question.answer
        for one, (question, _) in zip(answered[name], asked, strict=True)
    ]
    assert len(right) > 150
    assert np.mean(right) > 0.97  # of 6,932 questions 99.1 %: tools/measure_embedded.py


def test_without_its_picture_it_does_not_know(pipelines, asked):
    wrong = [(q.text, asked[n - 40][1]) for n, (q, _) in enumerate(asked)]  # another picture's
    found = [one for batch in pipelines["pt"].stream(wrong) for one in batch]
    right = [one.answer == q.answer for one, (q, _) in zip(found, asked, strict=True)]
    assert np.mean(right) < 0.5


def test_the_frameworks_agree(answered):
    for rows in zip(*answered.values(), strict=True):
        probabilities = [dict(one.answers) for one in rows]
        for text in probabilities[0]:
            values = [found.get(text) for found in probabilities]
            if None not in values:
                assert max(values) - min(values) < 1e-5
        assert len({one.answer for one in rows}) == 1


def test_the_checkpoint_is_small():
    files = list(embedded().iterdir())
    assert sum(path.stat().st_size for path in files) < 4_000_000
    assert {path.name for path in files} == {
        "config.json",
        "model.safetensors",
        "processor_config.json",
        "vocab.txt",
    }


def test_a_question_answered_alone_is_answered_the_same(pipelines, answered, seen):
    image, own = seen[0]
    for question, batched in zip(own, answered["pt"], strict=False):
        alone = pipelines["pt"](image, question.text)
        assert alone.question == question.text
        assert [text for text, _ in alone.answers] == [text for text, _ in batched.answers]
        np.testing.assert_allclose(
            [p for _, p in alone.answers], [p for _, p in batched.answers], atol=1e-5
        )


def test_answers_are_ranked_probabilities(pipelines, seen):
    found = pipelines["pt"](seen[0][0], "what digit is red?", top=99)
    assert len(found.answers) == 18
    values = [probability for _, probability in found.answers]
    assert values == sorted(values, reverse=True)
    assert sum(values) == pytest.approx(1)
    assert found.answer == found.answers[0].answer


def test_several_questions_about_one_image(pipelines, seen):
    found = pipelines["pt"](seen[0][0], ["how many digits are there?", "is there a red 3?"])
    assert [one.question for one in found] == ["how many digits are there?", "is there a red 3?"]


@pytest.mark.parametrize("name", BACKENDS)
def test_attentions_are_those_of_the_words_and_regions(name, pipelines, seen):
    found = pipelines[name](seen[0][0], "what digit is red?", attentions=True)
    size = found.words[-1][2] + len(found.regions)
    assert found.attentions.shape == (4, 4, size, size)
    np.testing.assert_allclose(found.attentions.sum(-1), 1, atol=1e-5)
    same = pipelines["pt"](seen[0][0], "what digit is red?", attentions=True)
    np.testing.assert_allclose(found.attentions, same.attentions, atol=1e-5)


def test_its_picture(pipelines, seen, tmp_path):
    from visualbert.explain import explain_answer, save_picture

    image = seen[0][0]
    found = pipelines["pt"](image, "what digit is red?", attentions=True)
    save_picture(explain_answer(image, found), tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").size[0] > 1000
    with pytest.raises(InputError) as error:
        explain_answer(image, pipelines["pt"](image, "what digit is red?"))
    assert str(error.value) == "the attentions were not kept; ask with attentions=True"


def test_a_model_in_memory(pipelines, seen):
    model = visualbert.load(embedded(), "pt", dtype="float32")
    with pytest.raises(UsageError) as error:
        pipeline("vqa", model)
    assert str(error.value) == "a model in memory needs its processor too: processor=…"
    own = pipeline("vqa", model, processor=VisualBertProcessor.from_pretrained(embedded()))
    question = "what digit is red?"
    assert own(seen[0][0], question).answers == pipelines["pt"](seen[0][0], question).answers


def test_the_embedded_model_is_found_by_its_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert pipeline("vqa", EMBEDDED).answers == pipeline().answers
    (tmp_path / EMBEDDED).mkdir()  # a folder of that name is meant first
    with pytest.raises(visualbert.VisualBertError):
        pipeline("vqa", EMBEDDED)


def test_what_is_no_question_or_picture(pipelines, seen, tmp_path):
    pipe = pipelines["pt"]
    for arguments, sentence in [
        ((seen[0][0], ""), "text 0 is empty; there is nothing to read"),
        ((None, "why"), "pass an image, or the regions of one"),
        ((seen[0][0], b"why"), "a text must be a string, or a list of them, got bytes"),
        ((seen[0][0], []), "there is no text; a batch has at least one"),
    ]:
        with pytest.raises(InputError) as error:
            pipe(*arguments)
        assert str(error.value) == sentence
    (tmp_path / "a.png").write_text("none")
    with pytest.raises(InputError, match="not an image"):
        pipe(tmp_path / "a.png", "why")
    for top in (0, 2.5, "3"):
        with pytest.raises(UsageError) as error:
            pipe(seen[0][0], "why", top=top)
        assert str(error.value) == f"top={top!r} must be at least 1"
    with pytest.raises(UsageError) as error:
        next(pipe.stream([("why", None)], batch_size=0))
    assert str(error.value) == "batch_size=0 must be at least 1"
    with pytest.raises(UsageError) as error:
        pipeline("captioning")
    assert str(error.value) == (
        "unknown task 'captioning'; expected one of vqa, visual-question-answering"
    )


# Files that do not fit each other


@pytest.fixture
def own(tmp_path):
    """A copy of the embedded model, and a function that changes values in one of its files."""
    folder = tmp_path / "own"
    shutil.copytree(embedded(), folder)

    def change(file, **values):
        path = folder / file
        found = json.loads(path.read_text())
        (found["recipe"] if file.startswith("processor") else found).update(values)
        path.write_text(json.dumps(found))

    return folder, change


WAY = "; pass one that fits: recipe=…, or --recipe on the command line"


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (
            {"max_length": 65},
            "the recipe 'scenes' gives texts of max_length=65 wordpieces, and {} has "
            "max_position_embeddings=64" + WAY,
        ),
        (
            {"width": 2048},
            "the recipe 'scenes' gives regions 2048 wide, and {} has visual_embedding_dim=573"
            + WAY,
        ),
        (
            {"visual_segments": [2]},
            "the recipe 'scenes' gives segments up to 2, and {} has type_vocab_size=2" + WAY,
        ),
        (
            {"architecture": "VisualBertForMultipleChoice"},
            "the recipe 'scenes' is for a VisualBertForMultipleChoice, which answers no questions; "
            "pass another one: recipe=…, or --recipe on the command line",
        ),
    ],
    ids=["long", "wide", "segments", "head"],
)
def test_a_recipe_that_does_not_fit_the_model(own, values, sentence):
    folder, change = own
    change("processor_config.json", **values)
    with pytest.raises(InputError) as error:
        pipeline("vqa", folder)
    assert str(error.value) == sentence.format(folder)


def test_a_vocabulary_that_is_too_large_for_the_model(own, bert_vocabulary):
    folder, _ = own
    with pytest.raises(InputError) as error:
        pipeline("vqa", folder, vocabulary=bert_vocabulary)
    assert str(error.value) == (
        f"the vocabulary holds 30522 words, and {folder} has vocab_size=160; pass its own: "
        "vocabulary=…, or --vocabulary on the command line"
    )


def test_a_folder_without_processor_files_but_with_its_vocabulary(own, seen, pipelines):
    folder, _ = own
    (folder / "processor_config.json").unlink()
    question = "what digit is red?"
    found = pipeline("vqa", folder, recipe="scenes", backend="pt")(seen[0][0], question)
    assert found.answers == pipelines["pt"](seen[0][0], question).answers
    with pytest.warns(UserWarning, match="has no processor files"), pytest.raises(InputError):
        pipeline("vqa", folder)  # the recipe that is guessed has longer texts than it takes


def test_a_link_to_a_read_only_folder(own, seen, pipelines, tmp_path):
    folder, _ = own
    for path in (*folder.iterdir(), folder):
        path.chmod(0o555 if path.is_dir() else 0o444)
    link = tmp_path / "ein Bild – 絵"
    link.symlink_to(folder)
    question = "what digit is red?"
    found = pipeline("vqa", link, backend="pt")(seen[0][0], question)
    assert found.answers == pipelines["pt"](seen[0][0], question).answers
    folder.chmod(0o755)


def test_the_longest_text_of_an_odd_table_of_positions(tmp_path):
    # Texts are padded to multiples of eight, but never beyond the model's positions.
    from visualbert import VisualBertForQuestionAnswering

    config = VisualBertConfig.from_pretrained(embedded()).replace(
        num_hidden_layers=1, max_position_embeddings=61
    )
    own = VisualBertProcessor.from_pretrained(embedded())
    recipe = dataclasses.replace(own.recipe, max_length=61)
    pipe = pipeline(
        "vqa",
        VisualBertForQuestionAnswering(config).eval(),
        processor=VisualBertProcessor(recipe, own.tokenizer),
    )
    regions = np.random.default_rng(0).standard_normal((3, 573)).astype(np.float32)
    with pytest.warns(UserWarning, match="too long"):
        found = pipe(question="red " * 90, regions=regions, attentions=True)
    assert found.attentions.shape == (1, 4, 64, 64)
    np.testing.assert_allclose(found.attentions.sum(-1), 1, atol=1e-5)


def test_regions_that_are_none_or_empty_are_answered_the_same(pipelines):
    some = np.random.default_rng(0).standard_normal((3, 573)).astype(np.float32)
    for pipe in pipelines.values():
        alone = pipe.ask(["is it red"], [None])[0]
        for regions in (Regions(np.zeros((0, 573))), None):
            for batch, at in (
                ([regions], 0),
                ([regions, Regions(some)], 0),
                ([Regions(some), regions], 1),
            ):
                found = pipe.ask(["is it red"] * len(batch), batch)[at]
                np.testing.assert_allclose(
                    [p for _, p in found.answers], [p for _, p in alone.answers], atol=1e-5
                )


def test_sigmoids_of_large_scores_are_silent(recwarn):
    from visualbert.answering import _PROBABILITIES

    found = _PROBABILITIES["sigmoid"](np.array([[-1e4, 0.0, 1e4, np.log(3)]]))
    np.testing.assert_allclose(found, [[0, 0.5, 1, 0.75]])
    assert not recwarn.list


# A published model: its recipe, its answers, and its features


@pytest.fixture(scope="module")
def published(tmp_path_factory, bert_vocabulary):
    """A folder such as the Hub's uclanlp/visualbert-vqa, features of one image, and answer lists.

    The published shapes but for a small body.
    """
    from visualbert import VisualBertForQuestionAnswering

    folder = tmp_path_factory.mktemp("uclanlp")
    config = VisualBertConfig(
        hidden_size=24, num_attention_heads=2, num_hidden_layers=2, intermediate_size=32,
        visual_embedding_dim=2048, num_labels=3129,
    )  # fmt: skip
    model = VisualBertForQuestionAnswering(config, seed=3).eval()
    model.save_pretrained(folder / "visualbert-vqa")
    rng = np.random.default_rng(0)
    features = rng.standard_normal((110, 2048)).astype(np.float32)
    (folder / "features").mkdir()
    np.save(folder / "features/COCO_val2014_000000000042.npy", features)
    for name, file in (("pythia-vqa", "answers_vqa.txt"), ("lxmert-vqa", "other.json")):
        order = ORDERS[name]
        words = [f"filler {n}" for n in range(order.labels)]
        for word, label in order.marks.items():
            words[label] = word
        text = json.dumps(words) if file.endswith("json") else "\n".join(words) + "\n"
        (folder / file).write_text(text)
    return folder, model, features


def test_a_published_model_gets_its_own_inputs(published, bert_vocabulary):
    import torch

    folder, model, features = published
    with pytest.warns(UserWarning, match="the recipe 'vqa' is taken by its name"):
        pipe = pipeline(
            "vqa",
            folder / "visualbert-vqa",
            backend="pt",
            vocabulary=bert_vocabulary,
            answers=folder / "answers_vqa.txt",
        )
    found = pipe(question="Is it red?", regions=Regions(features), top=3129)
    # By hand, as vqa_dataset.py and BertVQA have it: [CLS] is it red ? [MASK] [SEP], segments 0,
    # the first 100 regions, the answer at the mask.
    ids = torch.tensor([[101, 2003, 2009, 2417, 1029, 103, 102]])
    with torch.no_grad():
        logits = model(
            input_ids=ids,
            visual_embeds=torch.tensor(features[None, :100]),
            visual_token_type_ids=torch.zeros(1, 100, dtype=torch.long),
        ).logits[0]
    want = torch.softmax(logits.double(), 0).numpy()
    words = pipe.answers
    given = {words.index(text): probability for text, probability in found.answers}
    assert len(given) == 3128 and 0 not in given  # <unk> is no answer
    np.testing.assert_allclose([given[n] for n in range(1, 3129)], want[1:], atol=1e-7)


def test_transformers_inputs_give_other_answers(published, bert_vocabulary):
    folder, _, features = published
    options = {"vocabulary": bert_vocabulary, "answers": folder / "answers_vqa.txt"}
    both = [
        pipeline("vqa", folder / "visualbert-vqa", backend="pt", recipe=recipe, **options)
        for recipe in ("vqa", "hf")
    ]
    own, theirs = (
        dict(pipe(question="Is it red?", regions=Regions(features), top=3129).answers)
        for pipe in both
    )
    assert max(abs(own[text] - theirs[text]) for text in own) > 1e-6


def test_the_other_answer_list_is_refused(published, bert_vocabulary):
    folder, _, _ = published
    with pytest.raises(InputError, match="has LXMERT's order"):
        pipeline(
            "vqa",
            folder / "visualbert-vqa",
            recipe="vqa",
            vocabulary=bert_vocabulary,
            answers=folder / "other.json",
        )


def test_the_other_answer_list_is_refused_as_a_list_too(published, bert_vocabulary):
    folder, _, _ = published
    with pytest.raises(InputError, match=r"^answers has LXMERT's order"):
        pipeline(
            "vqa",
            folder / "visualbert-vqa",
            recipe="vqa",
            vocabulary=bert_vocabulary,
            answers=json.loads((folder / "other.json").read_text()),
        )


def test_another_head_answers_nothing(tmp_path):
    from visualbert import VisualBertForVisualReasoning

    small = VisualBertConfig.from_pretrained(embedded()).replace(num_hidden_layers=1)
    VisualBertForVisualReasoning(small).save_pretrained(tmp_path)
    for name in ("processor_config.json", "vocab.txt"):
        shutil.copy(embedded() / name, tmp_path)
    with pytest.raises(InputError) as error:
        pipeline("vqa", tmp_path)
    assert str(error.value) == (
        f"{tmp_path} is a VisualBertForVisualReasoning, which answers no questions; expected a "
        "VisualBertForQuestionAnswering"
    )


def test_what_newcomers_pass(pipelines, seen, asked):
    pipe, image = pipelines["pt"], seen[0][0]
    for arguments, sentence in [
        ((image,), "pass a question about the image: (image, question)"),
        ((asked[0][1], "why"), "these are regions, and no image; pass them as regions=…"),
        (([image], "why"), "one image is looked at in a call; ask about each of them"),
    ]:
        with pytest.raises(InputError) as error:
            pipe(*arguments)
        assert str(error.value) == sentence
    assert pipeline("visual-question-answering", backend="pt").answers == pipe.answers
    assert repr(pipe) == (
        "<18 answers of VisualBertForQuestionAnswering by the recipe 'scenes': (image, question)>"
    )


def test_unknown_words_are_told(pipelines, seen, recwarn):
    image = seen[0][0]
    with pytest.warns(UserWarning, match="vocabulary") as caught:
        pipelines["pt"](image, ["is the zorgle red", "a blurf zorgle"])
    assert [str(w.message) for w in caught] == [
        "the model's vocabulary does not hold 'zorgle', 'blurf'; what it says of them is guessed"
    ]
    pipelines["pt"](image, "is there a red 3")
    assert not recwarn.list
