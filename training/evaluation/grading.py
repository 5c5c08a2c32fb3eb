"""What is a right answer, by data set: every row from 0 to 1, and the data set's own metric over all rows.

Row scores are what systems are paired by; their mean is the metric's headline figure.
"""

import numpy as np

from training.data.refcoco import parse_box
from training.metrics.aokvqa.aokvqa import aokvqa_scores, chosen, direct_answer_accuracy
from training.metrics.refcoco.refcoco import iou, refcoco_scores
from training.metrics.vqa_rad.vqa_rad import score_answer, vqa_rad_scores


def score_cards(prediction: str, sample: dict) -> float:
    """Whether a prediction is the answer but for case and surrounding blanks."""
    return float(prediction.strip().lower() == sample["answer"].strip().lower())


def score_vqa_rad(prediction: str, sample: dict) -> float:
    """Closed questions by whole words, open ones by exact match."""
    which = "closed" if sample["family"] == "closed" else "open_exact_match"
    return score_answer(prediction, sample["answer"])[which]


def score_aokvqa(prediction: str, sample: dict) -> float:
    """Multiple choice by the choice that is named, direct answers by min(1, matches / 3) over the ten annotators."""
    if sample["choices"]:
        return float(chosen(prediction, sample["choices"]) == sample["correct_choice"])
    return direct_answer_accuracy(prediction, sample["direct_answers"])


def score_refcoco(prediction: str, sample: dict) -> float:
    """Whether the predicted box and the right one have an IoU of at least 0.5."""
    box, (right,) = parse_box(prediction), sample["boxes"]
    return float(bool(box) and iou(box, in_per_cent(right)) >= 0.5)


def in_per_cent(box: list[float]) -> list[float]:
    """A box in shares of the image in the unit that predictions have."""
    return [100 * side for side in box]


ROWS = {"cards": score_cards, "vqa_rad": score_vqa_rad, "aokvqa": score_aokvqa, "refcoco": score_refcoco}


def score_rows(dataset: str, predictions: list[str], samples: list[dict]) -> np.ndarray:
    """The score of every row, `(n,)` float within 0 and 1."""
    return np.array([ROWS[dataset](prediction, sample) for prediction, sample in zip(predictions, samples)])


def score_set(dataset: str, predictions: list[str], samples: list[dict], kept: list[list]) -> dict:
    """The data set's own metric; nothing for cards, whose families say it all.

    `kept` are the regions kept of each image, boxes in shares of its sides.
    """
    column = {name: [sample[name] for sample in samples] for name in samples[0]}
    if dataset == "vqa_rad":
        return vqa_rad_scores(predictions, column["answer"], column["family"])
    if dataset == "aokvqa":
        return aokvqa_scores(
            predictions,
            column["choices"],
            column["correct_choice"],
            column["direct_answers"],
            column["difficult"],
        )
    if dataset == "refcoco":
        boxes = [in_per_cent(box) for (box,) in column["boxes"]]
        regions = [[in_per_cent(box) for box in row] for row in kept]
        return refcoco_scores([parse_box(prediction) for prediction in predictions], boxes, regions)
    return {}
