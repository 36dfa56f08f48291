"""The embedded benchmark: the same bytes for the same seed, every answer what the scene shows, no
answer to be had from words alone, and the published formats field by field.

What is right is worked out by `scene_checker`, which reads the English of the tasks and shares no
code with what wrote it; each of its checks has a corrupted twin that it must find.
"""

import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from xml.etree import ElementTree

import numpy as np
import pytest
import scene_checker as checker
from PIL import Image, ImageDraw

from visualbert.errors import CheckpointError, InputError, UsageError
from visualbert.scenes import read
from visualbert.scenes.draw import make_scene, outline, paint, scans_of
from visualbert.scenes.make import make_scenes
from visualbert.scenes.questions import ANSWERS
from visualbert.scenes.questions import KINDS as QUESTION_KINDS
from visualbert.scenes.statements import KINDS as STATEMENT_KINDS
from visualbert.scenes.words import vocabulary

IMAGES, SEED = 121, 5
NAMES = {"annotations", "flickr30k", "images", "nlvr2", "scenes.json", "vcr", "vqa"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A training and a test benchmark, and what making them returned."""
    found = {}
    for split in ("train", "test"):
        folder = tmp_path_factory.mktemp("scenes") / split
        found[split] = folder, make_scenes(folder, IMAGES, SEED, split)
    return found


@pytest.fixture(scope="module", params=("train", "test"))
def scenes(request, folders):
    """Each of them, opened."""
    return read.open_scenes(folders[request.param][0])


@pytest.fixture(scope="module")
def worlds(scenes):
    """What its annotations say there is, by image."""
    return checker.worlds(load(scenes, "annotations/instances_{}.json"))


def load(scenes, name):
    return json.loads((scenes.folder / name.format(scenes.split)).read_text())


def load_lines(scenes, name):
    text = (scenes.folder / name.format(scenes.split)).read_text()
    return [json.loads(line) for line in text.splitlines()]


def contents(folder):
    """Every file's bytes by its path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# The same numbers give the same bytes


def test_bytes_are_those_of_the_seed(tmp_path):
    make_scenes(tmp_path / "a", 9, 3, "test")
    code = "from visualbert.scenes.make import make_scenes; import sys; "
    code += "make_scenes(sys.argv[1], 9, 3, 'test')"
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "b")],
        env={**os.environ, "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo"},
        check=True,
    )
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    make_scenes(tmp_path / "c", 9, 4, "test")
    other = contents(tmp_path / "c")
    same = {name for name, data in contents(tmp_path / "a").items() if other[name] == data}
    assert same == {"vqa/answers_vqa.txt", "flickr30k/test.txt"}


def test_a_scene_does_not_depend_on_how_many_there_are(folders, tmp_path):
    make_scenes(tmp_path / "few", 8, SEED, "train")
    few, many = read.open_scenes(tmp_path / "few"), read.open_scenes(folders["train"][0])
    for name in ("questions", "statements", "problems", "captions", "things"):
        some, all_ = getattr(few, name)(), getattr(many, name)()
        assert some and some == all_[: len(some)], name
    for number in range(8):
        assert few.image(number).read_bytes() == many.image(number).read_bytes()
        assert few.sentences(number) == many.sentences(number)


def test_images_show_their_scenes(scenes):
    for number in (0, IMAGES - 1):
        with Image.open(scenes.image(number)) as image:
            assert (image.format, image.mode, image.size) == ("PNG", "RGB", (640, 480))
            drawn = paint(make_scene(number, SEED, scenes.split))
            assert image.tobytes() == drawn.tobytes()


def test_no_handwriting_is_shared(folders):
    used = {}
    for split, (folder, _) in folders.items():
        things = read.open_scenes(folder).things()
        used[split] = {thing.attributes["scan"] for thing in things}
        assert used[split] <= set(scans_of(split))
    assert min(map(len, used.values())) > 200
    assert not used["train"] & used["test"]


# Every answer is what the scene shows


def replaced(items, n, **changes):
    """The items with the nth one changed."""
    return [item._replace(**changes) if at == n else item for at, item in enumerate(items)]


def wrong_answers(asked, worlds):
    return [q for q in asked if set(q.answers) != {checker.answer(worlds[q.image_id], q.text)}]


def test_questions(scenes, worlds):
    asked = scenes.questions()
    assert wrong_answers(asked, worlds) == []
    assert all(q.text.endswith("?") and len(q.answers) == 10 for q in asked)
    assert {question.kind for question in asked} == set(QUESTION_KINDS)
    assert len({q.question_id for q in asked}) == len(asked) > 6 * IMAGES
    assert len({(q.image_id, q.text) for q in asked}) == len(asked)


