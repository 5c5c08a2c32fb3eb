"""Processor of QGSA-SmolVLM: that of Idefics3, with the question marked and the selection drawn."""

import numpy as np
import torch
from PIL import Image, ImageDraw
from transformers import BatchFeature, Idefics3Processor

from .generations_qgsa import image_options
from .images_qgsa import has_images, images_of_samples, load_images, to_rgb
from .prompt_qgsa import find_question
from .selection_qgsa import QGSASelection, read_layout
from .tiles_qgsa import LazyImage, LazyTiles


KEPT_FIELDS = ("kept_tokens", "kept_tiles", "grids", "image_sample")  # of a selection, to draw it
KEPT, ENCODED, GRID = (255, 140, 0), (40, 120, 255), (255, 255, 255)


class QGSAProcessor(Idefics3Processor):
    """Prepares prompts and images as [`Idefics3Processor`] does, and adds `question_mask`.

    Takes the same arguments. `question_mask` `(B, L)` int64 is 1 on the tokens of the last turn of the user: what the
    selector reads.

    With `lazy_tiles=True` only the global views become pixels at once; the inputs then carry `lazy_tiles`, from which
    the model cuts the tiles that it looks at, and no others.

    Raises ValueError for an image with a side below 4 px, sides further apart than 1 : 200, over 89 million pixels, or
    more than 8 bits a channel; for other numbers of images than the prompts name, and an image whose question has no
    word. Raises OSError for a file that cannot be read.
    """

    _auto_class = "AutoProcessor"

    def __call__(self, images=None, text=None, lazy_tiles=False, **kwargs):
        options = {**kwargs, **(kwargs.get("images_kwargs") or {})}
        check_edges(options)
        rescale = options.get("do_rescale")
        images = load_images(images, self.image_processor.do_rescale if rescale is None else rescale)
        if text is not None:
            text = check_text(text)
            images = images if has_images(images) else None
        if images is None or text is None:
            return super().__call__(images=images, text=text, **kwargs)
        images = images_of_samples(images, [prompt.count(self.image_token) for prompt in text])
        prepare = self.prepare_lazily if lazy_tiles else self.prepare_all
        inputs = prepare(images, text, **kwargs)
        masks = [
            self.mask_question(torch.as_tensor(ids), torch.as_tensor(mask))
            for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"])
        ]
        if isinstance(inputs["input_ids"], list):
            inputs["question_mask"] = [mask.tolist() for mask in masks]
        else:
            stacked = torch.stack(masks)
            inputs["question_mask"] = stacked if torch.is_tensor(inputs["input_ids"]) else stacked.numpy()
        return inputs

    def prepare_all(self, images, text, **kwargs) -> BatchFeature:
        """The stock processor's inputs. Raises ValueError where the tokenizer cuts the prompt within an image."""
        try:
            return super().__call__(images=images, text=text, **kwargs)
        except TypeError as error:
            if kwargs.get("truncation"):
                raise ValueError(f"max_length {kwargs.get('max_length')} cuts the prompt within an image") from error
            raise

    def prepare_lazily(self, images, text, images_kwargs=None, text_kwargs=None, **kwargs) -> BatchFeature:
        """The inputs with the pixels of the global views only, and `lazy_tiles` that cut the others on demand; of
        the images of each sample, and as many prompts.

        Pixels are those of the image processor's PIL backend, whatever backend it has. Of the image processor's
        options `size` and `do_image_splitting` are followed; all that it does not know is for the tokenizer.

        Raises ValueError for any other option of the image processor.
        """
        own, images_kwargs = self.image_processor, dict(images_kwargs or {})
        known = image_options(own)
        for name in [name for name in kwargs if name in known and name != "return_tensors"]:
            images_kwargs[name] = kwargs.pop(name)
        longest_edge = (images_kwargs.pop("size", None) or own.size)["longest_edge"]
        split = images_kwargs.pop("do_image_splitting", None)
        split = own.do_image_splitting if split is None else split
        if images_kwargs:
            raise ValueError(f"lazy_tiles follows size and do_image_splitting, not {', '.join(images_kwargs)}")
        text = list(text)
        samples = [
            [
                LazyImage(to_rgb(image), longest_edge, own.max_image_size["longest_edge"], split, own.resample)
                for image in sample
            ]
            for sample in images
        ]
        for number, sample in enumerate(samples):
            between = text[number].split(self.image_token)
            shown = [self.image_prompt(*image.grid) for image in sample]
            text[number] = between[0] + "".join(image + words for image, words in zip(shown, between[1:]))
        tiles = LazyTiles(samples, own)
        inputs = self.tokenizer(text, **kwargs, **(text_kwargs or {}))
        return BatchFeature({**inputs, "pixel_values": tiles.global_views(), "lazy_tiles": tiles})

    def image_prompt(self, rows: int, columns: int) -> str:
        """The text of an image of `rows` x `columns` tiles; 0 x 0 is a single tile, its own global view."""
        tokens, lines = self.image_token * self.image_seq_len, ""
        for row in range(1, rows + 1):
            for column in range(1, columns + 1):
                lines += f"{self.fake_image_token}<row_{row}_col_{column}>{tokens}"
            lines += "\n"
        separator = "\n" if rows else ""
        return f"{lines}{separator}{self.fake_image_token}{self.global_image_tag}{tokens}{self.fake_image_token}"

    def mask_question(self, input_ids: torch.LongTensor, attention_mask: torch.Tensor) -> torch.LongTensor:
        """1 on the tokens of the question, 0 elsewhere; all `(L,)`. Raises ValueError for images without one."""
        layout = read_layout(
            input_ids[None], self.image_seq_len, self.image_token_id, self.global_image_token_id, self.row_col_ids
        )
        readable = (layout.tile_of_position < 0) & attention_mask[None].bool()
        end_of_utterance = self.tokenizer.convert_tokens_to_ids(self.end_of_utterance_token)
        while True:
            mask = find_question(input_ids[None], readable, end_of_utterance)[0]
            words = self.tokenizer.decode(input_ids[mask], skip_special_tokens=True).strip()
            if not words.startswith("Assistant:"):
                break
            readable[:, mask.nonzero()[0, 0] :] = False  # an answer, such as the one to be learnt: look before it
        words = words.removeprefix("User:")
        if len(layout.grids) and not words.strip():
            raise ValueError(
                f"text asks nothing: 0 words beside {len(layout.grids)} images, and it is the question that selects"
            )
        return mask.long()

    def draw_selection(self, image, selection: QGSASelection, index: int = 0) -> Image.Image:
        """Draw what was kept for this question: kept regions in colour, the rest grey, the tile grid on top.

        Encoded tiles are outlined in blue and kept tokens of theirs in orange. What was kept of the global view covers
        the image coarsely; it keeps its colour without an outline.

        Args:
            image: what the processor was given (PIL image, path, URL or array).
            selection: what `model.select` returned.
            index: number of the image in the batch, in prompt order.

        Returns an RGB image of the same size. Raises ValueError where `index` is beyond the selection's images, or the
        image cannot be one of them, and TypeError for what is no image or selection.
        """
        # By name: the code of a checkpoint is a copy of this.
        whole = type(selection).__name__ == "QGSASelection" and set(KEPT_FIELDS) <= set(selection)
        if not whole:
            raise TypeError(f"selection is a {type(selection).__name__}: give what `model.select` returns")
        if not isinstance(index, int) or not 0 <= index < len(selection.grids):
            raise ValueError(f"index is {index!r}: the selection holds {len(selection.grids)} images")
        if image is None or isinstance(image, list | tuple):
            raise TypeError(f"image is a {type(image).__name__}: give the one image of that number")
        image = to_rgb(load_images(image))
        check_grid(*selection.grids[index].tolist(), *image.size)
        tiles, glance, encoded = kept_maps(selection, index, self.image_seq_len)
        colour = np.asarray(image)
        grey = np.asarray(image.convert("L").convert("RGB")) // 2 + 96
        kept = scale_to(tiles | glance, image.size)
        drawn = Image.fromarray(np.where(kept[..., None], colour, grey).astype(np.uint8))
        draw = ImageDraw.Draw(drawn)
        draw_cells(draw, np.ones_like(encoded), image.size, GRID, 1)
        draw_cells(draw, encoded, image.size, ENCODED, 2)
        draw_cells(draw, tiles, image.size, KEPT, 1)
        return drawn


