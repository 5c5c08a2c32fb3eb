"""The A-OKVQA metric on worked examples."""

from pathlib import Path

import evaluate
import pytest

from training.metrics.aokvqa.aokvqa import aokvqa_metric, chosen, direct_answer_accuracy


METRIC = Path(__file__).parents[3] / "training" / "metrics" / "aokvqa"
CHOICES = ["dog", "cat", "a cow", "b"]


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("A", 0),
        ("(a)", 0),
        ("B.", None),  # the letter of cat and the text of the last choice
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
def test_chosen(prediction, expected):
    assert chosen(prediction, CHOICES) == expected


def test_direct_answer_accuracy():
    answers = ["dog"] * 2 + ["puppy"] * 4 + ["Labrador."] + ["hot dog"] * 3
    for prediction, expected in (("dog", 2 / 3), ("Puppy.", 1), ("labrador", 1 / 3), ("hot", 0), ("dog puppy", 0)):
        assert direct_answer_accuracy(prediction, answers) == pytest.approx(expected)
    assert direct_answer_accuracy("", answers) == 0
    with pytest.raises(ValueError, match=r"direct_answers \(\[\]\): at least one answer"):
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


def test_a_worked_example_without_difficult_direct_answers():
    assert aokvqa_metric(**rows()) == EXPECTED


def test_the_metric_loads_offline_and_agrees():
    assert evaluate.load(str(METRIC)).compute(**rows()) == EXPECTED


def test_no_rows_have_no_value():
    nothing = {"multiple_choice": None, "direct_answer": None}
    counts = {"n_multiple_choice": 0, "n_direct_answer": 0, "n_difficult": 0}
    assert aokvqa_metric([], [], [], [], []) == nothing | counts


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"difficult": [False]}, r"columns \(\[5, 5, 5, 5, 1\] entries\) must have the same length"),
        ({"correct_choices": [4, 1, -1, -1, -1]}, r"row 0: correct_choices \(4\) must be an index of its 4 choices"),
        ({"correct_choices": [-1, 1, -1, -1, -1]}, r"row 0: correct_choices \(-1\) must be an index of its 4 choices"),
        ({"choices": [["x"] * 5] * 2 + [[]] * 3}, "an index of its 5 choices, at most 4"),
        ({"direct_answers": [[]] * 5}, "row 2 has neither choices nor direct answers"),
    ],
)
def test_invalid_rows_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        aokvqa_metric(**(rows() | change))
