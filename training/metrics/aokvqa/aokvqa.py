"""Scores for A-OKVQA: accuracy of multiple choice, and soft accuracy of direct answers over ten annotators.

The maths are plain functions; the `evaluate.Metric` at the end only passes columns on. Load it with
`evaluate.load("training/metrics/aokvqa")`, which needs no network.
"""

import re

import datasets
import evaluate


LETTERS = "ABCD"
NEEDED_MATCHES = 3  # annotators who gave this answer, for full marks

_DESCRIPTION = """\
Scores for A-OKVQA. Every question is scored as multiple choice where it was asked so, and as a direct answer where it
was asked so; difficult direct answers are left out of the latter, as the benchmark does, and counted.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: the generated answers, a list of str.
    choices: the four choices of each row, a list of lists of str; an empty list asks for a direct answer.
    correct_choices: the number of the right choice of each row, from 0, a list of int; -1 for a direct answer.
    direct_answers: the ten answers of each row, a list of lists of str; an empty list for multiple choice.
    difficult: whether the direct answer of each row is marked as difficult, a list of bool.

Returns a dict; scores are shares within 0 and 1, and None where there is no row to score:
    multiple_choice: accuracy.
    direct_answer: mean of min(1, matches / 3) over the ten answers, without the difficult rows.
    n_multiple_choice, n_direct_answer, n_difficult: how many rows each has; the difficult ones are scored nowhere.

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
    """A text in lower case, without an "Answer:" in front, surrounding blanks and a full stop."""
    return re.sub(r"^\s*answer\s*:\s*", "", text.lower()).strip(" \t\n.")


def chosen(prediction: str, choices: list[str]) -> int | None:
    """The number of the choice that a prediction names, from 0; None where it names none, or not exactly one.

    It names one by its text, or by its letter: "B", "(b)", "Answer: B", and "B. cat" where the text is that of B. A
    letter that only starts a sentence ("A man") names none, and neither does an answer with further words in it.
    """
    said = plain(prediction)
    named = {number for number, choice in enumerate(choices) if said == plain(choice)}
    for number, choice in enumerate(choices):
        letter, text = LETTERS[number].lower(), re.escape(plain(choice))
        if re.fullmatch(rf"\(?{letter}[).:]*(\s+{text})?", said):
            named.add(number)
    return named.pop() if len(named) == 1 else None


def direct_answer_accuracy(prediction: str, direct_answers: list[str]) -> float:
    """min(1, matches / 3), where a match is an annotator's answer that equals the prediction, as whole and plain text.

    Raises ValueError for no answers.
    """
    if not direct_answers:
        raise ValueError("direct_answers holds 0 answers: there is nothing to compare with")
    matches = sum(plain(prediction) == plain(answer) for answer in direct_answers)
    return min(1.0, matches / NEEDED_MATCHES)


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def aokvqa_scores(
    predictions: list[str],
    choices: list[list[str]],
    correct_choices: list[int],
    direct_answers: list[list[str]],
    difficult: list[bool],
) -> dict[str, float | int | None]:
    """The scores of a set of answers; all lists have one entry for each row, as in the metric's description.

    Raises ValueError for lists of different lengths, a number that is none of the choices, more choices than letters,
    and a row without either choices or direct answers.
    """
    columns = (predictions, choices, correct_choices, direct_answers, difficult)
    if len({len(column) for column in columns}) > 1:
        raise ValueError(
            f"the columns have {[len(column) for column in columns]} rows: they need one entry a row each"
        )
    multiple, direct, left_out = [], [], 0
    for row, (prediction, options, correct, answers, hard) in enumerate(zip(*columns)):
        if options:
            if len(options) > len(LETTERS) or not 0 <= correct < len(options):
                raise ValueError(
                    f"row {row}: correct_choices is {correct} of {len(options)} choices, of which there may be "
                    f"{len(LETTERS)}"
                )
            multiple.append(float(chosen(prediction, options) == correct))
        elif not answers:
            raise ValueError(f"row {row} has 0 choices and 0 direct answers")
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
    """`aokvqa_scores` as a metric."""

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
        return aokvqa_scores(predictions, choices, correct_choices, direct_answers, difficult)
