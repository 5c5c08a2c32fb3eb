"""The VQA-RAD metric on worked examples."""

import socket
from pathlib import Path

import evaluate
import pytest

from training.metrics.vqa_rad.vqa_rad import answer_tokens, grade_answer, vqa_rad_metric


METRIC = Path(__file__).parents[3] / "training" / "metrics" / "vqa_rad"


# One answer


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
    assert grade_answer(prediction, reference)["closed"] == closed


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
    grades = grade_answer(prediction, reference)
    assert grades["open_recall"] == pytest.approx(recall)
    assert grades["open_exact_match"] == exact


@pytest.mark.parametrize("prediction", ["", "?", "yes"])
def test_no_answer_is_right_for_a_reference_without_words(prediction):
    assert set(grade_answer(prediction, " ?! ").values()) == {0.0}


def test_tokens_are_words_and_numbers():
    assert answer_tokens("The 3.4 cm mass_T2 (head/neck), 5.") == ["3.4", "cm", "mass", "t2", "head", "neck", "5"]


# All rows


def test_a_worked_example():
    rows = [
        ("Yes.", "yes", "closed"),  # right
        ("no", "Yes", "closed"),  # wrong, and counted
        ("nodule", "no", "closed"),  # wrong
        ("on the left", "Left", "closed"),  # right
        ("upper lobe", "right upper lobe", "open"),  # recall 2/3
        ("CT", "ct", "open"),  # recall 1, exact
    ]
    metric = vqa_rad_metric(*map(list, zip(*rows)))
    assert metric == {
        "closed": pytest.approx(2 / 4),
        "open_recall": pytest.approx((2 / 3 + 1) / 2),
        "open_exact_match": pytest.approx(1 / 2),
        "overall": pytest.approx(3 / 6),
        "n_closed": 4,
        "n_open": 2,
    }


def test_wrong_closed_answers_are_not_skipped():
    metric = vqa_rad_metric(["yes", "", "maybe", "no"], ["yes"] * 4, ["closed"] * 4)
    assert metric["closed"] == metric["overall"] == 1 / 4
    assert metric["n_closed"] == 4


@pytest.mark.parametrize("shortcut", ["yes no", "yes or no", "no, yes", "", "nodule", "eyes noted", "true"])
def test_one_answer_to_everything_gains_nothing(shortcut):
    assert vqa_rad_metric([shortcut] * 2, ["yes", "no"], ["closed"] * 2)["closed"] == 0


def test_repeating_a_token_gains_nothing():
    once = grade_answer("lobe", "left and right lobe")["open_recall"]
    often = grade_answer("lobe lobe lobe lobe", "left and right lobe")["open_recall"]
    assert once == often == 1 / 4


def test_a_listing_gains_no_accuracy_on_open_questions():
    metric = vqa_rad_metric(["ct mri x ray ultrasound"], ["CT"], ["open"])
    assert (metric["open_recall"], metric["open_exact_match"], metric["overall"]) == (1, 0, 0)


def test_a_family_without_rows_has_no_value():
    only_open = vqa_rad_metric(["ct"], ["ct"], ["open"])
    assert (only_open["closed"], only_open["n_closed"], only_open["overall"]) == (None, 0, 1)
    only_closed = vqa_rad_metric(["no"], ["yes"], ["closed"])
    assert (only_closed["open_recall"], only_closed["open_exact_match"], only_closed["overall"]) == (None, None, 0)
    assert vqa_rad_metric([], [], [])["overall"] is None


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"predictions \(2\), references \(1\) and families \(1\) must have"):
        vqa_rad_metric(["a", "b"], ["a"], ["open"])
    with pytest.raises(ValueError, match=r"families \(\['CLOSED'\]\): choose from closed, open"):
        vqa_rad_metric(["yes"], ["yes"], ["CLOSED"])


@pytest.mark.parametrize("path", [METRIC, METRIC / "vqa_rad.py"], ids=["folder", "file"])
def test_metric_loads_offline(path, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    loaded = evaluate.load(str(path), cache_dir=str(tmp_path))
    columns = {
        "predictions": ["Yes", "no", "upper lobe"],
        "references": ["yes", "yes", "right upper lobe"],
        "families": ["closed", "closed", "open"],
    }
    assert loaded.compute(**columns) == vqa_rad_metric(**columns)
    assert loaded.compute(predictions=["no"], references=["no"], families=["closed"])["open_recall"] is None
