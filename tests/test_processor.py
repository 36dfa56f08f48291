"""The processor: tokens as transformers' BertTokenizer gives them, truncation as the original's
code does it, padding, phrases, masked words, and files.
"""

import dataclasses
import json
import sys

import numpy as np
import pytest

from visualbert import (
    ConfigError,
    HubError,
    InputError,
    MissingBackendError,
    UsageError,
    VisualBertConfig,
)
from visualbert.inputs.processor import VisualBertProcessor, check_regions
from visualbert.inputs.recipes import RECIPES
from visualbert.inputs.regions import Regions
from visualbert.inputs.text import WordPiece, pythia_words, truncated

DIFFICULT = [
    "What's THE man’s hat—made of?!",
    "naïve café Ångström ﬁne Straße İstanbul ΑΣ",
    "中文字符 mixed with English, 日本語テキスト",
    "emoji 😀👩‍👩‍👧 and\tcontrol\x00\x01 characters\u200b\ufeff",
    "supercalifragilisticexpialidocious " + "a" * 150,
    "ids like 3.14159e-10, U.S.A., e-mail@example.com, #hashtag_under-score",
    "[CLS] literal [MASK] tokens [SEP] in the text [UNK] [PAD]",
    "   spaces   \u00a0 no-break \u3000 ideographic  ",
    "العربية עברית हिन्दी ภาษาไทย",
    "don't can't won't 'quoted' \"double\" `back`",
    "½ ² ™ © € £ ¥ § ¶ • … – — ‘ ’ “ ”",
    "a\u0301e\u0300 combining and \U0001d4d7\U0001d4ee\U0001d4f5\U0001d4f5\U0001d4f8",
    "\n\n\r\n line\nbreaks \r\n",
]


@pytest.fixture(scope="module")
def tokenizer(bert_vocabulary):
    return WordPiece.from_file(bert_vocabulary)


@pytest.fixture(scope="module")
def processor(bert_vocabulary):
    return VisualBertProcessor("vqa", bert_vocabulary)


def made(count, width=2048, **more):
    return Regions(np.full((count, width), count, np.float32), **more)


@pytest.mark.parametrize("text", DIFFICULT, ids=range(len(DIFFICULT)))
@pytest.mark.parametrize("lowercase", [True, False])
def test_tokens_are_those_of_transformers(text, lowercase, bert_vocabulary):
    from transformers import BertTokenizer

    theirs = BertTokenizer(str(bert_vocabulary), do_lower_case=lowercase)
    ours = WordPiece.from_file(bert_vocabulary, lowercase)
    assert ours.split("text", text).ids == theirs.encode(text, add_special_tokens=False)


def test_a_tokenizer_json_gives_the_same_tokens(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer.tokenizer.to_str())
    twin = WordPiece.from_file(path)
    for text in DIFFICULT:
        assert twin.split("text", text).ids == tokenizer.split("text", text).ids


def test_pythia_words():
    # tokenize() in dataloaders/vqa_dataset.py
    assert pythia_words("What's this, Sir?") == "what 's this sir"