@pytest.mark.parametrize("kind", QUESTION_KINDS)
def test_a_wrong_answer_is_found(kind, scenes, worlds):
    asked = scenes.questions()
    n = next(n for n, question in enumerate(asked) if question.kind == kind)
    other = next(a for a in reversed(ANSWERS) if a != asked[n].answers[0])
    corrupted = replaced(asked, n, answers=(other,) * 10)
    assert wrong_answers(corrupted, worlds) == [corrupted[n]]


def wrong_labels(said, worlds):
    found = []
    for statement in said:
        number, pair = map(int, statement.identifier.split("-")[1:3])
        first = 4 * number + 2 * pair
        if checker.holds((worlds[first], worlds[first + 1]), statement.text) != statement.label:
            found.append(statement)
    return found


def test_statements(scenes, worlds):
    said = scenes.statements()
    assert wrong_labels(said, worlds) == []
    assert len({s.identifier for s in said}) == len(said)
    kinds = {record["synset"] for record in load_lines(scenes, "nlvr2/{}.json")}
    assert kinds == set(STATEMENT_KINDS)


def test_a_wrong_label_is_found(scenes, worlds):
    said = scenes.statements()
    for n in range(24):
        corrupted = replaced(said, n, label=not said[n].label)
        assert wrong_labels(corrupted[:24], worlds) == [corrupted[n]]