def check_grid(rows: int, columns: int, width: int, height: int):
    """Raise ValueError where an image of these sides would not be cut into such a grid, give or take a tile."""
    tall = height / width
    apart = rows - columns * tall if rows <= columns else columns - rows / tall
    if rows and abs(apart) >= 2:
        raise ValueError(
            f"the selection is of an image of {rows} x {columns} tiles, this one has {width} x {height} px: is it "
            "another one?"
        )


def check_edges(options: dict):
    """Raise ValueError unless each size among the options of the image processor names a longest edge in px."""
    for name in ("size", "max_image_size"):
        size = options.get(name)
        edge = size.get("longest_edge") if isinstance(size, dict) else size
        if size is not None and (not isinstance(size, dict) or not isinstance(edge, int) or edge < 1):
            raise ValueError(f'{name} is {size!r}: it has to be {{"longest_edge": px}}')


def check_text(text) -> list[str]:
    """The prompts as a list. Raises TypeError for what is no text, and ValueError where there is none."""
    prompts = [text] if isinstance(text, str) else text
    if not isinstance(prompts, list | tuple | np.ndarray) or not all(isinstance(each, str) for each in prompts):
        raise TypeError(f"text is a {type(text).__name__}: it has to be a string or a list of strings")
    if not len(prompts):
        raise ValueError("text is an empty list: there is no prompt")
    return list(prompts)


