"""Prompts and images as arrays: tiles as the stock image processor cuts them, their layout, and the question.

Sizes in the docstrings of this folder: a prompt of L positions with I images and T tiles (global views included), P
visual tokens per tile, C = P cells of the glance, D the width of the text model. Images, tiles and tokens are always
in prompt order.
"""

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import Tokenizer


IMAGE, FAKE = "<image>", "<fake_token_around_image>"
MAX_SIDE = 4096  # px; the largest side that the stock image processor scales to
MIN_SIDE, MAX_ASPECT = 4, 200  # beyond them the short side is resized to nothing


def chat_prompt(question: str, images: int = 1) -> str:
    """The prompt of a question in SmolVLM's chat format; several turns, and other formats, are for the caller."""
    return f"<|im_start|>User:{IMAGE * images or ' '}{question}<end_of_utterance>\nAssistant:"


@dataclass(frozen=True)
class TiledImage:
    """An image scaled as by the stock image processor, and cut one tile at a time.

    Args:
        image: RGB, scaled to whole tiles.
        grid: rows and columns of its tiles; 0 x 0 for a single tile, which is its own global view.
        settings: `preprocessor_config.json`.
        encoded: features of whole tiles, `(P, D)` float32, by the number of the tile and the graph that encoded it.
    """

    image: Image.Image
    grid: tuple[int, int]
    settings: dict
    encoded: dict[tuple[int, Any], np.ndarray] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, image: Image.Image, settings: dict) -> "TiledImage":
        """Raises TypeError if it is not a PIL image, ValueError if it is too small or too narrow to be cut."""
        if not isinstance(image, Image.Image):
            raise TypeError(f"images ({type(image).__name__}) must hold PIL images")
        width, height = image.size
        if min(image.size) < MIN_SIDE or max(image.size) > MAX_ASPECT * min(image.size):
            raise ValueError(
                f"images ({width} x {height} px): each side must have at least {MIN_SIDE} px, and the longer one at "
                f"most {MAX_ASPECT} times the shorter"
            )
        tile, resample = settings["max_image_size"]["longest_edge"], settings["resample"]
        image = to_rgb(image).resize(scaled_size(width, height, settings["size"]["longest_edge"]), resample)
        if not settings["do_image_splitting"]:
            return cls(image, (0, 0), settings)
        image = image.resize(size_in_tiles(*image.size, tile), resample)
        columns, rows = (side // tile for side in image.size)
        return cls(image, (rows, columns) if max(rows, columns) > 1 else (0, 0), settings)

    def cut(self, number: int) -> np.ndarray:
        """Pixels of tile `number`, `(3, S, S)` float32; tiles are numbered row by row, the global view last."""
        settings, (rows, columns) = self.settings, self.grid
        tile = settings["max_image_size"]["longest_edge"]
        if number == rows * columns:
            view = self.image.resize((tile, tile), settings["resample"])
        else:
            left, top = tile * (number % columns), tile * (number // columns)
            view = self.image.crop((left, top, left + tile, top + tile))
        pixels = (np.asarray(view, np.float64) * settings["rescale_factor"]).astype(np.float32)
        mean, std = (np.array(settings[name], np.float32) for name in ("image_mean", "image_std"))
        return ((pixels - mean) / std).transpose(2, 0, 1)

    def placeholders(self, tokens: int) -> str:
        """The image in a prompt, with `tokens` placeholders per tile."""
        rows, columns = self.grid
        lines = "".join(
            "".join(f"{FAKE}<row_{row}_col_{column}>{IMAGE * tokens}" for column in range(1, columns + 1)) + "\n"
            for row in range(1, rows + 1)
        )
        separator = "\n" if rows else ""
        return f"{lines}{separator}{FAKE}<global-img>{IMAGE * tokens}{FAKE}"


def to_rgb(image: Image.Image) -> Image.Image:
    """The image in RGB; transparent pixels become white, as in the stock image processor."""
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255,) * 4), image)
    return image.convert("RGB")


