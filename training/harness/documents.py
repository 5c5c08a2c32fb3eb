"""Documents for both harnesses, the samples of `training/data`, and the grading of their answers.

Every data set of `training/data/sets.py` can be a task. A published one comes from the Hub, or from the folder in the
environment variable `QGSA_<NAME>_DIR`, such as `QGSA_VQA_RAD_DIR`: lmms-eval has no option that reaches a task.
"""

import os

import datasets
from torch.utils.data import Subset

from training.data.arguments import DataArguments
from training.data.dataset import without_image
from training.data.sets import get_dataset, load_eval


def load_samples(name: str) -> Subset:
    """The samples of the data set `name` that the presets evaluate: same split, same number.

    Raises ValueError for an unknown data set, and any error of its `load`.
    """
    dataset = get_dataset(name)
    folder = os.environ.get(f"QGSA_{name.upper()}_DIR")
    return load_eval(DataArguments(name, folder, eval_split=dataset.eval_split, test_size=dataset.eval_size))


def load(dataset: str, **unused) -> datasets.DatasetDict:
    """The questions that our evaluation asks about `dataset`, such as `"cards"`, as the split `test`.

    A document is a sample with its boxes as fractions and its `dataset`. It is made on demand: its image is that of
    the loader, not re-encoded, and a limited run makes no others. lm-eval also passes the metadata of the task and the
    arguments of the model, which are `unused`.

    Raises ValueError for an unknown data set, and any error of its `load`.
    """
    samples = load_samples(dataset)

    def make_documents(columns: dict) -> dict:
        chosen = [samples[index] for index in columns["index"]]
        rows = [{**without_image(sample), "image": sample["image"], "dataset": dataset} for sample in chosen]
        return {name: [row[name] for row in rows] for name in rows[0]}

    table = datasets.Dataset.from_dict({"index": range(len(samples))})
    return datasets.DatasetDict({"test": table.with_transform(make_documents)})


def images(document: dict) -> list:
    """The image of a document (PIL, RGB), in a list as both harnesses expect."""
    return [document["image"]]


def grade(document: dict, answers: list[str]) -> dict[str, float]:
    """The grades of the single answer to a document, each from 0 to 1.

    `accuracy` is the grade that systems are compared by; next to it are the data set's `extra_metrics` that apply to
    this document. A harness averages each over the documents that have it.
    """
    prediction, dataset = answers[0].strip(), get_dataset(document["dataset"])
    metric = dataset.metric([prediction], [document], [[]])
    extra = {name: metric[name] for name in dataset.extra_metrics if metric[name] is not None}
    return {"accuracy": dataset.grade(prediction, document)} | {name: float(value) for name, value in extra.items()}