def original_truncation(a, b, most):
    """`InputExample.perform_truncate` of the original, in other words."""
    if b is None:
        return a[: most - 2], None
    over = len(a) + len(b) + 3 - most
    if over > 0:
        front = min((over + 1) // 2, max(len(a) - 32, 0))
        a, b = a[front:], b[over + front :]
    return a, b


def test_every_length_is_cut_as_the_original_cuts_it():
    for recipe in (RECIPES["vqa-coco-pre"], RECIPES["nlvr2"]):
        for first in range(1, 141):
            a = list(range(first))
            if recipe.template.count("{") == 1:
                start, end = truncated(recipe, [first])[0]
                assert a[start:end] == original_truncation(a, None, 128)[0]
                continue
            for second in range(1, 141):
                b = list(range(second))
                (start, end), (low, high) = truncated(recipe, [first, second])
                assert (a[start:end], b[low:high]) == original_truncation(a, b, 128)


@pytest.mark.parametrize("lengths", [(3, 4), (62, 63), (63, 63), (100, 60), (20, 200), (200, 20)])
def test_pairs_are_cut_as_the_original_cuts_them(lengths, bert_vocabulary, recwarn):
    processor = VisualBertProcessor("vqa-coco-pre", bert_vocabulary)
    numbers = [str(n) for n in range(10)]
    first, second = ([numbers[n % 10] for n in range(length)] for length in lengths)
    a, b = original_truncation(first, second, 128)
    batch = processor([" ".join(first)], [" ".join(second)])
    tokens = [processor.tokenizer.tokenizer.id_to_token(i) for i in batch["input_ids"][0]]
    assert tokens == ["[CLS]", *a, "[SEP]", *b, "[SEP]"]
    cut = sum(lengths) - len(a) - len(b)
    said = [str(w.message) for w in recwarn]
    want = (
        f"text 0 is too long; {cut} of its wordpieces were left out to keep 128, as in the original"
    )
    assert said == ([want] if cut else [])


def test_a_long_question_keeps_its_mask(processor):
    with pytest.warns(UserWarning, match="400 of its wordpieces"):
        batch = processor(" ".join(["red"] * 524))
    assert batch["input_ids"].shape == (1, 128)
    assert batch.mask_positions.tolist() == [126]


def test_single_texts_lose_their_tail(bert_vocabulary):
    processor = VisualBertProcessor("nlvr2", bert_vocabulary)
    words = [str(n % 10) for n in range(300)]
    with pytest.warns(UserWarning, match="too long"):
        batch = processor(" ".join(words))
    tokens = [processor.tokenizer.tokenizer.id_to_token(i) for i in batch["input_ids"][0]]
    assert tokens == ["[CLS]", *original_truncation(words, None, 128)[0], "[SEP]"]


def test_ragged_batches_are_padded_and_masked(processor):
    batch = processor(["what is it", "why"], regions=[made(2), made(5)])
    assert {name: array.shape for name, array in batch.items()} == {
        "input_ids": (2, 7),
        "attention_mask": (2, 7),
        "token_type_ids": (2, 7),
        "visual_embeds": (2, 5, 2048),
        "visual_attention_mask": (2, 5),
        "visual_token_type_ids": (2, 5),
    }
    assert batch["attention_mask"].tolist() == [[1] * 7, [1] * 5 + [0] * 2]
    assert batch["visual_attention_mask"].tolist() == [[1, 1, 0, 0, 0], [1] * 5]
    assert not batch["input_ids"][1, 5:].any()
    assert not batch["visual_embeds"][0, 2:].any()
    assert (batch["visual_embeds"][1] == 5).all()
    assert batch.mask_positions.tolist() == [5, 3]
    assert [word for word, _, _ in batch.encoded[1].words] == [
        "[CLS]", "why", "?", "[MASK]", "[SEP]",
    ]  # fmt: skip


def test_one_image_for_many_questions_and_examples_without_any(processor):
    one = processor(["what", "why"], regions=made(3))
    assert one["visual_attention_mask"].tolist() == [[1, 1, 1]] * 2
    some = processor(["what", "why"], regions=[made(3), None])
    assert some["visual_attention_mask"].tolist() == [[1, 1, 1], [0, 0, 0]]
    assert "visual_embeds" not in processor(["what"])


@pytest.mark.parametrize("kind", ["np", "pt", "tf", "jax"])
def test_arrays_of_every_framework_feed_its_model(kind, bert_vocabulary):
    import visualbert

    if kind != "np":
        pytest.importorskip({"pt": "torch", "tf": "tensorflow", "jax": "jax"}[kind])
    config = VisualBertConfig(
        hidden_size=8, num_attention_heads=2, num_hidden_layers=1, intermediate_size=12,
        visual_embedding_dim=2048, num_labels=5,
    )  # fmt: skip
    processor = VisualBertProcessor("vqa", bert_vocabulary)
    batch = processor(["what is it", "why"], regions=[made(2), made(5)], return_tensors=kind)
    prefix = {"pt": "", "np": "", "tf": "TF", "jax": "Flax"}[kind]
    model = getattr(visualbert, f"{prefix}VisualBertForQuestionAnswering")(config)
    if kind == "np":
        with pytest.raises(InputError):
            model(**{**batch, "visual_embeds": batch["visual_embeds"][..., :7]})
        return
    assert tuple(model(**batch).logits.shape) == (2, 5)


def test_choices(bert_vocabulary):
    processor = VisualBertProcessor("vcr", bert_vocabulary)
    choices = [["yes", "no", "maybe so", "never"], ["a", "b", "c", "d"]]
    batch = processor(["is it", "who is that"], choices, [made(2, 512), made(3, 512)])
    assert batch["input_ids"].shape == (2, 4, 7)
    assert batch["visual_embeds"].shape == (2, 3, 512)
    flat = batch["attention_mask"].sum(-1)
    assert flat.tolist() == [[6, 6, 7, 6], [7, 7, 7, 7]]


def test_phrases_are_their_last_wordpiece(bert_vocabulary):
    # flickr_dataset.py: the last wordpiece of the phrase's last word, behind [CLS].
    processor = VisualBertProcessor("flickr", bert_vocabulary)
    text = "A man in electromagnetism beside a man"
    phrases = [["A man", "electromagnetism", (33, 38)], ["beside"]]
    batch = processor([text, text], regions=made(2, 2054), phrases=phrases)
    assert batch["region_to_phrase_position"].tolist() == [[2, 7, 10], [8, -1, -1]]
    with pytest.raises(InputError) as error:
        processor(text, regions=made(2, 2054), phrases=[["a dog"]])
    assert str(error.value) == f"text 0: there is no phrase 'a dog' in {text!r}"
    long = "word " * 200 + "end"
    with pytest.warns(UserWarning, match="too long"), pytest.raises(InputError, match="cut off"):
        processor(long, phrases=[["end"]])


@pytest.mark.parametrize(
    ("text", "phrase", "word"),
    [
        ("What's on the man's red hat, sir?", "red", "red"),
        ("What's on the man's red hat, sir?", "The Man's", "s"),
        ("What's on the man's red hat, sir?", "hat, sir", "sir"),
        ("What's on the man's red hat, sir?", (0, 5), "'"),
        ("What's on the man's red hat, sir?", (5, 6), "s"),
        ("What's on the man's red hat, sir?", (14, 17), "man"),
        ("İİİ, is it blue?", "blue", "blue"),
        ("a woman, and a man", "man", "man"),  # not the end of "woman"
        ("what, what, end", "end", "end"),
    ],
)
def test_phrases_are_found_in_questions_that_are_rewritten(processor, text, phrase, word):
    batch = processor(text, phrases=[[phrase]])
    at = batch["region_to_phrase_position"].item()
    assert processor.tokenizer.tokenizer.id_to_token(batch["input_ids"][0, at]) == word
    if phrase == "man":
        assert at == 5


def test_bad_phrases(processor, bert_vocabulary):
    for phrase, sentence in [
        ("?", "text 0: nothing of the phrase '?' is left; it is no word"),
        ((4, 5), "text 0: nothing of the phrase (4, 5) is left; it is no word"),
        (3, "text 0: a phrase is its words, or where it starts and ends, not 3"),
        (("a", "b"), "text 0: a phrase is its words, or where it starts and ends, not ('a', 'b')"),
        (" ", "text 0: there is no phrase ' ' in 'what is it?'"),
        ((0, 99), "text 0: there is no phrase (0, 99) in 'what is it?'"),
    ]:
        with pytest.raises(InputError) as error:
            processor("what is it?", phrases=[[phrase]])
        assert str(error.value) == sentence
    with pytest.raises(UsageError) as error:
        VisualBertProcessor("vcr", bert_vocabulary)("why", ["a"] * 4, phrases=[["why"]])
    assert str(error.value) == "the recipe 'vcr' has choices, and no phrases"


def test_the_mask_that_is_read_is_the_templates(bert_vocabulary):
    recipe = dataclasses.replace(RECIPES["vqa"], words="")
    batch = VisualBertProcessor(recipe, bert_vocabulary)(["is [MASK] it", "is it"])
    assert batch.mask_positions.tolist() == (batch["attention_mask"].sum(1) - 2).tolist()
    pythia = VisualBertProcessor("vqa", bert_vocabulary)("is [MASK] it")  # is "[mask]" there
    assert (pythia["input_ids"] == 103).sum() == 1


def test_two_images_from_pixels(bert_vocabulary):
    from visualbert.scenes import EXAMPLE

    recipe = dataclasses.replace(RECIPES["nlvr2"], width=573, detector="blobs")
    processor = VisualBertProcessor(recipe, bert_vocabulary)
    blank = np.zeros((20, 20, 3), np.uint8)
    batch = processor(["both", "none"], images=[[EXAMPLE, blank], [blank, blank]])
    counts = [len(processor.extractor(image)) for image in (EXAMPLE, blank)]
    want = [[0] * counts[0] + [1] * counts[1], [0] * counts[1] + [1] * counts[1]]
    segments, mask = batch["visual_token_type_ids"], batch["visual_attention_mask"]
    assert [list(s[m == 1]) for s, m in zip(segments, mask, strict=True)] == want


def test_masked_words(processor):
    batch = processor(["red " * 100] * 200)
    made = processor.corrupt(batch, np.random.default_rng(0))
    ids, labels = batch["input_ids"], made["labels"]
    chosen = labels >= 0
    special = np.isin(ids, list(processor.tokenizer.special.values()))
    assert not (chosen & special).any()
    assert (labels[chosen] == ids[chosen]).all()
    assert (made["input_ids"][~chosen] == ids[~chosen]).all()
    assert chosen.sum() / (~special).sum() == pytest.approx(0.15, abs=0.01)
    after = made["input_ids"][chosen]
    assert (after == processor.tokenizer.special["[MASK]"]).mean() == pytest.approx(0.8, abs=0.03)
    assert (after == labels[chosen]).mean() == pytest.approx(0.1, abs=0.03)
    again = processor.corrupt(batch, np.random.default_rng(0))
    np.testing.assert_array_equal(again["input_ids"], made["input_ids"])
    assert made.encoded is batch.encoded


def test_masked_words_of_every_framework(processor):
    texts = ["red and blue", "why"]
    want = processor.corrupt(processor(texts), np.random.default_rng(0), 0.9)
    for kind, library in (("pt", "torch"), ("tf", "tensorflow"), ("jax", "jax")):
        pytest.importorskip(library)
        batch = processor(texts, return_tensors=kind)
        found = processor.corrupt(batch, np.random.default_rng(0), 0.9, return_tensors=kind)
        assert {type(array) for array in found.values()} == {type(batch["input_ids"])}
        for name, array in want.items():
            np.testing.assert_array_equal(np.asarray(found[name]), array)
    for probability in (-0.1, 1.5, float("nan")):
        with pytest.raises(UsageError) as error:
            processor.corrupt(processor(texts), np.random.default_rng(0), probability)
        assert str(error.value) == f"probability={probability!r} must be from 0 to 1"


def test_files(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["processor_config.json", "vocab.txt"]
    twin = VisualBertProcessor.from_pretrained(tmp_path)
    assert twin.recipe == processor.recipe
    for text in DIFFICULT:
        assert twin(text)["input_ids"].tolist() == processor(text)["input_ids"].tolist()


@pytest.mark.parametrize("lowercase", [True, False])
def test_saved_and_loaded_it_gives_the_same_ids(lowercase, bert_vocabulary, tmp_path):
    # Words that only some line readers take for one: U+2028 is in multilingual vocabularies.
    words = bert_vocabulary.read_text(encoding="utf-8").splitlines()
    words[900:905] = ["\u2028", "\x85", "Hat", "\x1c", "##\u2029"]
    own = VisualBertProcessor("hf", words, lowercase)
    own.save_pretrained(tmp_path)
    twin = VisualBertProcessor.from_pretrained(tmp_path)
    assert twin.lowercase is lowercase
    assert twin.tokenizer.vocabulary() == own.tokenizer.vocabulary() == words
    rng = np.random.default_rng(0)
    blocks = [(0x21, 0x7F), (0xA0, 0x250), (0x370, 0x600), (0x900, 0xE80), (0x2000, 0x2070),
              (0x3040, 0x30FF), (0x4E00, 0x4E80), (0x1F600, 0x1F650), (1, 0x20)]  # fmt: skip
    texts = [
        "Hat " + "".join(map(chr, rng.integers(*blocks[n % len(blocks)], 30))) for n in range(200)
    ]
    for text in texts + DIFFICULT:
        want = own.tokenizer.split("text", text)
        assert twin.tokenizer.split("text", text) == want
    assert (own.tokenizer.split("text", "Hat").ids == [902]) is not lowercase


def test_a_word_with_a_line_break_is_saved_too(bert_vocabulary, tmp_path):
    words = [*bert_vocabulary.read_text(encoding="utf-8").splitlines(), "a\nb"]
    VisualBertProcessor("vqa", words).save_pretrained(tmp_path)
    assert VisualBertProcessor.from_pretrained(tmp_path).tokenizer.vocabulary() == words


def test_a_cased_vocabulary_of_transformers(bert_vocabulary, tmp_path):
    (tmp_path / "processor_config.json").write_text(json.dumps({"recipe": "hf"}))
    (tmp_path / "vocab.txt").write_bytes(b"\xef\xbb\xbf" + bert_vocabulary.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False}))
    cased = VisualBertProcessor.from_pretrained(tmp_path)
    assert cased("Red")["input_ids"].tolist() == [[101, 100, 102]]  # no such word
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True}))
    assert VisualBertProcessor.from_pretrained(tmp_path)("Red")["input_ids"][0, 1] == 2417
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": "no"}))
    with pytest.raises(ConfigError) as error:
        VisualBertProcessor.from_pretrained(tmp_path)
    assert str(error.value) == f"{tmp_path}: lowercase='no' must be true or false"


