"""Selection metric: how much of the image is kept, and whether the relevance points at the answer.

The maths is in plain functions; the `evaluate.Metric` at the end only passes columns on. Load it with
`evaluate.load("training/metrics/selection")`, which needs no network. Boxes are `[x0, y0, x1, y1]` in fractions of the
image's width and height, from 0 to 1.
"""

import datasets
import evaluate
import numpy as np


_DESCRIPTION = """\
Metric for question-guided selection: the number of visual tokens and tiles kept, and how well the relevance map points
into the boxes that the question is about. Rows without boxes are left out of the latter, and counted.
"""

_KWARGS_DESCRIPTION = """
Args:
    visual_tokens: number of visual tokens kept per row, a list of int.
    tiles: number of high-resolution tiles encoded per row, a list of int.
    relevance: relevance map over the whole image per row, a list of maps, lists of rows of non-negative floats; [] if
        unknown.
    boxes: boxes per row, a list of lists of [x0, y0, x1, y1] from 0 to 1; [] without any.

Returns a dict; means are None without rows:
    visual_tokens: mean number of visual tokens (k).
    tiles: mean number of tiles (m).
    pointing_accuracy: share of the rows whose most relevant cell has its centre in one of the boxes.
    relevance_in_boxes: mean share of the relevance inside the boxes, from 0 to 1.
    n: number of rows.
    n_pointed: number of rows in the last two means.
    n_without_boxes, n_without_relevance: number of rows left out of them, by reason; a row without either counts as
        without boxes.

Example:
    >>> metric = evaluate.load("training/metrics/selection")
    >>> row = dict(visual_tokens=[80], tiles=[2], relevance=[[[0.25, 0.75]]], boxes=[[[0.5, 0.0, 1.0, 1.0]]])
    >>> metric.compute(**row)["relevance_in_boxes"]
    0.75
"""

_CITATION = ""


def check_relevance(relevance) -> np.ndarray:
    """A relevance map as `(rows, columns)` float64. Raises ValueError for an invalid or all-zero map."""
    if len({len(row) for row in relevance}) != 1:
        raise ValueError(f"relevance (rows of {[len(row) for row in relevance]} columns) must be rectangular")
    values = np.asarray(relevance, np.float64)
    if values.ndim != 2 or not values.size:
        raise ValueError(f"relevance (shape {values.shape}) must have the shape (rows, columns)")
    if not np.isfinite(values).all() or values.min() < 0 or values.sum() <= 0:
        raise ValueError(
            f"relevance (from {values.min()} to {values.max()}) must be finite and non-negative, with a positive sum"
        )
    return values


def check_boxes(boxes) -> np.ndarray:
    """Boxes as `(n, 4)` float64. Raises ValueError, with its numbers, for a box that is invalid or not within 0..1."""
    for box in boxes:
        # The tolerance is for numbers that were float32 once.
        if len(box) != 4 or not (-1e-6 <= box[0] < box[2] <= 1 + 1e-6 and -1e-6 <= box[1] < box[3] <= 1 + 1e-6):
            raise ValueError(
                f"boxes ({list(box)}): a box must be [x0, y0, x1, y1] in fractions of the image, x0 < x1 and y0 < y1"
            )
    return np.clip(np.asarray(boxes, np.float64).reshape(-1, 4), 0, 1)


def points_into(relevance, boxes) -> bool:
    """Whether the centre of the most relevant cell (the first of several) lies in one of the boxes.

    Args:
        relevance: `(rows, columns)` over the whole image, non-negative.
        boxes: `(n, 4)`, `[x0, y0, x1, y1]` in fractions of the image's width and height.

    Raises ValueError for an invalid map or box.
    """
    relevance, boxes = check_relevance(relevance), check_boxes(boxes)
    row, column = np.unravel_index(relevance.argmax(), relevance.shape)
    y, x = (row + 0.5) / relevance.shape[0], (column + 0.5) / relevance.shape[1]
    return any(x0 <= x <= x1 and y0 <= y <= y1 for x0, y0, x1, y1 in boxes)


def relevance_in_boxes(relevance, boxes) -> float:
    """Share of the relevance inside the union of the boxes, from 0 to 1; arguments and errors as in `points_into`.

    The relevance of a cell is spread evenly over it: a cell that is half in a box counts half.
    """
    relevance, boxes = check_relevance(relevance), check_boxes(boxes)
    rows, columns = relevance.shape
    # Cut the image at every edge of a cell or a box: each piece lies in one cell, and either inside a box or outside.
    x_cuts = np.unique(np.concatenate([np.arange(columns + 1) / columns, boxes[:, 0], boxes[:, 2]]))
    y_cuts = np.unique(np.concatenate([np.arange(rows + 1) / rows, boxes[:, 1], boxes[:, 3]]))
    x, y = (x_cuts[:-1] + x_cuts[1:]) / 2, (y_cuts[:-1] + y_cuts[1:]) / 2
    inside = np.zeros((len(y), len(x)), bool)
    for x0, y0, x1, y1 in boxes:
        inside |= np.outer((y0 < y) & (y < y1), (x0 < x) & (x < x1))
    # The middle of a piece that is only a rounding error wide may lie on the image's far edge.
    row, column = np.minimum((y * rows).astype(int), rows - 1), np.minimum((x * columns).astype(int), columns - 1)
    cell = relevance[np.ix_(row, column)]
    share_of_cell = np.outer(np.diff(y_cuts) * rows, np.diff(x_cuts) * columns)
    return float((cell * share_of_cell * inside).sum() / relevance.sum())


def _mean(values: list[float]) -> float | None:
    return float(np.mean(values)) if values else None


def selection_metric(
    visual_tokens: list[int],
    tiles: list[int],
    relevance: list[list[list[float]]],
    boxes: list[list[list[float]]],
) -> dict[str, float | int | None]:
    """The metric over all rows; the lists have one entry per row, see the description above.

    Raises ValueError for lists of different lengths and, naming the row, for an invalid map or box.
    """
    columns = (visual_tokens, tiles, relevance, boxes)
    if len({len(column) for column in columns}) > 1:
        raise ValueError(f"columns ({[len(column) for column in columns]} entries) must have the same length")
    pointed, inside, without_boxes, without_relevance = [], [], 0, 0
    for row, (row_relevance, row_boxes) in enumerate(zip(relevance, boxes)):
        if not len(row_boxes):
            without_boxes += 1
        elif not len(row_relevance):
            without_relevance += 1
        else:
            try:
                pointed.append(points_into(row_relevance, row_boxes))
                inside.append(relevance_in_boxes(row_relevance, row_boxes))
            except ValueError as error:
                raise ValueError(f"row {row}: {error}") from error
    return {
        "visual_tokens": _mean(visual_tokens),
        "tiles": _mean(tiles),
        "pointing_accuracy": _mean(pointed),
        "relevance_in_boxes": _mean(inside),
        "n": len(boxes),
        "n_pointed": len(pointed),
        "n_without_boxes": without_boxes,
        "n_without_relevance": without_relevance,
    }


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class SelectionMetric(evaluate.Metric):
    """`selection_metric` as a metric."""

    def _info(self):
        grid = datasets.List(datasets.List(datasets.Value("float64")))
        count = datasets.Value("int64")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"visual_tokens": count, "tiles": count, "relevance": grid, "boxes": grid}),
        )

    def _compute(self, visual_tokens, tiles, relevance, boxes):
        return selection_metric(visual_tokens, tiles, relevance, boxes)