def test_a_statement_is_true_of_one_pair_and_false_of_the_other(scenes):
    labels = {}
    for s in scenes.statements():
        number, pair, sentence = s.identifier.split("-")[1:]
        labels.setdefault((number, sentence, s.text), {})[pair] = s.label
    assert len(labels) > 8 * (IMAGES // 4)
    assert all(sorted(pairs.values()) == [False, True] for pairs in labels.values())
    first = sum(pairs["0"] for pairs in labels.values()) / len(labels)
    assert 0.42 < first < 0.58


def wrong_choices(problems, worlds):
    found = []
    for problem in problems:
        world = worlds[int(re.search(r"\d{12}", problem.image)[0])]
        right = [
            checker.right(world, problem.question, choices)
            for choices in (problem.answers, problem.reasons)
        ]
        if right != [[problem.answer], [problem.reason]]:
            found.append(problem)
    return found


def test_choices_have_exactly_one_right_answer_and_reason(scenes, worlds):
    problems = scenes.problems()
    assert wrong_choices(problems, worlds) == []
    assert {len(set(c)) for p in problems for c in (p.answers, p.reasons)} == {4}
    assert len(problems) > 3 * IMAGES


def test_a_wrong_choice_is_found(scenes, worlds):
    problems = scenes.problems()[:20]
    for n, problem in enumerate(problems):
        twice = (*problem.answers[:3], problem.answers[problem.answer], problem.answers[3])
        for changes in (
            {"answer": (problem.answer + 1) % 4},
            {"reason": (problem.reason + 1) % 4},
            {"answers": twice},
            {"reasons": problem.reasons[: problem.reason]},
        ):
            corrupted = replaced(problems, n, **changes)
            assert wrong_choices(corrupted, worlds) == [corrupted[n]]


def wrong_captions(captions, worlds):
    return [c for c in captions if not checker.describes(worlds[c.image_id], c.text)]


def test_captions(scenes, worlds):
    captions = scenes.captions()
    assert Counter(c.image_id for c in captions) == dict.fromkeys(range(IMAGES), 5)
    assert len({(c.image_id, c.text) for c in captions}) == len(captions)
    assert wrong_captions(captions, worlds) == []


def test_a_wrong_caption_is_found(scenes, worlds):
    captions = scenes.captions()
    n = next(n for n, caption in enumerate(captions) if caption.text.startswith("there are"))
    changed = re.sub(r"\d", lambda m: str(9 - int(m[0])), captions[n].text)
    corrupted = replaced(captions, n, text=changed)
    assert wrong_captions(corrupted, worlds) == [corrupted[n]]


def true_elsewhere(worlds, caption):
    try:
        return checker.describes(worlds[(caption.image_id + 37) % IMAGES], caption.text)
    except checker.Doubt:
        return False


def test_captions_are_true_of_few_other_scenes(scenes, worlds):
    captions = scenes.captions()
    share = sum(true_elsewhere(worlds, caption) for caption in captions) / len(captions)
    assert 0 < share < 0.06  # 2.8 % of 40 000


def wrong_phrases(sentences, worlds):
    found = []
    for sentence in sentences:
        world, text = worlds[int(sentence.image_id)], " ".join(sentence.words)
        assert checker.describes(world, text), text
        for phrase in sentence.phrases:
            things = checker.meant(world, phrase.text, text)
            if sorted(phrase.boxes) != sorted(thing["box"] for thing in things):
                found.append(phrase)
    return found


def test_phrases(scenes, worlds):
    sentences = [s for number in range(IMAGES) for s in scenes.sentences(number)]
    assert wrong_phrases(sentences, worlds) == []
    meant = Counter()
    for sentence in sentences:
        for phrase in sentence.phrases:
            assert phrase.text == " ".join(sentence.words[phrase.first : phrase.last + 1])
            assert phrase.kinds == (("other",) if phrase.boxes else ("notvisual",))
            meant[len(phrase.boxes)] += 1
    assert min(meant[n] for n in (0, 1, 2)) > 10 and max(meant) >= 5


def test_a_wrong_box_is_found(scenes, worlds):
    sentences = [s for number in range(10) for s in scenes.sentences(number)]
    for n, sentence in enumerate(sentences):
        phrase = sentence.phrases[0]
        others = [t["box"] for t in worlds[int(sentence.image_id)] if t["box"] not in phrase.boxes]
        for boxes in ((), (*phrase.boxes, *others[:1], *phrase.boxes[:1])):
            moved = phrase._replace(boxes=boxes)
            corrupted = replaced(sentences, n, phrases=(moved, *sentence.phrases[1:]))
            assert wrong_phrases(corrupted, worlds) == [moved]


def test_outlines_go_round_the_ink():
    shares = []
    for number in range(6):
        scene = make_scene(number, SEED)
        pixels = np.asarray(paint(scene), int)
        for thing in scene.things:
            x1, y1, x2, y2 = thing.box
            points = outline(thing)
            assert all(x1 <= x <= x2 and y1 <= y < y2 for x, y in points)
            mask = Image.new("L", (640, 480))
            ImageDraw.Draw(mask).polygon(points, fill=1)
            ink = np.zeros((480, 640), bool)
            ink[y1:y2, x1:x2] = pixels[y1:y2, x1:x2].min(2) < 150
            shares.append((np.asarray(mask)[ink]).mean())
    assert min(shares) > 0.8 and np.mean(shares) > 0.95


# Nothing to be had from words alone


LARGEST_SHARE = {"exists": 0.7, "position": 0.7, "count": 0.4, "colour": 0.35}  # else 0.25


def test_no_answer_is_worth_guessing(scenes):
    given = {}
    for question in scenes.questions():
        given.setdefault(question.kind, Counter())[question.answers[0]] += 1
    for kind, answers in given.items():
        share = max(answers.values()) / sum(answers.values())
        assert share < LARGEST_SHARE.get(kind, 0.25), (kind, share)
    assert set().union(*given.values()) == set(ANSWERS)


def test_no_place_of_a_choice_is_worth_guessing(scenes):
    problems = scenes.problems()
    for name in ("answer", "reason"):
        places = Counter(getattr(problem, name) for problem in problems)
        assert set(places) == set(range(4)) and max(places.values()) / len(problems) < 0.33


def blind(problems, name):
    """How often each choice of each kind of question is right, from words alone."""
    seen, right = Counter(), Counter()
    for problem in problems:
        for n, choice in enumerate(getattr(problem, f"{name}s")):
            seen[key(problem, choice)] += 1
            right[key(problem, choice)] += n == getattr(problem, name)
    return {words: (right[words] + 1) / (seen[words] + 4) for words in seen}


def key(problem, choice):
    return " ".join(map(str, problem.question[:4])), str(choice)


def test_words_alone_do_not_choose(folders):
    """A guess by what was right in training, made about the test."""
    train, test = (read.open_scenes(folders[split][0]).problems() for split in ("train", "test"))
    for name in ("answer", "reason"):
        worth = blind(train, name)
        hits = 0
        for problem in test:
            choices = getattr(problem, f"{name}s")
            best = max(range(4), key=lambda n: worth.get(key(problem, choices[n]), 0.25))
            hits += best == getattr(problem, name)
        assert 0.15 < hits / len(test) < 0.35  # 0.28 and 0.27 on five times as many


# Words


def every_text(scenes):
    yield from (question.text for question in scenes.questions())
    yield from (statement.text for statement in scenes.statements())
    yield from (caption.text for caption in scenes.captions())
    for number in range(IMAGES):
        yield from (" ".join(sentence.words) for sentence in scenes.sentences(number))
    for problem in scenes.problems():
        for tokens in (problem.question, *problem.answers, *problem.reasons):
            yield checker.named(tokens)[0]
        yield from problem.objects


def test_every_word_has_an_id(scenes):
    known = set(vocabulary())
    for text in (*every_text(scenes), *scenes.answers()):
        assert set(re.findall(r"\w+|[^\w\s]", text)) <= known, text
    assert tuple(scenes.answers()) == ANSWERS


def test_the_vocabulary_stays_as_the_shipped_model_knows_it():
    words = vocabulary()
    assert (len(words), words.index("[MASK]"), words.index("red")) == (160, 4, 102)
    assert len(set(words)) == len(words)


# The published formats


def shape(value):
    """Types, of a list those of its entries."""
    if isinstance(value, dict):
        return {name: shape(inner) for name, inner in value.items()}
    if isinstance(value, list):
        kinds = [shape(inner) for inner in value]
        return [kind for n, kind in enumerate(kinds) if kind not in kinds[:n]]
    return type(value).__name__


INFO = dict.fromkeys(("description", "url", "version", "contributor", "date_created"), "str")
INFO["year"] = "int"
VQA = {"info": INFO, "license": {"id": "int", "name": "str", "url": "str"}}
VQA |= dict.fromkeys(("data_subtype", "data_type", "task_type"), "str")


def test_vqa_format(scenes):
    asked = load(scenes, "vqa/v2_OpenEnded_mscoco_{}_questions.json")
    question = {"image_id": "int", "question_id": "int", "question": "str"}
    assert shape(asked) == {**VQA, "questions": [question]}
    given = load(scenes, "vqa/v2_mscoco_{}_annotations.json")
    answer = {"answer": "str", "answer_confidence": "str", "answer_id": "int"}
    annotation = dict.fromkeys(("question_type", "multiple_choice_answer", "answer_type"), "str")
    annotation |= {"answers": [answer], "image_id": "int", "question_id": "int"}
    assert shape(given) == {**VQA, "annotations": [annotation]}
    assert (given["data_type"], given["task_type"]) == ("mscoco", "Open-Ended")
    ids = [(q["image_id"], q["question_id"]) for q in asked["questions"]]
    assert ids == [(a["image_id"], a["question_id"]) for a in given["annotations"]]
    types = {"yes": "yes/no", "no": "yes/no", "7": "number", "red": "other"}
    for annotation in given["annotations"]:
        assert [a["answer_id"] for a in annotation["answers"]] == list(range(1, 11))
        said = annotation["multiple_choice_answer"]
        assert types.get(said, annotation["answer_type"]) == annotation["answer_type"]
    assert {a["answer_type"] for a in given["annotations"]} == set(types.values())


def test_nlvr2_format(scenes):
    records = load_lines(scenes, "nlvr2/{}.json")
    fields = ("identifier", "sentence", "label", "synset", "left_url", "right_url")
    assert shape(records) == [dict.fromkeys(fields, "str")]
    assert {record["label"] for record in records} == {"True", "False"}
    for record in records:
        pair = re.fullmatch(rf"({scenes.split}-\d+-[01])-\d+", record["identifier"])[1]
        for n, name in enumerate(("left_url", "right_url")):
            image = scenes.folder / "nlvr2" / "images" / f"{pair}-img{n}.png"
            assert image.read_bytes() == (scenes.folder / record[name]).read_bytes()
    assert len(list((scenes.folder / "nlvr2" / "images").iterdir())) == IMAGES // 4 * 4


VCR_TEXTS = ("movie", "img_fn", "metadata_fn", "question_orig", "answer_orig", "rationale_orig")
VCR_TEXTS += ("answer_likelihood", "img_id", "annot_id", "match_fold")
VCR_NUMBERS = ("answer_label", "rationale_label", "question_number", "match_index")
VCR_LISTS = ("answer_sources", "rationale_sources", "interesting_scores")


def test_vcr_format(scenes):
    records = load_lines(scenes, "vcr/{}.jsonl")
    expected = {**dict.fromkeys(VCR_TEXTS, "str"), **dict.fromkeys(VCR_NUMBERS, "int")}
    expected |= {**{name: ["int"] for name in VCR_LISTS}, "objects": ["str"]}
    tokens = ("question", "answer_choices", "rationale_choices")
    mentions = 0
    for record in records:
        assert shape({k: v for k, v in record.items() if k not in tokens}) == expected
        assert len(record["answer_choices"]) == len(record["rationale_choices"]) == 4
        for words in (record["question"], *record["answer_choices"], *record["rationale_choices"]):
            assert all(isinstance(w, str) or shape(w) == ["int"] for w in words)
            mentions += sum(isinstance(word, list) for word in words)
        assert (scenes.folder / record["img_fn"]).is_file()
    assert mentions > len(records) / 2
    assert len({record["annot_id"] for record in records}) == len(records)


def test_vcr_metadata_format(scenes, worlds):
    for problem in scenes.problems()[::20]:
        path = scenes.folder / problem.metadata
        expected = {"boxes": [["float"]], "segms": [[[["float"]]]], "names": ["str"]}
        assert shape(json.loads(path.read_text())) == {**expected, "width": "int", "height": "int"}
        found = read.read_vcr_metadata(path)
        boxes = [thing["box"] for thing in worlds[int(path.stem[-12:])]]
        assert found.boxes.tolist() == [[*box, 1.0] for box in boxes]
        assert (found.names, found.size) == (problem.objects, (640, 480))
        for (polygon,), (x1, y1, x2, y2) in zip(found.outlines, boxes, strict=True):
            assert (polygon >= (x1, y1)).all() and (polygon <= (x2, y2)).all()


def test_flickr30k_format(scenes, worlds):
    """Read as the data set's own utilities read it: corners less one."""
    numbers = (scenes.folder / "flickr30k" / f"{scenes.split}.txt").read_text().split()
    assert numbers == [str(n) for n in range(IMAGES)]
    for number in numbers[:20]:
        root = ElementTree.parse(scenes.folder / "flickr30k" / "Annotations" / f"{number}.xml")
        assert root.findtext("filename") == scenes.image(int(number)).name
        size = [int(root.findtext(f"size/{name}")) for name in ("width", "height", "depth")]
        assert size == [640, 480, 3]
        boxes = [thing["box"] for thing in worlds[int(number)]]
        named = set()
        for item in root.findall("object"):
            corners = ("xmin", "ymin", "xmax", "ymax")
            x1, y1, x2, y2 = (int(item.findtext(f"bndbox/{name}")) - 1 for name in corners)
            assert (x1, y1, x2 + 1, y2 + 1) in boxes
            named |= {name.text for name in item.findall("name")}
        path = scenes.folder / "flickr30k" / "Sentences" / f"{number}.txt"
        lines = path.read_text().splitlines()
        assert len(lines) == 5
        used = [m for line in lines for m in re.findall(r"\[/EN#(\d+)/(\w+) [^\[\]]+\]", line)]
        assert {n for n, kind in used if kind == "other"} == named
        assert {n for n, kind in used if kind == "notvisual"} <= {"0"}


IMAGE = {"id": "int", "file_name": "str", "width": "int", "height": "int", "license": "int"}
COCO = {"info": INFO, "licenses": [{"id": "int", "name": "str", "url": "str"}], "images": [IMAGE]}


def test_coco_captions_format(scenes):
    found = load(scenes, "annotations/captions_{}.json")
    caption = {"image_id": "int", "id": "int", "caption": "str"}
    assert shape(found) == {**COCO, "annotations": [caption]}
    assert all((scenes.folder / "images" / i["file_name"]).is_file() for i in found["images"])
    assert len({a["id"] for a in found["annotations"]}) == len(found["annotations"])


def test_coco_instances_format(scenes):
    found = load(scenes, "annotations/instances_{}.json")
    item = dict.fromkeys(("id", "image_id", "category_id", "iscrowd"), "int")
    item |= {"bbox": ["float"], "segmentation": [["float"]], "area": "float"}
    item["attributes"] = {"colour": "str", "size": "str", "scan": "int"}
    category = {"id": "int", "name": "str", "supercategory": "str"}
    assert shape(found) == {**COCO, "categories": [category], "annotations": [item]}
    assert [c["name"] for c in found["categories"]] == [str(n) for n in range(10)]
    for item in found["annotations"]:
        _, _, width, height = item["bbox"]
        assert 0 < item["area"] <= width * height
    scene = make_scene(7, SEED, scenes.split)
    things = [thing for thing in scenes.things() if thing.image_id == 7]
    for thing, drawn in zip(things, scene.things, strict=True):
        assert (thing.category, thing.box) == (str(drawn.digit), drawn.box)
        wanted = {"colour": drawn.colour, "size": drawn.size, "scan": drawn.scan}
        assert thing.attributes == wanted


# Writing


def test_what_is_written(folders):
    for split, (folder, counts) in folders.items():
        assert {path.name for path in folder.iterdir()} == NAMES
        scenes = read.open_scenes(folder)
        assert (scenes.split, scenes.seed, scenes.images) == (split, SEED, IMAGES)
        sentences = sum(len(scenes.sentences(n)) for n in range(IMAGES))
        assert counts == {
            "images": len(list((folder / "images").iterdir())),
            "questions": len(scenes.questions()),
            "statements": len(scenes.statements()),
            "problems": len(scenes.problems()),
            "sentences": sentences,
        }


def test_progress_counts_images(tmp_path):
    seen = []
    make_scenes(tmp_path / "a", 5, 0, progress=seen.append)
    assert seen == [1] * 5


BAD = {
    "images=3 is not a whole number from 4 to 1,000,000": {"images": 3},
    "images=1000001 is not a whole number from 4 to 1,000,000": {"images": 1_000_001},
    "images=True is not a whole number from 4 to 1,000,000": {"images": True},
    "images=4.5 is not a whole number from 4 to 1,000,000": {"images": 4.5},
    "seed=-1 is not a whole number of at least 0": {"seed": -1},
    "split='dev' is not one of train, test": {"split": "dev"},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message, tmp_path):
    with pytest.raises(UsageError) as caught:
        make_scenes(tmp_path / "a", **{"images": 4, "seed": 0, **BAD[message]})
    assert str(caught.value) == message
    assert not (tmp_path / "a").exists()


def test_nothing_is_overwritten_unasked(tmp_path):
    folder = tmp_path / "a"
    make_scenes(folder, 5, 0)
    before = contents(folder)
    with pytest.raises(UsageError) as caught:
        make_scenes(folder, 4, 1)
    assert str(caught.value) == (
        f"{folder} holds a benchmark already; choose another folder, or replace it with force=True"
    )
    assert contents(folder) == before
    (folder / "notes.txt").write_text("mine")
    make_scenes(folder, 4, 1, "test", force=True)
    make_scenes(tmp_path / "b", 4, 1, "test")
    assert contents(folder) == contents(tmp_path / "b") | {"notes.txt": b"mine"}


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_of_something_else_is_left_alone(force, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "holiday.png").write_text("mine")
    with pytest.raises(UsageError) as caught:
        make_scenes(tmp_path, 4, 0, force=force)
    assert str(caught.value) == (
        f"{tmp_path} holds something that is no benchmark; choose another folder"
    )
    assert contents(tmp_path) == {"images/holiday.png": b"mine"}


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "a").write_text("mine")
    with pytest.raises(CheckpointError, match="it is not a folder; nothing was changed"):
        make_scenes(tmp_path / "a", 4, 0)
    assert (tmp_path / "a").read_text() == "mine"


