"""The RefCOCO metric on worked examples."""

from pathlib import Path

import evaluate
import numpy as np
import pytest

from training.metrics.refcoco.refcoco import covered_share, iou, refcoco_metric


METRIC = Path(__file__).parents[3] / "training" / "metrics" / "refcoco"
BOX = [2.0, 1.0, 6.0, 3.0]


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (BOX, 1),
        ([2, 1, 6, 2], 1 / 2),
        ([4, 1, 8, 3], 1 / 3),
        ([0, 0, 10, 10], 8 / 100),
        ([6, 1, 8, 3], 0),
        ([7, 5, 8, 6], 0),
    ],
)
def test_iou(other, expected):
    assert iou(BOX, other) == iou(other, BOX) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("regions", "expected"),
    [
        ([], 0),
        ([[0, 0, 4, 4]], 1 / 2),
        ([[0, 0, 4, 4], [0, 0, 4, 4]], 1 / 2),
        ([[0, 0, 4, 4], [3, 0, 5, 2]], 5 / 8),
        ([[2, 1, 3, 2], [5, 2, 6, 3], [9, 9, 10, 10]], 2 / 8),
        ([[0, 0, 9, 9]], 1),
    ],
)
def test_covered_share(regions, expected):
    assert covered_share(BOX, regions) == pytest.approx(expected)


def test_covered_share_agrees_with_counted_cells():
    rng = np.random.default_rng(0)
    for _ in range(30):
        corners = rng.integers(0, 10, (4, 2))
        regions = [[x, y, x + w, y + h] for (x, y), (w, h) in zip(corners, rng.integers(1, 6, (4, 2)))]
        cells = np.zeros((20, 20), bool)
        for x0, y0, x1, y1 in regions:
            cells[y0:y1, x0:x1] = True
        assert covered_share([1, 2, 9, 8], regions) == pytest.approx(cells[2:8, 1:9].mean())


def rows():
    return {
        "predictions": [[2.0, 1.0, 6.0, 2.0], [5.0, 1.0, 9.0, 3.0], [0.0, 0.0, 10.0, 6.0], []],
        "references": [BOX] * 4,
        "kept": [[[0.0, 0.0, 4.0, 4.0]], [], [[0.0, 0.0, 10.0, 10.0]], [BOX]],
    }


EXPECTED = {
    "accuracy_at_50": 1 / 4,
    "mean_iou": pytest.approx((1 / 2 + 2 / 14 + 8 / 60 + 0) / 4),
    "centre_hit": 2 / 4,
    "kept_recall": pytest.approx((1 / 2 + 0 + 1 + 1) / 4),
    "n": 4,
}


def test_a_worked_example_with_a_missing_box():
    assert refcoco_metric(**rows()) == EXPECTED


def test_the_metric_loads_offline_and_agrees():
    assert evaluate.load(str(METRIC)).compute(**rows()) == EXPECTED


def test_no_rows_have_no_value():
    metric = refcoco_metric([], [], [])
    assert metric.pop("n") == 0 and set(metric.values()) == {None}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kept": [[]]}, r"predictions \(4\), references \(4\) and kept \(1\) must have"),
        ({"references": [BOX, BOX, BOX, [2.0, 1.0, 2.0, 3.0]]}, r"references\[3\] \(\[2.0, 1.0, 2.0, 3.0\]\)"),
        ({"predictions": [BOX, [1.0, 2.0], BOX, BOX]}, r"predictions\[1\] \(\[1.0, 2.0\]\)"),
        ({"kept": [[], [[0.0, 5.0, 1.0, float("nan")]], [], []]}, r"kept\[1\] \(\[0.0, 5.0, 1.0, nan\]\)"),
    ],
)
def test_invalid_rows_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        refcoco_metric(**(rows() | change))
