"""VQA-RAD: the scores, worked by hand, and the loader on small sets and on the real one."""

import json
import logging
import pickle
import socket
from pathlib import Path

import datasets
import evaluate
import pytest
from PIL import Image

from training.data.cards import FEATURES
from training.data.rows import Questions
from training.data.vqa_rad import HUB_ID, answer_family, image_split, load_vqa_rad
from training.metrics.vqa_rad.vqa_rad import answer_tokens, score_answer, vqa_rad_scores


ROOT = Path(__file__).parents[3]
METRIC = ROOT / "training" / "metrics" / "vqa_rad"
REAL = ROOT.parent / "shared" / "data" / "vqa_rad"

needs_real_data = pytest.mark.skipif(not REAL.is_dir(), reason="VQA-RAD is not at ../shared/data/vqa_rad")


# Scores of one answer


@pytest.mark.parametrize(
    ("prediction", "reference", "closed"),
    [
        ("Yes", "yes", 1),
        (" no.", "No", 1),
        ("Yes, in the left lung", "Yes", 1),
        ("no", "yes", 0),
        ("", "yes", 0),
        ("a nodule", "no", 0),
        ("there is nothing abnormal", "No", 0),
        ("eyes", "yes", 0),
        ("not seen", "no", 0),
        ("yes and no", "yes", 0),
        ("yes and no", "no", 0),
        ("no no no yes", "no", 0),
        ("it is on the left side", "Left side", 1),
        ("the side that is left", "left side", 0),
        ("left", "left side", 0),
        ("in vasculature", "In the vasculature", 1),
        ("abnormal", "normal", 0),
        ("non contrast ct", "Non-contrast CT", 1),
        ("just one, no more", "Just one", 1),
    ],
)
def test_closed_answers(prediction, reference, closed):
    assert score_answer(prediction, reference)["closed"] == closed


@pytest.mark.parametrize(
    ("prediction", "reference", "recall", "exact"),
    [
        ("Right upper lobe.", "right upper lobe", 1, 1),
        ("upper lobe", "right upper lobe", 2 / 3, 0),
        ("lobe upper right", "right upper lobe", 1, 0),
        ("the right upper lobe of the lung", "right upper lobe", 1, 0),
        ("extremities", "The extremities", 1, 1),
        ("the", "The extremities", 0, 0),
        ("pneumonia", "pneumothorax", 0, 0),
        ("", "fat", 0, 0),
        ("3.4 cm", "3.4cm", 1, 1),
        ("3 cm, 4 mm", "3.4 cm", 1 / 2, 0),
        ("lobe", "left lobe and right lobe", 1 / 5, 0),
        ("12", "12", 1, 1),
        ("a", "A", 1, 1),
    ],
)
def test_open_answers(prediction, reference, recall, exact):
    score = score_answer(prediction, reference)
    assert score["open_recall"] == pytest.approx(recall)
    assert score["open_exact_match"] == exact


@pytest.mark.parametrize("prediction", ["", "?", "yes"])
def test_nothing_is_right_about_a_reference_without_words(prediction):
    assert set(score_answer(prediction, " ?! ").values()) == {0.0}


def test_tokens_are_words_and_numbers():
    assert answer_tokens("The 3.4 cm mass_T2 (head/neck), 5.") == ["3.4", "cm", "mass", "t2", "head", "neck", "5"]


# Scores of a set


def test_scores_worked_by_hand():
    rows = [
        ("Yes.", "yes", "closed"),  # right
        ("no", "Yes", "closed"),  # wrong, and counted
        ("nodule", "no", "closed"),  # wrong
        ("on the left", "Left", "closed"),  # right
        ("upper lobe", "right upper lobe", "open"),  # recall 2/3
        ("CT", "ct", "open"),  # recall 1, exact
    ]
    scores = vqa_rad_scores(*map(list, zip(*rows)))
    assert scores == {
        "closed": pytest.approx(2 / 4),
        "open_recall": pytest.approx((2 / 3 + 1) / 2),
        "open_exact_match": pytest.approx(1 / 2),
        "overall": pytest.approx(3 / 6),
        "n_closed": 4,
        "n_open": 2,
    }


def test_wrong_closed_answers_are_not_skipped():
    scores = vqa_rad_scores(["yes", "", "maybe", "no"], ["yes"] * 4, ["closed"] * 4)
    assert scores["closed"] == scores["overall"] == 1 / 4
    assert scores["n_closed"] == 4


@pytest.mark.parametrize("shortcut", ["yes no", "yes or no", "no, yes", "", "nodule", "eyes noted", "true"])
def test_one_answer_to_everything_gains_nothing(shortcut):
    assert vqa_rad_scores([shortcut] * 2, ["yes", "no"], ["closed"] * 2)["closed"] == 0


def test_repeating_a_token_gains_nothing():
    once = score_answer("lobe", "left and right lobe")["open_recall"]
    often = score_answer("lobe lobe lobe lobe", "left and right lobe")["open_recall"]
    assert once == often == 1 / 4