def test_an_error_on_the_way_changes_nothing(tmp_path):
    def full(count):
        raise OSError(28, "No space left on device")

    for folder in (tmp_path / "new", tmp_path / "old"):
        with pytest.raises(CheckpointError) as caught:
            make_scenes(folder, 4, 0, progress=full)
        assert str(caught.value) == (
            f"cannot write {folder}: No space left on device; nothing there was changed"
        )
        assert not folder.exists()
    make_scenes(tmp_path / "old", 4, 0)
    before = contents(tmp_path / "old")
    for error in (OSError(28, "No space left on device"), KeyboardInterrupt()):

        def stop(count, error=error):
            raise error

        with pytest.raises((CheckpointError, KeyboardInterrupt)):
            make_scenes(tmp_path / "old", 5, 1, force=True, progress=stop)
        assert contents(tmp_path / "old") == before
        assert {path.name for path in (tmp_path / "old").iterdir()} == NAMES


def test_a_killed_process_leaves_no_half(tmp_path):
    folder = tmp_path / "a"
    code = "from visualbert.scenes.make import make_scenes; import sys; "
    code += "make_scenes(sys.argv[1], 400, 0, progress=lambda n: print('.', flush=True))"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == ".\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    with pytest.raises(InputError, match="holds no benchmark"):
        read.open_scenes(folder)
    make_scenes(folder, 4, 0)
    assert {path.name for path in folder.iterdir()} == NAMES


