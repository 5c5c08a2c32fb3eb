"""The loyalty metric on worked examples."""

from pathlib import Path

import evaluate
import pytest

from training.metrics.loyalty.loyalty import loyalty_metric, plain


METRIC = Path(__file__).parents[3] / "training" / "metrics" / "loyalty"


def columns():
    rows = [
        ("star", "Star ", True, True),  # the same
        ("row 2  column 3", "row 2 column 3", True, True),  # the same
        ("moon", "star", False, True),  # broken
        ("stars", "star", True, True),  # another text, also right
        ("moon", "moon", False, False),  # the same mistake
        ("moon", "heart", False, False),  # another mistake
        ("star", "heart", True, False),  # fixed
    ]
    names = ("predictions", "dense_predictions", "right", "dense_right")
    return dict(zip(names, map(list, zip(*rows))))


EXPECTED = {
    "loyalty": pytest.approx(3 / 7),
    "loyalty_where_right": pytest.approx(2 / 4),
    "loyalty_where_wrong": pytest.approx(1 / 3),
    "n_fixed": 1,
    "n_broken": 1,
    "n": 7,
    "n_dense_right": 4,
    "n_dense_wrong": 3,
}


def test_a_worked_example():
    assert loyalty_metric(**columns()) == EXPECTED


def test_the_metric_loads_offline_and_agrees():
    assert evaluate.load(str(METRIC)).compute(**columns()) == EXPECTED


def test_fixed_minus_broken_is_the_difference_in_right_answers():
    rows = columns()
    metric = loyalty_metric(**rows)
    assert metric["n_fixed"] - metric["n_broken"] == sum(rows["right"]) - sum(rows["dense_right"])


def test_dense_is_loyal_to_itself():
    metric = loyalty_metric(["a", "b"], ["a", "b"], [True, False], [True, False])
    assert metric["loyalty"] == metric["loyalty_where_right"] == metric["loyalty_where_wrong"] == 1
    assert metric["n_fixed"] == metric["n_broken"] == 0


def test_no_rows_have_no_value():
    only_right = loyalty_metric(["a"], ["b"], [True], [True])
    assert (only_right["loyalty_where_right"], only_right["loyalty_where_wrong"]) == (0, None)
    assert loyalty_metric([], [], [], [])["loyalty"] is None


@pytest.mark.parametrize(("text", "expected"), [(" A  Man\n", "a man"), ("", ""), ("a.", "a."), ("\t", "")])
def test_plain(text, expected):
    assert plain(text) == expected


def test_columns_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match=r"columns \(\[7, 7, 1, 7\] entries\) must have the same length"):
        loyalty_metric(**(columns() | {"right": [True]}))
