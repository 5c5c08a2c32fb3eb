"""A-OKVQA: the loader on small files with the published schema, and its grading."""

import io
import logging
import pickle

import datasets
import numpy as np
import pytest
from PIL import Image

from training.data.aokvqa import AOKVQA, COLUMNS, HUB_ID, load_aokvqa, most_frequent, read_texts
from training.data.cards import FEATURES as CARD_FEATURES
from training.metrics.aokvqa.aokvqa import aokvqa_metric


SCHEMA = {
    "image": datasets.Image(),
    "question_id": datasets.Value("string"),
    "question": datasets.Value("string"),
    "choices": datasets.List(datasets.Value("string")),
    "correct_choice_idx": datasets.Value("int8"),
    "direct_answers": datasets.Value("string"),
    "difficult_direct_answer": datasets.Value("bool"),
    "rationales": datasets.List(datasets.Value("string")),
}
TEXTS = datasets.List(datasets.Value("string"))
PETS = ["dog", "cat", "cow", "hen"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def _picture(colour="red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 48), colour).save(file, "PNG")
    return file.getvalue()


def _cut_jpeg() -> bytes:
    file = io.BytesIO()
    Image.effect_noise((64, 64), 60).save(file, "JPEG")
    return file.getvalue()[: len(file.getvalue()) // 2]  # keeps the header: only a full read shows it


def _row(question_id, image=None, **change):
    row = {
        "image": {"bytes": image or _picture(), "path": None},
        "question_id": question_id,
        "question": " What is it? ",
        "choices": PETS,
        "correct_choice_idx": 1,
        "direct_answers": str(["cat"] * 4 + ["dog"] * 5 + ["cow"]),
        "difficult_direct_answer": False,
        "rationales": ["It says so."],
    }
    return row | change


GOOD = [_row("a"), _row("b", _picture("blue"), correct_choice_idx=3, difficult_direct_answer=True)]
BROKEN = [  # each with the reason for multiple choice and for direct answers
    (_row("c", _cut_jpeg()), "broken image", "broken image"),
    (_row("d", b"this is not an image"), "broken image", "broken image"),
    (_row("e") | {"image": None}, "missing image", "missing image"),
    (_row("f", question=" "), "empty question", "empty question"),
    (_row(None), "no question id", "no question id"),
    (_row("g", choices=PETS[:3]), "wrong number of choices", None),
    (_row("h", choices=None), "wrong number of choices", None),
    (_row("i", choices=["dog", "cat", "", "hen"]), "empty choice", None),
    (_row("j", correct_choice_idx=4), "correct choice out of range", None),
    (_row("k", correct_choice_idx=-1), "correct choice out of range", None),
    (_row("l", correct_choice_idx=None), "correct choice out of range", None),
    (_row("m", direct_answers="[]"), None, "no direct answers"),
    (_row("n", direct_answers="['cat', "), None, "no direct answers"),
    (_row("o", direct_answers=None), None, "no direct answers"),
    (_row("p", direct_answers="['', ' ']"), None, "no direct answers"),
]


def _table(rows, **schema) -> datasets.Dataset:
    return datasets.Dataset.from_list(rows, features=datasets.Features(SCHEMA | schema))


def _folder(tmp_path, rows, name="train-00000-of-00001.parquet", **schema):
    folder = tmp_path / "aokvqa"
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    _table(rows, **schema).to_parquet(path)
    return folder


def test_multiple_choice_samples(tmp_path):
    samples = load_aokvqa(_folder(tmp_path, GOOD), "train", "multiple_choice")
    assert len(samples) == 2 and samples.skipped == {}
    first = samples[0]
    assert set(CARD_FEATURES) < set(first)
    image = first.pop("image")
    assert (image.mode, image.size, image.getpixel((0, 0))) == ("RGB", (64, 48), (255, 0, 0))
    assert first == {
        "question_id": "a",
        "question": "What is it?\nChoices:\nA. dog\nB. cat\nC. cow\nD. hen\nAnswer with the letter.",
        "answer": "B",
        "choices": PETS,
        "family": "multiple_choice",
        "tiles_needed": "unknown",
        "boxes": [],
        "correct_choice": 1,
        "direct_answers": [],
        "difficult": False,
    }
    assert (samples[1]["answer"], samples[1]["difficult"]) == ("D", True)
    assert samples[1]["image"].getpixel((0, 0)) == (0, 0, 255)


def test_direct_answer_samples(tmp_path):
    first = load_aokvqa(_folder(tmp_path, GOOD), "train", "direct_answer")[0]
    del first["image"]
    assert first == {
        "question_id": "a",
        "question": "What is it?\nGive a very brief answer.",
        "answer": "dog",
        "choices": [],
        "family": "direct_answer",
        "tiles_needed": "unknown",
        "boxes": [],
        "correct_choice": -1,
        "direct_answers": ["cat"] * 4 + ["dog"] * 5 + ["cow"],
        "difficult": False,
    }


@pytest.mark.parametrize("form", ["multiple_choice", "direct_answer"])
def test_the_metric_takes_the_samples(tmp_path, form):
    samples = list(load_aokvqa(_folder(tmp_path, GOOD), "train", form))
    columns = {
        "choices": [sample["choices"] for sample in samples],
        "correct_choices": [sample["correct_choice"] for sample in samples],
        "direct_answers": [sample["direct_answers"] for sample in samples],
        "difficult": [sample["difficult"] for sample in samples],
    }
    assert aokvqa_metric([sample["answer"] for sample in samples], **columns)[form] == 1


def test_direct_answers_may_be_a_list(tmp_path):
    rows = [_row("a", direct_answers=["cat", "dog", " dog "])]
    sample = load_aokvqa(_folder(tmp_path, rows, direct_answers=TEXTS), "train", "direct_answer")[0]
    assert (sample["answer"], sample["direct_answers"]) == ("dog", ["cat", "dog", "dog"])


@pytest.mark.parametrize(("form", "column"), [("multiple_choice", 1), ("direct_answer", 2)])
def test_unusable_rows_are_counted_and_reported_once(tmp_path, caplog, form, column):
    folder = _folder(tmp_path, GOOD + [broken[0] for broken in BROKEN])
    with caplog.at_level(logging.WARNING, logger="training.data.rows"):
        samples = load_aokvqa(folder, "train", form)
    reasons = [broken[column] for broken in BROKEN if broken[column]]
    assert samples.skipped == {reason: reasons.count(reason) for reason in reasons}
    assert len(samples) == len(list(samples)) == len(GOOD) + len(BROKEN) - len(reasons)
    assert len(caplog.records) == 1
    assert f"A-OKVQA train ({form}): skipped {len(reasons)} of 17 rows" in caplog.text
    assert "broken image: 2" in caplog.text


def test_nothing_is_reported_if_nothing_is_skipped(tmp_path, caplog):
    load_aokvqa(_folder(tmp_path, GOOD))
    assert caplog.records == []


@pytest.mark.parametrize("name", ["train.parquet", "data/train-0.parquet"])
def test_files_may_be_in_the_folder_or_in_data(tmp_path, name):
    folder = _folder(tmp_path, GOOD, name)
    _folder(tmp_path, GOOD[:1], "validation.parquet")
    assert [row["question_id"] for row in load_aokvqa(folder, "train").rows] == ["a", "b"]
    assert len(load_aokvqa(folder, "validation")) == 1


def test_a_folder_whose_name_looks_like_a_pattern(tmp_path):
    folder = _folder(tmp_path, GOOD).rename(tmp_path / "set [1]")
    assert len(load_aokvqa(folder)) == 2


def test_the_files_of_a_split_are_read_in_order(tmp_path):
    _folder(tmp_path, GOOD[1:], "train-00001-of-00002.parquet")
    folder = _folder(tmp_path, GOOD[:1], "train-00000-of-00002.parquet")
    assert [row["question_id"] for row in load_aokvqa(folder).rows] == ["a", "b"]


def test_the_hub_is_asked_without_a_folder(monkeypatch):
    def load_dataset(name, split):
        assert (name, split) == (HUB_ID, "validation")
        return _table(GOOD)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    samples = load_aokvqa(split="validation")
    assert [sample["question_id"] for sample in samples] == ["a", "b"]
    assert pickle.loads(pickle.dumps(samples))[1]["image"].size == (64, 48)
    with pytest.raises(IndexError, match="2 samples"):
        samples[2]


@pytest.mark.parametrize("column", COLUMNS)
def test_a_missing_column_is_named(tmp_path, monkeypatch, column):
    table = _table(GOOD).remove_columns(column)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: table)
    with pytest.raises(ValueError, match=f"missing column {column}; the table has .*rationales"):
        load_aokvqa()


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="folder .*not_here not found"):
        load_aokvqa(tmp_path / "not_here")
    with pytest.raises(FileNotFoundError, match=r"no validation\*.parquet in .*aokvqa"):
        load_aokvqa(_folder(tmp_path, GOOD), "validation")


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match=r"split \('test'\): its answers are not published"):
        load_aokvqa(split="test")
    with pytest.raises(ValueError, match=r"split \('val'\): choose from train, validation"):
        load_aokvqa(split="val")
    with pytest.raises(ValueError, match=r"form \('open'\): choose from multiple_choice, direct_answer"):
        load_aokvqa(form="open")


