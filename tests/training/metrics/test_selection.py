"""The selection metric on worked examples."""

from pathlib import Path

import evaluate
import numpy as np
import pytest

from training.metrics.selection.selection import points_into, relevance_in_boxes, selection_metric


METRIC = Path(__file__).parents[3] / "training" / "metrics" / "selection"
MAP = [[0.1, 0.2], [0.6, 0.1]]  # the most relevant cell is at the bottom left, its centre at x 0.25, y 0.75
WHOLE = [0.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("boxes", "points", "mass"),
    [
        ([WHOLE], True, 1),
        ([[0.0, 0.5, 0.5, 1.0]], True, 0.6),  # just that cell
        ([[0.0, 0.0, 1.0, 0.5]], False, 0.3),  # the upper row
        ([[0.0, 0.5, 0.25, 1.0]], True, 0.3),  # half of the cell, up to its centre
        ([[0.26, 0.5, 0.5, 1.0]], False, 0.6 * 0.24 / 0.5),
        ([[0.25, 0.25, 0.75, 0.75]], True, 0.25),  # a quarter of every cell
        ([[0.0, 0.5, 0.5, 1.0]] * 2, True, 0.6),  # the same box twice
        ([[0.0, 0.5, 0.5, 1.0], [0.25, 0.5, 0.75, 1.0]], True, 0.6 + 0.1 / 2),  # they overlap
        ([[0.5, 0.0, 1.0, 0.5], [0.5, 0.5, 1.0, 1.0]], False, 0.3),  # they touch
    ],
)
def test_maps(boxes, points, mass):
    assert points_into(MAP, boxes) is points
    assert relevance_in_boxes(MAP, boxes) == pytest.approx(mass)


def test_rows_and_columns_are_not_swapped():
    wide = [[1.0, 2.0, 1.0, 0.0]]  # one row of four cells
    assert points_into(wide, [[0.25, 0.0, 0.5, 1.0]])
    assert not points_into(wide, [[0.0, 0.25, 0.25, 0.5]])
    assert relevance_in_boxes(wide, [[0.25, 0.0, 0.5, 1.0]]) == pytest.approx(2 / 4)
    assert relevance_in_boxes(wide, [[0.0, 0.25, 1.0, 0.5]]) == pytest.approx(1 / 4)


def test_a_map_need_not_sum_to_one():
    assert relevance_in_boxes(np.multiply(MAP, 7), [[0.0, 0.5, 0.5, 1.0]]) == pytest.approx(0.6)


def test_a_box_a_rounding_error_from_the_edge():
    edge = np.nextafter(1, 0)
    assert relevance_in_boxes(MAP, [[0.0, 0.0, edge, edge]]) == pytest.approx(1)
    assert relevance_in_boxes(MAP, [[0.0, 0.0, 1 + 1e-7, 1.0]]) == pytest.approx(1)  # as after float32


def test_relevance_in_boxes_agrees_with_counted_pixels():
    rng = np.random.default_rng(0)
    for _ in range(30):
        relevance = rng.random((3, 5))
        pixels = np.kron(relevance, np.ones((20, 12)))  # 60 x 60
        boxes, inside = [], np.zeros((60, 60), bool)
        for _ in range(3):
            x0, y0 = rng.integers(0, 50, 2)
            x1, y1 = x0 + rng.integers(1, 10), y0 + rng.integers(1, 10)
            boxes.append([x0 / 60, y0 / 60, x1 / 60, y1 / 60])
            inside[y0:y1, x0:x1] = True
        assert relevance_in_boxes(relevance, boxes) == pytest.approx(pixels[inside].sum() / pixels.sum())


def rows():
    return {
        "visual_tokens": [40, 60, 80, 100],
        "tiles": [1, 2, 2, 4],
        "relevance": [MAP, MAP, MAP, []],
        "boxes": [[[0.0, 0.5, 0.5, 1.0]], [[0.0, 0.0, 1.0, 0.5]], [], [WHOLE]],
    }


EXPECTED = {
    "visual_tokens": 70,
    "tiles": 9 / 4,
    "pointing_accuracy": 1 / 2,
    "relevance_in_boxes": pytest.approx((0.6 + 0.3) / 2),
    "n": 4,
    "n_pointed": 2,
    "n_without_boxes": 1,
    "n_without_relevance": 1,
}


def test_a_worked_example_with_rows_left_out():
    assert selection_metric(**rows()) == EXPECTED


def test_the_metric_loads_offline_and_agrees():
    assert evaluate.load(str(METRIC)).compute(**rows()) == EXPECTED


def test_no_rows_have_no_value():
    metric = selection_metric([], [], [], [])
    means = ("visual_tokens", "tiles", "pointing_accuracy", "relevance_in_boxes")
    assert {metric[name] for name in means} == {None}
    assert metric["n"] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tiles": [1]}, r"columns \(\[4, 1, 4, 4\] entries\)"),
        ({"boxes": [[[0.0, 0.0, 64.0, 32.0]], [], [], []]}, r"row 0: boxes \(\[0.0, 0.0, 64.0, 32.0\]\)"),
        ({"boxes": [[], [[0.5, 0.0, 0.5, 1.0]], [], []]}, r"row 1: boxes \(\[0.5, 0.0, "),
        ({"boxes": [[], [[0.5, 0.0, 1.0]], [], []]}, r"row 1: boxes \(\[0.5, 0.0, "),
        ({"relevance": [[[0.1, 0.2], [0.3]], [], [], []]}, r"row 0: relevance \(rows of \[2, 1\] columns\)"),
        ({"relevance": [[[-0.5, 0.2]], [], [], []]}, r"row 0: relevance \(from -0.5 to 0.2\)"),
        ({"relevance": [[[0.0, 0.0]], [], [], []]}, r"row 0: relevance \(from 0.0 to 0.0\)"),
        ({"relevance": [[[float("nan"), 1.0]], [], [], []]}, r"row 0: relevance \(from nan to"),
        ({"relevance": [[[]], [], [], []]}, r"row 0: relevance \(shape \(1, 0\)\)"),
    ],
)
def test_invalid_rows_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        selection_metric(**(rows() | change))