def test_a_model_that_cannot_read_it(bert_vocabulary):
    processor = VisualBertProcessor("vcr-coco-pre", bert_vocabulary)
    fits = {"visual_embedding_dim": 512}
    way = "; pass one that fits: recipe=…, or --recipe on the command line"
    for change, sentence in [
        (
            {"vocab_size": 30521},
            "the vocabulary holds 30522 words, and it has vocab_size=30521; pass its own: "
            "vocabulary=…, or --vocabulary on the command line",
        ),
        (
            {"visual_embedding_dim": 2048},
            "the recipe 'vcr-coco-pre' gives regions 512 wide, and it has "
            "visual_embedding_dim=2048" + way,
        ),
        (
            {"max_position_embeddings": 127},
            "the recipe 'vcr-coco-pre' gives texts of max_length=128 wordpieces, and it has "
            "max_position_embeddings=127" + way,
        ),
        (
            {"type_vocab_size": 1},
            "the recipe 'vcr-coco-pre' gives segments up to 1, and it has type_vocab_size=1" + way,
        ),
    ]:
        with pytest.raises(InputError) as error:
            processor.check(VisualBertConfig(**{**fits, **change}), "it")
        assert str(error.value) == sentence


def test_a_vocabulary_that_is_hardly_the_models(bert_vocabulary, recwarn):
    processor = VisualBertProcessor("vqa", bert_vocabulary)
    processor.check(VisualBertConfig(visual_embedding_dim=2048, vocab_size=30592), "it")
    assert not recwarn.list  # a table that was padded
    processor.check(VisualBertConfig(visual_embedding_dim=2048, vocab_size=50_000), "it")
    assert [str(w.message) for w in recwarn] == [
        "the vocabulary holds 30522 words, and it has vocab_size=50000; it is hardly the one of "
        "its training"
    ]