def scaled_size(width: int, height: int, longest_edge: int) -> tuple[int, int]:
    """(width, height) of an image scaled to `longest_edge`, the shorter side even, as in the stock processor."""
    aspect = width / height
    if width >= height:
        width, height = longest_edge, int(longest_edge / aspect)
        height += height % 2
    else:
        width, height = int(longest_edge * aspect), longest_edge
        width += width % 2
    width, height = max(width, 1), max(height, 1)
    if max(width, height) > MAX_SIDE:
        aspect = width / height
        width, height = (MAX_SIDE, int(MAX_SIDE / aspect)) if width >= height else (int(MAX_SIDE * aspect), MAX_SIDE)
    return max(width, 1), max(height, 1)


def size_in_tiles(width: int, height: int, tile: int) -> tuple[int, int]:
    """(width, height) rounded up to whole tiles, the longer side first, as in the stock processor."""
    aspect = width / height
    if width >= height:
        width = math.ceil(width / tile) * tile
        height = math.ceil(int(width / aspect) / tile) * tile
    else:
        height = math.ceil(height / tile) * tile
        width = math.ceil(int(height * aspect) / tile) * tile
    return width, height


@dataclass(frozen=True)
class Prompt:
    """A prompt with its images.

    Args:
        input_ids: `(L,)` int64.
        images: the images.
        tile_image: `(T,)` int64, the image of each tile.
        tile_row, tile_column: `(T,)` int64, its place in the grid; -1 for a global view.
        token_positions: `(T, P)` int64, the positions of its visual tokens.
        tile_of_position: `(L,)` int64, the tile whose markers or tokens stand at each position; -1 for text.
    """

    input_ids: np.ndarray
    images: list[TiledImage]
    tile_image: np.ndarray
    tile_row: np.ndarray
    tile_column: np.ndarray
    token_positions: np.ndarray
    tile_of_position: np.ndarray

    @classmethod
    def of(cls, tokenizer: Tokenizer, text: str, images: list[TiledImage], tokens: int) -> "Prompt":
        """Raises ValueError if the text names another number of images.

        Args:
            text: with one `<image>` per image.
            tokens: P.
        """
        between = text.split(IMAGE)
        if len(between) - 1 != len(images):
            raise ValueError(f"prompt ({len(between) - 1} times {IMAGE}) must name each of the {len(images)} images")
        shown = [image.placeholders(tokens) for image in images]
        text = between[0] + "".join(image + words for image, words in zip(shown, between[1:]))
        ids = np.array(tokenizer.encode(text).ids, np.int64)
        places = [
            (number, row, column)
            for number, image in enumerate(images)
            for row, column in [*np.ndindex(image.grid), (-1, -1)]
        ]
        tile_image, tile_row, tile_column = np.array(places, np.int64).reshape(-1, 3).T
        positions = np.flatnonzero(ids == tokenizer.token_to_id(IMAGE)).reshape(-1, tokens)
        fakes = np.flatnonzero(ids == tokenizer.token_to_id(FAKE))
        tile_of_position = np.full(len(ids), -1)
        # A tile spans its markers and everything up to the next tile's; a global view ends with a marker of its own.
        begins = fakes[np.searchsorted(fakes, positions[:, 0]) - 1]
        for tile, start in enumerate(begins):
            end = positions[tile, -1] + 2 if tile_row[tile] < 0 else begins[tile + 1]
            tile_of_position[start:end] = tile
        return cls(ids, images, tile_image, tile_row, tile_column, positions, tile_of_position)

    @property
    def is_global(self) -> np.ndarray:
        """Whether each tile is a global view, `(T,)` bool."""
        return self.tile_row < 0

    @cached_property
    def parts(self) -> np.ndarray:
        """Rows and columns into which the image of each tile is cut, at least 1, `(T, 2)` int64."""
        return np.maximum(np.array([image.grid for image in self.images]).reshape(-1, 2), 1)[self.tile_image]

    @property
    def has_tiles(self) -> np.ndarray:
        """Whether the image of each tile is more than its global view, `(T,)` bool."""
        return self.parts.prod(1) > 1

    def place(self, tile: int) -> tuple[TiledImage, int]:
        """The image of a tile, and the number of the tile in it."""
        first = int(np.searchsorted(self.tile_image, self.tile_image[tile]))
        return self.images[self.tile_image[tile]], tile - first

    def pixel_blocks(self, tile: int, block: np.ndarray, size: int) -> np.ndarray:
        """Pixels of some blocks of a tile, `(n, 3, size, size)` float32; there is one block per visual token.

        Args:
            block: `(n,)` int64, the number of each in the tile, row by row.
        """
        image, number = self.place(tile)
        pixels, side = image.cut(number), round(self.token_positions.shape[1] ** 0.5)
        pixels = pixels[:, : side * size, : side * size]  # the rest lies beyond the last whole patch
        return pixels.reshape(3, side, size, side, size)[:, block // side, :, block % side]

    def keep(self, kept: np.ndarray, markers_stay: bool = False) -> np.ndarray:
        """Positions to keep, `(K,)` int64, given the visual tokens `kept` `(T, P)` bool.

        All text stays. The markers of a tile are dropped with its last token unless they stay; those of a global view
        close the image.
        """
        marked = np.append(kept.any(1) | self.is_global | markers_stay, True)  # the last one is for text, tile -1
        stays = marked[self.tile_of_position]
        stays[self.token_positions] = kept
        return np.flatnonzero(stays)


def patch_numbers(side: int, scale: int) -> np.ndarray:
    """Number, within its tile, of every patch of every block, `(side ** 2, scale ** 2)` int64.

    Args:
        side: blocks along a tile.
        scale: patches along a block.
    """
    grid = np.arange((side * scale) ** 2).reshape(side, scale, side, scale)
    return grid.swapaxes(1, 2).reshape(side**2, scale**2)


def find_sequence(ids: np.ndarray, sequence: list[int]) -> np.ndarray:
    """Positions where `sequence` begins in `ids` `(L,)`."""
    if not sequence or len(ids) < len(sequence):
        return np.zeros(0, np.int64)
    windows = np.lib.stride_tricks.sliding_window_view(ids, len(sequence))
    return np.flatnonzero((windows == sequence).all(1))


def covered_by(ids: np.ndarray, sequence: list[int]) -> np.ndarray:
    """The positions of `ids` `(L,)` that belong to a `sequence`, bool."""
    covered = np.zeros(len(ids), bool)
    covered[(find_sequence(ids, sequence)[:, None] + np.arange(len(sequence))).ravel()] = True
    return covered


def find_question(prompt: Prompt, config: dict) -> tuple[np.ndarray, int]:
    """The question, `(L,)` bool, and the position that predicts the first token of its answer.

    The question is the last closed turn that is not the assistant's and says something, or all text if no turn is
    closed; without words there is none.

    Args:
        config: ids of the markers of turns, see QGSAConfig.
    """
    ids, header = prompt.input_ids, config["assistant_token_ids"]
    length, is_text = len(ids), prompt.tile_of_position < 0
    end, place = config["end_of_utterance_token_id"], np.arange(len(ids))
    ends = np.flatnonzero(is_text & (ids == end))
    turn = np.searchsorted(ends, place)  # the number of the turn at each position, its closing token included
    starts = np.append(0, ends + 1)  # of each turn
    begins = find_sequence(ids, header)
    opens = np.isin(starts, begins) | np.isin(starts + 1, begins)  # perhaps after a token of white space
    is_answer = opens & (np.arange(len(starts)) > 0)
    template = [end, *header, config["text_config"]["bos_token_id"]]
    says = is_text & ~np.isin(ids, template) & ~is_answer[turn]
    closed = says & (turn < len(ends))
    texts = is_text & (ids != end)
    question = texts & (turn == turn[closed].max()) if closed.any() else texts & ~is_answer[turn]
    if not (question & says & ~covered_by(ids, config["user_token_ids"])).any():
        return np.zeros(length, bool), length - 1
    following = turn[question].max() + 1
    if following < len(starts) and is_answer[following]:
        space = not np.isin(starts[following], begins)
        return question, min(int(starts[following]) - 1 + len(header) + space, length - 1)
    return question, length - 1
