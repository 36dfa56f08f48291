"""Answer lists: read in every form, identified, matched with the model, and refused by name when
they belong to another order.
"""

import hashlib
import json
import os
import threading

import pytest

from visualbert import HubError, InputError, VisualBertConfig
from visualbert.inputs import answers
from visualbert.inputs.answers import (
    ORDERS,
    Answers,
    Order,
    as_answers,
    choose_answers,
    identify,
    read_answers,
)


def in_order(name):
    """A list with the known answers at their places, and fillers elsewhere."""
    order = ORDERS[name]
    words = [f"filler {n}" for n in range(order.labels)]
    for word, label in order.marks.items():
        words[label] = word
    return words


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("answers")
    words = in_order("pythia-vqa")
    (folder / "answers_vqa.txt").write_text("\n".join(words) + "\n")
    (folder / "no_newline.txt").write_text("\n".join(words))
    lxmert = in_order("lxmert-vqa")
    (folder / "trainval_label2ans.json").write_text(json.dumps(lxmert))
    numbers = {word: n for n, word in enumerate(lxmert)}
    (folder / "trainval_ans2label.json").write_text(json.dumps(numbers))
    (folder / "by_number.json").write_text(json.dumps({str(n): w for w, n in numbers.items()}))
    return folder


@pytest.mark.parametrize(
    ("name", "order"),
    [
        ("answers_vqa.txt", "pythia-vqa"),
        ("no_newline.txt", "pythia-vqa"),
        ("trainval_label2ans.json", "lxmert-vqa"),
        ("trainval_ans2label.json", "lxmert-vqa"),
        ("by_number.json", "lxmert-vqa"),
    ],
)
def test_every_form_is_read_and_identified(name, order, files):
    found = read_answers(files / name)
    assert found.words == tuple(in_order(order))
    assert found.order == order


@pytest.mark.parametrize("newline", ["", "\n"])
def test_a_digest_identifies_a_file_with_and_without_its_last_newline(
    newline, tmp_path, monkeypatch
):
    text = "<unk>\nno\nyes"
    digest = hashlib.md5((text + "\n").encode()).hexdigest()
    monkeypatch.setitem(ORDERS, "small", Order("a small order", "a.txt", (digest,), 99, {}))
    (tmp_path / "a.txt").write_text(text + newline)
    assert read_answers(tmp_path / "a.txt").order == "small"
    (tmp_path / "a.txt").write_text(text + "!" + newline)
    assert read_answers(tmp_path / "a.txt").order == ""


def test_no_other_list_is_identified():
    words = in_order("pythia-vqa")
    words[3117], words[3116] = words[3116], words[3117]  # "yes" one place off
    assert identify(words) == ""
    assert identify(words[:-1]) == ""


def config(labels=3129, **more):
    return VisualBertConfig(num_labels=labels, **more)


def test_the_other_order_is_refused(files):
    with pytest.raises(InputError) as error:
        choose_answers(
            config(),
            "pythia-vqa",
            read_answers(files / "trainval_label2ans.json"),
            "uclanlp/visualbert-vqa",
        )
    assert str(error.value) == (
        f"{files / 'trainval_label2ans.json'} has LXMERT's order, and uclanlp/visualbert-vqa was "
        "trained with Pythia's order, in which its labels mean other answers; pass answers_vqa.txt"
    )


def test_the_right_order_is_taken(files, recwarn):
    found = choose_answers(
        config(), "pythia-vqa", read_answers(files / "answers_vqa.txt"), "the model"
    )
    assert found.words[3117] == "yes"
    assert not recwarn.list


def test_an_unknown_list_of_the_right_length_is_taken_with_a_warning():
    given = Answers(tuple(f"word {n}" for n in range(3129)), "mine.txt")
    with pytest.warns(UserWarning, match="cannot be told") as caught:
        assert choose_answers(config(), "pythia-vqa", given, "the model") is given
    assert str(caught[0].message) == (
        "mine.txt is not the known answers_vqa.txt; whether its order is that of the model cannot "
        "be told"
    )


def test_a_list_of_another_length_is_refused():
    with pytest.raises(InputError) as error:
        choose_answers(config(5), "", Answers(("a", "b"), "mine.txt"), "the model")
    assert str(error.value) == "mine.txt holds 2 answers, and the model has 5 labels"


def test_names_in_the_configuration_are_used():
    named = VisualBertConfig(id2label={0: "no", 1: "yes"})
    assert choose_answers(named, "", None, "the model").words == ("no", "yes")


@pytest.mark.parametrize(
    ("wanted", "hint"),
    [("pythia-vqa", "answers_vqa.txt"), ("", "a file with one answer a line")],
)
def test_placeholders_are_no_names(wanted, hint):
    with pytest.raises(InputError) as error:
        choose_answers(config(7), wanted, None, "the model")
    assert str(error.value) == (
        f"the model does not say what its 7 labels mean; pass its answers ({hint}): answers=…, or "
        "--answers on the command line"
    )


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"\xff\xfe\x00", "not text, so there are no answers in it"),
        (b"", "expected one answer a line, or a JSON list of answers"),
        (b"[1, 2]", "expected one answer a line, or a JSON list of answers"),
        (b"[", "not readable as JSON: "),
        (b"[" * 100_000, "not readable as JSON: "),
        (b'{"yes": 1, "no": 2}', "the answers are not numbered from 0 without a gap"),
        (b'{"a": "b"}', "the answers are not numbered from 0 without a gap"),
        (b'{"a": [], "b": {}}', "the answers are not numbered from 0 without a gap"),
    ],
)
def test_bad_files(data, sentence, tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(data)
    with pytest.raises(InputError) as error:
        read_answers(path)
    assert str(error.value).startswith(f"{path}: {sentence}")


def test_lists_and_a_byte_order_mark(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfno\r\nyes\r\n")
    assert as_answers(tmp_path / "a.txt").words == ("no", "yes")
    assert as_answers(in_order("lxmert-vqa")).order == "lxmert-vqa"
    for given in ([], ["yes", 3], 5):
        with pytest.raises(InputError) as error:
            as_answers(given)
        assert str(error.value) == (
            "answers: expected one answer a line, or a JSON list of answers"
        )


def test_a_pipe_is_read_once(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_text, args=("no\nyes\n",))
    writer.start()
    assert read_answers(path).words == ("no", "yes")
    writer.join()
    with pytest.raises(InputError, match="embedded null byte"):
        read_answers("a\0b")


def test_missing_and_oversized_files(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="cannot be read: No such file or directory"):
        read_answers(tmp_path / "none.txt")
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        read_answers(tmp_path)
    monkeypatch.setattr(answers, "_MOST", 3)
    (tmp_path / "a.txt").write_text("yes\nno\n")
    with pytest.raises(InputError, match="larger than any list of answers"):
        read_answers(tmp_path / "a.txt")


def test_a_file_on_the_hub_that_cannot_be_had(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(HubError, match="pass a local file") as error:
        read_answers("owner/name/answers_vqa.txt")
    assert str(error.value).startswith(
        "owner/name/answers_vqa.txt: no such file, and as a file on the Hub: owner/name: "
    )