# Reading what others wrote


def write(path, value):
    text = value if isinstance(value, str) else json.dumps(value)
    path.write_text(text, encoding="utf-8")
    return path


def test_answers_may_be_kept_back(tmp_path):
    """Test sets come without them."""
    asked = {"questions": [{"image_id": 1, "question": "Where?", "question_id": 10}]}
    found = read.read_vqa(write(tmp_path / "q.json", asked))
    assert found == [read.VqaQuestion(1, 10, "Where?", (), "")]
    line = '{"identifier": "test2-7-1-3", "sentence": "A dog.", "writer": 4}\n\n'
    found = read.read_nlvr2(write(tmp_path / "n.json", line))
    images = ("test2-7-1-img0.png", "test2-7-1-img1.png")
    assert found == [read.Nlvr2Statement("test2-7-1-3", "A dog.", None, images)]
    problem = {
        **{"annot_id": "test-0", "img_fn": "a/1.jpg", "metadata_fn": "a/1.json"},
        **{"objects": ["person", "person", "cup"], "question": ["Is", [0, 1], "here", "?"]},
        **{"answer_choices": [["Yes"], [[2]]], "rationale_choices": []},
    }
    (found,) = read.read_vcr(write(tmp_path / "v.jsonl", problem))
    assert found.question == ("Is", (0, 1), "here", "?")
    assert (found.answers, found.answer, found.reason) == ((("Yes",), ((2,),)), None, None)


