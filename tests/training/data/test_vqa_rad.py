"""VQA-RAD: the loader on small data sets and on the real one, and its grading."""

import json
import logging
import pickle
from pathlib import Path

import datasets
import pytest
from PIL import Image

from training.data.cards import FEATURES
from training.data.rows import Questions
from training.data.vqa_rad import HUB_ID, VQA_RAD, answer_family, image_split, load_vqa_rad
from training.metrics.vqa_rad.vqa_rad import vqa_rad_metric


ROOT = Path(__file__).parents[3]
REAL = ROOT.parent / "shared" / "data" / "vqa_rad"

EVERYTHING = [[0.0, 0.0, 1.0, 1.0]]

needs_real_data = pytest.mark.skipif(not REAL.is_dir(), reason="VQA-RAD is not at ../shared/data/vqa_rad")


# The loader on a small folder


def _entry(qid, image_name, answer, answer_type="OPEN", question="What is this?"):
    return {
        "qid": qid,
        "image_name": image_name,
        "image_organ": "CHEST",
        "answer": answer,
        "answer_type": answer_type,
        "question_type": "PRES",
        "question": question,
        "phrase_type": "freeform",
    }


@pytest.fixture
def folder(tmp_path):
    """Thirteen good and two bad images; ten good and six bad training rows, four good test rows."""
    images = tmp_path / "images"
    images.mkdir()
    for number in range(12):
        Image.new("L" if number == 1 else "RGB", (40 + number, 30), 20 * number).save(images / f"scan{number}.jpg")
    Image.new("RGB", (3, 2)).save(images / "tiny.jpg")
    Image.effect_noise((200, 200), 60).save(images / "cut.jpg")
    whole = (images / "cut.jpg").read_bytes()
    (images / "cut.jpg").write_bytes(whole[: len(whole) // 2])  # keeps the header: only a full read shows it
    (images / "text.jpg").write_text("this is not an image")
    good = [
        _entry(1, "scan0.jpg", " Yes ", "CLOSED ", " Is it there? "),
        _entry(2, "scan1.jpg", 12),
        _entry(3, "scan1.jpg", 0),
        _entry(4, "scan2.jpg", "Left side", "CLOSED"),
        *(_entry(10 + number, f"scan{number}.jpg", "fat") for number in range(3, 9)),
    ]
    bad = [
        _entry(30, "nowhere.jpg", "fat"),
        _entry(31, "cut.jpg", "fat"),
        _entry(32, "text.jpg", "fat"),
        _entry(33, "scan0.jpg", "  "),
        _entry(34, "scan0.jpg", None),
        _entry(35, "scan0.jpg", "fat", question=""),
    ]
    test = [_entry(40 + number, f"scan{number}.jpg", "No", "CLOSED") for number in (0, 10, 11)]
    test.append(_entry(52, "tiny.jpg", "Axial"))
    (tmp_path / "trainset.json").write_text(json.dumps(good[:2] + bad + good[2:]))
    (tmp_path / "testset.json").write_text(json.dumps(test))
    return tmp_path


def test_items_have_the_format_of_a_cards_sample(folder):
    samples = load_vqa_rad(folder, "train")
    assert isinstance(samples, Questions)
    assert len(samples) == 10
    first = samples[0]
    assert set(first) == set(FEATURES)
    assert first["image"].mode == "RGB"
    assert first["image"].size == (40, 30)
    del first["image"]
    assert first == {
        "question_id": 1,
        "question": "Is it there?\nGive a very brief answer.",
        "answer": "Yes",
        "choices": [],
        "family": "closed",
        "tiles_needed": "unknown",
        "boxes": [],
    }
    assert [sample["answer"] for sample in samples][:4] == ["Yes", "12", "0", "Left side"]
    assert [sample["family"] for sample in samples][:4] == ["closed", "open", "open", "closed"]
    assert samples[1]["image"].mode == "RGB"  # a grey JPEG
    with pytest.raises(IndexError, match="10"):
        samples[10]


def test_the_answer_does_not_decide_the_prompt(folder):
    samples = load_vqa_rad(folder, "train")
    assert {sample["question"].split("\n", 1)[1] for sample in samples} == {"Give a very brief answer."}
    assert {sample["family"] for sample in samples} == {"closed", "open"}
    assert [row["question"] for row in samples.rows][:2] == ["Is it there?", "What is this?"]  # as published


def test_items_fit_the_features_of_the_cards(folder):
    table = datasets.Dataset.from_list(list(load_vqa_rad(folder, "test")), features=FEATURES)
    assert table["question_id"][:] == [40, 50, 51, 52]


def test_unusable_rows_are_counted_and_reported_once(folder, caplog):
    with caplog.at_level(logging.WARNING, logger="training.data.rows"):
        samples = load_vqa_rad(folder, "train")
    assert samples.skipped == {"missing image": 1, "broken image": 2, "empty answer": 2, "empty question": 1}
    assert len(caplog.records) == 1
    assert "6 of 16 rows" in caplog.text
    assert "broken image: 2" in caplog.text


def test_nothing_is_reported_if_nothing_is_skipped(folder, caplog):
    samples = load_vqa_rad(folder, "test")
    assert samples.skipped == {}
    assert caplog.records == []


def test_a_row_without_fields_is_not_fatal(folder):
    (folder / "testset.json").write_text(json.dumps([{}, {"qid": 7}, _entry(8, "scan0.jpg", "fat")]))
    samples = load_vqa_rad(folder, "test")
    assert [row["question_id"] for row in samples.rows] == [8]
    assert samples.skipped == {"no question id": 1, "empty question": 1}


def test_images_are_opened_lazily_and_the_data_set_can_be_pickled(folder):
    samples = load_vqa_rad(folder, "test")
    copy = pickle.loads(pickle.dumps(samples))
    assert copy[1]["image"].size == (50, 30)
    (folder / "images" / "scan10.jpg").unlink()
    assert copy[0]["question_id"] == 40
    with pytest.raises(FileNotFoundError, match="scan10.jpg"):
        samples[1]
    assert not any(isinstance(value, Image.Image) for row in copy.rows for value in row.values())


@pytest.mark.parametrize("seed", range(4))
def test_split_by_image_shares_no_image_and_loses_no_row(folder, seed):
    parts = {split: load_vqa_rad(folder, split, by="image", seed=seed) for split in ("train", "test")}
    names = {split: {row["image_name"] for row in part.rows} for split, part in parts.items()}
    assert not names["train"] & names["test"]
    assert sorted(row["question_id"] for part in parts.values() for row in part.rows) == (
        [1, 2, 3, 4, *range(13, 19), 40, 50, 51, 52]
    )
    assert sum(count for part in parts.values() for count in part.skipped.values()) == 6


def test_image_split_is_seeded_and_takes_about_15_percent():
    names = [f"synpic{number}.jpg" for number in range(20000, 24000)]
    first, second = ({name for name in names if image_split(name, seed) == "test"} for seed in (0, 1))
    assert len(first) / len(names) == pytest.approx(0.15, abs=0.02)
    assert len(first & second) / len(names) == pytest.approx(0.15**2, abs=0.01)
    assert first == {name for name in names if image_split(name) == "test"}


@pytest.mark.parametrize("missing", ["images", "trainset.json", "testset.json"])
def test_a_missing_part_is_named(folder, missing):
    (folder / missing).rename(folder / "elsewhere")
    with pytest.raises(FileNotFoundError, match=missing):
        load_vqa_rad(folder)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="not_here"):
        load_vqa_rad(tmp_path / "not_here")


@pytest.mark.parametrize("content", ["[{", '{"qid": 1}', "[1, 2]"])
def test_an_unreadable_file_is_named(folder, content):
    (folder / "trainset.json").write_text(content)
    with pytest.raises(ValueError, match="trainset.json"):
        load_vqa_rad(folder)


def test_bad_options_are_refused(folder):
    with pytest.raises(ValueError, match=r"split \('validation'\): choose from train, test"):
        load_vqa_rad(folder, "validation")
    with pytest.raises(ValueError, match=r"split_by \('patient'\): choose from published, image"):
        load_vqa_rad(folder, by="patient")


@pytest.mark.parametrize(
    ("answer", "answer_type", "family"),
    [
        ("Left", "CLOSED ", "closed"),
        ("yes", "OPEN", "open"),
        ("Yes", "", "closed"),
        ("no.", "", "closed"),
        ("nodule", "", "open"),
        ("no fracture", "", "open"),
    ],
)
def test_answer_family(answer, answer_type, family):
    assert answer_family(answer, answer_type) == family


# The loader on the schema of the Hub version


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Replaces `datasets.load_dataset` by a small in-memory data set with the same features."""
    features = datasets.Features(
        {"image": datasets.Image(), "question": datasets.Value("string"), "answer": datasets.Value("string")}
    )
    path = tmp_path / "scan.jpg"
    Image.new("L", (30, 20), 200).save(path)
    red, blue = (Image.new("RGB", (20, 20), colour) for colour in ("red", "blue"))
    rows = {
        "train": [
            {"image": red, "question": "is it red?", "answer": "yes"},
            {"image": blue, "question": "what colour?", "answer": "blue"},
            {"image": {"path": None, "bytes": b"not an image"}, "question": "what colour?", "answer": "blue"},
            {"image": None, "question": "what colour?", "answer": "blue"},
            {"image": red, "question": "what colour?", "answer": ""},
            {"image": {"path": str(path), "bytes": None}, "question": "what is it?", "answer": "a scan"},
        ],
        "test": [
            {"image": red, "question": "is it blue?", "answer": "No"},
            {"image": blue, "question": "which?", "answer": None},
        ],
    }
    tables = {split: datasets.Dataset.from_list(entries, features=features) for split, entries in rows.items()}

    def load_dataset(name, split):
        assert name == HUB_ID
        return tables[split]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def test_hub_schema(hub):
    train, test = load_vqa_rad(split="train"), load_vqa_rad(split="test")
    assert [sample["question_id"] for sample in train] == [0, 1, 5]
    assert [sample["question_id"] for sample in test] == [6]  # continues from train: unique over both splits
    assert [sample["family"] for sample in train] == ["closed", "open", "open"]
    assert train.skipped == {"broken image": 1, "missing image": 1, "empty answer": 1}
    assert test.skipped == {"empty answer": 1}
    assert set(train[0]) == set(FEATURES)
    assert train[0]["image"].getpixel((0, 0)) == (255, 0, 0)
    assert train[1]["image"].getpixel((0, 0)) == (0, 0, 255)
    assert (train[2]["image"].mode, train[2]["image"].size) == ("RGB", (30, 20))
    assert train.rows[0]["image_name"] == test.rows[0]["image_name"]
    assert pickle.loads(pickle.dumps(test))[0]["question"] == "is it blue?\nGive a very brief answer."


@pytest.mark.parametrize("seed", range(8))
def test_hub_split_by_image(hub, seed):
    train, test = (load_vqa_rad(split=split, by="image", seed=seed) for split in ("train", "test"))
    assert not {row["image_name"] for row in train.rows} & {row["image_name"] for row in test.rows}
    assert sorted(row["question_id"] for row in train.rows + test.rows) == [0, 1, 5, 6]


# Grading


def test_closed_and_open_questions_are_graded_differently():
    samples = [
        {"answer": "yes", "family": "closed"},
        {"answer": "No", "family": "closed"},
        {"answer": "left lobe", "family": "open"},
        {"answer": "chest", "family": "open"},
    ]
    predictions = ["Yes, it is.", "yes", "the left lobe", "a chest film"]
    grades = VQA_RAD.grade_all(predictions, samples)
    assert grades.tolist() == [1, 0, 1, 0]
    metric = VQA_RAD.metric(predictions, samples, [EVERYTHING] * 4)
    assert (metric["closed"], metric["open_exact_match"], metric["overall"]) == (0.5, 0.5, grades.mean())


# The real data set


@needs_real_data
def test_real_published_split_and_its_leak():
    train, test = (load_vqa_rad(REAL, split) for split in ("train", "test"))
    assert (len(train), len(test)) == (3064, 451)
    assert train.skipped == test.skipped == {}
    images = [{row["image_name"] for row in part.rows} for part in (train, test)]
    assert (len(images[0]), len(images[1]), len(images[0] & images[1])) == (314, 203, 203)
    pairs = [{(row["image_name"], row["question"]) for row in part.rows} for part in (train, test)]
    assert len(pairs[0] & pairs[1]) == 14


@needs_real_data
def test_real_items():
    train, test = (load_vqa_rad(REAL, split) for split in ("train", "test"))
    for samples, closed in ((train, 1823), (test, 272)):
        families = [answer_family(row["answer"], row["answer_type"]) for row in samples.rows]
        assert families.count("closed") == closed
        assert all(isinstance(row["answer"], str) and row["answer"] == row["answer"].strip() for row in samples.rows)
    assert (train[0]["question_id"], train[0]["answer"], train[0]["image"].mode) == (1, "Yes", "RGB")
    references = [row["answer"] for row in test.rows]
    metric = vqa_rad_metric(references, references, [sample["family"] for sample in test])
    assert {metric[name] for name in ("closed", "open_recall", "open_exact_match", "overall")} == {1.0}
    assert (metric["n_closed"], metric["n_open"]) == (272, 179)


@needs_real_data
@pytest.mark.parametrize("seed", [0, 1])
def test_real_split_by_image(seed):
    train, test = (load_vqa_rad(REAL, split, by="image", seed=seed) for split in ("train", "test"))
    names = [{row["image_name"] for row in part.rows} for part in (train, test)]
    assert not names[0] & names[1]
    assert len(names[0] | names[1]) == 314
    assert len(names[1]) / 314 == pytest.approx(0.15, abs=0.03)
    assert len(train) + len(test) == 3064 + 451