@pytest.mark.parametrize(("kind", "library", "extra"), [
    ("pt", "torch", "pt"), ("tf", "tensorflow", "tf"), ("jax", "jax", "flax"),
])  # fmt: skip
def test_arrays_of_a_framework_that_is_not_installed(kind, library, extra, processor, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingBackendError) as error:
        processor("why", return_tensors=kind)
    assert str(error.value) == (
        f"return_tensors={kind!r} needs {library}: pip install visualbert[{extra}]"
    )


def test_another_tokenizer_is_saved_whole(bert_vocabulary, tmp_path):
    from tokenizers import normalizers

    own = WordPiece.from_file(bert_vocabulary)
    own.tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=False)
    VisualBertProcessor("vqa", own).save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").exists() and not (tmp_path / "vocab.txt").exists()
    twin = VisualBertProcessor.from_pretrained(tmp_path)
    assert twin("café")["input_ids"].tolist() != [[101]]
    assert twin.tokenizer.split("x", "café").ids == own.split("x", "café").ids


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "text 0 is empty; there is nothing to read"),
        ("  \n", "text 0 is empty; there is nothing to read"),
        ("?", "text 0 is empty; there is nothing to read"),
        ("x" * 100_001, "text 0 has 100001 characters; at most 100000 are read"),
        ([3], "text 0 must be a string, got int"),
        ([], "there is no text; a batch has at least one"),
        (None, "a text must be a string, or a list of them, got NoneType"),
        (b"why", "a text must be a string, or a list of them, got bytes"),
        ("\u200b\x00", "text 0 is empty; there is nothing to read"),
        (
            ["why", "a\udc80"],
            "text 1 holds '\\udc80', half of a character; it was decoded wrongly",
        ),
    ],
    ids=["nothing", "space", "mark", "book", "number", "empty", "none", "bytes", "zero", "half"],
)
def test_bad_texts(text, sentence, processor):
    with pytest.raises(InputError) as error:
        processor(text)
    assert str(error.value) == sentence


