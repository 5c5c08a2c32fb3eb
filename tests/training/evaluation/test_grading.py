"""What is right, by data set: rows by hand, and that their mean is the metric's headline figure."""

import numpy as np
import pytest

from training.evaluation.grading import score_rows, score_set


EVERYTHING = [[0.0, 0.0, 1.0, 1.0]]


def test_cards_forgive_case_and_blanks_only():
    references = ["star", "Row 1 column 2", "yes", "red", "no"]
    predictions = [" Star\n", "row 1 column 2", "yes.", "dark red", ""]
    samples = [{"answer": answer} for answer in references]
    assert score_rows("cards", predictions, samples).tolist() == [1, 1, 0, 0, 0]
    assert score_set("cards", predictions, samples, [EVERYTHING] * 5) == {}


def test_vqa_rad_has_closed_and_open_questions():
    samples = [
        {"answer": "yes", "family": "closed"},
        {"answer": "No", "family": "closed"},
        {"answer": "left lobe", "family": "open"},
        {"answer": "chest", "family": "open"},
    ]
    predictions = ["Yes, it is.", "yes", "the left lobe", "a chest film"]
    scores = score_rows("vqa_rad", predictions, samples)
    assert scores.tolist() == [1, 0, 1, 0]
    metric = score_set("vqa_rad", predictions, samples, [EVERYTHING] * 4)
    assert (metric["closed"], metric["open_exact_match"], metric["overall"]) == (0.5, 0.5, scores.mean())


def test_aokvqa_in_both_forms():
    multiple = {"choices": ["dog", "cat", "cow", "hen"], "correct_choice": 1, "direct_answers": [], "difficult": False}
    direct = {"choices": [], "correct_choice": -1, "direct_answers": ["cat"] * 2 + ["dog"] * 8, "difficult": False}
    samples, predictions = [multiple, multiple, direct, direct], ["B", "dog", "cat", "dog"]
    assert score_rows("aokvqa", predictions, samples) == pytest.approx(np.array([1, 0, 2 / 3, 1]))
    metric = score_set("aokvqa", predictions, samples, [EVERYTHING] * 4)
    assert (metric["multiple_choice"], metric["direct_answer"]) == (0.5, pytest.approx(5 / 6))


def test_refcoco_compares_per_cent_with_shares():
    samples = [{"answer": "[10, 20, 50, 60]", "boxes": [[0.1, 0.2, 0.5, 0.6]]}] * 3
    predictions = ["[10, 20, 50, 60]", "[10, 20, 50, 30]", "on the left"]
    assert score_rows("refcoco", predictions, samples).tolist() == [1, 0, 0]
    kept = [EVERYTHING, [[0.1, 0.2, 0.3, 0.6]], []]
    metric = score_set("refcoco", predictions, samples, kept)
    assert metric["accuracy_at_50"] == pytest.approx(1 / 3)
    assert metric["mean_iou"] == pytest.approx((1 + 0.25) / 3)
    assert metric["kept_recall"] == pytest.approx((1 + 0.5) / 3)
