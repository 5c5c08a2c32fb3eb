"""A-OKVQA: questions about everyday photos that require world knowledge, as multiple choice or with direct answers.

The source is `HuggingFaceM4/A-OKVQA` on the Hub (17056 train and 1145 validation questions), or a folder of parquet
files with the same columns. The prompts are those of the SmolVLM authors' own evaluation in VLMEvalKit.

Paper: Schwenk et al., "A-OKVQA: A Benchmark for Visual Question Answering using World Knowledge", ECCV 2022.
"""

import ast
from collections import Counter
from pathlib import Path

from PIL import Image

from training.data.arguments import DataArguments
from training.data.dataset import VQADataset
from training.data.rows import (
    BRIEF_ANSWER,
    Questions,
    TableImages,
    load_table,
    plain_text,
    report_skipped,
    usable_rows,
)
from training.metrics.aokvqa.aokvqa import aokvqa_metric, chosen, direct_answer_accuracy


HUB_ID = "HuggingFaceM4/A-OKVQA"
SPLITS = ("train", "validation")
FORMS = ("multiple_choice", "direct_answer")
LETTERS = "ABCD"
COLUMNS = (
    "image",
    "question_id",
    "question",
    "choices",
    "correct_choice_idx",
    "direct_answers",
    "difficult_direct_answer",
)


def read_texts(value) -> list[str]:
    """The texts in a list, or in a string that holds a Python list literal; [] for anything else."""
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return []
    if not isinstance(value, (list, tuple)):
        return []
    return [plain_text(entry) for entry in value]


def multiple_choice_question(question: str, choices: list[str]) -> str:
    """The question, its lettered choices and the request for a letter, each on its own line."""
    options = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices)]
    return "\n".join([question, "Choices:", *options, "Answer with the letter."])


def most_frequent(answers: list[str]) -> str:
    """The answer that most annotators gave; the first one if several tie."""
    return Counter(answers).most_common(1)[0][0]


def _row_problem(row: dict, size: tuple[int, int] | None) -> str | None:
    if not row["question_id"]:
        return "no question id"
    if not row["question"]:
        return "empty question"
    if row["form"] == "direct_answer":
        return None if row["direct_answers"] else "no direct answers"
    if len(row["choices"]) != len(LETTERS):
        return "wrong number of choices"
    if not all(row["choices"]):
        return "empty choice"
    correct = row["correct_choice"]
    return None if type(correct) is int and 0 <= correct < len(LETTERS) else "correct choice out of range"


def _make_sample(row: dict, image: Image.Image) -> dict:
    multiple = row["form"] == "multiple_choice"
    if multiple:
        question = multiple_choice_question(row["question"], row["choices"])
    else:
        question = row["question"] + BRIEF_ANSWER
    return {
        "question_id": row["question_id"],
        "image": image,
        "question": question,
        "answer": LETTERS[row["correct_choice"]] if multiple else most_frequent(row["direct_answers"]),
        "choices": row["choices"] if multiple else [],
        "family": row["form"],
        "tiles_needed": "unknown",
        "boxes": [],
        "correct_choice": row["correct_choice"] if multiple else -1,
        "direct_answers": [] if multiple else row["direct_answers"],
        "difficult": row["difficult"],
    }


def load_aokvqa(data_dir: str | Path | None = None, split: str = "train", form: str = "multiple_choice") -> Questions:
    """Load one split of A-OKVQA.

    Args:
        data_dir: folder with `<split>*.parquet`, directly or in `data/`; None loads from the Hub.
        split: `"train"` or `"validation"`.
        form: `"multiple_choice"`, answered with a letter, or `"direct_answer"`, answered with the most frequent of the
            annotators' ten answers.

    Each item is a dict with the keys of a cards sample: `question_id` (str), `image` (PIL, RGB, original size),
    `question` (the prompt), `answer`, `choices` (four, or none for a direct answer), `family` (the form),
    `tiles_needed` (`"unknown"`) and `boxes` (empty: none are annotated). The metric also needs `correct_choice` (int
    from 0, -1 for a direct answer), `direct_answers` (list of str, empty for multiple choice) and `difficult` (bool,
    whether the direct answer is marked as difficult).

    `.rows` holds the usable rows without their images, with the answers of both forms. Every image is read once;
    unusable rows are left out, counted in `.skipped` and reported in one warning.

    Raises ValueError for an unknown `split` or `form` or a missing column, FileNotFoundError for a missing folder or a
    folder without files of the split.
    """
    if split == "test":
        raise ValueError(f"split ('test'): its answers are not published; choose from {', '.join(SPLITS)}")
    if split not in SPLITS:
        raise ValueError(f"split ({split!r}): choose from {', '.join(SPLITS)}")
    if form not in FORMS:
        raise ValueError(f"form ({form!r}): choose from {', '.join(FORMS)}")
    find_image = TableImages()
    rows = [
        {
            "question_id": plain_text(entry["question_id"]),
            "image_name": entry["image_name"],
            "question": plain_text(entry["question"]),
            "choices": read_texts(entry["choices"]),
            "correct_choice": entry["correct_choice_idx"],
            "direct_answers": [text for text in read_texts(entry["direct_answers"]) if text],
            "difficult": bool(entry["difficult_direct_answer"]),
            "form": form,
        }
        for entry in find_image.read(split, load_table("A-OKVQA", HUB_ID, data_dir, split, COLUMNS))
    ]
    usable, skipped = usable_rows(rows, find_image, _row_problem)
    report_skipped(f"A-OKVQA {split} ({form})", len(rows), skipped)
    return Questions(usable, find_image, _make_sample, skipped)


def _load(arguments: DataArguments, split: str, seed: int) -> Questions:
    return load_aokvqa(arguments.data_dir, split, arguments.form)


def _grade(prediction: str, sample: dict) -> float:
    """Multiple choice by the choice that is named, direct answers by min(1, matches / 3) over the ten annotators."""
    if sample["choices"]:
        return float(chosen(prediction, sample["choices"]) == sample["correct_choice"])
    return direct_answer_accuracy(prediction, sample["direct_answers"])


def _metric(predictions: list[str], samples: list[dict], kept: list[list]) -> dict:
    names = ("choices", "correct_choice", "direct_answers", "difficult")
    return aokvqa_metric(predictions, *([sample[name] for sample in samples] for name in names))


def _is_evaluated(row: dict) -> bool:
    """Difficult direct answers are not evaluated, following the benchmark."""
    return not (row["form"] == "direct_answer" and row["difficult"])


AOKVQA = VQADataset(
    name="aokvqa",
    hub_id=HUB_ID,
    eval_split="validation",
    eval_size=1145,
    load=_load,
    grade=_grade,
    graded_by="the choice that is named, or min(1, matches / 3) over ten annotators",
    metric=_metric,
    is_evaluated=_is_evaluated,
)