FLICKR = """\
[/EN#1/people/clothing Two men] , one in [/EN#2/clothing a hat] , at [/EN#3/scene a park] .
Men \u00e9t\u00e9 \n
"""
FLICKR_XML = """<?xml version="1.0"?>
<annotation><filename>9.jpg</filename>
<object><name>1</name><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>3</xmax><ymax>4</ymax></bndbox></object>
<object><name>1</name><name>2</name>
<bndbox><xmin>5</xmin><ymin>6</ymin><xmax>7</xmax><ymax>8</ymax></bndbox></object>
<object><name>3</name><scene>1</scene><nobndbox>0</nobndbox></object></annotation>
"""


def test_flickr30k_as_it_comes(tmp_path):
    sentences = write(tmp_path / "9.txt", FLICKR)
    first, second = read.read_entities(sentences, write(tmp_path / "9.xml", FLICKR_XML))
    assert (first.image_id, " ".join(first.words)) == ("9", "Two men , one in a hat , at a park .")
    men, hat, park = first.phrases
    assert men == ("1", ("people", "clothing"), "Two men", 0, 1, ((0, 1, 3, 4), (4, 5, 7, 8)))
    assert hat == ("2", ("clothing",), "a hat", 5, 6, ((4, 5, 7, 8),))
    assert park == ("3", ("scene",), "a park", 9, 10, ())
    assert (second.words, second.phrases) == (("Men", "été"), ())
    assert read.read_entities(sentences)[0].phrases[0].boxes == ()


