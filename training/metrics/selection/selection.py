"""Scores for a selection: how much of the image it keeps, and whether its relevance lies where the answer is.

The maths are plain functions; the `evaluate.Metric` at the end only passes columns on. Load it with
`evaluate.load("training/metrics/selection")`, which needs no network. Boxes are `[x0, y0, x1, y1]` in shares of the
image's width and height, within 0 and 1.
"""

import datasets
import evaluate
import numpy as np


_DESCRIPTION = """\
Scores for question-guided selection: the visual tokens and tiles that are kept, and how far the relevance map points
into the boxes that the question is about. Rows without boxes are left out of the latter, and counted.
"""

_KWARGS_DESCRIPTION = """
Args:
    visual_tokens: how many visual tokens each row keeps, a list of int.
    tiles: how many high-resolution tiles each row keeps, a list of int.
    relevance: the relevance map of each row over the whole image, a list of rows of columns of float, none below 0;
        [] where it is unknown.
    boxes: the boxes of each row, a list of lists of [x0, y0, x1, y1] within 0 and 1; [] where there are none.

Returns a dict; means are None where there is no row to score:
    visual_tokens: mean number of visual tokens (k).
    tiles: mean number of tiles (m).
    pointing_accuracy: share of the rows whose most relevant cell has its centre in one of the boxes.
    relevance_in_boxes: mean share of the relevance that lies in the boxes, 0 to 1.
    n: how many rows there are.
    n_pointed: how many of them the latter two are over.
    n_without_boxes, n_without_relevance: why others are left out of these; a row that lacks both has no boxes.

Example:
    >>> metric = evaluate.load("training/metrics/selection")
    >>> row = dict(visual_tokens=[80], tiles=[2], relevance=[[[0.25, 0.75]]], boxes=[[[0.5, 0.0, 1.0, 1.0]]])
    >>> metric.compute(**row)["relevance_in_boxes"]
    0.75
"""

_CITATION = ""


def check_relevance(relevance) -> np.ndarray:
    """A relevance map as `(rows, columns)` float64. Raises ValueError for one that is none or has nothing in it."""
    if len({len(row) for row in relevance}) != 1:
        raise ValueError(f"relevance has rows of {[len(row) for row in relevance]} columns: they need one length")
    values = np.asarray(relevance, np.float64)
    if values.ndim != 2 or not values.size:
        raise ValueError(f"relevance has the shape {values.shape}: it needs to be (rows, columns)")
    if not np.isfinite(values).all() or values.min() < 0 or values.sum() <= 0:
        raise ValueError(
            f"relevance is within {values.min()} and {values.max()}: its cells have to be 0 or more, and some be more"
        )
    return values


def check_boxes(boxes) -> np.ndarray:
    """Boxes as `(n, 4)` float64. Raises ValueError, with its numbers, for one that is none or not within 0 and 1."""
    for box in boxes:
        # The slack is that of numbers that once were float32.
        if len(box) != 4 or not (-1e-6 <= box[0] < box[2] <= 1 + 1e-6 and -1e-6 <= box[1] < box[3] <= 1 + 1e-6):
            raise ValueError(
                f"boxes holds {list(box)}: a box is [x0, y0, x1, y1] in shares of the image, with x0 < x1 and y0 < y1"
            )
    return np.clip(np.asarray(boxes, np.float64).reshape(-1, 4), 0, 1)


def points_into(relevance, boxes) -> bool:
    """Whether the centre of the most relevant cell, of several the first, lies in one of the boxes.

    Args:
        relevance: `(rows, columns)` over the whole image, none below 0.
        boxes: `(n, 4)`, `[x0, y0, x1, y1]` in shares of the image's width and height.
    """
    relevance, boxes = check_relevance(relevance), check_boxes(boxes)
    row, column = np.unravel_index(relevance.argmax(), relevance.shape)
    y, x = (row + 0.5) / relevance.shape[0], (column + 0.5) / relevance.shape[1]
    return any(x0 <= x <= x1 and y0 <= y <= y1 for x0, y0, x1, y1 in boxes)


def relevance_in_boxes(relevance, boxes) -> float:
    """Share of the relevance in the union of the boxes, 0 to 1; arguments as of `points_into`.

    The relevance of a cell is spread evenly over it: one that is half in a box counts with half of its relevance.
    """
    relevance, boxes = check_relevance(relevance), check_boxes(boxes)
    rows, columns = relevance.shape
    # Cut the image at every edge of a cell or a box: each piece is then in one cell, and in a box as a whole or not.
    x_cuts = np.unique(np.concatenate([np.arange(columns + 1) / columns, boxes[:, 0], boxes[:, 2]]))
    y_cuts = np.unique(np.concatenate([np.arange(rows + 1) / rows, boxes[:, 1], boxes[:, 3]]))
    x, y = (x_cuts[:-1] + x_cuts[1:]) / 2, (y_cuts[:-1] + y_cuts[1:]) / 2
    inside = np.zeros((len(y), len(x)), bool)
    for x0, y0, x1, y1 in boxes:
        inside |= np.outer((y0 < y) & (y < y1), (x0 < x) & (x < x1))
    # The middle of a piece of no more than a rounding error may lie on the image's far edge.
    row, column = np.minimum((y * rows).astype(int), rows - 1), np.minimum((x * columns).astype(int), columns - 1)
    cell = relevance[np.ix_(row, column)]
    share_of_cell = np.outer(np.diff(y_cuts) * rows, np.diff(x_cuts) * columns)
    return float((cell * share_of_cell * inside).sum() / relevance.sum())


def _mean(values: list[float]) -> float | None:
    return float(np.mean(values)) if values else None


def selection_scores(
    visual_tokens: list[int],
    tiles: list[int],
    relevance: list[list[list[float]]],
    boxes: list[list[list[float]]],
) -> dict[str, float | int | None]:
    """The scores of a set of selections; all lists have one entry for each row, as in the metric's description.

    Raises ValueError for lists of different lengths, and with the row for a map or a box that is none.
    """
    columns = (visual_tokens, tiles, relevance, boxes)
    if len({len(column) for column in columns}) > 1:
        raise ValueError(
            f"the columns have {[len(column) for column in columns]} rows: they need one entry for each row"
        )
    pointed, inside, without_boxes, without_relevance = [], [], 0, 0
    for row, (scores, wanted) in enumerate(zip(relevance, boxes)):
        if not len(wanted):
            without_boxes += 1
        elif not len(scores):
            without_relevance += 1
        else:
            try:
                pointed.append(points_into(scores, wanted))
                inside.append(relevance_in_boxes(scores, wanted))
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
    """`selection_scores` as a metric."""

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
        return selection_scores(visual_tokens, tiles, relevance, boxes)
