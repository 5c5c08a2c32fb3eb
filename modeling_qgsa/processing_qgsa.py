"""Processor of QGSA-SmolVLM: that of Idefics3, plus the question mask and pictures of the selection."""

from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from transformers import BatchFeature, Idefics3Processor

from .compat_qgsa import image_processor_options, tokenizer_options, uses_torchvision
from .images_qgsa import has_images, images_per_sample, load_images, to_rgb
from .layout_qgsa import VisualLayout
from .prompt_qgsa import Turns, find_question, read_chat_format, read_tile_markers
from .selection_qgsa import QGSASelection
from .tiles_qgsa import LazyImage, LazyTiles


DRAWN_FIELDS = ("kept_tokens", "kept_tiles", "grids", "image_sample")  # fields of a selection needed to draw it
KEPT, ENCODED, GRID = (255, 140, 0), (40, 120, 255), (255, 255, 255)


class MarkerIds(NamedTuple):
    """Token ids by which the layout of a prompt is read, as in [`QGSAConfig`]."""

    tokens_per_tile: int
    image_token_id: int
    global_image_token_id: int | list[int]
    tile_token_ids: list[int | list[int]]


class QGSAProcessor(Idefics3Processor):
    """Prepares prompts and images like [`Idefics3Processor`], and adds `question_mask`.

    Takes the same arguments. `question_mask` `(B, L)` int64 is 1 on the tokens that the selector reads: the last
    closed turn that is not the assistant's, or none if it is empty. Turns are those of the chat template.

    With `lazy_tiles=True` only the global views are turned into pixels at once; the inputs then carry `lazy_tiles`,
    from which the model cuts exactly the tiles that it looks at. What `open` returns may stand in place of an image,
    which is then not scaled again.

    Raises ValueError for an image with a side of less than 4 px, an aspect ratio over 200, more than 89 million
    pixels or more than 8 bits per channel; if the number of images in the prompts differs from the number given; and
    for videos and audio. Raises OSError for a file that cannot be read.
    """

    _auto_class = "AutoProcessor"  # type: ignore[assignment]

    @property
    def model_input_names(self) -> list[str]:
        return [*super().model_input_names, "question_mask"]

    def apply_chat_template(self, conversation, *args, **kwargs):
        """As stock. Raises ValueError for content other than text and images, which templates drop."""
        check_parts(conversation)
        return super().apply_chat_template(conversation, *args, **kwargs)

    def __call__(
        self, images: Any = None, text: str | list[str] | None = None, lazy_tiles: bool | None = None, **kwargs
    ):
        check_media(**{name: kwargs.pop(name, None) for name in ("videos", "audio", "audios")})
        options = {**kwargs, **(kwargs.get("images_kwargs") or {})}
        check_edges(options)
        rescale = options.get("do_rescale")
        images = load_images(images, self.image_processor.do_rescale if rescale is None else rescale)
        if has_opened(images):
            check_opened(text, lazy_tiles)
            lazy_tiles = True
        if text is not None:
            text = check_text(text)
            images = images if has_images(images) else None
        if images is None or text is None:
            return super().__call__(images=images, text=text, **kwargs)
        images = images_per_sample(images, [prompt.count(self.image_token) for prompt in text])
        prepare = self.prepare_lazily if lazy_tiles else self.prepare_all
        inputs = prepare(images, text, **kwargs)
        masks = self.mask_questions(inputs["input_ids"], inputs["attention_mask"])
        if isinstance(inputs["input_ids"], list):
            inputs["question_mask"] = [mask.tolist() for mask in masks]
        else:
            stacked = torch.stack(masks)
            inputs["question_mask"] = stacked if torch.is_tensor(inputs["input_ids"]) else stacked.numpy()
        return inputs

    def open(
        self, image: Any, size: dict[str, int] | None = None, do_image_splitting: bool | None = None
    ) -> LazyImage:
        """Scale an image once, for several questions: the processor takes the result in place of the image.

        Its inputs are then those of `lazy_tiles=True`, which an opened image implies.

        Args:
            image: PIL image, path, URL, array or tensor; an opened image is returned as it is.
            size: `{"longest_edge": px}`, that of the image processor by default.
            do_image_splitting: whether there are tiles in addition to the global view, as in the image processor by
                default.

        Raises what the processor raises for such an image, TypeError for several, and ValueError for an image that was
        opened already and is to be scaled otherwise.
        """
        cutting, image_processor = {"size": size, "do_image_splitting": do_image_splitting}, self.image_processor
        check_edges(cutting)
        tile = image_processor.max_image_size["longest_edge"]
        if isinstance(image, LazyImage):
            check_scaled(image, tile, uses_torchvision(image_processor), **cutting)
            return image
        if image is None or isinstance(image, list | tuple):
            raise TypeError(f"image ({type(image).__name__}) must be a single image")
        image = to_rgb(load_images(image, image_processor.do_rescale))
        split = image_processor.do_image_splitting if do_image_splitting is None else do_image_splitting
        edge = (size or image_processor.size)["longest_edge"]
        return LazyImage(image, image_processor, edge, split)

    def prepare_all(self, images, text, **kwargs) -> BatchFeature:
        """The stock processor's inputs. Raises ValueError if truncation cuts the prompt within an image."""
        try:
            return super().__call__(images=images, text=text, **kwargs)
        except TypeError as error:
            if kwargs.get("truncation"):
                raise ValueError(f"max_length {kwargs.get('max_length')} cuts the prompt within an image") from error
            raise

    def prepare_lazily(self, images, text, images_kwargs=None, text_kwargs=None, **kwargs) -> BatchFeature:
        """Inputs with the pixels of the global views only, and `lazy_tiles` that cut the other tiles on demand.

        Among the options of the image processor, `size` and `do_image_splitting` are supported; options of the
        tokenizer go there.

        Args:
            images: the images of each sample, a list of lists.
            text: one prompt per sample.

        Raises ValueError for any other option.
        """
        image_processor, images_kwargs = self.image_processor, dict(images_kwargs or {})
        known = image_processor_options(image_processor)
        for name in [name for name in kwargs if name in known and name != "return_tensors"]:
            images_kwargs[name] = kwargs.pop(name)
        cutting = {name: images_kwargs.pop(name, None) for name in ("size", "do_image_splitting")}
        if images_kwargs:
            raise ValueError(f"lazy_tiles supports size and do_image_splitting, not {', '.join(images_kwargs)}")
        options = {**kwargs, **(text_kwargs or {})}
        unknown = sorted(options.keys() - tokenizer_options())
        if unknown:
            raise ValueError(f"lazy_tiles: unknown options {', '.join(unknown)}. Those of `generate` go to the model")
        text = list(text)
        samples = [[self.open(image, **cutting) for image in sample] for sample in images]
        for number, sample in enumerate(samples):
            between = text[number].split(self.image_token)
            shown = [self.image_prompt(*image.grid) for image in sample]
            text[number] = between[0] + "".join(image + words for image, words in zip(shown, between[1:]))
        tiles = LazyTiles(samples, image_processor)
        inputs = self.tokenizer(text, **options)
        return BatchFeature({**inputs, "pixel_values": tiles.global_views(), "lazy_tiles": tiles})

    def image_prompt(self, rows: int, columns: int) -> str:
        """The placeholders of an image with `rows` x `columns` tiles; 0 x 0 is a single tile, its own global view."""
        tokens, lines = self.image_token * self.image_seq_len, ""
        for row in range(1, rows + 1):
            for column in range(1, columns + 1):
                lines += f"{self.fake_image_token}<row_{row}_col_{column}>{tokens}"
            lines += "\n"
        separator = "\n" if rows else ""
        return f"{lines}{separator}{self.fake_image_token}{self.global_image_tag}{tokens}{self.fake_image_token}"

    def mask_questions(self, input_ids, attention_mask) -> list[torch.Tensor]:
        """1 on the tokens of each sample's question, 0 elsewhere and without a question, `(L,)` int64 each.

        Args:
            input_ids, attention_mask: `(B, L)`, or one list per sample.
        """
        global_view, *tiles = read_tile_markers(self)
        markers = MarkerIds(self.image_seq_len, self.image_token_id, global_view, tiles)
        chat, masks = read_chat_format(self), []
        for ids, shown in zip(map(torch.as_tensor, input_ids), map(torch.as_tensor, attention_mask)):
            layout = VisualLayout.of(markers, ids[None])
            turns = Turns.of(chat, ids[None], shown[None].bool() & (layout.tile_of_position < 0))
            mask = find_question(turns, torch.ones_like(turns.text))[0]
            words = self.tokenizer.decode(ids[mask], skip_special_tokens=True).strip()
            masks.append(mask.long() if words.removeprefix(chat.user_header).strip() else torch.zeros_like(ids).long())
        return masks

    def draw_selection(self, image, selection: QGSASelection, index: int = 0) -> Image.Image:
        """Draw a selection: kept regions in colour, the rest grey, the tile grid on top.

        Encoded tiles are outlined in blue, their kept tokens in orange. Kept tokens of the global view cover the image
        coarsely; these regions keep their colour without an outline.

        Args:
            image: the image given to the processor (PIL image, path, URL or array, or what `open` made of them, which
                is drawn as it was scaled).
            selection: the result of `model.select`.
            index: number of the image in the batch, in prompt order.

        Returns an RGB image of the same size. Raises ValueError if `index` exceeds the selection's images or the image
        cannot be one of them, TypeError if an argument is not an image or a selection.
        """
        # Compared by name: the code of a checkpoint is a copy of this code.
        whole = type(selection).__name__ == "QGSASelection" and set(DRAWN_FIELDS) <= set(selection)
        if not whole:
            raise TypeError(f"selection ({type(selection).__name__}) must be the result of `model.select`")
        grids = selection["grids"]
        if not isinstance(index, int) or not 0 <= index < len(grids):
            raise ValueError(f"index ({index!r}) must be below the number of images in the selection ({len(grids)})")
        if image is None or isinstance(image, list | tuple):
            raise TypeError(f"image ({type(image).__name__}) must be the single image with that index")
        image = image.to_pil() if isinstance(image, LazyImage) else to_rgb(load_images(image))
        check_grid(*grids[index].tolist(), *image.size)
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
    """Raise ValueError if an image of this size would not be cut into such a grid, give or take a tile."""
    tall = height / width
    apart = rows - columns * tall if rows <= columns else columns - rows / tall
    if rows and abs(apart) >= 2:
        raise ValueError(
            f"the selection belongs to an image of {rows} x {columns} tiles, but this one has {width} x {height} px: "
            "is it a different image?"
        )


