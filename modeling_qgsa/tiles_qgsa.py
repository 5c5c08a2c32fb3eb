"""Images whose tiles are cut on demand, with exactly the pixels of the stock image processor."""

import copy
import hashlib
import math
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from PIL import Image
from transformers.image_transforms import normalize, rescale


MAX_SIDE = 4096  # px; the largest side that the stock image processor scales to


class LazyImage:
    """An image scaled as by the stock image processor, and cut one tile at a time.

    Args:
        image: PIL, RGB.
        longest_edge: target size of the longer side in px, `size["longest_edge"]` of the image processor.
        tile: tile size in px, `max_image_size["longest_edge"]`.
        split: whether there are tiles in addition to the global view.
        resample: filter for all resizing.
    """

    def __init__(self, image: Image.Image, longest_edge: int, tile: int, split: bool, resample: int):
        self.resample, self.tile = resample, tile
        image = image.resize(scaled_size(*image.size, longest_edge), resample)
        if split:
            image = image.resize(size_in_tiles(*image.size, tile), resample)
        columns, rows = (side // tile for side in image.size)
        self.image = image
        self.grid = (rows, columns) if split and max(rows, columns) > 1 else (0, 0)

    @cached_property
    def digest(self) -> str:
        """Identity of the image and of how it is cut."""
        settings = str((self.image.size, self.tile, self.grid, self.resample))
        return hashlib.sha256(self.image.tobytes() + settings.encode()).hexdigest()

    @cached_property
    def global_view(self) -> Image.Image:
        """The whole image, `tile` px wide and high."""
        view, size = self.image, (self.tile, self.tile)
        return view if view.size == size else view.resize(size, self.resample)

    @property
    def last(self) -> int:
        """Number of the global view, which comes after the tiles."""
        return math.prod(self.grid)

    def cut(self, number: int) -> np.ndarray:
        """Pixels of tile `number`, `(3, tile, tile)` uint8; tiles are numbered row by row, the global view last."""
        columns = self.grid[1]
        if number == self.last:
            return np.asarray(self.global_view).transpose(2, 0, 1)
        left, top = self.tile * (number % columns), self.tile * (number // columns)
        return np.asarray(self.image.crop((left, top, left + self.tile, top + self.tile))).transpose(2, 0, 1)


class LazyTiles:
    """The tiles of a batch, turned into pixels only when the model asks for them.

    Args:
        samples: the images of each sample.
        image_processor: source of `rescale_factor`, `image_mean` and `image_std`.
    """

    def __init__(self, samples: list[list[LazyImage]], image_processor):
        self.image_processor = image_processor
        self.tiles = [[(image, number) for image in images for number in range(image.last + 1)] for images in samples]

    @classmethod
    def join(cls, parts: Sequence["LazyTiles"]) -> "LazyTiles":
        """The tiles of several batches as one batch."""
        whole = copy.copy(parts[0])
        whole.tiles = [tiles for part in parts for tiles in part.tiles]
        return whole

    @property
    def counts(self) -> list[int]:
        """Number of tiles per sample, global views included."""
        return [len(tiles) for tiles in self.tiles]

    def without_first(self, count: int) -> "LazyTiles":
        """The tiles of each sample after its first `count`."""
        rest = copy.copy(self)
        rest.tiles = [tiles[count:] for tiles in self.tiles]
        return rest

    def of_samples(self, samples: list[int]) -> "LazyTiles":
        """The tiles of some samples."""
        some = copy.copy(self)
        some.tiles = [self.tiles[sample] for sample in samples]
        return some

    def cut(self, samples: list[int], ordinals: list[int]) -> torch.Tensor:
        """Pixels of the tiles at `ordinals` within `samples`, `(n, 3, tile, tile)` float32."""
        views = [image.cut(number) for image, number in (self.tiles[s][o] for s, o in zip(samples, ordinals))]
        return torch.from_numpy(np.stack([self.to_floats(view) for view in views]))

    def global_views(self) -> torch.Tensor:
        """Pixels of the global views, `(B, images, 3, tile, tile)` float32; zeros for samples with fewer images."""
        places = [
            (s, o) for s, tiles in enumerate(self.tiles) for o, (image, n) in enumerate(tiles) if n == image.last
        ]
        counts = [sum(sample == s for sample, _ in places) for s in range(len(self.tiles))]
        return torch.nn.utils.rnn.pad_sequence(
            self.cut([s for s, _ in places], [o for _, o in places]).split(counts), batch_first=True
        )

    def to_floats(self, pixels: np.ndarray) -> np.ndarray:
        source = self.image_processor
        if source.do_rescale:
            pixels = rescale(pixels, source.rescale_factor, input_data_format="channels_first")
        if source.do_normalize:
            pixels = normalize(pixels, source.image_mean, source.image_std, input_data_format="channels_first")
        return pixels.astype(np.float32)

    def key(self, sample: int, ordinal: int) -> tuple:
        """Identity of a tile: its image, its number and the scale of its pixels."""
        image, number = self.tiles[sample][ordinal]
        source = self.image_processor
        scale = (source.do_rescale, source.rescale_factor, source.do_normalize, *source.image_mean, *source.image_std)
        return image.digest, number, scale


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