@pytest.mark.parametrize(
    ("value", "texts"),
    [
        (["a", " b "], ["a", "b"]),
        ("['a', \"it's\"]", ["a", "it's"]),
        ("('a', 2)", ["a", "2"]),
        ("a, b", []),
        ("{'a': 1}", []),
        ("{[]: 1}", []),
        ("__import__('os').getcwd()", []),
        ("[" * 500, []),
        ("\x00", []),
        ("3", []),
        (None, []),
    ],
)
def test_texts_from_a_list_or_a_literal(value, texts):
    assert read_texts(value) == texts


@pytest.mark.parametrize(
    ("answers", "expected"), [(["a", "b", "b"], "b"), (["b", "a", "a", "b"], "b"), (["a", "b", "c"], "a")]
)
def test_the_most_frequent_answer_or_the_first_of_several(answers, expected):
    assert most_frequent(answers) == expected


# Grading


def test_both_forms_are_graded():
    multiple = {"choices": PETS, "correct_choice": 1, "direct_answers": [], "difficult": False}
    direct = {"choices": [], "correct_choice": -1, "direct_answers": ["cat"] * 2 + ["dog"] * 8, "difficult": False}
    samples, predictions = [multiple, multiple, direct, direct], ["B", "dog", "cat", "dog"]
    assert AOKVQA.grade_all(predictions, samples) == pytest.approx(np.array([1, 0, 2 / 3, 1]))
    metric = AOKVQA.metric(predictions, samples, [[[0.0, 0.0, 1.0, 1.0]]] * 4)
    assert (metric["multiple_choice"], metric["direct_answer"]) == (0.5, pytest.approx(5 / 6))
