"""Scores for VQA-RAD: accuracy of closed questions, token recall and exact match of open ones.

The maths are plain functions; the `evaluate.Metric` at the end only passes columns on. Load it with
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
Scores for medical visual question answering on VQA-RAD. Closed questions (yes/no, or a choice between options named
in the question) by accuracy, open questions by token recall and by exact match. Every row counts.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: the generated answers, a list of str.
    references: the right answers, a list of str.
    families: "closed" or "open" for each row, a list of str.

Returns a dict; scores are shares within 0 and 1, and None where there is no row to score:
    closed: accuracy of the closed rows.
    open_recall: mean share of the reference's tokens that are in the prediction.
    open_exact_match: share of the open rows whose tokens equal the reference's.
    overall: share of all rows that are right, by accuracy (closed) or exact match (open).
    n_closed, n_open: how many rows each family has.

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

    A text of nothing but articles keeps them, as "A" may be an answer.
    """
    tokens = re.findall(r"\d+\.\d+|[^\W_]+", text.lower())
    return [token for token in tokens if token not in ARTICLES] or tokens


def _contains(tokens: list[str], phrase: list[str]) -> bool:
    return any(tokens[start : start + len(phrase)] == phrase for start in range(len(tokens) - len(phrase) + 1))


def score_answer(prediction: str, reference: str) -> dict[str, float]:
    """Score one answer in all three ways; which of them counts depends on the row's family.

    Returns a dict of floats within 0 and 1:
        closed: 1 if the reference is in the prediction as whole words, in order and without a gap. For yes and no the
            opposite word has to be absent as well, so that saying both is wrong. The other options of a choice
            ("left or right?") are not known here, so an answer that names several of them passes.
        open_recall: share of the reference's tokens found in the prediction; a repeated token has to be there as
            often. Recall does not punish long answers: read it next to the exact match.
        open_exact_match: 1 if the tokens are equal.

    A reference without a word or number in it scores 0: nothing can be right, and an empty answer least of all.
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


def vqa_rad_scores(
    predictions: list[str], references: list[str], families: list[str]
) -> dict[str, float | int | None]:
    """The scores of a set of answers; all three lists have one entry for each row.

    Returns `closed`, `open_recall`, `open_exact_match`, `overall` (shares within 0 and 1, None without rows) and the
    counts `n_closed`, `n_open`, which together are the number of rows: none is ever left out.

    Raises ValueError for lists of different lengths or an unknown family.
    """
    if not len(predictions) == len(references) == len(families):
        raise ValueError(
            f"{len(predictions)} predictions, {len(references)} references and {len(families)} families: "
            "the lists need one entry for each row"
        )
    unknown = sorted(set(families) - set(FAMILIES))
    if unknown:
        raise ValueError(f"unknown families {unknown}: choose from {', '.join(FAMILIES)}")
    scores = {family: [] for family in FAMILIES}
    for prediction, reference, family in zip(predictions, references, families):
        scores[family].append(score_answer(prediction, reference))
    closed = [score["closed"] for score in scores["closed"]]
    exact = [score["open_exact_match"] for score in scores["open"]]
    return {
        "closed": _mean(closed),
        "open_recall": _mean([score["open_recall"] for score in scores["open"]]),
        "open_exact_match": _mean(exact),
        "overall": _mean(closed + exact),
        "n_closed": len(closed),
        "n_open": len(exact),
    }


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class VqaRadMetric(evaluate.Metric):
    """`vqa_rad_scores` as a metric."""

    def _info(self):
        columns = {name: datasets.Value("string") for name in ("predictions", "references", "families")}
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(columns),
        )

    def _compute(self, predictions, references, families):
        return vqa_rad_scores(predictions, references, families)