def test_bad_pairs(processor, bert_vocabulary):
    with pytest.raises(InputError) as error:
        processor("why", "because")
    assert str(error.value) == "text 0: the recipe takes one text ([CLS] {a} ? [MASK] [SEP])"
    pairs = VisualBertProcessor("vqa-coco-pre", bert_vocabulary)
    with pytest.raises(InputError) as error:
        pairs("why")
    assert str(error.value) == "text 0: the recipe takes two texts ([CLS] {a} [SEP] {b} [SEP])"
    vcr = VisualBertProcessor("vcr", bert_vocabulary)
    with pytest.raises(InputError) as error:
        vcr("why")
    assert str(error.value) == "the recipe 'vcr' needs 4 choices a text"
    with pytest.raises(InputError, match="all of the same length"):
        vcr(["why", "who"], [["a", "b"], ["a"]])


def test_regions_of_another_width(processor):
    with pytest.raises(InputError) as error:
        processor("why", regions=made(3, 1024))
    assert str(error.value) == (
        "regions 0: features are 1024 wide, and the recipe 'vqa' reads 2048: those of Pythia's "
        "Faster R-CNN on Visual Genome (ResNeXt-101, fc6, 2048 wide)"
    )


def test_regions_that_are_no_numbers(processor):
    with pytest.raises(InputError) as error:
        processor("why", regions=np.full((2, 2048), np.inf))
    assert str(error.value) == "regions 0: a feature is NaN or infinite"


