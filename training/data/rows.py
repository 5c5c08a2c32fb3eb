"""What the real data sets share: tables of `datasets`, rows that cannot be used, and samples opened one by one.

A row is a dict of plain values with an `image_name`; the image stays where it is until a sample is asked for. An image
finder is a function from that name to what PIL can open, which raises FileNotFoundError where there is none.
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

# What a damaged picture makes PIL raise: SyntaxError comes from its PNG reader.
IMAGE_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)

# Asks for a short answer in the words of the SmolVLM authors' own evaluation; it follows the question.
BRIEF_ANSWER = "\nGive a very brief answer."


def plain_text(value) -> str:
    """A value as stripped text: `None` is empty, the number 4 is "4"."""
    return "" if value is None else str(value).strip()


def encoded_image(image: dict | None) -> bytes:
    """The bytes of an undecoded `datasets.Image` value, which holds either them or a path; empty for no image."""
    if image is None:
        return b""
    if image["bytes"] is None and image["path"] and Path(image["path"]).is_file():
        return Path(image["path"]).read_bytes()
    return image["bytes"] or b""


def load_table(name: str, hub_id: str, data_dir: str | Path | None, split: str, columns: tuple[str, ...]):
    """One split as a `datasets.Dataset`, with its images left encoded.

    Args:
        name: of the set, for messages.
        hub_id: where it is on the Hub, for no `data_dir`.
        data_dir: folder with `<split>.parquet` or `<split>-*.parquet`, in itself or in `data/`.
        split: such as `"train"`; `"test"` does not find the files of `"testA"`.
        columns: that it needs.

    Raises FileNotFoundError (with the path) for a missing folder or no files of this split, ValueError for a missing
    column.
    """
    if data_dir is None:
        table = datasets.load_dataset(hub_id, split=split)
    else:
        files = _split_files(name, Path(data_dir).expanduser(), split)
        # `datasets` takes names for patterns, and calls whatever it loads from files "train".
        names = [glob.escape(str(file)) for file in files]
        table = datasets.load_dataset("parquet", data_files=names, split="train")
    missing = [column for column in columns if column not in table.column_names]
    if missing:
        raise ValueError(
            f"{name} {split}: there is no column {', '.join(missing)}; there are {', '.join(table.column_names)}"
        )
    # Decoding here would cost as much as a pass over the set, and stop at the first broken image.
    return table.cast_column("image", datasets.Image(decode=False))


def _split_files(name: str, folder: Path, split: str) -> list[Path]:
    """The parquet files of a split, in order; of the folder itself or else of its `data/`, never of both."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{name}: there is no folder {folder}")
    for place in (folder, folder / "data"):
        files = [file for file in sorted(place.glob(f"{split}*.parquet")) if not file.stem[len(split) :][:1].isalnum()]
        if files:
            return files
    raise FileNotFoundError(f"{name}: there is no {split}*.parquet in {folder} or {folder / 'data'}")


@dataclass
class TableImages:
    """Finds an encoded image by its name, the digest of its bytes, in the tables it came from, which stay on disk."""

    tables: dict[str, datasets.Dataset] = field(default_factory=dict)
    places: dict[str, tuple[str, int]] = field(default_factory=dict)

    def read(self, split: str, table: datasets.Dataset) -> Iterator[dict]:
        """The entries of a table whose images are left encoded, with `image_name` (empty for none) for `image`."""
        self.tables[split] = table
        for index, entry in enumerate(table):
            data = encoded_image(entry.pop("image"))
            name = hashlib.sha256(data).hexdigest() if data else ""
            if data:
                self.places.setdefault(name, (split, index))
            yield {**entry, "image_name": name}

    def __call__(self, image_name: str) -> io.BytesIO:
        if image_name not in self.places:
            raise FileNotFoundError("the row has no image")
        split, index = self.places[image_name]
        return io.BytesIO(encoded_image(self.tables[split][index]["image"]))


def check_image(find_image: Callable, image_name: str) -> tuple[tuple[int, int] | None, str | None]:
    """`(width, height)` in px and None for an image that can be read; else None and what the matter is with it.

    That is `"missing image"` or `"broken image"`. Reads the whole file: a header says nothing of a cut-off end.
    """
    try:
        with Image.open(find_image(image_name)) as image:
            size = image.size
            # Lets a JPEG be read at an eighth of its size, which is faster and still goes through all of its data.
            image.draft("RGB", (max(1, image.width // 8), max(1, image.height // 8)))
            image.load()
    except FileNotFoundError:
        return None, "missing image"
    except IMAGE_ERRORS:
        return None, "broken image"
    return size, None


def usable_rows(rows: list[dict], find_image: Callable, row_problem: Callable) -> tuple[list[dict], dict[str, int]]:
    """The rows that make a sample, and how many others there are for each reason; a row counts under one reason.

    Every image is read once. `row_problem(row, size)` says what else the matter is with a row, or None; `size` is that
    of its image, `(width, height)` in px, or None where the image cannot be read. What it says comes first.
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
    """Warn once, with the reasons, where any of `total` rows were left out."""
    if skipped:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in sorted(skipped.items()))
        logger.warning("%s: %d of %d rows left out (%s)", name, sum(skipped.values()), total, reasons)


class Questions(torch.utils.data.Dataset):
    """Rows with images as a map-style data set of samples.

    Args:
        rows: the usable rows, without their images.
        find_image: the image finder of their `image_name`.
        make_sample: `(row, image)` to a sample; the image is PIL, RGB, in its own size. A function of a module, so
            that the set travels to workers.
        skipped: how many rows were left out, for each reason; empty when none was.
    """

    def __init__(self, rows: list[dict], find_image: Callable, make_sample: Callable, skipped: dict[str, int]):
        self.rows, self.find_image, self.make_sample, self.skipped = rows, find_image, make_sample, skipped

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self.rows):
            raise IndexError(f"index {index} is outside of the {len(self.rows)} samples")
        row = self.rows[index]
        with Image.open(self.find_image(row["image_name"])) as image:
            image = image.convert("RGB")
        return self.make_sample(row, image)