def kept_maps(selection: QGSASelection, index: int, tokens_per_tile: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What was kept of one image, as maps over it.

    Returns `(tiles, glance, encoded)`, bool: high-resolution tokens kept, `(rows * side, columns * side)`; the kept
    tokens of the global view on the same cells; and the tiles encoded, `(rows, columns)`. A single tile is its own
    global view.
    """
    side = round(tokens_per_tile**0.5)
    sample = int(selection.image_sample[index])
    first_image = int((selection.image_sample[:index] == sample).sum())
    of_sample = selection.grids[selection.image_sample == sample].prod(1) + 1
    start = int(of_sample[:first_image].sum())
    rows, columns = selection.grids[index].tolist()
    count = rows * columns

    kept = selection.kept_tokens[sample].view(-1, side, side)[start : start + count + 1].cpu().numpy()
    encoded = selection.kept_tiles[sample, start : start + count].cpu().numpy().reshape(rows, columns)
    if count == 0:
        return np.zeros_like(kept[0]), kept[0], encoded
    tiles = kept[:-1].reshape(rows, columns, side, side).transpose(0, 2, 1, 3).reshape(rows * side, columns * side)
    return tiles, scale_to(kept[-1], (columns * side, rows * side)), encoded


def scale_to(cells: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Scale a bool map to `size` (width, height) by its nearest cells."""
    return np.asarray(Image.fromarray(cells.astype(np.uint8)).resize(size, Image.Resampling.NEAREST)) > 0


def draw_cells(draw: ImageDraw.ImageDraw, cells: np.ndarray, size: tuple[int, int], colour, width: int):
    """Outline the cells that are True of a map that covers an image of `size` (width, height)."""
    rows, columns = cells.shape
    for row, column in np.argwhere(cells):
        x, y = size[0] * column // columns, size[1] * row // rows
        right, bottom = size[0] * (column + 1) // columns - 1, size[1] * (row + 1) // rows - 1
        draw.rectangle((x, y, max(x, right), max(y, bottom)), outline=colour, width=width)  # a cell may be below 1 px


__all__ = ["QGSAProcessor"]