def test_regions_of_another_detector(processor):
    with pytest.warns(UserWarning, match="worse") as caught:
        processor("why", regions=made(3, provenance="butd-r101"))
    assert str(caught[0].message) == (
        "regions 0: features of bottom-up attention's Faster R-CNN on Visual Genome (ResNet-101, "
        "2048 wide); the recipe 'vqa' was trained with those of Pythia's Faster R-CNN on Visual "
        "Genome (ResNeXt-101, fc6, 2048 wide), and answers will be worse"
    )


def test_regions_of_the_right_detector_say_nothing(recwarn):
    check_regions(made(3, provenance="pythia-x101-fc6"), RECIPES["vqa"], "regions")
    check_regions(made(3), RECIPES["vqa"], "regions")
    assert not recwarn.list


def test_two_images_for_one(processor, bert_vocabulary):
    with pytest.raises(InputError) as error:
        processor("why", regions=[[made(3), made(3)]])
    assert str(error.value) == "regions 0: of 2 images; the recipe 'vqa' takes 1"
    with pytest.raises(InputError) as error:
        VisualBertProcessor("nlvr2", bert_vocabulary)("why", regions=[made(3, 1024)])
    assert str(error.value) == "regions 0: of 1 image; the recipe 'nlvr2' takes 2"
    with pytest.raises(InputError) as error:
        processor(["a", "b"], regions=[made(3)] * 3)
    assert str(error.value) == "2 texts and regions of 3 images; pass one for each"


def test_what_are_no_regions(processor):
    with pytest.raises(InputError) as error:
        processor("why", regions=5)
    assert str(error.value) == "regions must be Regions, an array, or a list of them, got int"


def test_regions_may_be_tensors_and_none_at_all(processor):
    torch = pytest.importorskip("torch")
    array = np.random.default_rng(0).standard_normal((3, 2048)).astype(np.float32)
    batch = processor(["why", "who"], regions=torch.from_numpy(array))
    np.testing.assert_array_equal(batch["visual_embeds"], np.stack([array] * 2))
    empty = processor(["why", "who"], regions=[made(0), made(2)])
    assert empty["visual_attention_mask"].tolist() == [[0, 0], [1, 1]]