VCR_LINE = {
    **{"annot_id": "val-0", "img_fn": "1.jpg", "metadata_fn": "1.json", "objects": ["cup"]},
    **{"question": ["A", [0]], "answer_choices": [["a"]], "rationale_choices": [["b"]]},
}
BOX = {"boxes": [[0, 0, 1, 1, 1]], "segms": [[[[0, 0], [1, 1]]]], "names": ["cup"]}
BOX |= {"width": 9, "height": 9}
CATEGORY = {"categories": [{"id": 1, "name": "a"}]}
THING = {"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]}
ASKED = {"image_id": 1, "question": "Where?", "question_id": 10}
XML = "<annotation><object><name>1</name><bndbox><xmin>{}</xmin></bndbox></object></annotation>"
BROKEN = {
    "vqa": (
        ("{", "FILE, line 1: no JSON (Expecting property name enclosed in double quotes)"),
        ("[]", "FILE: a JSON object was expected, got []"),
        ("[" * 100_000, "FILE: no JSON (a number or its depth goes too far)"),
        ({"annotations": []}, "FILE: 'questions' is missing"),
        ({"questions": {}}, "FILE: 'questions' must be a list, got {}"),
        ({"questions": [4]}, "FILE, questions[0]: an object was expected, got 4"),
        ({"questions": [ASKED, {}]}, "FILE, questions[1]: 'question_id' is missing"),
        (
            {"questions": [{**ASKED, "question": None}]},
            "FILE, questions[0]: 'question' must be a text, got null",
        ),
        (
            {"questions": [{**ASKED, "question_id": True}]},
            "FILE, questions[0]: 'question_id' must be a whole number, got true",
        ),
    ),
    "nlvr2": (
        ('{"identifier": "a-1-0-0"}', "FILE, line 1: 'sentence' is missing"),
        ('\n{"a": 1', "FILE, line 2: no JSON (Expecting ',' delimiter)"),
        (
            '{"identifier": "dev", "sentence": "a"}',
            "FILE, line 1: identifier 'dev' is not of the form split-set-pair-sentence",
        ),
        (
            '{"identifier": "a-1-0-0", "sentence": "a", "label": "yes"}',
            'FILE, line 1: label must be "True" or "False", got "yes"',
        ),
    ),
    "vcr": (
        ({**VCR_LINE, "question": "a"}, "FILE, line 1: 'question' must be a list, got \"a\""),
        ({**VCR_LINE, "question": [[1]]}, "FILE, line 1: [1] is mentioned, of 1 objects"),
        (
            {**VCR_LINE, "question": [None]},
            "FILE, line 1: a word or a list of object numbers was expected, got null",
        ),
        (
            {**VCR_LINE, "answer_choices": ["a"]},
            'FILE, line 1, answer_choices[0]: a list of words was expected, got "a"',
        ),
        ({**VCR_LINE, "answer_label": 1}, "FILE, line 1: answer_label is 1, of 1 choices"),
        ({**VCR_LINE, "objects": [1]}, "FILE, line 1: 'objects' must hold texts, got 1"),
    ),
    "vcr_metadata": (
        (
            {**BOX, "boxes": [[0, 0, 1, 1]]},
            "FILE, boxes[0]: five numbers were expected, got [0, 0, 1, 1]",
        ),
        ({**BOX, "boxes": [[0, 0, 1, 1, float("nan")]]}, "FILE, boxes[0]: five numbers were "),
        ({**BOX, "names": []}, "FILE: 1 boxes, 1 segms, 0 names; expected as many of each"),
        ({**BOX, "segms": [[[1]]]}, "FILE: 'segms' must hold polygons as lists of [x, y]"),
    ),
    "captions": (
        (
            {"annotations": [{"image_id": "1"}]},
            "FILE, annotations[0]: 'image_id' must be a whole number, got \"1\"",
        ),
    ),
    "instances": (
        (
            {"annotations": [THING], "categories": []},
            "FILE, annotations[0]: category_id 1 is not in 'categories'",
        ),
        (
            {"annotations": [{**THING, "bbox": [1, 2, 3]}], **CATEGORY},
            "FILE, annotations[0]: 'bbox' must hold four numbers, got [1, 2, 3]",
        ),
        (
            {"annotations": [{**THING, "bbox": [1, 2, 3, "4"]}], **CATEGORY},
            "FILE, annotations[0]: 'bbox' must hold numbers, got \"4\"",
        ),
    ),
    "entities": (
        ("a\n[/EN#1/other a", "FILE, line 2: the phrase [/EN#1/other is not closed by ]"),
        ("[/EN#1 a]", "FILE, line 1: '[/EN#1' does not open a phrase as [/EN#id/type does"),
        (
            "[/EN#1/other a [/EN#2/other b]]",
            "FILE, line 1: '[/EN#2/other' does not open a phrase as [/EN#id/type does",
        ),
    ),
    "_entity_boxes": (
        ("<a", "FILE, line 1: no XML (unclosed token)"),
        ("<!DOCTYPE a><a/>", "FILE: XML with declarations of its own is not read"),
        (
            XML.format("x"),
            "FILE, object 1: bndbox must hold four whole numbers, got ['x', '', '', '']",
        ),
    ),
    "answers": (("", "FILE holds no answers; expected one a line"),),
}
CASES = [(name, *case) for name, cases in BROKEN.items() for case in cases]


@pytest.mark.parametrize(("name", "value", "message"), CASES)
def test_broken_files(name, value, message, tmp_path):
    path = write(tmp_path / "file", value)
    reader = getattr(read, name if name.startswith("_") else f"read_{name}")
    with pytest.raises(InputError) as caught:
        reader(path)
    text = str(caught.value).replace(str(path), "FILE")
    assert text.startswith(message) if message.endswith(" ") else text == message


def test_files_that_cannot_be_read(tmp_path):
    for reader in (read.read_vqa, read.read_nlvr2, read.read_vcr, read.read_entities):
        with pytest.raises(InputError) as caught:
            reader(tmp_path / "none")
        assert str(caught.value) == f"cannot read {tmp_path / 'none'}: No such file or directory"
    (tmp_path / "binary").write_bytes(b"a\xff")
    with pytest.raises(InputError) as caught:
        read.read_captions(tmp_path / "binary")
    assert str(caught.value) == f"{tmp_path / 'binary'} is no UTF-8 text (byte 1)"


def test_a_question_without_annotation(tmp_path):
    asked = write(tmp_path / "q.json", {"questions": [ASKED]})
    given = write(tmp_path / "a.json", {"annotations": []})
    with pytest.raises(InputError) as caught:
        read.read_vqa(asked, given)
    assert str(caught.value) == (
        f"{asked}, questions[0]: question_id 10 has no annotation in {given}"
    )


def test_a_folder_that_is_no_benchmark(tmp_path):
    with pytest.raises(InputError) as caught:
        read.open_scenes(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path} holds no benchmark; `visualbert scenes make` writes one (no scenes.json there)"
    )
    write(tmp_path / "scenes.json", {"format": 2})
    with pytest.raises(
        InputError, match=r"scenes\.json: format 2, this version of visualbert reads 1$"
    ):
        read.open_scenes(tmp_path)


