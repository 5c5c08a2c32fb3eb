"""The A-OKVQA metric, worked by hand."""

from pathlib import Path

import evaluate
import pytest

from training.metrics.aokvqa.aokvqa import aokvqa_scores, chosen, direct_answer_accuracy


METRIC = Path(__file__).parents[3] / "training" / "metrics" / "aokvqa"
CHOICES = ["dog", "cat", "a cow", "b"]


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("A", 0),
        ("(a)", 0),
        ("B.", None),  # the letter of cat, and the text of the last choice
        (" Answer: C\n", 2),
        ("C) a cow", 2),
        ("A cow.", 2),
        ("a cow", 2),
        ("Dog", 0),
        ("D: b", 3),
        ("A. cat", None),  # letter and text disagree
        ("A man", None),
        ("dog or cat", None),
        ("A B", None),
        ("the dog", None),
        ("dogs", None),
        ("E", None),
        ("", None),
    ],
)
def test_the_choice_that_is_named(prediction, expected):
    assert chosen(prediction, CHOICES) == expected


def test_direct_answers_by_hand():
    answers = ["dog"] * 2 + ["puppy"] * 4 + ["Labrador."] + ["hot dog"] * 3
    for prediction, expected in (("dog", 2 / 3), ("Puppy.", 1), ("labrador", 1 / 3), ("hot", 0), ("dog puppy", 0)):
        assert direct_answer_accuracy(prediction, answers) == pytest.approx(expected)
    assert direct_answer_accuracy("", answers) == 0
    with pytest.raises(ValueError, match="direct_answers holds 0 answers"):
        direct_answer_accuracy("dog", [])


def rows():
    return {
        "predictions": ["A", "cow", "dog", "dog", "dog"],
        "choices": [["dog", "cat", "cow", "hen"]] * 2 + [[]] * 3,
        "correct_choices": [0, 1, -1, -1, -1],
        "direct_answers": [[], [], ["dog"] * 10, ["cat"] * 8 + ["dog"] * 2, ["cat"] * 10],
        "difficult": [True, False, False, False, True],
    }


EXPECTED = {
    "multiple_choice": 0.5,
    "direct_answer": pytest.approx((1 + 2 / 3) / 2),
    "n_multiple_choice": 2,
    "n_direct_answer": 2,
    "n_difficult": 1,
}


def test_scores_by_hand_and_difficult_rows_left_out_of_direct_answers_only():
    assert aokvqa_scores(**rows()) == EXPECTED


def test_the_metric_loads_offline_and_says_the_same():
    assert evaluate.load(str(METRIC)).compute(**rows()) == EXPECTED


def test_no_rows_have_no_score():
    nothing = {"multiple_choice": None, "direct_answer": None}
    counts = {"n_multiple_choice": 0, "n_direct_answer": 0, "n_difficult": 0}
    assert aokvqa_scores([], [], [], [], []) == nothing | counts


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"difficult": [False]}, r"the columns have \[5, 5, 5, 5, 1\] rows"),
        ({"correct_choices": [4, 1, -1, -1, -1]}, "row 0: correct_choices is 4 of 4 choices"),
        ({"correct_choices": [-1, 1, -1, -1, -1]}, "row 0: correct_choices is -1 of 4 choices"),
        ({"choices": [["x"] * 5] * 2 + [[]] * 3}, "of 5 choices, of which there may be 4"),
        ({"direct_answers": [[]] * 5}, "row 2 has 0 choices and 0 direct answers"),
    ],
)
def test_rows_that_cannot_be_scored_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        aokvqa_scores(**(rows() | change))
