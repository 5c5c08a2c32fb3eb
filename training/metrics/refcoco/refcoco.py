"""RefCOCO metric: whether the box that an expression refers to was found, and whether it was kept.

The maths is in plain functions; the `evaluate.Metric` at the end only passes columns on. Load it with
`evaluate.load("training/metrics/refcoco")`, which needs no network. Boxes are `[x0, y0, x1, y1]` in any common unit,
with x0 < x1 and y0 < y1; the data set itself has `[x, y, w, h]`.
"""

import datasets
import evaluate
import numpy as np


MIN_IOU = 0.5  # from which on a predicted box counts as correct

_DESCRIPTION = """\
RefCOCO metric for referring expressions: the predicted box against the correct one, and how much of the correct box
the kept regions of the image cover. Every row counts: a missing box is wrong, and without kept regions nothing is
covered.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: predicted box per row, a list of boxes [x0, y0, x1, y1]; [] if none could be read.
    references: correct box per row, a list of boxes.
    kept: kept regions of the image per row, a list of lists of boxes; they may overlap.

Returns a dict; all values except n are from 0 to 1, or None without rows:
    accuracy_at_50: share of the rows whose boxes have an intersection over union (IoU) of at least 0.5.
    mean_iou: mean IoU.
    centre_hit: share of the rows whose predicted box has its centre in the correct box.
    kept_recall: mean share of the correct box that the kept regions cover.
    n: number of rows.

Example:
    >>> metric = evaluate.load("training/metrics/refcoco")
    >>> box = [0.0, 0.0, 2.0, 2.0]
    >>> metric.compute(predictions=[[0.0, 0.0, 2.0, 1.0]], references=[box], kept=[[box]])["mean_iou"]
    0.5
"""

_CITATION = """\
@inproceedings{yu2016refcoco,
  title = {Modeling Context in Referring Expressions},
  author = {Yu, Licheng and Poirson, Patrick and Yang, Shan and Berg, Alexander C. and Berg, Tamara L.},
  booktitle = {ECCV},
  year = {2016}
}
"""


def check_box(box: list[float], name: str) -> list[float]:
    """The box itself. Raises ValueError, with its numbers, if it is not a box."""
    if len(box) != 4 or not np.isfinite(box).all() or box[0] >= box[2] or box[1] >= box[3]:
        raise ValueError(f"{name} ({list(box)}): a box must be [x0, y0, x1, y1] with x0 < x1 and y0 < y1")
    return box


def area(box: list[float]) -> float:
    """Area of a box; 0 for the intersection of disjoint boxes, whose sides are in reverse order."""
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def intersection(one: list[float], other: list[float]) -> list[float]:
    """The intersection of two boxes; its sides are in reverse order if they are disjoint."""
    return [max(one[0], other[0]), max(one[1], other[1]), min(one[2], other[2]), min(one[3], other[3])]


def iou(one: list[float], other: list[float]) -> float:
    """Intersection over union of two boxes, from 0 to 1."""
    shared = area(intersection(one, other))
    return shared / (area(one) + area(other) - shared)


def covered_share(box: list[float], regions: list[list[float]]) -> float:
    """Share of a box that the union of `regions` covers, from 0 to 1."""
    clipped = [part for part in (intersection(box, region) for region in regions) if area(part)]
    columns = sorted({side for part in clipped for side in (part[0], part[2])})
    rows = sorted({side for part in clipped for side in (part[1], part[3])})
    covered = 0.0
    for left, right in zip(columns, columns[1:]):
        for top, bottom in zip(rows, rows[1:]):
            cell = [left, top, right, bottom]
            covered += area(cell) * any(area(intersection(cell, part)) for part in clipped)
    return covered / area(box)


def refcoco_metric(
    predictions: list[list[float]], references: list[list[float]], kept: list[list[list[float]]]
) -> dict[str, float | int | None]:
    """The metric over all rows; the lists have one entry per row, see the description above.

    Raises ValueError for lists of different lengths or an invalid box.
    """
    if not len(predictions) == len(references) == len(kept):
        raise ValueError(
            f"predictions ({len(predictions)}), references ({len(references)}) and kept ({len(kept)}) must have the "
            "same length"
        )
    overlaps, hits, covered = [], [], []
    for row, (predicted, box, regions) in enumerate(zip(predictions, references, kept)):
        check_box(box, f"references[{row}]")
        for region in regions:
            check_box(region, f"kept[{row}]")
        covered.append(covered_share(box, regions))
        if not predicted:
            overlaps.append(0.0)
            hits.append(False)
            continue
        x0, y0, x1, y1 = check_box(predicted, f"predictions[{row}]")
        overlaps.append(iou(predicted, box))
        hits.append(box[0] <= (x0 + x1) / 2 <= box[2] and box[1] <= (y0 + y1) / 2 <= box[3])
    columns = {"accuracy_at_50": np.array(overlaps) >= MIN_IOU, "mean_iou": overlaps}
    columns |= {"centre_hit": hits, "kept_recall": covered}
    return {name: float(np.mean(values)) if hits else None for name, values in columns.items()} | {"n": len(hits)}


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class RefcocoMetric(evaluate.Metric):
    """`refcoco_metric` as a metric."""

    def _info(self):
        box = datasets.List(datasets.Value("float64"))
        columns = {"predictions": box, "references": box, "kept": datasets.List(box)}
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(columns),
        )

    def _compute(self, predictions, references, kept):
        return refcoco_metric(predictions, references, kept)
