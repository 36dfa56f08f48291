"""From a picture and a question to an answer: the model that comes with the package answers about
handwriting that it never saw, the same in three frameworks, and any other model by its own recipe.
"""

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
    ]:
        with pytest.raises(InputError) as error:
            pipe(*arguments)
        assert str(error.value) == sentence
    (tmp_path / "a.png").write_text("none")
    with pytest.raises(InputError, match="not an image"):
        pipe(tmp_path / "a.png", "why")
    with pytest.raises(UsageError) as error:
        pipe(seen[0][0], "why", top=0)
    assert str(error.value) == "top=0 must be at least 1"
    with pytest.raises(UsageError) as error:
        pipeline("captioning")
    assert str(error.value) == "unknown task 'captioning'; expected one of vqa"


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