# The command


def test_command(run, tmp_path):
    folder = tmp_path / "a"
    status, out, err = run("scenes", "make", folder, "--images", "8", "--seed", "2")
    assert (status, err) == (0, "")
    assert re.fullmatch(
        rf"wrote {folder}: 8 images, \d\d questions, \d\d statements, \d\d problems, 40 sentences "
        r"\(train, seed 2\)\n",
        out,
    )
    make_scenes(tmp_path / "b", 8, 2)
    assert contents(folder) == contents(tmp_path / "b")
    status, out, err = run("scenes", "make", folder, "--images", "8")
    assert (status, out) == (2, "")
    assert err == (
        f"visualbert scenes: {folder} holds a benchmark already; choose another folder, or replace "
        "it with --force\n"
    )
    wanted = ["--images", "4", "--split", "test", "--force"]
    assert run("scenes", "make", folder, *wanted)[0] == 0
    assert read.open_scenes(folder).split == "test"


def test_command_refuses(run, tmp_path):
    status, out, err = run("scenes", "make", tmp_path / "a", "--images", "0")
    assert (status, out) == (2, "")
    assert err == "visualbert scenes: images=0 is not a whole number from 4 to 1,000,000\n"
    assert run("scenes", "make", tmp_path / "a", "--images", "x")[0] == 2
    assert run("scenes", "make", tmp_path / "a")[0] == 2
    assert run("scenes")[0] == 2
    assert not (tmp_path / "a").exists()