def test_bad_options(processor):
    with pytest.raises(UsageError) as error:
        processor("why", return_tensors="torch")
    assert str(error.value) == "return_tensors='torch' is not one of np, pt, tf, jax"
    with pytest.raises(UsageError, match="which is no part of this package"):
        processor("why", images="picture.png")


def test_bad_vocabularies(tmp_path):
    for name, text, sentence in [
        ("a.txt", "red\nblue\n", "the vocabulary lacks [PAD], [UNK], [CLS], [SEP], [MASK]"),
        ("b.txt", "red\nred\n", "the vocabulary holds 'red' twice"),
        ("c.json", "{}", "not a vocabulary"),
    ]:
        path = tmp_path / name
        path.write_text(text)
        with pytest.raises(ConfigError) as error:
            WordPiece.from_file(path)
        assert str(error.value).startswith(f"{path}: {sentence}")
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        WordPiece.from_file(tmp_path / "none.txt")


def test_broken_processor_files(tmp_path, bert_vocabulary):
    path = tmp_path / "processor_config.json"
    (tmp_path / "vocab.txt").write_bytes(bert_vocabulary.read_bytes())
    whole = dataclasses.asdict(RECIPES["vqa"])
    for recipe, sentence in [
        (5, "it must be a name, or an object of a recipe's fields"),
        ("vq", "unknown recipe 'vq'; did you mean 'vqa'?"),
        ({**whole, "segment": 1}, "there is no field 'segment'"),
        ({**whole, "max_length": "128"}, "max_length='128' must be of type int"),
        ({**whole, "max_length": True}, "max_length=True must be of type int"),
        ({**whole, "regions": 2.5}, "regions=2.5 must be of type int | None"),
        ({**whole, "visual_segments": [0, "1"]},
         "visual_segments=(0, '1') must be of type tuple[int, ...]"),
        ({**whole, "visual_segments": []}, "visual_segments=() must be segment ids"),
        ({**whole, "max_length": 4},
         "max_length=4 must be at least 5, or nothing of the text is left in "
         "'[CLS] {a} ? [MASK] [SEP]'"),
        ({**whole, "choices": 0}, "choices=0 must be at least 1"),
        ({**whole, "scores": "max"}, "scores='max' must be one of 'softmax', 'sigmoid'"),
        ({**whole, "template": "[CLS] [SEP]"},
         "template='[CLS] [SEP]' must hold one {a}, and {b} at most"),
        ({**whole, "template": "[CLS] {a} [SEP]"},
         "template='[CLS] {a} [SEP]' must end in [MASK] [SEP] to be read so"),
    ]:  # fmt: skip
        path.write_text(json.dumps({"recipe": recipe}))
        with pytest.raises(ConfigError) as error:
            VisualBertProcessor.from_pretrained(tmp_path)
        assert str(error.value) == f"{path}: not a recipe ({sentence})"
    path.write_text(json.dumps({"recipe": {"name": "x"}}))
    with pytest.raises(ConfigError, match="not a recipe"):
        VisualBertProcessor.from_pretrained(tmp_path)
    path.write_text(json.dumps({"recipe": "vqa"}))
    assert VisualBertProcessor.from_pretrained(tmp_path).recipe is RECIPES["vqa"]


def test_without_a_vocabulary_the_hub_is_asked(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "processor_config.json").write_text(json.dumps({"recipe": "vqa"}))
    with pytest.raises(HubError) as error:
        VisualBertProcessor.from_pretrained(tmp_path)
    assert str(error.value).endswith(
        "pass a vocab.txt: vocabulary=…, or --vocabulary on the command line"
    )


def test_regions_of_the_wrong_kind(processor):
    for regions, sentence in [
        ("a.png", "regions='a.png' are no regions; a picture is passed as images=…"),
        (np.zeros(2048), "regions have the shape (2048,), expected (regions, width)"),
        ([made(3), made(3)], "1 text and regions of 2 images; pass one for each"),
    ]:
        with pytest.raises(InputError) as error:
            processor("why", regions=regions)
        assert str(error.value) == sentence
