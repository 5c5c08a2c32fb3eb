"""VQA-RAD: questions of clinicians about radiology images, closed (mostly yes/no) and open.

Two sources, one sample format (that of `cards.py`):

- a local folder with `images/`, `trainset.json` and `testset.json`: 3064 and 451 questions on 314 images;
- `flaviagiammarino/vqa-rad` on the Hub: 1793 and 451 questions. It lacks the 1267 train questions that were reworded
  into a frame (`phrase_type` `frame`) and four duplicates, so say which source a figure is from.

Two splits. The published one leaks: all 203 test images also occur in train, 14 of the test questions word for word
about the same image. `by="image"` splits the same rows so that no image is in both; report both.
"""

import hashlib
import io
import json
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import datasets
import torch
from PIL import Image


logger = logging.getLogger(__name__)

HUB_ID = "flaviagiammarino/vqa-rad"
SPLITS = ("train", "test")
SPLIT_FILES = {"train": "trainset.json", "test": "testset.json"}
TEST_PERCENT = 15  # of the images, where the split is by image

# What a damaged picture makes PIL raise: SyntaxError comes from its PNG reader.
IMAGE_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


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


def _text(value) -> str:
    """A JSON value as stripped text: `None` is empty, the number 4 is "4"."""
    return "" if value is None else str(value).strip()


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
                    "image_name": _text(entry.get("image_name")),
                    "question": _text(entry.get("question")),
                    "answer": _text(entry.get("answer")),
                    "answer_type": _text(entry.get("answer_type")),
                    "split": split,
                }
            )
    return rows, partial(_folder_image, images)


@dataclass
class _HubImages:
    """Finds an encoded image by its digest in the tables it came from, which stay on disk."""

    tables: dict[str, datasets.Dataset]
    places: dict[str, tuple[str, int]]

    def __call__(self, image_name: str) -> io.BytesIO:
        if image_name not in self.places:
            raise FileNotFoundError("VQA-RAD: the row has no image")
        split, index = self.places[image_name]
        return io.BytesIO(_encoded(self.tables[split][index]["image"]))


def _encoded(image: dict | None) -> bytes:
    """The bytes of an undecoded `datasets.Image` value, which holds either them or a path; empty for no image."""
    if image is None:
        return b""
    if image["bytes"] is None and image["path"] and Path(image["path"]).is_file():
        return Path(image["path"]).read_bytes()
    return image["bytes"] or b""


def _read_hub() -> tuple[list[dict], Callable]:
    """Rows of both splits from the Hub, and the function from an image name to what PIL can open.

    A row is a dict with `question_id` (int), `image_name`, `question`, `answer`, `answer_type` (all str) and `split`.
    The function raises FileNotFoundError where there is no image.

    The Hub set names neither questions nor images: the position in train then test stands for the one, the digest of
    the encoded image for the other.
    """
    rows, tables, places = [], {}, {}
    for split in SPLITS:
        # Left encoded: decoding here would cost as much as a pass over the set, and stop at the first broken image.
        table = datasets.load_dataset(HUB_ID, split=split).cast_column("image", datasets.Image(decode=False))
        tables[split] = table
        for index, entry in enumerate(table):
            encoded = _encoded(entry["image"])
            name = hashlib.sha256(encoded).hexdigest() if encoded else ""
            if encoded:
                places.setdefault(name, (split, index))
            rows.append(
                {
                    "question_id": len(rows),
                    "image_name": name,
                    "question": _text(entry["question"]),
                    "answer": _text(entry["answer"]),
                    "answer_type": "",
                    "split": split,
                }
            )
    return rows, _HubImages(tables, places)


def _image_problem(find_image: Callable, image_name: str) -> str | None:
    """`"missing image"`, `"broken image"` or None. Reads the whole file: a header says nothing of a cut-off end."""
    try:
        with Image.open(find_image(image_name)) as image:
            # Lets a JPEG be read at an eighth of its size, which is faster and still goes through all of its data.
            image.draft("RGB", (max(1, image.width // 8), max(1, image.height // 8)))
            image.load()
    except FileNotFoundError:
        return "missing image"
    except IMAGE_ERRORS:
        return "broken image"
    return None


def _usable_rows(rows: list[dict], find_image: Callable) -> tuple[list[dict], dict[str, int]]:
    """The rows that make a sample, and how many others there are for each reason; a row counts under one reason."""
    usable, skipped, image_problems = [], Counter(), {}
    for row in rows:
        name = row["image_name"]
        if name not in image_problems:
            image_problems[name] = _image_problem(find_image, name)
        problem = image_problems[name]
        if type(row["question_id"]) is not int:
            problem = "no question id"
        elif not row["question"]:
            problem = "empty question"
        elif not row["answer"]:
            problem = "empty answer"
        if problem is None:
            usable.append(row)
        else:
            skipped[problem] += 1
    return usable, dict(skipped)


class VqaRad(torch.utils.data.Dataset):
    """VQA-RAD as a map-style data set; made by `load_vqa_rad`.

    Each item is a dict with the keys of a cards sample: `question_id` (int), `image` (PIL, RGB, in its own size),
    `question`, `answer` (str), `choices` (empty), `family` (`"closed"` or `"open"`), `tiles_needed` (`"unknown"`) and
    `boxes` (empty: the set has none).

    Attributes:
        rows: the usable rows without their images: dicts with `question_id`, `image_name`, `question`, `answer`,
            `answer_type` and the `split` they were published in.
        skipped: how many rows of this split were left out, for each reason; empty when none was.
    """

    def __init__(self, rows: list[dict], find_image: Callable, skipped: dict[str, int]):
        self.rows, self.find_image, self.skipped = rows, find_image, skipped

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self.rows):
            raise IndexError(f"index {index} is outside of the {len(self.rows)} samples")
        row = self.rows[index]
        with Image.open(self.find_image(row["image_name"])) as image:
            image = image.convert("RGB")
        return {
            "question_id": row["question_id"],
            "image": image,
            "question": row["question"],
            "answer": row["answer"],
            "choices": [],
            "family": answer_family(row["answer"], row["answer_type"]),
            "tiles_needed": "unknown",
            "boxes": [],
        }


def load_vqa_rad(
    data_dir: str | Path | None = None, split: str = "train", by: str = "published", seed: int = 0
) -> VqaRad:
    """Load one split of VQA-RAD.

    Args:
        data_dir: folder with `images/`, `trainset.json` and `testset.json`; without it the set comes from the Hub.
        split: `"train"` or `"test"`.
        by: `"published"` for the split of the authors, which leaks, or `"image"` for one in which no image is in both.
        seed: of the split by image; the published split ignores it.

    Every image of the split is read once here, so that a row that cannot be used is found before training and not in
    the middle of it. Such rows are left out, counted in `.skipped` and reported in one warning.

    Raises ValueError for an unknown `split` or `by` and for a JSON file that cannot be read, FileNotFoundError (with
    the path) for a missing folder or JSON file.
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
    usable, skipped = _usable_rows(rows, find_image)
    if skipped:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in sorted(skipped.items()))
        logger.warning(
            "VQA-RAD %s (by %s): %d of %d rows left out (%s)", split, by, len(rows) - len(usable), len(rows), reasons
        )
    return VqaRad(usable, find_image, skipped)
