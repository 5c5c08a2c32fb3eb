"""VQA-RAD: clinicians' questions about radiology images, closed (mostly yes/no) and open.

Two sources share one sample format:

- a local folder with `images/`, `trainset.json` and `testset.json`: 3064 and 451 questions on 314 images;
- `flaviagiammarino/vqa-rad` on the Hub: 1793 and 451 questions. It lacks four duplicates and the 1267 training
  questions that were reworded into a template (`phrase_type` `frame`), so results should name their source.

The published split leaks: all 203 test images also occur in train, and 14 test questions are asked there word for word
about the same image. `by="image"` splits the same rows so that no image is in both splits; report both.

Paper: Lau et al., "A dataset of clinically generated visual questions and answers about radiology images", 2018.
"""

import hashlib
import json
from collections.abc import Callable
from functools import partial
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
from training.metrics.vqa_rad.vqa_rad import grade_answer, vqa_rad_metric


HUB_ID = "flaviagiammarino/vqa-rad"
SPLITS = ("train", "test")
SPLIT_FILES = {"train": "trainset.json", "test": "testset.json"}
TEST_PERCENT = 15  # percentage of the images in the test split, if split by image


def image_split(image_name: str, seed: int = 0) -> str:
    """The split of an image, `"train"` or (for about 15 % of all names) `"test"`.

    It depends only on the name and the seed, so that a skipped row never moves an image to the other split.
    """
    digest = hashlib.sha256(f"{seed}/{image_name}".encode()).digest()
    return "test" if int.from_bytes(digest[:8], "big") % 100 < TEST_PERCENT else "train"


def answer_family(answer: str, answer_type: str = "") -> str:
    """`"closed"` or `"open"`: the answer type if the source has one; otherwise yes/no answers are closed.

    The type `CLOSED` includes answers that choose between options in the question ("left or right?").
    """
    answer_type = answer_type.strip().upper()
    if answer_type in ("CLOSED", "OPEN"):
        return answer_type.lower()
    return "closed" if answer.strip(" .").lower() in ("yes", "no") else "open"


def _folder_image(images: Path, image_name: str) -> Path:
    path = images / image_name
    if not path.is_file():
        raise FileNotFoundError(f"VQA-RAD: image {path} not found")
    return path


def _read_folder(folder: Path) -> tuple[list[dict], Callable]:
    """Rows of both splits and their image finder, in the format of `_read_hub`."""
    images = folder / "images"
    for needed in (folder, images):
        if not needed.is_dir():
            raise FileNotFoundError(f"VQA-RAD: folder {needed} not found")
    rows = []
    for split, file_name in SPLIT_FILES.items():
        path = folder / file_name
        if not path.is_file():
            raise FileNotFoundError(f"VQA-RAD: file {path} not found")
        try:
            entries = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"VQA-RAD: {path} is not valid JSON ({error})") from error
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ValueError(f"VQA-RAD: {path} must contain a list of objects, one per question")
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
    """Rows of both splits from the Hub, and their image finder.

    A row is a dict with `question_id` (int), `image_name`, `question`, `answer`, `answer_type` (all str) and `split`.

    The Hub version has no ids: the question id is the position in train followed by test, the image name the digest of
    the encoded image.
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
        # The same prompt for closed and open questions: only the answer tells them apart reliably.
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
        data_dir: folder with `images/`, `trainset.json` and `testset.json`; None loads from the Hub.
        split: `"train"` or `"test"`.
        by: `"published"` for the authors' split, which leaks, or `"image"` for a split that shares no images.
        seed: seed of the split by image; the published split ignores it.

    Each item is a dict with the keys of a cards sample: `question_id` (int), `image` (PIL, RGB, original size),
    `question` (followed by "Give a very brief answer." on its own line), `answer` (str), `choices` (empty), `family`
    (`"closed"` or `"open"`), `tiles_needed` (`"unknown"`) and `boxes` (empty: none are annotated).

    `.rows` holds the usable rows without their images: dicts with `question_id`, `image_name`, `question` (as
    published), `answer`, `answer_type` and the `split` they were published in.

    Every image of the split is read once, so that unusable rows show up before training. They are left out, counted in
    `.skipped` and reported in one warning.

    Raises ValueError for an unknown `split` or `by`, an unreadable JSON file or a missing column, FileNotFoundError
    (with the path) for a missing folder or JSON file.
    """
    if split not in SPLITS:
        raise ValueError(f"split ({split!r}): choose from {', '.join(SPLITS)}")
    if by not in ("published", "image"):
        raise ValueError(f"split_by ({by!r}): choose from published, image")
    rows, find_image = _read_hub() if data_dir is None else _read_folder(Path(data_dir).expanduser())
    if by == "published":
        rows = [row for row in rows if row["split"] == split]
    else:
        rows = [row for row in rows if image_split(row["image_name"], seed) == split]
    usable, skipped = usable_rows(rows, find_image, _row_problem)
    report_skipped(f"VQA-RAD {split} (by {by})", len(rows), skipped)
    return Questions(usable, find_image, _make_sample, skipped)


def _load(arguments: DataArguments, split: str, seed: int) -> Questions:
    """The split by image always has seed 0, whatever the seed of the run."""
    return load_vqa_rad(arguments.data_dir, split, arguments.split_by)


def _grade(prediction: str, sample: dict) -> float:
    """Closed questions by whole words, open ones by exact match; see `grade_answer`."""
    rule = "closed" if sample["family"] == "closed" else "open_exact_match"
    return grade_answer(prediction, sample["answer"])[rule]


def _metric(predictions: list[str], samples: list[dict], kept: list[list]) -> dict:
    answers, families = ([sample[name] for sample in samples] for name in ("answer", "family"))
    return vqa_rad_metric(predictions, answers, families)


VQA_RAD = VQADataset(
    name="vqa_rad",
    hub_id=HUB_ID,
    eval_split="test",
    eval_size=451,
    load=_load,
    grade=_grade,
    graded_by="exact match, closed questions by whole words",
    metric=_metric,
    extra_metrics=("closed", "open_exact_match", "open_recall"),
)