def check_edges(options: dict):
    """Raise ValueError unless each size among the image processor options gives a longest edge in px."""
    for name in ("size", "max_image_size"):
        size = options.get(name)
        edge = size.get("longest_edge") if isinstance(size, dict) else size
        if size is not None and (not isinstance(size, dict) or not isinstance(edge, int) or edge < 1):
            raise ValueError(f'{name} ({size!r}) must be {{"longest_edge": px}}')


def has_opened(images) -> bool:
    """Whether nested lists contain an image that was opened."""
    return any(map(has_opened, images)) if isinstance(images, list | tuple) else isinstance(images, LazyImage)


def check_opened(text, lazy_tiles):
    """Raise ValueError for opened images that are not to be cut on demand, or without a prompt."""
    if text is None:
        raise ValueError("text (None): images that were opened are prepared together with a prompt")
    if lazy_tiles is not None and not lazy_tiles:
        raise ValueError(f"lazy_tiles ({lazy_tiles}): images that were opened are cut on demand")


def check_scaled(image: LazyImage, tile: int, by_torchvision: bool, **cutting):
    """Raise ValueError if an opened image has tiles of another size in px, or is to be scaled otherwise."""
    for name, value in cutting.items():
        if value is not None:
            raise ValueError(f"{name} ({value}): the image was scaled when it was opened: give it to `open`")
    if image.tile != tile:
        raise ValueError(f"the image was opened for tiles of {image.tile} px, but those of this processor have {tile}")
    if image.by_torchvision != by_torchvision:
        names = [("PIL", "torchvision")[each] for each in (image.by_torchvision, by_torchvision)]
        raise ValueError(f"the image was opened, and scaled, by {names[0]}, but this processor scales by {names[1]}")


