"""RefCOCO: the box of the object that an expression ("the man on the left") refers to in an everyday photo.

The source is `lmms-lab/RefCOCO` on the Hub, which has the splits val, test, testA and testB but **no train split**, or
a folder of parquet files with the same columns, which may have one. The published `question` column asks for a caption
of a given box, the inverse task, and is not used.

Paper: Yu et al., "Modeling Context in Referring Expressions", ECCV 2016.
"""

import math
import re
from pathlib import Path

from PIL import Image

from training.data.arguments import DataArguments
from training.data.dataset import VQADataset
from training.data.rows import Questions, TableImages, load_table, plain_text, report_skipped, usable_rows
from training.metrics.refcoco.refcoco import MIN_IOU, iou, refcoco_metric


HUB_ID = "lmms-lab/RefCOCO"
HUB_SPLITS = ("val", "test", "testA", "testB")
COLUMNS = ("image", "question_id", "answer", "bbox")
SLACK = 1.0  # px that a box may reach over the image edge before it is clipped: published boxes are rounded
PROMPT = (
    'Where is "{expression}"? Give its bounding box as [x0, y0, x1, y1], each from 0 to 100 per cent of the image.'
)


def pixel_box(bbox: list[float] | None, size: tuple[int, int]) -> list[float]:
    """Convert `[x, y, w, h]` in px to `[x0, y0, x1, y1]`, clipped to an image of `size` `(width, height)`.

    Returns [] for a box without area, a box that reaches over the edge by more than `SLACK`, and anything other than
    four finite numbers.
    """
    if not isinstance(bbox, list) or len(bbox) != 4:
        return []
    if not all(isinstance(number, (int, float)) and math.isfinite(number) for number in bbox):
        return []
    x, y, box_width, box_height = bbox
    width, height = size
    if min(x, y) < -SLACK or x + box_width > width + SLACK or y + box_height > height + SLACK:
        return []
    box = [max(0.0, x), max(0.0, y), min(float(width), x + box_width), min(float(height), y + box_height)]
    return box if box[0] < box[2] and box[1] < box[3] else []


def _percent_span(start: float, end: float, length: int) -> tuple[int, int]:
    """Two px positions as integer percentages of `length`, rounded; rounded outwards if they would coincide."""
    start, end = 100 * start / length, 100 * end / length
    if round(start) < round(end):
        return round(start), round(end)
    return math.floor(start), math.ceil(end)


def box_answer(box: list[float], size: tuple[int, int]) -> str:
    """A box in px as the expected answer, percentages of `size` `(width, height)` such as `"[12, 30, 45, 88]"`."""
    (x0, x1), (y0, y1) = _percent_span(box[0], box[2], size[0]), _percent_span(box[1], box[3], size[1])
    return f"[{x0}, {y0}, {x1}, {y1}]"


def parse_box(text: str) -> list[float]:
    """The box `[x0, y0, x1, y1]` in a generated text, in percentages of the image, or [] without one.

    A text has a box if it contains exactly four numbers, all of them integers, with x0 < x1 and y0 < y1.
    """
    numbers = re.findall(r"-?\d+(?:\.\d+)?", text)
    if len(numbers) != 4 or not all(number.isdigit() for number in numbers):
        return []
    x0, y0, x1, y1 = box = [float(number) for number in numbers]
    # Hundreds of digits are read as infinity.
    return box if x0 < x1 and y0 < y1 and all(map(math.isfinite, box)) else []


def _first_expression(answer) -> str:
    expressions = [answer] if isinstance(answer, str) else answer or []
    return next((text for text in map(plain_text, expressions) if text), "")


def _row_problem(row: dict, size: tuple[int, int] | None) -> str | None:
    if not row["question_id"]:
        return "no question id"
    if not row["expression"]:
        return "no expression"
    if size is not None and not pixel_box(row["bbox"], size):
        return "box outside the image"
    return None


def _make_sample(row: dict, image: Image.Image) -> dict:
    box = pixel_box(row["bbox"], image.size)
    return {
        "question_id": row["question_id"],
        "image": image,
        "question": PROMPT.format(expression=row["expression"]),
        "answer": box_answer(box, image.size),
        "choices": [],
        "family": "refer",
        "tiles_needed": "unknown",
        "boxes": [box],
    }


def load_refcoco(data_dir: str | Path | None = None, split: str = "val") -> Questions:
    """Load one split of RefCOCO: one sample per row, with its first non-empty expression.

    Args:
        data_dir: folder with `<split>*.parquet`, directly or in `data/`; None loads from the Hub.
        split: `"val"`, `"test"`, `"testA"` or `"testB"`; also `"train"` from a folder that has it, unlike the Hub.

    Each item is a dict with the keys of a cards sample: `question_id` (str), `image` (PIL, RGB, original size),
    `question` (the prompt), `answer` (such as `"[12, 30, 45, 88]"`, integer percentages of the image's width and
    height), `choices` (empty), `family` (`"refer"`), `tiles_needed` (`"unknown"`) and `boxes` (the single correct box,
    `[x0, y0, x1, y1]` in px).

    `.rows` holds the usable rows without their images: dicts with `question_id`, `image_name`, `expression` and `bbox`
    (as published). Every image is read once; unusable rows are left out, counted in `.skipped` and reported in one
    warning.

    Raises ValueError for an unknown `split` or a missing column, FileNotFoundError for a missing folder or a folder
    without files of the split.
    """
    if split == "train" and data_dir is None:
        raise ValueError(f"split ('train'): {HUB_ID} does not have it; choose from {', '.join(HUB_SPLITS)}")
    if split not in ("train", *HUB_SPLITS):
        raise ValueError(f"split ({split!r}): choose from train (local folders only), {', '.join(HUB_SPLITS)}")
    find_image = TableImages()
    rows = [
        {
            "question_id": plain_text(entry["question_id"]),
            "image_name": entry["image_name"],
            "expression": _first_expression(entry["answer"]),
            "bbox": entry["bbox"],
        }
        for entry in find_image.read(split, load_table("RefCOCO", HUB_ID, data_dir, split, COLUMNS))
    ]
    usable, skipped = usable_rows(rows, find_image, _row_problem)
    report_skipped(f"RefCOCO {split}", len(rows), skipped)
    return Questions(usable, find_image, _make_sample, skipped)


def _load(arguments: DataArguments, split: str, seed: int) -> Questions:
    return load_refcoco(arguments.data_dir, split)


def _in_per_cent(box: list[float]) -> list[float]:
    """A box in fractions of the image, converted to the unit of predictions."""
    return [100 * side for side in box]


def _grade(prediction: str, sample: dict) -> float:
    """1 if the predicted box and the correct one have an IoU of at least 0.5."""
    box, (correct,) = parse_box(prediction), sample["boxes"]
    return float(bool(box) and iou(box, _in_per_cent(correct)) >= MIN_IOU)


def _metric(predictions: list[str], samples: list[dict], kept: list[list]) -> dict:
    boxes = [_in_per_cent(box) for (box,) in (sample["boxes"] for sample in samples)]
    regions = [[_in_per_cent(box) for box in row] for row in kept]
    return refcoco_metric([parse_box(prediction) for prediction in predictions], boxes, regions)


REFCOCO = VQADataset(
    name="refcoco",
    hub_id=HUB_ID,
    eval_split="test",
    eval_size=5000,
    load=_load,
    grade=_grade,
    graded_by="boxes with an IoU of at least 0.5",
    metric=_metric,
    extra_metrics=("mean_iou", "centre_hit"),
)
