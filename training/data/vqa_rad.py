"""VQA-RAD: questions of clinicians about radiology images, closed (mostly yes/no) and open.

Two sources, one sample format (that of `cards.py`):

- a local folder with `images/`, `trainset.json` and `testset.json`: 3064 and 451 questions on 314 images;
- `flaviagiammarino/vqa-rad` on the Hub: 1793 and 451 questions. It lacks the 1267 train questions that were reworded
  into a frame (`phrase_type` `frame`) and four duplicates, so say which source a figure is from.

Two splits. The published one leaks: all 203 test images also occur in train, 14 of the test questions word for word
about the same image. `by="image"` splits the same rows so that no image is in both; report both.
"""

import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from PIL import Image

from training.data.rows import (
    BRIEF_ANSWER,
    Questions,
    TableImages,
    load_table,
    plain_text,
    report_skipped,
    usable_rows,
)


HUB_ID = "flaviagiammarino/vqa-rad"
SPLITS = ("train", "test")
SPLIT_FILES = {"train": "trainset.json", "test": "testset.json"}
TEST_PERCENT = 15  # of the images, where the split is by image


def image_split(image_name: str, seed: int = 0) -> str:
    """`"train"` or `"test"` for an image: about 15 % of all names to test.

    It depends on nothing but the name and the seed, so that a row lost elsewhere moves no image to the other side.
    """
    digest = hashlib.sha256(f"{seed}/{image_name}".encode()).digest()
    return "test" if int.from_bytes(digest[:8], "big") % 100 < TEST_PERCENT else "train"


def answer_family(answer: str, answer_type: str = "") -> str:
    """`"closed"` or `"open"`: by the answer type where the source gives one, else closed means a yes/no answer.

    The type `CLOSED` also holds answers that choose one of the options in the question ("left or right?").
    """
    answer_type = answer_type.strip().upper()
    if answer_type in ("CLOSED", "OPEN"):
        return answer_type.lower()
    return "closed" if answer.strip(" .").lower() in ("yes", "no") else "open"


def _folder_image(images: Path, image_name: str) -> Path:
    path = images / image_name
    if not path.is_file():
        raise FileNotFoundError(f"VQA-RAD: there is no image {path}")
    return path


def _read_folder(folder: Path) -> tuple[list[dict], Callable]:
    """Rows of both splits and the function from an image name to its file; see `_read_hub` for the form."""
    images = folder / "images"
    for needed in (folder, images):
        if not needed.is_dir():
            raise FileNotFoundError(f"VQA-RAD: there is no folder {needed}")
    rows = []
    for split, file_name in SPLIT_FILES.items():
        path = folder / file_name
        if not path.is_file():
            raise FileNotFoundError(f"VQA-RAD: there is no file {path}")
        try:
            entries = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"VQA-RAD: {path} is not valid JSON ({error})") from error
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ValueError(f"VQA-RAD: {path} has to hold a list of objects, one for each question")
        for entry in entries:
            rows.append(
                {
                    "question_id": entry.get("qid"),
                    "image_name": plain_text(entry.get("image_name")),
                    "question": plain_text(entry.get("question")),
                    "answer": plain_text(entry.get("answer")),
                    "answer_type": plain_text(entry.get("answer_type")),
                    "split": split,
                }
            )
    return rows, partial(_folder_image, images)


def _read_hub() -> tuple[list[dict], Callable]:
    """Rows of both splits from the Hub, and the function from an image name to what PIL can open.

    A row is a dict with `question_id` (int), `image_name`, `question`, `answer`, `answer_type` (all str) and `split`.
    The function raises FileNotFoundError where there is no image.

    The Hub set names neither questions nor images: the position in train then test stands for the one, the digest of
    the encoded image for the other.
    """
    rows, find_image = [], TableImages()
    for split in SPLITS:
        table = load_table("VQA-RAD", HUB_ID, None, split, ("image", "question", "answer"))
        for entry in find_image.read(split, table):
            rows.append(
                {
                    "question_id": len(rows),
                    "image_name": entry["image_name"],
                    "question": plain_text(entry["question"]),
                    "answer": plain_text(entry["answer"]),
                    "answer_type": "",
                    "split": split,
                }
            )
    return rows, find_image


def _row_problem(row: dict, size: tuple[int, int] | None) -> str | None:
    if type(row["question_id"]) is not int:
        return "no question id"
    if not row["question"]:
        return "empty question"
    return None if row["answer"] else "empty answer"


def _make_sample(row: dict, image: Image.Image) -> dict:
    return {
        "question_id": row["question_id"],
        "image": image,
        # The same for closed and open questions: which of them a question is, only its answer says for sure.
        "question": row["question"] + BRIEF_ANSWER,
        "answer": row["answer"],
        "choices": [],
        "family": answer_family(row["answer"], row["answer_type"]),
        "tiles_needed": "unknown",
        "boxes": [],
    }


def load_vqa_rad(
    data_dir: str | Path | None = None, split: str = "train", by: str = "published", seed: int = 0
) -> Questions:
    """Load one split of VQA-RAD.

    Args:
        data_dir: folder with `images/`, `trainset.json` and `testset.json`; without it the set comes from the Hub.
        split: `"train"` or `"test"`.
        by: `"published"` for the split of the authors, which leaks, or `"image"` for one in which no image is in both.
        seed: of the split by image; the published split ignores it.

    Each item is a dict with the keys of a cards sample: `question_id` (int), `image` (PIL, RGB, in its own size),
    `question` (with "Give a very brief answer." on a line of its own after it), `answer` (str), `choices` (empty),
    `family` (`"closed"` or `"open"`), `tiles_needed` (`"unknown"`) and `boxes` (empty: the set has none).

    `.rows` holds the usable rows without their images: dicts with `question_id`, `image_name`, `question` (as
    published), `answer`, `answer_type` and the `split` they were published in.

    Every image of the split is read once here, so that a row that cannot be used is found before training and not in
    the middle of it. Such rows are left out, counted in `.skipped` and reported in one warning.

    Raises ValueError for an unknown `split` or `by`, a JSON file that cannot be read and a table without one of the
    columns, FileNotFoundError (with the path) for a missing folder or JSON file.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}: choose from {', '.join(SPLITS)}")
    if by not in ("published", "image"):
        raise ValueError(f"by is {by!r}: choose from published, image")
    rows, find_image = _read_hub() if data_dir is None else _read_folder(Path(data_dir).expanduser())
    if by == "published":
        rows = [row for row in rows if row["split"] == split]
    else:
        rows = [row for row in rows if image_split(row["image_name"], seed) == split]
    usable, skipped = usable_rows(rows, find_image, _row_problem)
    report_skipped(f"VQA-RAD {split} (by {by})", len(rows), skipped)
    return Questions(usable, find_image, _make_sample, skipped)