def test_a_listing_gains_no_accuracy_on_open_questions():
    scores = vqa_rad_scores(["ct mri x ray ultrasound"], ["CT"], ["open"])
    assert (scores["open_recall"], scores["open_exact_match"], scores["overall"]) == (1, 0, 0)


def test_a_family_without_rows_has_no_score():
    only_open = vqa_rad_scores(["ct"], ["ct"], ["open"])
    assert (only_open["closed"], only_open["n_closed"], only_open["overall"]) == (None, 0, 1)
    only_closed = vqa_rad_scores(["no"], ["yes"], ["closed"])
    assert (only_closed["open_recall"], only_closed["open_exact_match"], only_closed["overall"]) == (None, None, 0)
    assert vqa_rad_scores([], [], [])["overall"] is None


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="2 predictions, 1 references and 1 families"):
        vqa_rad_scores(["a", "b"], ["a"], ["open"])
    with pytest.raises(ValueError, match="CLOSED"):
        vqa_rad_scores(["yes"], ["yes"], ["CLOSED"])


@pytest.mark.parametrize("path", [METRIC, METRIC / "vqa_rad.py"], ids=["folder", "file"])
def test_metric_loads_offline(path, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    metric = evaluate.load(str(path), cache_dir=str(tmp_path))
    columns = {
        "predictions": ["Yes", "no", "upper lobe"],
        "references": ["yes", "yes", "right upper lobe"],
        "families": ["closed", "closed", "open"],
    }
    assert metric.compute(**columns) == vqa_rad_scores(**columns)
    assert metric.compute(predictions=["no"], references=["no"], families=["closed"])["open_recall"] is None


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
    """Thirteen good images and two bad ones; ten good rows and six bad ones in train, four good ones in test."""
    images = tmp_path / "images"
    images.mkdir()
    for number in range(12):
        Image.new("L" if number == 1 else "RGB", (40 + number, 30), 20 * number).save(images / f"scan{number}.jpg")
    Image.new("RGB", (3, 2)).save(images / "tiny.jpg")
    Image.effect_noise((200, 200), 60).save(images / "cut.jpg")
    whole = (images / "cut.jpg").read_bytes()
    (images / "cut.jpg").write_bytes(whole[: len(whole) // 2])  # the header stays: only reading it all tells
    (images / "text.jpg").write_text("this is no picture")
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


def test_items_have_the_form_of_a_cards_sample(folder):
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
    assert [row["question"] for row in samples.rows][:2] == ["Is it there?", "What is this?"]  # the set's own words


def test_items_fit_the_features_of_the_cards(folder):
    table = datasets.Dataset.from_list(list(load_vqa_rad(folder, "test")), features=FEATURES)
    assert table["question_id"][:] == [40, 50, 51, 52]


def test_unusable_rows_are_counted_and_reported_once(folder, caplog):
    with caplog.at_level(logging.WARNING, logger="training.data.vqa_rad"):
        samples = load_vqa_rad(folder, "train")
    assert samples.skipped == {"missing image": 1, "broken image": 2, "empty answer": 2, "empty question": 1}
    assert len(caplog.records) == 1
    assert "6 of 16 rows" in caplog.text
    assert "broken image: 2" in caplog.text


def test_nothing_is_reported_where_nothing_is_skipped(folder, caplog):
    samples = load_vqa_rad(folder, "test")
    assert samples.skipped == {}
    assert caplog.records == []


def test_a_row_without_fields_is_not_fatal(folder):
    (folder / "testset.json").write_text(json.dumps([{}, {"qid": 7}, _entry(8, "scan0.jpg", "fat")]))
    samples = load_vqa_rad(folder, "test")
    assert [row["question_id"] for row in samples.rows] == [8]
    assert samples.skipped == {"no question id": 1, "empty question": 1}


def test_images_are_opened_lazily_and_the_set_travels_to_workers(folder):
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
    with pytest.raises(ValueError, match="validation"):
        load_vqa_rad(folder, "validation")
    with pytest.raises(ValueError, match="patient"):
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


# The loader on the schema of the Hub set


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """`datasets.load_dataset` that knows a small set of the same features, held in memory."""
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
            {"image": {"path": None, "bytes": b"no picture"}, "question": "what colour?", "answer": "blue"},
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
    assert [sample["question_id"] for sample in test] == [6]  # counts on from train: unique over both
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


# The real set


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
    scores = vqa_rad_scores(references, references, [sample["family"] for sample in test])
    assert {scores[name] for name in ("closed", "open_recall", "open_exact_match", "overall")} == {1.0}
    assert (scores["n_closed"], scores["n_open"]) == (272, 179)


@needs_real_data
@pytest.mark.parametrize("seed", [0, 1])
def test_real_split_by_image(seed):
    train, test = (load_vqa_rad(REAL, split, by="image", seed=seed) for split in ("train", "test"))
    names = [{row["image_name"] for row in part.rows} for part in (train, test)]
    assert not names[0] & names[1]
    assert len(names[0] | names[1]) == 314
    assert len(names[1]) / 314 == pytest.approx(0.15, abs=0.03)
    assert len(train) + len(test) == 3064 + 451
