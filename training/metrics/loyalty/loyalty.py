"""Loyalty: how far the answers under selection are those of the dense model, right or wrong.

The maths are plain functions; the `evaluate.Metric` at the end only passes columns on. Load it with
`evaluate.load("training/metrics/loyalty")`, which needs no network.
"""

import datasets
import evaluate


_DESCRIPTION = """\
Agreement of a system's answers with those of the dense model on the same questions, apart for those that dense has
right and wrong, and how many answers selection mends and breaks. Every row counts.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: the system's answers, a list of str.
    dense_predictions: the dense model's answers to the same questions, a list of str.
    right: whether the system's answer is right by the data set's own metric, a list of bool.
    dense_right: the same of the dense model's answer, a list of bool.

Returns a dict; shares are within 0 and 1, and None where there is no row to score:
    loyalty: share of the rows on which both answers are the same text, case and blanks aside.
    loyalty_where_right: the same share of the rows that dense has right.
    loyalty_where_wrong: the same share of the rows that dense has wrong.
    n_fixed: how many rows dense has wrong and the system right.
    n_broken: how many rows dense has right and the system wrong.
    n, n_dense_right, n_dense_wrong: how many rows there are of each kind.

Example:
    >>> metric = evaluate.load("training/metrics/loyalty")
    >>> answers = dict(predictions=["Star "], dense_predictions=["star"], right=[True], dense_right=[True])
    >>> metric.compute(**answers)["loyalty"]
    1.0
"""

_CITATION = ""


def plain(text: str) -> str:
    """A text in lower case, without blanks around it and with single ones in it."""
    return " ".join(text.lower().split())


def _mean(values: list[bool]) -> float | None:
    return sum(values) / len(values) if values else None


def loyalty_scores(
    predictions: list[str], dense_predictions: list[str], right: list[bool], dense_right: list[bool]
) -> dict[str, float | int | None]:
    """The scores of a set of answers; all lists have one entry for each row, as in the metric's description.

    Raises ValueError for lists of different lengths.
    """
    columns = (predictions, dense_predictions, right, dense_right)
    if len({len(column) for column in columns}) > 1:
        raise ValueError(
            f"the columns have {[len(column) for column in columns]} rows: they need one entry for each row"
        )
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
    """`loyalty_scores` as a metric."""

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
        return loyalty_scores(predictions, dense_predictions, right, dense_right)
