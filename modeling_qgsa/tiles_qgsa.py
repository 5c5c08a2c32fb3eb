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
from transformers.image_utils import SizeDict

from .compat_qgsa import torchvision_pixels, torchvision_resample, uses_torchvision


MAX_SIDE = 4096  # px; the largest side that the stock image processor scales to


class LazyImage:
    """An image scaled as by the stock image processor, in its backend, and cut one tile at a time.

    Args:
        image: PIL, RGB.
        image_processor: cuts `max_image_size["longest_edge"]` px wide and high tiles, and resizes with `resample`.
        longest_edge: target size of the longer side in px, `size["longest_edge"]` of the image processor.
        split: whether there are tiles in addition to the global view.
    """

    def __init__(self, image: Image.Image, image_processor, longest_edge: int, split: bool):
        self.tile = image_processor.max_image_size["longest_edge"]
        self.by_torchvision = uses_torchvision(image_processor)
        scale = scale_by_torchvision if self.by_torchvision else scale_by_pil
        # The scaled image, `(3, H, W)` uint8, and the whole of it, `(3, tile, tile)`.
        self.pixels, self.global_view = scale(image, image_processor, longest_edge, split)
        rows, columns = (side // self.tile for side in self.pixels.shape[1:])
        self.grid = (rows, columns) if split and max(rows, columns) > 1 else (0, 0)

    @cached_property
    def digest(self) -> str:
        """Identity of the image and of how it is cut."""
        found = hashlib.sha256(str((self.pixels.shape, self.tile, self.grid)).encode())
        for pixels in (self.pixels, self.global_view):
            found.update(np.ascontiguousarray(pixels.transpose(1, 2, 0)).data)  # as PIL has them in memory
        return found.hexdigest()

    @property
    def last(self) -> int:
        """Number of the global view, which comes after the tiles."""
        return math.prod(self.grid)

    def cut(self, number: int) -> np.ndarray:
        """Pixels of tile `number`, `(3, tile, tile)` uint8; tiles are numbered row by row, the global view last."""
        if number == self.last:
            return self.global_view
        row, column = divmod(number, self.grid[1])
        top, left = row * self.tile, column * self.tile
        return self.pixels[:, top : top + self.tile, left : left + self.tile]

    def to_pil(self) -> Image.Image:
        """The scaled image."""
        return Image.fromarray(np.ascontiguousarray(self.pixels.transpose(1, 2, 0)))


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
        if uses_torchvision(source):  # in one fused step, which rounds differently
            mean, std = tuple(source.image_mean), tuple(source.image_std)
            options = (source.do_rescale, source.rescale_factor, source.do_normalize, mean, std)
            floats = source.rescale_and_normalize(torch.from_numpy(np.ascontiguousarray(pixels)), *options)
            return floats.numpy().astype(np.float32, copy=False)
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
        return image.digest, number, scale, uses_torchvision(source)


def scale_by_pil(image: Image.Image, image_processor, longest_edge: int, split: bool) -> tuple[np.ndarray, np.ndarray]:
    """The scaled image and its global view, `(3, H, W)` and `(3, tile, tile)` uint8; arguments as of [`LazyImage`]."""
    tile, resample = image_processor.max_image_size["longest_edge"], image_processor.resample
    image = image.resize(scaled_size(*image.size, longest_edge), resample)
    if split:
        image = image.resize(size_in_tiles(*image.size, tile), resample)
    view = image if image.size == (tile, tile) else image.resize((tile, tile), resample)
    return np.asarray(image).transpose(2, 0, 1), np.asarray(view).transpose(2, 0, 1)


def scale_by_torchvision(
    image: Image.Image, image_processor, longest_edge: int, split: bool
) -> tuple[np.ndarray, np.ndarray]:
    """As `scale_by_pil`, by the methods of an image processor that uses torchvision."""
    tile, resample = image_processor.max_image_size["longest_edge"], torchvision_resample(image_processor)
    pixels = torchvision_pixels(image_processor, image)[None]
    pixels = image_processor.resize(pixels, SizeDict(longest_edge=longest_edge), resample)
    if split:
        pixels = image_processor.resize_for_vision_encoder(pixels, tile, resample)
    view = (
        pixels if pixels.shape[2:] == (tile, tile) else image_processor.resize(pixels, SizeDict(tile, tile), resample)
    )
    return pixels[0].numpy(), view[0].numpy()


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