def check_media(**media):
    """Raise ValueError for media that are no images, naming the argument."""
    for name, given in media.items():
        if has_images(given):
            raise ValueError(
                f"{name} ({type(given).__name__}): only images and text are processed. Give the frames of a video as "
                "images"
            )


def check_parts(conversation):
    """Raise ValueError for parts of messages that are neither text nor an image, naming their type."""
    for message in conversation if isinstance(conversation, list | tuple) else []:
        if isinstance(message, list | tuple):
            check_parts(message)
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list | tuple) else []:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind not in (None, "text", "image"):
                raise ValueError(
                    f"type ({kind!r}) of a part of a message must be 'text' or 'image': give an image, or each frame "
                    "of a video, as a part of type 'image'"
                )


def check_text(text) -> list[str]:
    """The prompts as a list. Raises TypeError if they are not strings, ValueError if there are none."""
    prompts = [text] if isinstance(text, str) else text
    if not isinstance(prompts, list | tuple | np.ndarray) or not all(isinstance(each, str) for each in prompts):
        raise TypeError(f"text ({type(text).__name__}) must be a string or a list of strings")
    if not len(prompts):
        raise ValueError("text (an empty list) must hold at least one prompt")
    return list(prompts)


def kept_maps(selection: QGSASelection, index: int, tokens_per_tile: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The selection of one image as maps over it.

    Returns `(tiles, glance, encoded)`, all bool: the kept high-resolution tokens, `(rows * side, columns * side)`; the
    kept tokens of the global view on the same cells; and the encoded tiles, `(rows, columns)`. A single tile is its
    own global view.
    """
    kept_tokens, kept_tiles, grids, image_sample = (selection[name] for name in DRAWN_FIELDS)
    side, sample = round(tokens_per_tile**0.5), int(image_sample[index])
    first_image = int((image_sample[:index] == sample).sum())
    tiles_per_image = grids[image_sample == sample].prod(1) + 1
    start = int(tiles_per_image[:first_image].sum())
    rows, columns = grids[index].tolist()
    count = rows * columns

    kept = kept_tokens[sample].view(-1, side, side)[start : start + count + 1].cpu().numpy()
    encoded = kept_tiles[sample, start : start + count].cpu().numpy().reshape(rows, columns)
    if count == 0:
        return np.zeros_like(kept[0]), kept[0], encoded
    tiles = kept[:-1].reshape(rows, columns, side, side).transpose(0, 2, 1, 3).reshape(rows * side, columns * side)
    return tiles, scale_to(kept[-1], (columns * side, rows * side)), encoded


def scale_to(cells: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Scale a bool map to `size` (width, height) by nearest neighbour."""
    return np.asarray(Image.fromarray(cells.astype(np.uint8)).resize(size, Image.Resampling.NEAREST)) > 0


def draw_cells(draw: ImageDraw.ImageDraw, cells: np.ndarray, size: tuple[int, int], colour, width: int):
    """Outline the True cells of a map that covers an image of `size` (width, height)."""
    rows, columns = cells.shape
    for row, column in np.argwhere(cells):
        x, y = size[0] * column // columns, size[1] * row // rows
        right, bottom = size[0] * (column + 1) // columns - 1, size[1] * (row + 1) // rows - 1
        draw.rectangle(
            (x, y, max(x, right), max(y, bottom)), outline=colour, width=width
        )  # a cell may be smaller than 1 px


__all__ = ["QGSAProcessor"]
