"""The description of a data set: samples, grading, metric and source in one object."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Dataset

from training.data.arguments import DataArguments


def without_image(sample: dict) -> dict:
    """A sample as it is graded: without its image, its boxes as fractions of the image's width and height."""
    width, height = sample["image"].size
    boxes = [[x0 / width, y0 / height, x1 / width, y1 / height] for x0, y0, x1, y1 in sample["boxes"]]
    return {name: value for name, value in sample.items() if name != "image"} | {"boxes": boxes}


def no_metric(predictions: list[str], samples: list[dict], kept: list[list]) -> dict:
    """The metric of a data set that needs nothing beyond its accuracy per family."""
    return {}


@dataclass(frozen=True)
class VQADataset:
    """A visual question answering data set.

    A sample is a dict with `question_id`, `image` (PIL, RGB), `question` (the whole prompt), `answer`, `choices`,
    `family`, `tiles_needed`, `boxes` (`[x0, y0, x1, y1]` in px), and whatever else the grading needs.

    Args:
        name: value of `--dataset`, and of `dataset` in `results.json`.
        hub_id: Hub id of the source without a local folder; None for a generated data set.
        eval_split: split that presets and harnesses evaluate.
        eval_size: number of questions of that split that presets and harnesses evaluate.
        load: `(arguments, split, seed)` to a map-style data set of samples. ValueError for an option or a table that
            cannot be used, FileNotFoundError for missing files.
        grade: `(prediction, sample)` to the grade of one answer, a float from 0 to 1. Here and in `metric` boxes are
            fractions, see `without_image`.
        graded_by: the rule of `grade` in words, for model cards.
        metric: `(predictions, samples, kept)` to the data set's own metric, a dict that goes into `results.json` as
            `scores`. `kept` holds the kept regions per image, boxes as fractions of its width and height. It needs at
            least one sample.
        extra_metrics: entries of `metric` that are means over questions; harnesses report them next to the accuracy.
        is_evaluated: which of the loaded `rows` are evaluated; None for all of them.
    """

    name: str
    hub_id: str | None
    eval_split: str
    eval_size: int
    load: Callable[[DataArguments, str, int], Dataset]
    grade: Callable[[str, dict], float]
    graded_by: str
    metric: Callable[[list[str], list[dict], list[list]], dict] = no_metric
    extra_metrics: tuple[str, ...] = ()
    is_evaluated: Callable[[dict], bool] | None = None

    def grade_all(self, predictions: list[str], samples: list[dict]) -> np.ndarray:
        """The grade of every answer, `(n,)` float64 from 0 to 1: systems are paired by these."""
        return np.array([self.grade(prediction, sample) for prediction, sample in zip(predictions, samples)])
