"""VQA-RAD metric: accuracy of closed questions, token recall and exact match of open ones.

The maths is in plain functions; the `evaluate.Metric` at the end only passes columns on. Load it with
`evaluate.load("training/metrics/vqa_rad")`, which needs no network.
"""

import re
from collections import Counter

import datasets
import evaluate


FAMILIES = ("closed", "open")
OPPOSITES = {"yes": "no", "no": "yes"}
ARTICLES = ("a", "an", "the")

_DESCRIPTION = """\
VQA-RAD metric for medical visual question answering: closed questions (yes/no, or a choice between options named in
the question) by accuracy, open questions by token recall and by exact match. Every row counts.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: generated answers, a list of str.
    references: correct answers, a list of str.
    families: "closed" or "open" per row, a list of str.

Returns a dict; values are from 0 to 1, or None without rows to grade:
    closed: accuracy of the closed rows.
    open_recall: mean share of the reference's tokens that are in the prediction.
    open_exact_match: share of the open rows whose tokens equal the reference's.
    overall: share of all rows that are right, by accuracy (closed) or exact match (open).
    n_closed, n_open: number of rows per family.

Example:
    >>> metric = evaluate.load("training/metrics/vqa_rad")
    >>> metric.compute(predictions=["Yes."], references=["yes"], families=["closed"])["closed"]
    1.0
"""

_CITATION = """\
@article{lau2018vqarad,
  title = {A dataset of clinically generated visual questions and answers about radiology images},
  author = {Lau, Jason J. and Gayen, Soumya and Ben Abacha, Asma and Demner-Fushman, Dina},
  journal = {Scientific Data},
  volume = {5},
  year = {2018}
}
"""


def answer_tokens(text: str) -> list[str]:
    """Lower-case words and numbers of a text, without punctuation and articles: "The 3.4 cm mass." → 3.4, cm, mass.

    A text that consists of articles keeps them, since "A" may be an answer.
    """
    tokens = re.findall(r"\d+\.\d+|[^\W_]+", text.lower())
    return [token for token in tokens if token not in ARTICLES] or tokens


def _contains(tokens: list[str], phrase: list[str]) -> bool:
    return any(tokens[start : start + len(phrase)] == phrase for start in range(len(tokens) - len(phrase) + 1))


def grade_answer(prediction: str, reference: str) -> dict[str, float]:
    """Grade one answer by all three rules; the family of the row decides which of them counts.

    Returns a dict of floats from 0 to 1:
        closed: 1 if the prediction contains the reference as consecutive whole words. For yes and no the opposite word
            must also be absent, so that saying both is wrong. The options of a choice ("left or right?") are not
            known here, so an answer that names several of them passes.
        open_recall: share of the reference's tokens found in the prediction; a repeated token must be repeated there.
            Recall does not punish long answers: read it next to the exact match.
        open_exact_match: 1 if the tokens are equal.

    All grades are 0 for a reference without words or numbers, even if the prediction is empty as well.
    """
    said, wanted = answer_tokens(prediction), answer_tokens(reference)
    if not wanted:
        return {"closed": 0.0, "open_recall": 0.0, "open_exact_match": 0.0}
    opposite = OPPOSITES.get(wanted[0]) if len(wanted) == 1 else None
    return {
        "closed": float(_contains(said, wanted) and opposite not in said),
        "open_recall": sum((Counter(said) & Counter(wanted)).values()) / len(wanted),
        "open_exact_match": float(said == wanted),
    }


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def vqa_rad_metric(
    predictions: list[str], references: list[str], families: list[str]
) -> dict[str, float | int | None]:
    """The metric over all rows; the lists have one entry per row, see the description above.

    `n_closed` and `n_open` add up to the number of rows: none is left out.

    Raises ValueError for lists of different lengths or an unknown family.
    """
    if not len(predictions) == len(references) == len(families):
        raise ValueError(
            f"predictions ({len(predictions)}), references ({len(references)}) and families ({len(families)}) must "
            "have the same length"
        )
    unknown = sorted(set(families) - set(FAMILIES))
    if unknown:
        raise ValueError(f"families ({unknown}): choose from {', '.join(FAMILIES)}")
    grades = {family: [] for family in FAMILIES}
    for prediction, reference, family in zip(predictions, references, families):
        grades[family].append(grade_answer(prediction, reference))
    closed = [grade["closed"] for grade in grades["closed"]]
    exact = [grade["open_exact_match"] for grade in grades["open"]]
    return {
        "closed": _mean(closed),
        "open_recall": _mean([grade["open_recall"] for grade in grades["open"]]),
        "open_exact_match": _mean(exact),
        "overall": _mean(closed + exact),
        "n_closed": len(closed),
        "n_open": len(exact),
    }


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class VqaRadMetric(evaluate.Metric):
    """`vqa_rad_metric` as a metric."""

    def _info(self):
        columns = {name: datasets.Value("string") for name in ("predictions", "references", "families")}
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(columns),
        )

    def _compute(self, predictions, references, families):
        return vqa_rad_metric(predictions, references, families)
