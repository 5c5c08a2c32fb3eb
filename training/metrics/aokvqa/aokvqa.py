"""A-OKVQA metric: multiple choice accuracy, and soft accuracy of direct answers over ten annotators.

The maths is in plain functions; the `evaluate.Metric` at the end only passes columns on. Load it with
`evaluate.load("training/metrics/aokvqa")`, which needs no network.
"""

import re

import datasets
import evaluate


LETTERS = "ABCD"
NEEDED_MATCHES = 3  # number of annotators with the same answer for full marks

_DESCRIPTION = """\
A-OKVQA metric. Every question is graded in the form in which it was asked, as multiple choice or as a direct answer.
Following the benchmark, difficult direct answers are not graded, only counted.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: generated answers, a list of str.
    choices: the four choices per row, a list of lists of str; an empty list for a direct answer.
    correct_choices: index of the correct choice per row, a list of int; -1 for a direct answer.
    direct_answers: the ten answers per row, a list of lists of str; an empty list for multiple choice.
    difficult: whether the direct answer of a row is marked as difficult, a list of bool.

Returns a dict; values are from 0 to 1, or None without rows to grade:
    multiple_choice: accuracy.
    direct_answer: mean of min(1, matches / 3) over the ten answers, without the difficult rows.
    n_multiple_choice, n_direct_answer, n_difficult: number of rows; the difficult ones are not graded.

Example:
    >>> metric = evaluate.load("training/metrics/aokvqa")
    >>> row = dict(choices=[["dog", "cat", "cow", "hen"]], correct_choices=[1], direct_answers=[[]], difficult=[False])
    >>> metric.compute(predictions=["B"], **row)["multiple_choice"]
    1.0
"""

_CITATION = """\
@inproceedings{schwenk2022aokvqa,
  title = {A-OKVQA: A Benchmark for Visual Question Answering using World Knowledge},
  author = {Schwenk, Dustin and Khandelwal, Apoorv and Clark, Christopher and Marino, Kenneth and Mottaghi, Roozbeh},
  booktitle = {ECCV},
  year = {2022}
}
"""


def plain(text: str) -> str:
    """A text in lower case, without a leading "Answer:", surrounding whitespace and full stops."""
    return re.sub(r"^\s*answer\s*:\s*", "", text.lower()).strip(" \t\n.")


def chosen(prediction: str, choices: list[str]) -> int | None:
    """The index of the choice that a prediction names; None unless it names exactly one.

    A prediction names a choice by its text or by its letter: "B", "(b)", "Answer: B", or "B. cat" if the text matches
    the letter. A letter that merely starts a sentence ("A man") or an answer with further words names none.
    """
    said = plain(prediction)
    named = {number for number, choice in enumerate(choices) if said == plain(choice)}
    for number, choice in enumerate(choices):
        letter, text = LETTERS[number].lower(), re.escape(plain(choice))
        if re.fullmatch(rf"\(?{letter}[).:]*(\s+{text})?", said):
            named.add(number)
    return named.pop() if len(named) == 1 else None


def direct_answer_accuracy(prediction: str, direct_answers: list[str]) -> float:
    """min(1, matches / 3), where a match is an annotator's answer that equals the prediction after `plain`.

    Raises ValueError without answers.
    """
    if not direct_answers:
        raise ValueError("direct_answers ([]): at least one answer is needed")
    matches = sum(plain(prediction) == plain(answer) for answer in direct_answers)
    return min(1.0, matches / NEEDED_MATCHES)


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def aokvqa_metric(
    predictions: list[str],
    choices: list[list[str]],
    correct_choices: list[int],
    direct_answers: list[list[str]],
    difficult: list[bool],
) -> dict[str, float | int | None]:
    """The metric over all rows; the lists have one entry per row, see the description above.

    Raises ValueError for lists of different lengths, an index outside the choices, more choices than letters, or a row
    with neither choices nor direct answers.
    """
    columns = (predictions, choices, correct_choices, direct_answers, difficult)
    if len({len(column) for column in columns}) > 1:
        raise ValueError(f"columns ({[len(column) for column in columns]} entries) must have the same length")
    multiple, direct, left_out = [], [], 0
    for row, (prediction, options, correct, answers, hard) in enumerate(zip(*columns)):
        if options:
            if len(options) > len(LETTERS) or not 0 <= correct < len(options):
                raise ValueError(
                    f"row {row}: correct_choices ({correct}) must be an index of its {len(options)} choices, at most "
                    f"{len(LETTERS)}"
                )
            multiple.append(float(chosen(prediction, options) == correct))
        elif not answers:
            raise ValueError(f"row {row} has neither choices nor direct answers")
        elif hard:
            left_out += 1
        else:
            direct.append(direct_answer_accuracy(prediction, answers))
    return {
        "multiple_choice": _mean(multiple),
        "direct_answer": _mean(direct),
        "n_multiple_choice": len(multiple),
        "n_direct_answer": len(direct),
        "n_difficult": left_out,
    }


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class AokvqaMetric(evaluate.Metric):
    """`aokvqa_metric` as a metric."""

    def _info(self):
        texts = datasets.List(datasets.Value("string"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {
                    "predictions": datasets.Value("string"),
                    "choices": texts,
                    "correct_choices": datasets.Value("int64"),
                    "direct_answers": texts,
                    "difficult": datasets.Value("bool"),
                }
            ),
        )

    def _compute(self, predictions, choices, correct_choices, direct_answers, difficult):
        return aokvqa_metric(predictions, choices, correct_choices, direct_answers, difficult)
