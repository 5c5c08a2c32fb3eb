"""Helpers for the published data sets: tables of `datasets`, unusable rows, and samples opened on demand.

A row is a dict of plain values with an `image_name`; its image is only opened when the sample is requested. An image
finder maps that name to a path or file that PIL can open, and raises FileNotFoundError if there is no such image.
"""

import glob
import hashlib
import io
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import torch
from PIL import Image


logger = logging.getLogger(__name__)

# Errors that PIL raises for damaged images; SyntaxError comes from its PNG reader.
IMAGE_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)

# Request for a short answer, appended to the question, as in the SmolVLM authors' own evaluation.
BRIEF_ANSWER = "\nGive a very brief answer."


def plain_text(value) -> str:
    """A value as stripped text: None becomes "", the number 4 becomes "4"."""
    return "" if value is None else str(value).strip()


def encoded_image(image: dict | None) -> bytes:
    """The bytes of an undecoded `datasets.Image` value, which holds either bytes or a path; empty without an image."""
    if image is None:
        return b""
    if image["bytes"] is None and image["path"] and Path(image["path"]).is_file():
        return Path(image["path"]).read_bytes()
    return image["bytes"] or b""


def load_table(name: str, hub_id: str, data_dir: str | Path | None, split: str, columns: tuple[str, ...]):
    """One split as a `datasets.Dataset` with encoded images.

    Args:
        name: name of the data set, for messages.
        hub_id: Hub id, used without a `data_dir`.
        data_dir: folder with `<split>.parquet` or `<split>-*.parquet`, directly or in `data/`.
        split: such as `"train"`; `"test"` does not match the files of `"testA"`.
        columns: required columns.

    Raises FileNotFoundError (with the path) for a missing folder or a folder without files of this split, ValueError
    for a missing column.
    """
    if data_dir is None:
        table = datasets.load_dataset(hub_id, split=split)
    else:
        files = _split_files(name, Path(data_dir).expanduser(), split)
        # `datasets` reads file names as patterns, and calls the split of any local files "train".
        names = [glob.escape(str(file)) for file in files]
        table = datasets.load_dataset("parquet", data_files=names, split="train")
    missing = [column for column in columns if column not in table.column_names]
    if missing:
        raise ValueError(
            f"{name} {split}: missing column {', '.join(missing)}; the table has {', '.join(table.column_names)}"
        )
    # Decoding here would cost a whole pass over the data, and stop at the first broken image.
    return table.cast_column("image", datasets.Image(decode=False))


def _split_files(name: str, folder: Path, split: str) -> list[Path]:
    """The parquet files of a split, in order: those of the folder itself, or else those of its `data/`, never both."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{name}: folder {folder} not found")
    for parent in (folder, folder / "data"):
        files = sorted(parent.glob(f"{split}*.parquet"))
        files = [file for file in files if not file.stem[len(split) :][:1].isalnum()]
        if files:
            return files
    raise FileNotFoundError(f"{name}: no {split}*.parquet in {folder} or {folder / 'data'}")


@dataclass
class TableImages:
    """Image finder for tables, which stay on disk: an image is named by the digest of its encoded bytes."""

    tables: dict[str, datasets.Dataset] = field(default_factory=dict)
    positions: dict[str, tuple[str, int]] = field(default_factory=dict)

    def read(self, split: str, table: datasets.Dataset) -> Iterator[dict]:
        """The entries of a table with encoded images, with `image_name` (empty without one) instead of `image`."""
        self.tables[split] = table
        for index, entry in enumerate(table):
            data = encoded_image(entry.pop("image"))
            name = hashlib.sha256(data).hexdigest() if data else ""
            if data:
                self.positions.setdefault(name, (split, index))
            yield {**entry, "image_name": name}

    def __call__(self, image_name: str) -> io.BytesIO:
        if image_name not in self.positions:
            raise FileNotFoundError("the row has no image")
        split, index = self.positions[image_name]
        return io.BytesIO(encoded_image(self.tables[split][index]["image"]))


def check_image(find_image: Callable, image_name: str) -> tuple[tuple[int, int] | None, str | None]:
    """`((width, height), None)`, in px, for a readable image, else `(None, problem)`.

    The problem is `"missing image"` or `"broken image"`. Reads the whole file: a truncated one has an intact header.
    """
    try:
        with Image.open(find_image(image_name)) as image:
            size = image.size
            # Decodes a JPEG at an eighth of its size: faster, and still reads all of its data.
            image.draft("RGB", (max(1, image.width // 8), max(1, image.height // 8)))
            image.load()
    except FileNotFoundError:
        return None, "missing image"
    except IMAGE_ERRORS:
        return None, "broken image"
    return size, None


def usable_rows(rows: list[dict], find_image: Callable, row_problem: Callable) -> tuple[list[dict], dict[str, int]]:
    """The rows that make a sample, and the number of unusable rows per reason (one reason per row).

    Every image is read once. `row_problem(row, size)` returns any other problem of a row, or None; `size` is the image
    size `(width, height)` in px, or None if the image cannot be read. Its problem takes precedence over the image's.
    """
    usable, skipped, images = [], Counter(), {}
    for row in rows:
        name = row["image_name"]
        if name not in images:
            images[name] = check_image(find_image, name)
        size, image_problem = images[name]
        problem = row_problem(row, size) or image_problem
        if problem is None:
            usable.append(row)
        else:
            skipped[problem] += 1
    return usable, dict(skipped)


def report_skipped(name: str, total: int, skipped: dict[str, int]):
    """Log one warning with the reasons if any of `total` rows were skipped."""
    if skipped:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in sorted(skipped.items()))
        logger.warning("%s: skipped %d of %d rows (%s)", name, sum(skipped.values()), total, reasons)


class Questions(torch.utils.data.Dataset):
    """Rows with images as a map-style data set of samples.

    Args:
        rows: usable rows, without their images.
        find_image: image finder for their `image_name`.
        make_sample: `(row, image)` to a sample; the image is PIL, RGB, original size. A module-level function, so that
            workers can unpickle the data set.
        skipped: number of skipped rows per reason; empty if there are none.

    Raises IndexError for an index out of range, FileNotFoundError if the image of a row has disappeared.
    """

    def __init__(self, rows: list[dict], find_image: Callable, make_sample: Callable, skipped: dict[str, int]):
        self.rows, self.find_image, self.make_sample, self.skipped = rows, find_image, make_sample, skipped

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self.rows):
            raise IndexError(f"index ({index}) is out of range for {len(self.rows)} samples")
        row = self.rows[index]
        with Image.open(self.find_image(row["image_name"])) as image:
            image = image.convert("RGB")
        return self.make_sample(row, image)
