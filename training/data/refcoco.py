"""RefCOCO: find what an expression refers to ("the man on the left") in an everyday picture, as a box.

The source is `lmms-lab/RefCOCO` on the Hub, which has the splits val, test, testA and testB and **no train split**, or
a folder of parquet files of the same columns, which may have one. The published `question` asks for a caption of a box
that is drawn in; here it is the other way round, so that column is not used.
"""

import math
import re
from pathlib import Path

from PIL import Image

from training.data.rows import Questions, TableImages, load_table, plain_text, report_skipped, usable_rows


HUB_ID = "lmms-lab/RefCOCO"
HUB_SPLITS = ("val", "test", "testA", "testB")
COLUMNS = ("image", "question_id", "answer", "bbox")
SLACK = 1.0  # px that a box may reach over the edge, which it is then cut at: the published ones are rounded


def pixel_box(bbox: list[float] | None, size: tuple[int, int]) -> list[float]:
    """`[x, y, w, h]` in px as `[x0, y0, x1, y1]` within an image of `size` `(width, height)`; [] for no such box.

    That is one without area, one that reaches over the edge by more than `SLACK`, and anything but four numbers.
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
    """Two px as whole per cent of `length`, rounded, or outwards where they would else be the same."""
    start, end = 100 * start / length, 100 * end / length
    if round(start) < round(end):
        return round(start), round(end)
    return math.floor(start), math.ceil(end)


def box_answer(box: list[float], size: tuple[int, int]) -> str:
    """A box in px as the answer asked for, such as `"[12, 30, 45, 88]"`: per cent of `size`, `(width, height)`."""
    (x0, x1), (y0, y1) = _percent_span(box[0], box[2], size[0]), _percent_span(box[1], box[3], size[1])
    return f"[{x0}, {y0}, {x1}, {y1}]"


def parse_box(text: str) -> list[float]:
    """The box `[x0, y0, x1, y1]` in a generated text, in the per cent asked for, or [] where there is none.

    There is one where the text has exactly four numbers, whole ones, with x0 < x1 and y0 < y1.
    """
    numbers = re.findall(r"-?\d+(?:\.\d+)?", text)
    if len(numbers) != 4 or not all(number.isdigit() for number in numbers):
        return []
    x0, y0, x1, y1 = box = [float(number) for number in numbers]
    # A text that repeats a digit hundreds of times reads as infinity.
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
        return "box outside of the image"
    return None


def _make_sample(row: dict, image: Image.Image) -> dict:
    box = pixel_box(row["bbox"], image.size)
    return {
        "question_id": row["question_id"],
        "image": image,
        "question": (
            f'Where is "{row["expression"]}"? '
            "Give its bounding box as [x0, y0, x1, y1], each from 0 to 100 per cent of the image."
        ),
        "answer": box_answer(box, image.size),
        "choices": [],
        "family": "refer",
        "tiles_needed": "unknown",
        "boxes": [box],
    }


def load_refcoco(data_dir: str | Path | None = None, split: str = "val") -> Questions:
    """Load one split of RefCOCO: one sample a row, with the first of its expressions that is not empty.

    Args:
        data_dir: folder with `<split>*.parquet`, in itself or in `data/`; without it the set comes from the Hub.
        split: `"val"`, `"test"`, `"testA"` or `"testB"`; `"train"` only from a folder that has it, the Hub does not.

    Each item is a dict with the keys of a cards sample: `question_id` (str), `image` (PIL, RGB, in its own size),
    `question` (the prompt), `answer` (such as `"[12, 30, 45, 88]"`, whole per cent of the image's width and height),
    `choices` (empty), `family` (`"refer"`), `tiles_needed` (`"unknown"`) and `boxes` (the one right box,
    `[x0, y0, x1, y1]` in px).

    `.rows` holds the usable rows without their images: dicts with `question_id`, `image_name`, `expression` and `bbox`
    (as published). Every image is read once here; rows that cannot be used are left out, counted in `.skipped` and
    reported in one warning.

    Raises ValueError for an unknown `split` and a missing column, FileNotFoundError for a missing folder and where it
    has no files of the split.
    """
    if split == "train" and data_dir is None:
        raise ValueError(f"split is 'train', which {HUB_ID} does not have: choose from {', '.join(HUB_SPLITS)}")
    if split not in ("train", *HUB_SPLITS):
        raise ValueError(f"split is {split!r}: choose from train (in a local folder), {', '.join(HUB_SPLITS)}")
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
