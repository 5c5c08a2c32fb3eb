"""What both harnesses ask, the samples of `training/data`, and how they score it.

VQA-RAD and A-OKVQA come from the Hub, or from the folders in the environment variables `QGSA_VQA_RAD_DIR` and
`QGSA_AOKVQA_DIR`: a variable, since lmms-eval has no option that reaches a task.
"""

import os

import datasets

from training.data.aokvqa import load_aokvqa
from training.data.cards import Cards
from training.data.vqa_rad import load_vqa_rad
from training.evaluation.grading import score_rows, score_set


CARDS = 2000  # test questions, as many as in the tables of the project
PARTS = ("closed", "open_exact_match", "open_recall")  # of VQA-RAD's score
LOADERS = {
    "cards": lambda: Cards("test", CARDS),
    "vqa_rad": lambda: load_vqa_rad(os.environ.get("QGSA_VQA_RAD_DIR"), "test"),
    "aokvqa": lambda: load_aokvqa(os.environ.get("QGSA_AOKVQA_DIR"), "validation"),
}


def load(dataset: str, **unused) -> datasets.DatasetDict:
    """The questions that our evaluation asks of `dataset` (cards, vqa_rad or aokvqa), as the split `test`.

    A document is a sample of `training/data` and the name of its `dataset`. It is made when it is asked for, so that
    its image is what the loader gives, not encoded anew, and a limited run draws no others. lm-eval passes the
    metadata of the task and the arguments of the model along, which are left `unused`.

    Raises what the data set's loader raises.
    """
    samples = LOADERS[dataset]()

    def show(columns: dict) -> dict:
        rows = [{**samples[index], "dataset": dataset} for index in columns["index"]]
        return {name: [row[name] for row in rows] for name in rows[0]}

    table = datasets.Dataset.from_dict({"index": range(len(samples))})
    return datasets.DatasetDict({"test": table.with_transform(show)})


def images(document: dict) -> list:
    """The image of a document, in a list as both harnesses have it; PIL, RGB."""
    return [document["image"]]


def results(document: dict, answers: list[str]) -> dict[str, float]:
    """The scores of the one answer to a document, each within 0 and 1.

    `accuracy` is what systems are compared by; beside it, for VQA-RAD, those of `PARTS` that hold for this document: a
    harness takes the mean of each over the documents that have it.
    """
    prediction, dataset = answers[0].strip(), document["dataset"]
    own = score_set(dataset, [prediction], [document], [[]])
    parts = {name: own[name] for name in PARTS if own.get(name) is not None}
    return {"accuracy": float(score_rows(dataset, [prediction], [document])[0])} | parts
