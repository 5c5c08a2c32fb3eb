"""Loyalty: agreement of the answers under selection with those of the dense model, right or wrong.

The maths is in plain functions; the `evaluate.Metric` at the end only passes columns on. Load it with
`evaluate.load("training/metrics/loyalty")`, which needs no network.
"""

import datasets
import evaluate


_DESCRIPTION = """\
Agreement of a system's answers with those of the dense model on the same questions, also split by whether the dense
answer is right, and the number of answers that selection fixes and breaks. Every row counts.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: the system's answers, a list of str.
    dense_predictions: the dense model's answers to the same questions, a list of str.
    right: whether the system's answer is right according to the data set's grading, a list of bool.
    dense_right: whether the dense model's answer is, a list of bool.

Returns a dict; shares are from 0 to 1, or None without rows:
    loyalty: share of the rows with the same answer, ignoring case and whitespace.
    loyalty_where_right: the same share among the rows that dense answers right.
    loyalty_where_wrong: the same share among the rows that dense answers wrong.
    n_fixed: number of rows that dense answers wrong and the system right.
    n_broken: number of rows that dense answers right and the system wrong.
    n, n_dense_right, n_dense_wrong: number of rows of each kind.

Example:
    >>> metric = evaluate.load("training/metrics/loyalty")
    >>> answers = dict(predictions=["Star "], dense_predictions=["star"], right=[True], dense_right=[True])
    >>> metric.compute(**answers)["loyalty"]
    1.0
"""

_CITATION = ""


def plain(text: str) -> str:
    """A text in lower case with its whitespace normalised to single spaces."""
    return " ".join(text.lower().split())


def _mean(values: list[bool]) -> float | None:
    return sum(values) / len(values) if values else None


def loyalty_metric(
    predictions: list[str], dense_predictions: list[str], right: list[bool], dense_right: list[bool]
) -> dict[str, float | int | None]:
    """The metric over all rows; the lists have one entry per row, see the description above.

    Raises ValueError for lists of different lengths.
    """
    columns = (predictions, dense_predictions, right, dense_right)
    if len({len(column) for column in columns}) > 1:
        raise ValueError(f"columns ({[len(column) for column in columns]} entries) must have the same length")
    same = [plain(said) == plain(dense) for said, dense in zip(predictions, dense_predictions)]
    where_right = [agrees for agrees, dense in zip(same, dense_right) if dense]
    where_wrong = [agrees for agrees, dense in zip(same, dense_right) if not dense]
    return {
        "loyalty": _mean(same),
        "loyalty_where_right": _mean(where_right),
        "loyalty_where_wrong": _mean(where_wrong),
        "n_fixed": sum(bool(ours and not dense) for ours, dense in zip(right, dense_right)),
        "n_broken": sum(bool(dense and not ours) for ours, dense in zip(right, dense_right)),
        "n": len(same),
        "n_dense_right": len(where_right),
        "n_dense_wrong": len(where_wrong),
    }


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class LoyaltyMetric(evaluate.Metric):
    """`loyalty_metric` as a metric."""

    def _info(self):
        text, flag = datasets.Value("string"), datasets.Value("bool")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": text, "dense_predictions": text, "right": flag, "dense_right": flag}
            ),
        )

    def _compute(self, predictions, dense_predictions, right, dense_right):
        return loyalty_metric(predictions, dense_predictions, right, dense_right)
